"""Masks that need no network: highest scores, frames, superpixels, painted pictures, and controls of equal area."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from weakspot._checks import (
    ImageWarning,
    check_batch,
    check_choice,
    check_count,
    check_fraction,
    check_range,
    check_seed,
    described,
    warn,
)
from weakspot._random import float32_noise
from weakspot.images import open_pictures

CONTROLS = ("shift", "random", "border")


def top(scores: Tensor, fraction: float) -> Tensor:
    """Return the sites with the highest scores; ties are broken in reading order.

    Args:
        scores: (N, 1, H, W), finite.
        fraction: fraction of the image, 0 to 1.

    Returns:
        Bool (N, 1, H, W), with exactly round(fraction * H * W) sites true in each image.

    Raises:
        ValueError: if scores have another shape or are not finite, or fraction is not in [0, 1].

    >>> top(torch.tensor([[[[3.0, 1.0], [2.0, 3.0]]]]), 0.5)
    tensor([[[[ True, False],
              [False,  True]]]])
    """
    check_fraction(fraction)
    if not isinstance(scores, Tensor) or scores.ndim != 4 or scores.shape[1] != 1:
        raise ValueError(f"scores must have shape (N, 1, H, W), got {described(scores)}")
    if not bool(scores.isfinite().all()):
        raise ValueError("scores must be finite, got NaN or infinity")
    flat = scores.flatten(1)
    # A stable sort breaks ties by position, which topk does not.
    chosen = flat.argsort(dim=1, descending=True, stable=True)[:, : round(fraction * flat.shape[1])]
    region = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, chosen, value=True)
    return region.view_as(scores)


def border(images: Tensor, *, width: int) -> Tensor:
    """Return a frame along all four sides.

    Args:
        images: (N, C, H, W), of which only shape and device matter.
        width: of the frame in pixels; half the shorter side or more covers the whole image.

    Returns:
        Bool (N, 1, H, W), true in the frame.

    Raises:
        ValueError: if images are not such a batch or the width is below 1.

    >>> border(torch.rand(1, 3, 3, 4), width=1).int()
    tensor([[[[1, 1, 1, 1],
              [1, 0, 0, 1],
              [1, 1, 1, 1]]]], dtype=torch.int32)
    """
    check_batch(images)
    check_count("width", width)
    region = torch.ones_like(images[:, :1], dtype=torch.bool)
    # An empty slice if twice the width reaches a side: then all is frame.
    region[:, :, width:-width, width:-width] = False
    return region


def superpixels(images: Tensor, *, count: int = 100) -> Tensor:
    """Cut each image into connected pieces of similar color by SLIC (Achanta et al. 2012) as in scikit-image.

    `labels == number` is a region; image n has `labels[n].max() + 1` pieces.

    Args:
        images: (N, C, H, W) in [0, 1], with 1 or 3 channels.
        count: the approximate number of pieces; 1 for the whole image, and never more than the image has pixels.

    Returns:
        Labels (N, 1, H, W), int64: each image uses every number from 0 to its number of pieces less one.

    Raises:
        ValueError: if images have other channels or count is below 1.

    >>> superpixels(torch.rand(1, 3, 2, 2), count=1)
    tensor([[[[0, 0],
              [0, 0]]]])
    """
    check_batch(images)
    check_range(images)
    if images.shape[1] not in {1, 3}:
        raise ValueError(f"images must have 1 or 3 channels, got {images.shape[1]}")
    check_count("count", count)
    return torch.stack([_superpixels_of_one(image, count) for image in images.detach().clamp(0, 1)])


def _superpixels_of_one(image: Tensor, count: int) -> Tensor:
    """Labels (1, H, W) of an image (C, H, W)."""
    from skimage.segmentation import slic

    # Three equal channels, so that compactness weighs gray like color: by lightness.
    pixels = image.expand(3, -1, -1).permute(1, 2, 0).double().cpu().numpy()
    labels = slic(pixels, n_segments=count, start_label=0)
    return torch.from_numpy(labels)[None].to(image.device, torch.int64)


class UnreadableError(ValueError):
    """The file exists but is not a picture that can be read."""


def from_file(path: Path | str, images: Tensor) -> Tensor:
    """Read the marked part of a mask picture.

    In a picture with transparent pixels, every opaque pixel is marked, whatever its color. In any other picture, the
    white part is.

    A picture of another size is cropped at its center to the images' aspect ratio and resized, like the pictures.

    Args:
        path: a picture file.
        images: (N, C, H, W), of which only size and device matter.

    Returns:
        Bool (1, 1, H, W), true where the picture is more opaque, or lighter, than half.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        UnreadableError: a ValueError, if `path` is not a picture that can be read.
        ValueError: if no pixel within the crop is marked, or images are not such a batch.

    Warns:
        ImageWarning: if the crop cuts off a part of the picture, because its aspect ratio is another one.
    """
    check_batch(images)
    path = Path(path)
    if path.is_dir():
        raise UnreadableError(f"{path} must be a picture, got a folder")
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
            f"{path} must have a mark where the model looks ({height} x {width}, cropped at the center like the "
            "pictures), got none (mark where the attack acts: white on black, or any color on a transparent ground)"
        )
    return region.to(images.device)


def _gray(path: Path, size: tuple[int, int] | None) -> tuple[Tensor, str]:
    """How white or, in a transparent picture, how opaque each pixel is (H, W), and a remark."""
    (picture,) = open_pictures(path, size=size, channels=1, marks=True)
    if picture.pixels is None:
        raise UnreadableError(f"{path}: {picture.remark.removesuffix('; skipped')}")
    return picture.pixels[0], picture.remark


def _is_cut(mask: tuple[int, int], images: tuple[int, int]) -> bool:
    """Whether the crop removes at least a pixel of the images on either side; less is rounding."""
    scale = min(mask[0] / images[0], mask[1] / images[1])
    return max(own / scale - side for own, side in zip(mask, images, strict=True)) >= 2


def matched(region: Tensor, *, kind: str = "shift", seed: int = 0, images: Tensor | None = None) -> Tensor:
    """Return a control region of exactly equal area.

    Args:
        region: bool (N, 1, H, W).
        kind: "shift" moves the region as a whole, wrapping around, by a random amount that is not zero; "random"
            scatters its sites; "border" takes the sites nearest to the image's border.
        seed: of "shift", of "random", and of the order among equally near sites of "border". Each image draws by `seed`
            and its own region, whatever else is in the batch.
        images: (N, C, H, W), by which each image draws instead, with the size of its region: equal regions are not
            moved equally, and regions that differ by rounding are.

    Returns:
        Bool (N, 1, H, W).

    Raises:
        ValueError: if the region is not such a mask or the kind is unknown.
    """
    mask = isinstance(region, Tensor) and region.dtype == torch.bool
    if not mask or region.ndim != 4 or region.shape[1] != 1:
        raise ValueError(f"region must be bool (N, 1, H, W), got {described(region)}")
    check_seed(seed)
    check_choice("kind", kind, CONTROLS)
    if not len(region):
        raise ValueError(f"region must hold at least one mask, got {tuple(region.shape)}")
    if images is not None:
        check_batch(images)
    if images is not None and len(images) != len(region):
        raise ValueError(f"images must be as many as regions ({len(region)}), got {len(images)}")
    contents = [b""] * len(region)
    if images is not None:
        raw = images.detach().cpu().contiguous().view(torch.uint8)
        contents = [image.numpy().tobytes() for image in raw]
    return torch.cat(
        [_control(mask, kind, seed, own) for mask, own in zip(region.split(1), contents, strict=True)]
    )


def _control(mask: Tensor, kind: str, seed: int, image: bytes) -> Tensor:
    content = image + str(int(mask.sum())).encode() if image else mask.cpu().numpy().tobytes()
    digest = hashlib.blake2b(content, digest_size=7, key=str(seed).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest))
    height, width = mask.shape[2:]
    if kind == "shift":
        if height * width == 1:
            return mask.clone()
        # One number for both axes, from 1 on: every shift but none at all is equally likely.
        move = int(torch.randint(1, height * width, (), generator=generator))
        return mask.roll((move // width, move % width), (2, 3))
    scores = float32_noise(generator, 1, 1, height, width)
    if kind == "border":
        rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
        inward = torch.minimum(
            torch.minimum(rows, height - 1 - rows), torch.minimum(columns, width - 1 - columns)
        )
        # Random numbers below one only order the sites at the same distance.
        scores = scores - inward
    # `top` turns the fraction back into exactly this number of sites.
    return top(scores.to(mask.device), int(mask.sum()) / (height * width))
