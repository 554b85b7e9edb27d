"""Smoothing: Gaussian means of maps, borders mirrored, so that sums over a map are kept."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian(maps: Tensor, sigma: float, radius: int) -> Tensor:
    """Maps (N, M, H, W) under a separable Gaussian cut at `radius` pixels; the edge pixel itself is mirrored too."""
    offsets = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    for side in (3, 2):
        size = maps.shape[side]
        mirrored = maps.index_select(side, _mirrored(size, radius, maps.device))
        # Tap by tap: a convolution would lay out every window in memory first.
        smooth = torch.zeros_like(maps)
        for tap, weight in enumerate(kernel.tolist()):
            smooth += weight * mirrored.narrow(side, tap, size)
        maps = smooth
    return maps


def _mirrored(size: int, radius: int, device: torch.device) -> Tensor:
    places = torch.arange(-radius, size + radius, device=device) % (2 * size)
    return torch.minimum(places, 2 * size - 1 - places)
