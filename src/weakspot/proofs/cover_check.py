"""Whether the record of a certificate of pixels is consistent: its values, and the boxes that cover allowed colors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from weakspot.proofs.box_cover import TooManyPartsError, find_gap, overlap
from weakspot.proofs.certificate import (
    AS_RUN,
    ENUMERATED,
    METHODS,
    PROVEN,
    REFUTED,
    UNKNOWN,
    PixelCertificate,
)
from weakspot.proofs.color_splits import WHOLE
from weakspot.proofs.enumeration import levels_between


def record_problems(one: PixelCertificate, classes: int) -> Iterator[str]:
    """Values that no certificate has.

    Args:
        one: certificate, as read.
        classes: number of classes of its network.
    """
    boxes, region = one.boxes, one.region[:, 0]
    if bool(((one.labels < 0) | (one.labels >= classes)).any()):
        yield f"its labels are not classes between 0 and {classes - 1}"
    known = (one.status == PROVEN) | (one.status == REFUTED) | (one.status == UNKNOWN)
    if not bool(known.all()):
        yield "it has a status other than 1, 0 and -1"
    if bool((one.status[~region] != UNKNOWN).any()):
        outside = (~region & (one.status != UNKNOWN)).nonzero()[0]
        yield f"{pixel_name(one, outside)} is outside the region, but has a status"
    unexplained = region & (one.status == UNKNOWN) & ((one.reason < 0) | (one.reason >= len(one.reasons)))
    if bool(unexplained.any()):
        yield f"{pixel_name(one, unexplained.nonzero()[0])} is unknown without a reason"
    explained = (one.status != UNKNOWN) & (one.reason >= 0)
    if bool(explained.any()):
        yield f"{pixel_name(one, explained.nonzero()[0])} is not unknown, but has a reason for that"
    # Of a refuted pixel no bound is above zero, and an unknown one with such a bound would be proven.
    positive = (one.status != PROVEN) & ~(one.lower_bound <= 0)
    if bool(positive.any()):
        yield f"{pixel_name(one, positive.nonzero()[0])} is not proven, but has a lower bound above zero"
    refuted = (one.status == REFUTED).nonzero().tolist()
    named = (one.predicted >= 0).nonzero().tolist()
    if refuted != named:
        place = next(place for place in (*refuted, *named) if (place in refuted) != (place in named))
        yield f"the status of {pixel_name(one, torch.tensor(place))} does not fit its counterexamples"
    if len(boxes) and not bool(((boxes.pixels >= 0) & (boxes.pixels < torch.tensor(one.status.shape))).all()):
        # What follows looks up the pixels of the boxes.
        yield "it has boxes of pixels outside the images"
        return
    if not bool(((boxes.method >= 0) & (boxes.method < len(METHODS))).all()):
        yield "it has boxes with an unknown method"
    enumerated = boxes.method == ENUMERATED
    weak = ~proves(boxes.bound, boxes.method)
    if bool(weak.any()):
        yield f"{pixel_name(one, boxes.pixels[weak][0])} has a box with no bound above zero"
    if bool(enumerated.any()) and not (one.colors.eight_bit and one.statement == AS_RUN):
        yield "it has enumerated boxes, which prove 8-bit colors as run and nothing else"
    unproven = one.status[boxes.pixels.unbind(1)] != PROVEN
    if bool(unproven.any()):
        yield f"{pixel_name(one, boxes.pixels[unproven][0])} is not proven, but has boxes"


def proves(bounds: Tensor, methods: Tensor) -> Tensor:
    """(B,) bool, the bounds that prove their box: those above zero.

    Enumeration looks at the class itself, and the label wins a tie with a class of a higher number.
    """
    return (bounds > 0) | ((methods == ENUMERATED) & (bounds >= 0))


def box_problems(one: PixelCertificate) -> Iterator[str]:
    """Boxes that are no range of allowed colors of their pixel, or are enumerated with too many colors."""
    boxes = one.boxes
    image, row, column = boxes.pixels.unbind(1)
    low, high = (ends[image, :, row, column] for ends in one.colors.box(one.images.cpu()))
    inside = ((low <= boxes.low) & (boxes.low <= boxes.high) & (boxes.high <= high)).all(1)
    if not bool(inside.all()):
        pixel = pixel_name(one, boxes.pixels[~inside][0])
        yield f"{pixel} has a box that reaches beyond the allowed colors or ends before it begins"
        return
    if one.colors.eight_bit:
        first, last = levels_between(boxes.low, boxes.high)
        empty = (first > last).any(1)
        if bool(empty.any()):
            yield f"{pixel_name(one, boxes.pixels[empty][0])} has a box without an 8-bit color"
        # In float64, because 256 to the power of many channels exceeds every integer type.
        many = (boxes.method == ENUMERATED) & ((last - first + 1).double().prod(1) > WHOLE)
        if bool(many.any()):
            yield f"{pixel_name(one, boxes.pixels[many][0])} has an enumerated box of more than {WHOLE} colors"


def cover_problems(one: PixelCertificate) -> Iterator[str]:
    """Proven pixels whose boxes do not cover their allowed colors, overlap, or have other bounds than stated."""
    boxes = one.boxes
    lows, highs = one.colors.box(one.images.cpu())
    proven = (one.status == PROVEN).nonzero()
    _, height, width = one.status.shape
    sites = (boxes.pixels[:, 0] * height + boxes.pixels[:, 1]) * width + boxes.pixels[:, 2]
    # The numbers of the boxes, pixel by pixel: those of one pixel are a stretch of `order`.
    order = sites.argsort(stable=True)
    sizes = torch.bincount(sites, minlength=one.status.numel())
    ends = sizes.cumsum(0)
    for pixel in proven:
        image, row, column = pixel.tolist()
        site = (image * height + row) * width + column
        mine = order[int(ends[site] - sizes[site]) : int(ends[site])]
        corners = [
            lows[image, :, row, column],
            highs[image, :, row, column],
            boxes.low[mine],
            boxes.high[mine],
        ]
        problem = _cover_problem(corners, eight_bit=one.colors.eight_bit)
        if problem:
            yield f"{pixel_name(one, pixel)} is not proven: {problem}"
        elif not float(one.lower_bound[image, row, column]) <= float(boxes.bound[mine].min()):
            yield f"the lower bound of {pixel_name(one, pixel)} is higher than those of its boxes"


def _cover_problem(corners: list[Tensor], *, eight_bit: bool) -> str:
    """What is wrong with the boxes of one pixel: corners of its allowed colors (C,) and of the boxes (B, C)."""
    low, high, lows, highs = corners
    if not len(lows):
        return "it has no boxes"
    if eight_bit:
        # Between two levels there is no color: levels are intervals of length 1 that touch.
        first, last = levels_between(torch.cat([low[None], lows]), torch.cat([high[None], highs]))
        # Row 0 is the region itself, the others are its boxes.
        (low, *_), lows = first.double(), first[1:].double()
        (high, *_), highs = (last + 1).double(), (last[1:] + 1).double()
    region = low.numpy(), high.numpy()
    try:
        gap = find_gap(*region, lows.numpy(), highs.numpy())
    except TooManyPartsError as error:
        return str(error)
    if gap is not None:
        scale = 255 if eight_bit else 1
        middle = ", ".join(f"{(a + b) / 2 / scale:.4g}" for a, b in zip(*gap, strict=True))
        return f"no box covers its color ({middle})"
    return "its boxes overlap" if overlap(*region, lows.numpy(), highs.numpy()) else ""


def pixel_name(certificate: PixelCertificate, pixel: Tensor) -> str:
    """A pixel (image, row, column) in words."""
    image, row, column = pixel.tolist()
    names = certificate.names
    return (
        f"pixel row {row}, column {column} of {names[image] if image < len(names) else f'image {image + 1}'}"
    )
