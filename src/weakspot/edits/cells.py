"""Groups: cells or superpixels of an image, as windows that edits can be made in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weakspot.edits.local import Edits

ACROSS = 14  # windows of superpixels are as many steps of this share of the image as they need


@dataclass(frozen=True)
class Windowed:
    """Groups whose windows are of one size.

    Attributes:
        numbers: (G,) of the groups.
        tops: (G,) row of each window's first pixel.
        lefts: (G,) column likewise.
        inside: bool (G, 1, h, w), the group's own pixels in its window.
    """

    numbers: Tensor
    tops: Tensor
    lefts: Tensor
    inside: Tensor


def cells(height: int, width: int, cell: int) -> Tensor:
    """(H, W) numbers of square cells in reading order; those at the far borders may be smaller.

    >>> cells(2, 5, 2)
    tensor([[0, 0, 1, 1, 2],
            [0, 0, 1, 1, 2]])
    """
    along = -(-width // cell)
    return (torch.arange(height) // cell)[:, None] * along + torch.arange(width) // cell


def grid(height: int, width: int, cell: int) -> tuple[int, int]:
    """How many rows and columns of cells there are."""
    return -(-height // cell), -(-width // cell)


def windowed(groups: Tensor, cell: int | None = None) -> list[Windowed]:
    """Windows around groups, in lots of one size.

    Args:
        groups: (H, W) numbers from 0; every group gets the smallest window of a lot that holds it.
        cell: side of the cells that the groups are, or None for superpixels.
    """
    height, width = groups.shape
    count = int(groups.max()) + 1
    steps = (cell, cell) if cell else (-(-height // ACROSS), -(-width // ACROSS))
    rows = torch.arange(height, device=groups.device)[:, None].expand_as(groups)
    columns = torch.arange(width, device=groups.device).expand_as(groups)
    tops, bottoms = _ends(groups, rows, count)
    lefts, rights = _ends(groups, columns, count)
    tall = _stepped(bottoms - tops + 1, steps[0], height)
    wide = _stepped(rights - lefts + 1, steps[1], width)
    there = torch.bincount(groups.flatten(), minlength=count) > 0
    lots = []
    for high, broad in torch.stack([tall, wide], 1)[there].unique(dim=0).tolist():
        numbers = ((tall == high) & (wide == broad) & there).nonzero()[:, 0]
        top, left = tops[numbers].clamp(max=height - high), lefts[numbers].clamp(max=width - broad)
        patches = groups.unfold(0, high, 1).unfold(1, broad, 1)[top, left]
        lots.append(Windowed(numbers, top, left, (patches == numbers[:, None, None])[:, None]))
    return lots


def _ends(groups: Tensor, places: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(count,) the first and the last place of each group."""
    flat = groups.flatten()
    first = torch.full((count,), int(places.max()), device=groups.device)
    first = first.scatter_reduce(0, flat, places.flatten(), "amin")
    last = torch.zeros_like(first).scatter_reduce(0, flat, places.flatten(), "amax")
    return first, last


def _stepped(lengths: Tensor, step: int, limit: int) -> Tensor:
    return (-(-lengths // step) * step).clamp(max=limit)


def exchanged(edits: Edits, other: Tensor, lots: Sequence[Windowed], chosen: Tensor | None = None) -> Tensor:
    """(G, K) logits of the one image of `edits` with each group, alone, taken from another image.

    Args:
        edits: of one image.
        other: (1, C, H, W) to take from.
        lots: the groups.
        chosen: (G,) bool, those to try; rows of others are NaN. All where not given.
    """
    image = edits.images
    count = int(max(int(lot.numbers.max()) for lot in lots)) + 1
    found: Tensor | None = None
    for lot in lots:
        mine = torch.ones_like(lot.numbers, dtype=torch.bool) if chosen is None else chosen[lot.numbers]
        if not bool(mine.any()):
            continue
        tops, lefts, inside = lot.tops[mine], lot.lefts[mine], lot.inside[mine]
        tall, wide = inside.shape[2:]
        patches = torch.where(
            inside, _cut(other, tops, lefts, tall, wide), _cut(image, tops, lefts, tall, wide)
        )
        logits = edits.logits(torch.zeros_like(tops), tops, lefts, patches)
        if found is None:
            found = torch.full((count, logits.shape[1]), torch.nan, device=logits.device, dtype=logits.dtype)
        found[lot.numbers[mine]] = logits
    if found is None:
        raise ValueError("chosen names no group; accepted is at least one")
    return found


def _cut(image: Tensor, tops: Tensor, lefts: Tensor, height: int, width: int) -> Tensor:
    """(M, C, height, width) windows of an image (1, C, H, W)."""
    views = image[0].unfold(1, height, 1).unfold(2, width, 1)
    return views[:, tops, lefts].transpose(0, 1)
