"""Smoothing: Gaussian means of maps, borders mirrored, so that sums over a map are kept."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def gaussian(maps: Tensor, sigma: float, radius: int) -> Tensor:
    """Maps (N, M, H, W) under a separable Gaussian cut at `radius` pixels; the edge pixel itself is mirrored too."""
    offsets = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    for side, turned in ((3, kernel), (2, kernel.transpose(2, 3))):
        mirrored = maps.index_select(side, _mirrored(maps.shape[side], radius, maps.device))
        rows = F.conv2d(mirrored.flatten(0, 1)[:, None], turned)
        maps = rows.view(*maps.shape)
    return maps


def _mirrored(size: int, radius: int, device: torch.device) -> Tensor:
    places = torch.arange(-radius, size + radius, device=device) % (2 * size)
    return torch.minimum(places, 2 * size - 1 - places)
