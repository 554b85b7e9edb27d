"""Windows: the parts of feature maps that an edit changes, with the map of the unedited image around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

AxisOrder = Literal["maps", "sites", "rows"]
"""How a network sees a map at some step: (N, C, H, W), (N, H, W, C), or (N * H * W, C)."""


@dataclass(frozen=True)
class Windows:
    """The part of a map that each of M edits changes, all of one size.

    Attributes:
        values: (M, h, w, C) contiguous, whatever the order of axes.
        tops: (M,) row of each window's first site.
        lefts: (M,) column of each window's first site.
        order: of the axes in which the network sees the whole map.
    """

    values: Tensor
    tops: Tensor
    lefts: Tensor
    order: AxisOrder = "maps"

    @property
    def size(self) -> tuple[int, int]:
        return self.values.shape[1], self.values.shape[2]

    def select(self, rows: slice) -> Windows:
        return replace(self, values=self.values[rows], tops=self.tops[rows], lefts=self.lefts[rows])

    def seen(self) -> Tensor:
        """The values in the network's order of axes, as if the window were the whole map."""
        return as_seen(self.values, self.order)

    def changed(self, seen: Tensor) -> Windows:
        """The same windows with other values, given in the network's order of axes."""
        return replace(self, values=as_sites(seen, self.order, self.size))


@dataclass(frozen=True)
class Map:
    """A map of the unedited images.

    Attributes:
        sites: (N, H, W, C) contiguous.
        order: of the axes in which the network sees it.
        padded: copies with borders, by widths and value.
    """

    sites: Tensor
    order: AxisOrder = "maps"
    padded: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        return self.sites.shape[1], self.sites.shape[2]

    def with_border(self, widths: Sequence[int], value: float) -> Tensor:
        """(N, H', W', C) with (left, right, top, bottom) more sites of this value."""
        if not any(widths):
            return self.sites
        key = (*widths, value)
        if key not in self.padded:
            # The last axis comes first: channels get no border.
            self.padded[key] = F.pad(self.sites, (0, 0, *widths), value=value)
        return self.padded[key]


def as_seen(sites: Tensor, order: AxisOrder) -> Tensor:
    """(N, H, W, C) in the network's order of axes."""
    if order == "maps":
        count, height, width, channels = sites.shape
        if channels == 1:
            # For one channel with channels-last strides, torch 2.13's convolution on CPUs gives wrong numbers.
            return sites.reshape(count, channels, height, width)
        return sites.permute(0, 3, 1, 2)
    return sites if order == "sites" else sites.reshape(-1, sites.shape[3])


def as_sites(seen: Tensor, order: AxisOrder, size: tuple[int, int]) -> Tensor:
    """(N, H, W, C), contiguous, of a map of this height and width in the network's order of axes."""
    if order == "maps":
        return seen.permute(0, 2, 3, 1).contiguous()
    return seen.contiguous() if order == "sites" else seen.reshape(-1, *size, seen.shape[1]).contiguous()


def gathered(sites: Tensor, owners: Tensor, tops: Tensor, lefts: Tensor, size: tuple[int, int]) -> Tensor:
    """(M, height, width, C): the windows of this size at these places of the owners' maps (N, H, W, C)."""
    first = _number(sites, owners, tops, lefts)
    # As rows of channels, so that each copied piece is contiguous.
    rows = sites.view(-1, sites.shape[3]).index_select(0, _all_numbers(first, size, sites.shape[2]))
    return rows.view(-1, *size, sites.shape[3])


def paste(onto: Tensor, tops: Tensor, lefts: Tensor, values: Tensor) -> Tensor:
    """Write values (M, h, w, C) into (M, H, W, C), each at its place; returns the latter."""
    count, height, width, channels = values.shape
    owners = torch.arange(count, device=values.device)
    numbers = _all_numbers(_number(onto, owners, tops, lefts), (height, width), onto.shape[2])
    onto.view(-1, channels).index_copy_(0, numbers, values.reshape(-1, channels))
    return onto


def _number(maps: Tensor, owners: Tensor, tops: Tensor, lefts: Tensor) -> Tensor:
    """(M,) numbers of sites of the owners' maps (N, H, W, C), counted over all maps in reading order."""
    return (owners * maps.shape[1] + tops) * maps.shape[2] + lefts


def _all_numbers(first: Tensor, size: tuple[int, int], columns: int) -> Tensor:
    """(M * height * width,) numbers of all sites of windows, whose first sites have the numbers (M,)."""
    return (first[:, None] + _offsets(*size, columns, first.device)).view(-1)


@lru_cache(maxsize=512)
def _offsets(height: int, width: int, columns: int, device: torch.device) -> Tensor:
    """(height * width,) numbers of a window's sites less that of its first, in a map of so many columns."""
    down, along = torch.arange(height, device=device), torch.arange(width, device=device)
    return (down[:, None] * columns + along).view(-1)


def whole(windows: Windows, clean: Map, owners: Tensor) -> Tensor:
    """(M, H, W, C): the whole maps of the edited images."""
    return paste(clean.sites.index_select(0, owners), windows.tops, windows.lefts, windows.values)


def joined(
    several: Sequence[Windows], cleans: Sequence[Map], owners: Tensor, room: float
) -> list[Windows] | None:
    """The windows grown to common places and one size, or None if that takes more than `room` of the map.

    They grow over the unedited maps.
    """
    first = several[0]
    # Windows of one branch share their tensors of places, which is cheaper to see than equal values.
    if all(
        one.size == first.size and (one.tops is first.tops or torch.equal(one.tops, first.tops))
        and (one.lefts is first.lefts or torch.equal(one.lefts, first.lefts))
        for one in several[1:]
    ):  # fmt: skip
        return list(several)
    # Branches of a residual block reach windows of different sizes. The smallest that contains all serves them all.
    height, width = cleans[0].size
    tops, tall = _span([one.tops for one in several], [one.size[0] for one in several], height)
    lefts, wide = _span([one.lefts for one in several], [one.size[1] for one in several], width)
    if tall * wide > room * height * width:
        return None
    grown = []
    for one, clean in zip(several, cleans, strict=True):
        if one.size != (tall, wide) or not torch.equal(one.tops, tops) or not torch.equal(one.lefts, lefts):
            # What a branch did not reach is unedited there, so its clean map fills the rest exactly.
            around = gathered(clean.sites, owners, tops, lefts, (tall, wide))
            values = paste(around, one.tops - tops, one.lefts - lefts, one.values)
            grown.append(replace(one, values=values, tops=tops, lefts=lefts))
        else:
            grown.append(one)
    return grown


def _span(starts: Sequence[Tensor], lengths: Sequence[int], limit: int) -> tuple[Tensor, int]:
    """Starts (M,) and the one length of stretches within 0 to limit that contain all stretches, row by row."""
    start = torch.stack(list(starts)).amin(0)
    end = torch.stack([begin + length for begin, length in zip(starts, lengths, strict=True)]).amax(0)
    length = int((end - start).max())
    # Moved back inside where the longest would leave the map; it then contains its own stretch all the same.
    return start.clamp(max=limit - length), length
