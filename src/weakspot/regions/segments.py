"""Segments: images cut into small pieces of one colour."""

from __future__ import annotations

import torch
from torch import Tensor

from weakspot.checks import check_batch, check_range


def superpixels(images: Tensor, *, count: int = 100) -> Tensor:
    """Cut each image into connected pieces of similar colour by SLIC (Achanta et al. 2012) as in scikit-image.

    `labels == number` is a region; the number of pieces of image n is `labels[n].max() + 1`.

    Args:
        images: (N, C, H, W) in [0, 1], of 1 or 3 channels.
        count: about how many pieces; 1 for the whole image in one, and never more than the image has pixels.

    Returns:
        Labels (N, 1, H, W), int64: each image uses every number from 0 up to one less than its pieces.

    Raises:
        ValueError: when images have other channels or count is under 1.

    >>> superpixels(torch.rand(1, 3, 2, 2), count=1)
    tensor([[[[0, 0],
              [0, 0]]]])
    """
    return torch.stack([_segmented(image, count) for image in _checked(images, count)])


def _checked(images: Tensor, count: int) -> Tensor:
    """The images without gradients in [0, 1], never changed in place."""
    check_batch(images)
    check_range(images)
    if images.shape[1] not in {1, 3}:
        raise ValueError(f"images have {images.shape[1]} channels; accepted are 1 and 3")
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"count is {count!r}; accepted is a whole number from 1")
    return images.detach().clamp(0, 1)


def _segmented(image: Tensor, count: int) -> Tensor:
    """Labels (1, H, W) of an image (C, H, W)."""
    from skimage.segmentation import slic

    # Three equal channels, so that compactness weighs grey as it weighs colour: by lightness.
    pixels = image.expand(3, -1, -1).permute(1, 2, 0).double().cpu().numpy()
    labels = slic(pixels, n_segments=count, start_label=0)
    return torch.from_numpy(labels)[None].to(image.device, torch.int64)
