"""Shares: the sites that score highest."""

from __future__ import annotations

import torch
from torch import Tensor

from weakspot.checks import check_share


def top(scores: Tensor, keep: float) -> Tensor:
    """The highest `keep` share of sites; ties go to the site that comes first in reading order.

    Args:
        scores: (N, 1, H, W), finite.
        keep: share of the image, 0 to 1.

    Returns:
        Bool (N, 1, H, W), exactly round(keep * H * W) sites true in each.

    Raises:
        ValueError: when scores have another shape or are not finite, or keep is no share.

    >>> top(torch.tensor([[[[3.0, 1.0], [2.0, 3.0]]]]), 0.5)
    tensor([[[[ True, False],
              [False,  True]]]])
    """
    check_share(keep)
    if scores.ndim != 4 or scores.shape[1] != 1:
        raise ValueError(f"scores has shape {tuple(scores.shape)}; accepted is (N, 1, H, W)")
    if not bool(scores.isfinite().all()):
        raise ValueError("scores holds NaN or infinity; accepted are finite numbers")
    flat = scores.flatten(1)
    chosen = flat.argsort(dim=1, descending=True, stable=True)[:, : round(keep * flat.shape[1])]
    region = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, chosen, value=True)
    return region.view_as(scores)
