"""Cells and superpixels of an image, as windows that edits are made in."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weakspot.edits.local import Edits

ACROSS = 14  # sides of windows around superpixels are multiples of this part of the image


@dataclass(frozen=True)
class Windowed:
    """Groups whose windows are of one size.

    Attributes:
        numbers: (G,) numbers of the groups.
        tops: (G,) row of each window's first pixel.
        lefts: (G,) column of each window's first pixel.
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
    """Windows around groups, in batches of one size.

    Args:
        groups: (H, W) numbers from 0; every group gets the smallest of a few sizes that contains it.
        cell: side of the cells, or None for superpixels.
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
    # Numbers may have gaps, as after a crop of superpixels.
    present = torch.bincount(groups.flatten(), minlength=count) > 0
    batches = []
    for high, broad in torch.stack([tall, wide], 1)[present].unique(dim=0).tolist():
        numbers = ((tall == high) & (wide == broad) & present).nonzero()[:, 0]
        # Windows at the far borders are moved inside the image.
        top, left = tops[numbers].clamp(max=height - high), lefts[numbers].clamp(max=width - broad)
        # (G, high, broad): the numbers of the groups in each window.
        patches = groups.unfold(0, high, 1).unfold(1, broad, 1)[top, left]
        batches.append(Windowed(numbers, top, left, (patches == numbers[:, None, None])[:, None]))
    return batches


def _ends(groups: Tensor, places: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(count,) the first and the last place of each group."""
    flat = groups.flatten()
    # Starting values that any place of a group replaces or equals.
    first = torch.full((count,), int(places.max()), device=groups.device)
    first = first.scatter_reduce(0, flat, places.flatten(), "amin")
    last = torch.zeros_like(first).scatter_reduce(0, flat, places.flatten(), "amax")
    return first, last


def _stepped(lengths: Tensor, step: int, limit: int) -> Tensor:
    return (-(-lengths // step) * step).clamp(max=limit)


def exchanged(
    edits: Edits, other: Tensor, batches: Sequence[Windowed], chosen: Tensor | None = None
) -> Tensor:
    """(G, K) logits of the one image of `edits` with each group, alone, taken from another image.

    Args:
        edits: of one image.
        other: (1, C, H, W) to take from.
        batches: the groups.
        chosen: (G,) bool, those to try, at least one; rows of others are NaN. All if None.
    """
    image = edits.images
    count = max(int(batch.numbers.max()) for batch in batches) + 1
    numbers, computed = [], []
    for batch in batches:
        wanted = torch.ones_like(batch.numbers, dtype=torch.bool) if chosen is None else chosen[batch.numbers]
        if not bool(wanted.any()):
            continue
        tops, lefts, inside = batch.tops[wanted], batch.lefts[wanted], batch.inside[wanted]
        tall, wide = inside.shape[2:]
        patches = torch.where(
            inside, _cut(other, tops, lefts, tall, wide), _cut(image, tops, lefts, tall, wide)
        )
        computed.append(edits.logits(torch.zeros_like(tops), tops, lefts, patches))
        numbers.append(batch.numbers[wanted])
    logits = torch.cat(computed)
    rows = logits.new_full((count, logits.shape[1]), torch.nan)
    rows[torch.cat(numbers)] = logits
    return rows


def _cut(image: Tensor, tops: Tensor, lefts: Tensor, height: int, width: int) -> Tensor:
    """(M, C, height, width) windows of an image (1, C, H, W)."""
    views = image[0].unfold(1, height, 1).unfold(2, width, 1)
    # Indexing leaves the channels first: (C, M, height, width).
    return views[:, tops, lefts].transpose(0, 1)
