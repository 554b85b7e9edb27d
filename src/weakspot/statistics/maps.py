"""Sums over sites of maps (N, H, W): products at every shift, standardization, ranks, neighbors."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-9


def products_over_shifts(fixed: Tensor, shifted: Tensor) -> Tensor:
    """sum_i fixed_i * shifted_(i - s) for every circular shift s: (N, H, W) each, and so is the result.

    One Fourier transform each instead of H * W sums (the cross-correlation theorem); float64.

    >>> products_over_shifts(torch.tensor([[[1.0, 3.0, 2.0]]]), torch.tensor([[[1.0, 0.0, 0.0]]])).round()
    tensor([[[1., 3., 2.]]], dtype=torch.float64)
    """
    spectra = torch.fft.rfft2(fixed.double()) * torch.fft.rfft2(shifted.double()).conj()
    products: Tensor = torch.fft.irfft2(spectra, s=fixed.shape[-2:])
    return products


def standardized(maps: Tensor) -> Tensor:
    """(N, H, W) less their mean over their deviation, float64; a constant map has none and becomes NaN."""
    maps = maps.double()
    centred = maps - maps.mean((1, 2), keepdim=True)
    spread = centred.square().mean((1, 2), keepdim=True).sqrt()
    return centred / torch.where(spread > ROUNDING * maps.abs().amax((1, 2), keepdim=True), spread, torch.nan)


def ranks(maps: Tensor) -> Tensor:
    """(N, H, W) ranks of the sites of each map, ties sharing their mean rank."""
    import pandas as pd

    ranked = pd.DataFrame(maps.flatten(1).T.cpu().numpy()).rank().to_numpy().T
    return torch.from_numpy(ranked.copy()).to(maps.device).view_as(maps)


def queen_lag(maps: Tensor) -> Tensor:
    """(N, H, W) mean of each site's neighbours, diagonal ones included; at the border of those there are."""
    kernel = torch.ones(1, 1, 3, 3, dtype=torch.float64, device=maps.device)
    kernel[..., 1, 1] = 0
    sums, counts = (
        torch.nn.functional.conv2d(tensor[:, None], kernel, padding=1)[:, 0]
        for tensor in (maps.double(), torch.ones_like(maps[:1], dtype=torch.float64))
    )
    return sums / counts.clamp(min=1)
