"""Frames: the outermost pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from weakspot.checks import check_batch


def border(images: Tensor, *, width: int) -> Tensor:
    """A frame along all four sides.

    Args:
        images: (N, C, H, W), of which only shape and device count.
        width: of the frame, in pixels; half the image's shorter side and more takes the whole image.

    Returns:
        Bool (N, 1, H, W), true in the frame.

    Raises:
        ValueError: when images are no such batch or the width is under 1.

    >>> border(torch.rand(1, 3, 3, 4), width=1).int()
    tensor([[[[1, 1, 1, 1],
              [1, 0, 0, 1],
              [1, 1, 1, 1]]]], dtype=torch.int32)
    """
    check_batch(images)
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"width is {width!r}; accepted is a whole number of pixels from 1")
    region = torch.ones_like(images[:, :1], dtype=torch.bool)
    region[:, :, width:-width, width:-width] = False
    return region
