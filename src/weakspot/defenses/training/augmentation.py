"""Augmentation: random crops and flips, of images and of their masks alike."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ROOM = 8  # a crop moves by up to a part of this of the side


class Moves:
    """A shift and a flip for each of some images.

    They are drawn from (seed, epoch) for all rows of the data at once, so an image moves alike in whatever batch and on
    whatever device it is.
    """

    def __init__(self, augment: str, count: int, size: tuple[int, int], seed: int, epoch: int) -> None:
        self.room = tuple(max(1, side // ROOM) if "crop" in augment else 0 for side in size)
        generator = torch.Generator().manual_seed(mixed_seed(seed, epoch, 1))
        self.shifts = torch.stack(
            [torch.randint(-room, room + 1, (count,), generator=generator) for room in self.room], 1
        )
        self.flips = torch.rand(count, generator=generator) < (0.5 if "flip" in augment else 0)
        self.still = augment == "none"

    def apply(self, rows: Tensor, pixels: Tensor, *, fill: float = 0) -> Tensor:
        """Images or masks (n, C, H, W) of these rows (n,) of the data, moved; what comes in from outside is `fill`."""
        if self.still:
            return pixels
        height, width = pixels.shape[2:]
        down, right = self.room
        padded = F.pad(pixels, (right, right, down, down), value=fill)
        shifts = self.shifts[rows]
        lines = shifts[:, :1] + down + torch.arange(height)
        places = torch.arange(width).expand(len(rows), -1)
        places = torch.where(self.flips[rows][:, None], width - 1 - places, places) + shifts[:, 1:] + right
        # One gather of sites: a quarter of what indexing by image, line and place takes.
        sites = (lines[:, :, None] * padded.shape[3] + places[:, None]).flatten(1).to(pixels.device)
        moved = padded.flatten(2).gather(2, sites[:, None].expand(-1, pixels.shape[1], -1))
        return moved.view(pixels.shape)


def mixed_seed(*parts: int) -> int:
    """One seed from several whole numbers; nearby ones give unrelated seeds.

    >>> mixed_seed(0, 1) != mixed_seed(1, 0)
    True
    """
    import hashlib

    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
