"""Whether the record of a certificate of pixels is consistent: its values, and the boxes that cover allowed colors.

Whether boxes cover a region is decided exactly, whatever the boxes are.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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

Floats = NDArray[np.float64]
MOST_PARTS = 200_000  # regions looked at; boxes that come from splits need about two for each box
OVERLAP = 1e-9  # of the volume


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


class TooManyPartsError(ValueError):
    """The boxes are laid out so that checking them takes too long."""


def find_gap(low: Floats, high: Floats, lows: Floats, highs: Floats) -> tuple[Floats, Floats] | None:
    """A part of a region that no box covers, or None if the closed boxes cover it.

    The region is cut along edges of boxes until each part lies inside one box. Nothing is rounded: coordinates are only
    compared.

    Args:
        low: (C,) lower corner of the region.
        high: (C,) upper corner.
        lows: (B, C) lower corners of the boxes.
        highs: (B, C) upper corners.

    Returns:
        The corners (C,) of an uncovered part.

    Raises:
        TooManyPartsError: if that would take too long.

    >>> region = np.zeros(1), np.ones(1)
    >>> find_gap(*region, np.array([[0.0], [0.5]]), np.array([[0.5], [1.0]])) is None
    True
    >>> find_gap(*region, np.array([[0.0], [0.6]]), np.array([[0.5], [1.0]]))
    (array([0.5]), array([0.6]))
    """
    parts = [(low, high, lows, highs)]
    looked_at = 0
    while parts:
        low, high, lows, highs = parts.pop()
        looked_at += 1
        if looked_at > MOST_PARTS:
            raise TooManyPartsError("the boxes of a pixel are too many to be checked")
        if bool(((lows <= low) & (highs >= high)).all(1).any()):
            continue
        cut = _cut(low, high, lows, highs)
        # A box that reached into the part without an edge inside it would contain the whole part.
        if cut is None:
            return low, high
        channel, value = cut
        below, above = high.copy(), low.copy()
        below[channel] = above[channel] = value
        # Boxes that reach across the cut are looked at on both sides.
        left, right = lows[:, channel] < value, highs[:, channel] > value
        parts += [(low, below, lows[left], highs[left]), (above, high, lows[right], highs[right])]
    return None


def _cut(low: Floats, high: Floats, lows: Floats, highs: Floats) -> tuple[int, float] | None:
    """Channel and value of an edge inside the region that cuts few boxes; None if no edge is inside."""
    best: tuple[int, int, int, float] | None = None
    # Boxes that only touch the part cover nothing of it.
    overlapping = ((lows < high) & (highs > low)).all(1)
    lows, highs = lows[overlapping], highs[overlapping]
    for channel in range(len(low)):
        edges = np.unique(np.concatenate([lows[:, channel], highs[:, channel]]))
        edges = edges[(edges > low[channel]) & (edges < high[channel])]
        # The middle ones keep the two parts alike.
        for place in {len(edges) // 4, len(edges) // 2, 3 * len(edges) // 4} if len(edges) else ():
            value = float(edges[place])
            cut = int(((lows[:, channel] < value) & (highs[:, channel] > value)).sum())
            # Compared in this order: boxes cut, distance from the middle; the rest makes the choice unique.
            candidate = (cut, abs(2 * place - len(edges)), channel, value)
            best = candidate if best is None or candidate < best else best
    return None if best is None else best[2:]


def overlap(low: Floats, high: Floats, lows: Floats, highs: Floats) -> bool:
    """Whether boxes that cover a region overlap, or reach beyond it; faces may touch."""
    inside = bool((lows >= low).all() and (highs <= high).all())
    # In parts of the region's volume: boxes that cover it sum up to 1 if they only touch, else to more.
    volume = math.fsum(np.prod((highs - lows) / (high - low), axis=1).tolist())
    return not inside or volume > 1 + OVERLAP
