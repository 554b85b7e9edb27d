"""Fills: what stands where a region is blocked out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from weakspot.checks import check_batch, check_region, closest

RANK = 8  # of the truncated SVD
RADIUS = 3  # pixels of surroundings that inpainting looks at


def neutralize(images: Tensor, region: Tensor, *, fill: str = "mean") -> Tensor:
    """Block out a region (after Chattopadhyay et al. 2020, arXiv 2011.10794).

    Gradients pass through the fills "mean", "zero" and "blur" as they are; "inpaint" and "svd" hand on the gradient
    as if they left the image as it is (BPDA, Athalye et al. 2018, arXiv 1802.00420).

    Args:
        images: (N, C, H, W) in [0, 1].
        region: bool (N, 1, H, W), or (1, 1, H, W) for every image.
        fill: "mean" of the image's sites outside the region, channel by channel (of all, where it is the whole image);
            "zero", black; "blur", 3 x 3 means; "inpaint" from the surroundings (Telea 2004,
            doi 10.1080/10867651.2004.10487596); "svd", each channel's best approximation of rank 8.

    Returns:
        (N, C, H, W), outside the region the images' own bits.

    Raises:
        ValueError: when an argument does not fit, naming it.

    >>> region = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    >>> region[..., 0, 0] = True
    >>> neutralize(torch.tensor([[[[1.0, 0.5], [0.5, 0.5]]]]), region)[0, 0, 0, 0].item()
    0.5
    """
    check_batch(images)
    check_region(region, images)
    check_fill(fill)
    where = region.to(images.device).expand(len(images), -1, -1, -1)
    return torch.where(where, FILLS[fill](images, where), images)


def check_fill(fill: str) -> None:
    """Raises ValueError unless `fill` is the name of a fill."""
    if fill not in FILLS:
        raise ValueError(f"fill is {fill!r}; {closest(str(fill), FILLS)}")


def _mean(images: Tensor, region: Tensor) -> Tensor:
    whole = region.flatten(1).all(1).view(-1, 1, 1, 1)
    kept = (~region | whole).to(images.dtype)
    return ((images * kept).sum((2, 3), keepdim=True) / kept.sum((2, 3), keepdim=True)).expand_as(images)


def _zero(images: Tensor, region: Tensor) -> Tensor:
    del region
    return torch.zeros_like(images)


def _blur(images: Tensor, region: Tensor) -> Tensor:
    del region
    return F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)


def _inpaint(images: Tensor, region: Tensor) -> Tensor:
    import cv2

    levels = (images.detach().clamp(0, 1) * 255).round().byte().cpu().numpy()
    masks = region[:, 0].cpu().numpy().astype(np.uint8)
    filled = np.stack(
        [
            np.stack([cv2.inpaint(channel, mask, RADIUS, cv2.INPAINT_TELEA) for channel in image])
            for image, mask in zip(levels, masks, strict=True)
        ]
    )
    return _as_if_unchanged(images, torch.from_numpy(filled).to(images) / 255)


def _svd(images: Tensor, region: Tensor) -> Tensor:
    del region
    left, sizes, right = torch.linalg.svd(images.detach().float(), full_matrices=False)
    rank = min(RANK, sizes.shape[-1])
    low = (left[..., :rank] * sizes[..., None, :rank]) @ right[..., :rank, :]
    return _as_if_unchanged(images, low.clamp(0, 1).to(images))


def _as_if_unchanged(images: Tensor, filled: Tensor) -> Tensor:
    """The filled images, their gradient that of the images."""
    return images + (filled - images).detach()


FILLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "zero": _zero,
    "blur": _blur,
    "inpaint": _inpaint,
    "svd": _svd,
}
