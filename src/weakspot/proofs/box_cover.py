"""Whether boxes of colors cover all allowed colors: exact, whatever the boxes are."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
MOST_PARTS = 200_000  # regions looked at; boxes that come from splits need about two for each box
OVERLAP = 1e-9  # of the volume


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
