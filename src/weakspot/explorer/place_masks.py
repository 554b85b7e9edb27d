"""Masks that the bench can propose, and the place of equal area that a mask is compared with."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from weakspot import regions
from weakspot._checks import collected_warnings
from weakspot.budgets import read_budget
from weakspot.explorer.bench import Bench, Exhibit
from weakspot.explorer.messages import Message, Request, RequestError, mask_text
from weakspot.statistics.number_format import percent
from weakspot.vulnerability import smallest_square
from weakspot.vulnerability.square import needless

DEFAULT_FRACTION = 0.3
MOST_PIECES = 5000
MOST_SHARED = 0.25  # of its pixels that a mask may share with its control in a comparison


@dataclass(frozen=True)
class MaskKind:
    """A kind of mask.

    Attributes:
        make: (bench, image, request) -> bool (1, 1, H, W), and the text that `--region` takes for it, or None.
        summary: which part of the image it is.
    """

    make: Callable[[Bench, Exhibit, Request], tuple[Tensor, str | None]]
    summary: str


def _fraction(request: Request) -> float:
    return request.number("fraction", 0, 1, DEFAULT_FRACTION)


def _cam(bench: Bench, exhibit: Exhibit, request: Request) -> tuple[Tensor, str | None]:
    mask = regions.cam(bench.classifier, exhibit.pixels, exhibit.label_tensor, fraction=_fraction(request))
    return mask, "cam"


def _background(bench: Bench, exhibit: Exhibit, _: Request) -> tuple[Tensor, str | None]:
    classes = exhibit.label_tensor
    return regions.background(exhibit.pixels, model=bench.classifier, classes=classes), "background"


def _foreground(bench: Bench, exhibit: Exhibit, request: Request) -> tuple[Tensor, str | None]:
    return ~_background(bench, exhibit, request)[0], "~background"


def _superpixels(bench: Bench, exhibit: Exhibit, request: Request) -> tuple[Tensor, str | None]:
    count = request.whole("count", 1, MOST_PIECES, 100)
    mask = regions.important_superpixels(
        bench.classifier, exhibit.pixels, exhibit.label_tensor, fraction=_fraction(request), count=count
    )
    return mask, f"superpixels:{count}"


def _superpixel(bench: Bench, exhibit: Exhibit, request: Request) -> tuple[Tensor, str | None]:  # noqa: ARG001
    y, x = request.whole("y", 0, exhibit.size[0] - 1), request.whole("x", 0, exhibit.size[1] - 1)
    pieces = regions.superpixels(exhibit.pixels, count=request.whole("count", 1, MOST_PIECES, 100))
    return pieces == pieces[0, 0, y, x], None


def _border(bench: Bench, exhibit: Exhibit, request: Request) -> tuple[Tensor, str | None]:  # noqa: ARG001
    width = request.whole("count", 1, max(exhibit.size), 8)
    return regions.border(exhibit.pixels, width=width), f"border:{width}"


def _weakest(bench: Bench, exhibit: Exhibit, request: Request) -> tuple[Tensor, str | None]:
    budget = read_budget(request.text("budget", "linf:4/255"))
    predicted = int(exhibit.logits.argmax())
    if predicted != exhibit.label:
        class_name = bench.classifier.class_name
        raise RequestError(needless(class_name(exhibit.label), class_name(predicted)))
    square = smallest_square(bench.classifier, exhibit.pixels, exhibit.label_tensor, budget=budget)
    side, top, left = (int(values[0]) for values in (square.side, square.top, square.left))
    if not side:
        raise RequestError(f"no square was found in which {budget} is enough to leave the label")
    mask = torch.zeros_like(exhibit.pixels[:, :1], dtype=torch.bool)
    mask[..., top : top + side, left : left + side] = True
    return mask, None


MASKS = {
    "cam": MaskKind(_cam, "where the network finds most evidence for the label"),
    "background": MaskKind(_background, "outside the object"),
    "foreground": MaskKind(_foreground, "the object"),
    "superpixels": MaskKind(_superpixels, "pieces of similar color with most evidence for the label"),
    "superpixel": MaskKind(_superpixel, "the piece of similar color at a point"),
    "border": MaskKind(_border, "a frame"),
    "weakest": MaskKind(_weakest, "the smallest square that was found to be enough for a budget"),
}


def propose(bench: Bench, request: Request) -> Message:
    """A mask of a kind, with what it warns of."""
    exhibit = bench.exhibit(request.whole("image", 0, 10**6))
    kind = request.choice("kind", list(MASKS))
    with collected_warnings() as remarks:
        mask, region = MASKS[kind].make(bench, exhibit, request)
    mask = mask.cpu()
    if not bool(mask.any()):
        raise RequestError(f"the {kind} mask of this image is empty")
    return {
        "mask": mask_text(mask),
        "pixels": int(mask.sum()),
        "region": region,
        "remark": " ".join(remarks) or None,
    }


def control_of(mask: Tensor, seed: int) -> Tensor | None:
    """A place of exactly equal area: the mask, shifted as a whole around the image; None for the whole image.

    Of all shifts, one is drawn from those with the least overlap: part of one place is no other place.
    """
    if bool(mask.all()):
        return None
    mask = mask.cpu()
    return shifted(mask, pixels_met(mask, mask), seed)


def pixels_met(mask: Tensor, other: Tensor) -> Tensor:
    """(H, W) how many pixels of another mask a mask (1, 1, H, W) meets when it is shifted down and right by so much."""
    # The conjugate turns the convolution into a correlation. Counts are whole numbers, which the transform blurs.
    spectrum = torch.fft.rfft2(mask[0, 0].double()).conj()
    met: Tensor = torch.fft.irfft2(torch.fft.rfft2(other[0, 0].double()) * spectrum, s=mask.shape[2:])
    return met.round()


def shifted(mask: Tensor, costs: Tensor, seed: int) -> Tensor:
    """The mask after one of the shifts of least cost (H, W), drawn by the seed, wrapping around."""
    shifts = (costs == costs.min()).nonzero()
    drawn = torch.randint(len(shifts), (), generator=torch.Generator().manual_seed(seed))
    return mask.roll(shifts[drawn].tolist(), (2, 3))


def measure_area(bench: Bench, request: Request) -> Message:
    """How large a mask is, and its control; without a mask, that none is brushed."""
    exhibit = bench.exhibit(request.whole("image", 0, 10**6))
    mask = request.mask("mask", exhibit.size)
    bench.brushed = mask
    if mask is None:
        return {"pixels": 0, "control": None, "overlap": None, "remark": None}
    return describe(mask, control_of(mask, request.whole("seed", 0, 2**53, 0)))


def describe(mask: Tensor, control: Tensor | None) -> Message:
    """Area of a mask and of what it has in common with its control, and what follows from that."""
    pixels = int(mask.sum())
    overlap = None if control is None else int((mask & control.cpu()).sum())
    return {
        "pixels": pixels,
        "control": None if control is None else mask_text(control),
        "overlap": overlap,
        "remark": _remark(pixels, overlap),
    }


def _remark(pixels: int, overlap: int | None) -> str | None:
    if overlap is None:
        return "The mask is the whole image: there is no other place of equal area to compare it with."
    if overlap > MOST_SHARED * pixels:
        return (
            f"{percent(overlap / pixels)} of the control lies inside the mask, at the least: comparing the two places "
            "says little. A smaller mask leaves more room for another place."
        )
    return None
