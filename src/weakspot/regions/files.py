"""Files: regions that somebody painted."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from weakspot.checks import ImageWarning, check_batch, warn
from weakspot.images import open_pictures


class UnreadableError(ValueError):
    """The file is there but holds no picture that can be read."""


def from_file(path: Path | str, images: Tensor) -> Tensor:
    """The white part of a mask picture; transparency counts as black.

    A picture of another size is cropped at its centre to the images' shape and resized, as pictures are.

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
    mask, remark = _grey(path, None)
    if remark:
        warn(f"{path}: {remark}", ImageWarning)
    rows, columns = mask.shape
    if (rows, columns) != (height, width):
        if _is_cut((rows, columns), (height, width)):
            warn(
                f"{path}: the mask is {rows} x {columns} and the images are {height} x {width} (height x width), "
                "which is another shape; what lies outside its centred crop is not used",
                ImageWarning,
            )
        mask, _ = _grey(path, (height, width))
    region = mask[None, None] > 0.5
    if not bool(region.any()):
        raise ValueError(
            f"{path} has no white pixel where the model looks ({height} x {width}, cropped at the centre as "
            "pictures are), so nothing may change; white is where the attack acts"
        )
    return region.to(images.device)


def _grey(path: Path, size: tuple[int, int] | None) -> tuple[Tensor, str]:
    """The picture (H, W) and what is worth knowing of it."""
    (picture,) = open_pictures(path, size=size, channels=1, background="black")
    if picture.pixels is None:
        raise UnreadableError(f"{path}: {picture.remark.removesuffix('; skipped')}")
    return picture.pixels[0], picture.remark


def _is_cut(mask: tuple[int, int], images: tuple[int, int]) -> bool:
    """Whether the crop takes away as much as a pixel of the images on either side; less is rounding."""
    scale = min(mask[0] / images[0], mask[1] / images[1])
    return max(own / scale - side for own, side in zip(mask, images, strict=True)) >= 2
