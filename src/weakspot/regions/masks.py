"""Shares: the sites that score highest.

Frames: the outermost pixels.

Segments: images cut into small pieces of one color.

Files: regions that somebody painted.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from weakspot._checks import ImageWarning, check_batch, check_fraction, check_range, warn
from weakspot.images import open_pictures


def top(scores: Tensor, fraction: float) -> Tensor:
    """The highest `fraction` share of sites; ties go to the site that comes first in reading order.

    Args:
        scores: (N, 1, H, W), finite.
        fraction: share of the image, 0 to 1.

    Returns:
        Bool (N, 1, H, W), exactly round(fraction * H * W) sites true in each.

    Raises:
        ValueError: when scores have another shape or are not finite, or fraction is not in [0, 1].

    >>> top(torch.tensor([[[[3.0, 1.0], [2.0, 3.0]]]]), 0.5)
    tensor([[[[ True, False],
              [False,  True]]]])
    """
    check_fraction(fraction)
    if scores.ndim != 4 or scores.shape[1] != 1:
        raise ValueError(f"scores has shape {tuple(scores.shape)}; accepted is (N, 1, H, W)")
    if not bool(scores.isfinite().all()):
        raise ValueError("scores holds NaN or infinity; accepted are finite numbers")
    flat = scores.flatten(1)
    chosen = flat.argsort(dim=1, descending=True, stable=True)[:, : round(fraction * flat.shape[1])]
    region = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, chosen, value=True)
    return region.view_as(scores)


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


def superpixels(images: Tensor, *, count: int = 100) -> Tensor:
    """Cut each image into connected pieces of similar color by SLIC (Achanta et al. 2012) as in scikit-image.

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

    # Three equal channels, so that compactness weighs gray as it weighs color: by lightness.
    pixels = image.expand(3, -1, -1).permute(1, 2, 0).double().cpu().numpy()
    labels = slic(pixels, n_segments=count, start_label=0)
    return torch.from_numpy(labels)[None].to(image.device, torch.int64)


class UnreadableError(ValueError):
    """The file is there but holds no picture that can be read."""


def from_file(path: Path | str, images: Tensor) -> Tensor:
    """The white part of a mask picture; transparency counts as black.

    A picture of another size is cropped at its center to the images' shape and resized, as pictures are.

    Args:
        path: a picture file.
        images: (N, C, H, W), of which only size and device count.

    Returns:
        Bool (1, 1, H, W), true where the picture is lighter than half.

    Raises:
        FileNotFoundError: when there is nothing at `path`.
        UnreadableError: a ValueError, when `path` is no picture that can be read.
        ValueError: when no pixel within the crop is white, or images are no such batch.

    Warns:
        ImageWarning: when the crop cuts off a part of the picture, because its shape differs from the images'.
    """
    check_batch(images)
    path = Path(path)
    if path.is_dir():
        raise UnreadableError(f"{path}: it is a folder; accepted is one picture")
    height, width = images.shape[2:]
    mask, remark = _gray(path, None)
    if remark:
        warn(f"{path}: {remark}", ImageWarning)
    rows, columns = mask.shape
    if (rows, columns) != (height, width):
        if _is_cut((rows, columns), (height, width)):
            warn(
                f"{path}: the mask is {rows} x {columns} and the images are {height} x {width} (height x width), "
                "which is another shape; what lies outside its centered crop is not used",
                ImageWarning,
            )
        mask, _ = _gray(path, (height, width))
    region = mask[None, None] > 0.5
    if not bool(region.any()):
        raise ValueError(
            f"{path} has no white pixel where the model looks ({height} x {width}, cropped at the center as "
            "pictures are), so nothing may change; white is where the attack acts"
        )
    return region.to(images.device)


def _gray(path: Path, size: tuple[int, int] | None) -> tuple[Tensor, str]:
    """The picture (H, W) and what is worth knowing of it."""
    (picture,) = open_pictures(path, size=size, channels=1, background="black")
    if picture.pixels is None:
        raise UnreadableError(f"{path}: {picture.remark.removesuffix('; skipped')}")
    return picture.pixels[0], picture.remark


def _is_cut(mask: tuple[int, int], images: tuple[int, int]) -> bool:
    """Whether the crop takes away as much as a pixel of the images on either side; less is rounding."""
    scale = min(mask[0] / images[0], mask[1] / images[1])
    return max(own / scale - side for own, side in zip(mask, images, strict=True)) >= 2
