"""Edits of a place by hand, and the decision then: another color, a map of such edits, an attack that is erased."""

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from weakspot.explorer.bench import Bench, Exhibit
from weakspot.explorer.messages import (
    Message,
    Request,
    RequestError,
    Send,
    finite,
    floats,
    mask_text,
    picture_text,
)
from weakspot.explorer.place_masks import pixels_met, shifted
from weakspot.explorer.worker import Worker
from weakspot.logits import margin
from weakspot.pairs import AttackResult
from weakspot.statistics.number_format import number, percent

LARGEST = 64  # pixels a side of a probed patch
GRID = 28  # patches a side of the heat map
AT_ONCE = 7  # patches of the heat map that a probe can undo
NEAR = 0.1  # the other place may hold so many more or fewer of the changed pixels, as a fraction


# ---------------------------------------------------------------- another color


def probe(bench: Bench, request: Request) -> Message:
    """The decision with one edit, by `LocalEdits`."""
    image = request.whole("image", 0, 10**6, 0)
    exhibit = bench.exhibit(image)
    color = request.color("color", int(exhibit.pixels.shape[1]))
    mask = request.mask("mask", exhibit.size)
    (top, left, tall, wide) = box = _box(exhibit, request) if mask is None else _box_of(mask)
    patch = exhibit.pixels[:, :, top : top + tall, left : left + wide]
    inside = torch.ones_like(patch[:, :1], dtype=torch.bool)
    if mask is not None:
        inside = mask[:, :, top : top + tall, left : left + wide].to(patch.device)
    # One rectangle is edited, in which only the pixels of the mask change.
    edited = torch.where(inside, color.to(patch), patch)
    place = torch.tensor([top]), torch.tensor([left])
    with torch.no_grad():
        logits = bench.edits(image).logits(*place, edited)[0]
    clean = exhibit.logits[0]
    return {
        **bench.judged(exhibit, logits),
        "change": finite(bench.margin(exhibit, logits) - bench.margin(exhibit, clean)),
        "changed": int(logits.argmax()) != int(clean.argmax()),
        "box": list(box),
    }


def _box(exhibit: Exhibit, request: Request) -> tuple[int, int, int, int]:
    """Top, left, height and width of a patch around a pixel, inside the image."""
    height, width = exhibit.size
    y, x = request.whole("y", 0, height - 1), request.whole("x", 0, width - 1)
    size = request.whole("size", 1, LARGEST, 1)
    tall, wide = min(size, height), min(size, width)
    top, left = (
        min(max(at - side // 2, 0), length - side)
        for at, side, length in ((y, tall, height), (x, wide, width))
    )
    return top, left, tall, wide


def _box_of(mask: Tensor) -> tuple[int, int, int, int]:
    """Top, left, height and width of the smallest box around a mask."""
    rows, columns = mask[0, 0].any(1).nonzero()[:, 0], mask[0, 0].any(0).nonzero()[:, 0]
    top, left = int(rows[0]), int(columns[0])
    return top, left, int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left


def heat_map(bench: Bench, request: Request, send: Send, worker: Worker) -> Generator[None]:
    """The margin under one edit at every place of a grid, row by row; a step of the generator is a part of a row.

    Raises:
        RequestError: if the request is not valid, at the first step.
    """
    image = request.whole("image", 0, 10**6, 0)
    exhibit = bench.exhibit(image)
    height, width = exhibit.size
    size = request.whole("size", 1, LARGEST, 1)
    if size > min(height, width):
        raise RequestError(f"size must be at most the image's {height} x {width} pixels, got {size}")
    grid = request.whole("grid", 2, 64, GRID)
    color = request.color("color", int(exhibit.pixels.shape[1])).to(exhibit.pixels)
    rows, columns = (_places(length, size, grid) for length in (height, width))
    clean = bench.margin(exhibit, exhibit.logits[0])
    lefts = columns - size // 2
    patches = color.expand(len(columns), -1, size, size)
    for place, top in enumerate((rows - size // 2).tolist()):
        parts = []
        for some in lefts.split(AT_ONCE):
            part = partial(bench.edits(image).logits, torch.full_like(some, top), some, patches[: len(some)])
            parts.append((yield from worker.unless_probed(part)))
            yield
        logits = torch.cat(parts)
        labels = exhibit.label_tensor.expand(len(logits))
        send(
            {
                "event": "rows",
                "row": place,
                "margins": floats(margin(logits, labels)[None]),
                "classes": floats(logits.argmax(1)[None].float()),
                "rows": len(rows),
                "columns": len(columns),
                "centers": {"y": rows.tolist(), "x": columns.tolist()},
                "clean": finite(clean),
            }
        )
    send({"event": "done"})


def _places(length: int, size: int, grid: int) -> Tensor:
    """Centers of at most `grid` patches, evenly from one border to the other."""
    last = length - size
    count = min(grid, last + 1)
    tops = torch.linspace(0, last, count).round().long() if count > 1 else torch.tensor([last // 2])
    return tops + size // 2


# ---------------------------------------------------------------- an attack that is erased


@dataclass(frozen=True, eq=False)
class Erased:
    """A pair without the perturbation of a place.

    Attributes:
        image: (1, C, H, W).
        pixels: changed pixels that were erased.
        margin: of the label.
        restored: whether the image is classified as the clean image is.
        predicted: its class, by name.
    """

    image: Tensor
    pixels: int
    margin: float
    restored: bool
    predicted: str


def undo_place(bench: Bench, request: Request) -> Message:
    """The decision without the perturbation of a brushed place, and without that of a comparable one."""
    exhibit = bench.attacked(request)
    pair = exhibit.attacked()
    mask = request.brushed("mask", exhibit.size)
    logits = bench.logits(pair.adversarial)[0]
    pixels = (pair.perturbation != 0).any(1, keepdim=True).cpu()
    own, erased_logits = _erase(bench, exhibit, pair, mask)
    place = comparable_place(mask, pixels, request.whole("seed", 0, 2**53, 0))
    other = None if place is None else _erase(bench, exhibit, pair, place)[0]
    before, clean = bench.margin(exhibit, logits), int(exhibit.logits.argmax())
    changed = int(logits.argmax()) != clean
    wrong = bench.classifier.class_name(clean) if clean != exhibit.label else None
    return {
        **bench.judged(exhibit, erased_logits),
        "png": picture_text(own.image[0]),
        "control": None
        if other is None or place is None
        else {"mask": mask_text(place), "margin": finite(other.margin)},
        "sentence": undo_sentence(own, other, before, int(pixels.sum()), changed=changed, wrong=wrong),
    }


def _erase(bench: Bench, exhibit: Exhibit, pair: AttackResult, mask: Tensor) -> tuple[Erased, Tensor]:
    """The pair with the clean pixels inside the mask, and its logits (K,)."""
    place = mask.to(pair.clean.device)
    image = torch.where(place, pair.clean, pair.adversarial)
    pixels = int(((pair.perturbation != 0).any(1, keepdim=True) & place).sum())
    logits = bench.logits(image)[0]
    predicted = int(logits.argmax())
    restored = predicted == int(exhibit.logits.argmax())
    name = bench.classifier.class_name(predicted)
    return Erased(image, pixels, bench.margin(exhibit, logits), restored, name), logits


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


def undo_sentence(
    own: Erased, other: Erased | None, before: float, total: int, *, changed: bool, wrong: str | None = None
) -> str:
    """What erasing a place did, beside a comparable place.

    Args:
        own: the brushed place.
        other: the place that it is compared with.
        before: margin of the whole perturbation.
        total: pixels that the perturbation changed.
        changed: whether the whole perturbation changes the decision.
        wrong: class of the clean image, if it is not the label.
    """
    if not own.pixels:
        return "The perturbation changes nothing in this place."
    clean = "" if wrong is None else f"The image is misclassified as {wrong} without an attack. "
    share = percent(own.pixels / total)
    start = f"{clean}Without the perturbation in this place, where {share} of the changed pixels are"
    what = f"{own.predicted}, margin {number(before)} to {number(own.margin)}"
    if not changed:
        return f"{start}: {what}. The perturbation does not change the decision, so that there is none to restore."
    end = "the decision is restored" if own.restored else "the decision is not restored"
    first = f"{start}, {end} ({what})."
    if other is None:
        return (
            f"{first} No place of its shape that lies outside it holds about as many changed pixels (within "
            f"{percent(NEAR)}), so that there is nothing to compare it with."
        )
    again = "is restored" if other.restored else "is not restored"
    second = (
        f"Without about as many changed pixels in another place, it {again} (margin {number(other.margin)})"
    )
    if own.restored and not other.restored:
        return f"{first} {second}; one other place is no test."
    return f"{first} {second}."
