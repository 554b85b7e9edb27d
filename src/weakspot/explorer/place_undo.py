"""Undo a place: erase the perturbation inside a mask, and in another place with as many changed pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weakspot.explorer.bench import Bench, Exhibit
from weakspot.explorer.messages import Message, Request, RequestError, finite, mask_text, picture_text
from weakspot.explorer.place_masks import pixels_met, shifted
from weakspot.pairs import AttackResult
from weakspot.statistics.number_format import number, percent

NEAR = 0.1  # the other place may hold so many more or fewer of the changed pixels, as a fraction


@dataclass(frozen=True, eq=False)
class Erased:
    """A pair without the perturbation of a place.

    Attributes:
        image: (1, C, H, W).
        pixels: changed pixels that were erased.
        margin: of the label.
        restored: whether the image is classified as its label.
        predicted: its class, by name.
    """

    image: Tensor
    pixels: int
    margin: float
    restored: bool
    predicted: str


def undo_place(bench: Bench, request: Request) -> Message:
    """The decision without the perturbation of a brushed place, and without that of a comparable one."""
    exhibit = bench.exhibit(request.whole("image", 0, 10**6, 0))
    side = request.choice("side", ("attack", "control"), "attack")
    pair = exhibit.pair if side == "attack" else exhibit.control
    if pair is None:
        raise RequestError("there is no perturbation yet (attack the image first)")
    mask = request.mask("mask", exhibit.size)
    if mask is None:
        raise RequestError("mask must be a picture of the brushed pixels, got nothing")
    logits = bench.logits(pair.adversarial)[0]
    changed = (pair.perturbation != 0).any(1, keepdim=True).cpu()
    own, erased_logits = _erase(bench, exhibit, pair, mask)
    place = comparable_place(mask, changed, request.whole("seed", 0, 2**53, 0))
    other = None if place is None else _erase(bench, exhibit, pair, place)[0]
    before = bench.margin(exhibit, logits)
    fooled = int(logits.argmax()) != exhibit.label
    return {
        **bench.judged(exhibit, erased_logits),
        "before": finite(before),
        "restored": own.restored and fooled,
        "pixels": own.pixels,
        "png": picture_text(own.image[0]),
        "control": None
        if other is None or place is None
        else {
            "mask": mask_text(place),
            "margin": finite(other.margin),
            "restored": other.restored and fooled,
            "pixels": other.pixels,
        },
        "sentence": undo_sentence(own, other, before, int(changed.sum()), fooled=fooled),
    }


def _erase(bench: Bench, exhibit: Exhibit, pair: AttackResult, mask: Tensor) -> tuple[Erased, Tensor]:
    """The pair with the clean pixels inside the mask, and its logits (K,)."""
    place = mask.to(pair.clean.device)
    image = torch.where(place, pair.clean, pair.adversarial)
    pixels = int(((pair.perturbation != 0).any(1, keepdim=True) & place).sum())
    logits = bench.logits(image)[0]
    predicted = int(logits.argmax())
    margin = bench.margin(exhibit, logits)
    name = bench.classifier.class_name(predicted)
    return Erased(image, pixels, margin, predicted == exhibit.label, name), logits


def comparable_place(mask: Tensor, changed: Tensor, seed: int) -> Tensor | None:
    """The mask moved as a whole, wrapping around, to where it meets about as many changed pixels and none of its own.

    All shifts are compared at once by Fourier transforms. Among those that fit equally well, the seed decides.

    Args:
        mask: bool (1, 1, H, W).
        changed: bool (1, 1, H, W), the pixels that a perturbation changed.
        seed: of the choice.

    Returns:
        Bool (1, 1, H, W), or None if there is no such place.
    """
    own = int((mask & changed).sum())
    if not own:
        return None
    met, shared = pixels_met(mask, changed), pixels_met(mask, mask)
    fits = (shared == 0) & ((met - own).abs() <= NEAR * own)
    if not bool(fits.any()):
        return None
    return shifted(mask, (met - own).abs().where(fits, torch.inf), seed)


def undo_sentence(own: Erased, other: Erased | None, before: float, total: int, *, fooled: bool) -> str:
    """What erasing a place did, beside a comparable place.

    Args:
        own: the brushed place.
        other: the place that it is compared with.
        before: margin of the whole perturbation.
        total: pixels that the perturbation changed.
        fooled: whether the whole perturbation fools the classifier.
    """
    if not own.pixels:
        return "The perturbation changes nothing in this place."
    start = f"Without the perturbation in this place, where {percent(own.pixels / total)} of the changed pixels are"
    what = f"{own.predicted}, margin {number(before)} to {number(own.margin)}"
    if not fooled:
        return f"{start}: {what}. The perturbation does not fool the network, so that there is no decision to restore."
    end = "the decision is restored" if own.restored else "the decision is not restored"
    first = f"{start}, {end} ({what})."
    if other is None:
        return f"{first} No other place holds as many changed pixels, so that there is nothing to compare it with."
    again = "is restored" if other.restored else "is not restored"
    second = f"Without as many changed pixels in another place, it {again} (margin {number(other.margin)})"
    if own.restored and not other.restored:
        return f"{first} {second}; one other place is no test."
    return f"{first} {second}."
