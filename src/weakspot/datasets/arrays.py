"""Images and labels in one .npz or .npy file of arrays."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from weakspot.datasets.labeled import LabeledImages, from_tensors
from weakspot.similarity import luma

ARRAYS = (".npz", ".npy")
IMAGES = ("images", "x", "data", "arr_0")
LABELS = ("labels", "y", "targets", "arr_1")

Array = NDArray[Any]


def read_npz(path: Path, split: str) -> LabeledImages:
    """Read the images and labels of a split into memory.

    Args:
        path: of an .npz file with images and labels, or with x_train, y_train, x_test, y_test. Arrays whose names
            contain no split are the training split. Channels may come first or last.
        split: "train" or "test". Other arrays are not read.

    Raises:
        FileNotFoundError: if the file has no such split.
        ValueError: if the file is damaged or holds no images and labels.
    """
    keys = _keys(path)
    if not keys:
        raise ValueError(f"{path} must be an .npz file with images and labels, got one array")
    images, labels = (_read(path, _key_of_split(path, keys, names, split)) for names in (IMAGES, LABELS))
    try:
        return from_tensors(_pixels(images), _classes(labels), name=f"{path.stem} {split}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def array_length(path: Path) -> int:
    """Number of images in the file.

    Raises:
        ValueError: if the file holds no images.
    """
    return len(_images(path))


def array_labels(path: Path) -> NDArray[np.int64] | None:
    """Labels (N,) stored beside the images, or None.

    Raises:
        ValueError: if the labels do not fit the images.
    """
    key = _key(_keys(path), ("labels", "labels_test", "y_test", "y", "targets", "arr_1"))
    if key is None:
        return None
    count = array_length(path)
    try:
        labels: NDArray[np.int64] = _classes(_cached(path, key)).numpy()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if labels.shape != (count,) or (labels < 0).any():
        lowest = f" with a class of {labels.min()}" if labels.size and labels.min() < 0 else ""
        raise ValueError(
            f"{path} must have one class of at least 0 for each of its {count} images, got labels of shape "
            f"{labels.shape}{lowest}"
        )
    return labels


def array_image(
    path: Path, row: int, size: tuple[int, int], channels: int
) -> tuple[Tensor | None, bytes, str]:
    """One image of the file.

    Args:
        path: of the file. An .npy file stays on disk; the arrays of an .npz file are cached.
        row: of the image.
        size: (height, width) of the result: the largest centered crop of this shape, resized.
        channels: 1 or 3, of the result.

    Returns:
        The image (C, H, W) in [0, 1], or None; its stored bytes; if there is no image, the reason.

    Raises:
        FileNotFoundError: if the file does not exist any more.
        ValueError: if the file does not hold images any more.
        IndexError: if the file holds fewer images.
    """
    stored = np.ascontiguousarray(_images(path)[row])
    content = stored.tobytes()
    pixels = torch.from_numpy(stored.astype(np.float32)) / (255 if stored.dtype == np.uint8 else 1)
    pixels = pixels[None] if pixels.ndim == 2 else _channels_first(pixels).contiguous()
    if not bool(pixels.isfinite().all()) or float(pixels.min()) < 0 or float(pixels.max()) > 1:
        return None, content, "its values are not all within [0, 1]; skipped"
    if pixels.shape[0] != channels:
        pixels = luma(pixels[None])[0] if channels == 1 else pixels.expand(channels, -1, -1).contiguous()
    return _resized(pixels, size), content, ""


def stored_image(path: Path, row: int) -> bytes:
    """The stored bytes of one image; raises the errors of `array_image`."""
    return np.ascontiguousarray(_images(path)[row]).tobytes()


def _images(path: Path) -> Array:
    keys = _keys(path)
    key = _key(keys, ("images", "images_test", "x_test", "x", "data", "arr_0"))
    if keys and key is None:
        raise ValueError(f"{path} must hold an array named images, got {', '.join(keys[:20])}")
    images = _cached(path, key)
    has_channels = images.ndim == 4 and (images.shape[1] in {1, 3} or images.shape[3] in {1, 3})
    if not (images.ndim == 3 or has_channels) or not (images.dtype.kind == "f" or images.dtype == np.uint8):
        raise ValueError(
            f"{path} must hold images of shape (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels, uint8 or "
            f"floats in [0, 1], got shape {images.shape} of {_type(images)}"
        )
    return images


def _key(keys: list[str], names: tuple[str, ...]) -> str | None:
    """The first of the names that the file has, whatever its case."""
    by_lower = {key.lower(): key for key in keys}
    return next((by_lower[name] for name in names if name in by_lower), None)


def _key_of_split(path: Path, keys: list[str], names: tuple[str, ...], split: str) -> str:
    """The array of images or labels of a split."""
    # All but the last name, which numpy gives to arrays without a name.
    of_split = [form for name in names[:-1] for form in (f"{name}_{split}", f"{split}_{name}")]
    key = _key(keys, (*of_split, *(names if split == "train" else ())))
    if key is not None:
        return key
    listed = ", ".join(keys[:20]) or "nothing"
    plain = f"{names[0]} or " if split == "train" else ""
    message = f"{path} must hold {plain}{names[0]}_{split} (or {names[1]}_{split}), got {listed}"
    has_other_split = any(name in key.lower().split("_") for key in keys for name in names)
    raise FileNotFoundError(message) if has_other_split else ValueError(message)


def _keys(path: Path) -> list[str]:
    """Names of the arrays in an .npz file; empty for an .npy file."""
    stored = _open(path)
    if not isinstance(stored, np.lib.npyio.NpzFile):
        return []
    with stored:
        return list(stored.files)


def _read(path: Path, key: str | None) -> Array:
    """One array of an .npz file, or the array of an .npy file, which stays on disk."""
    stored = _open(path)
    if key is None:
        return np.asarray(stored)
    with stored:
        try:
            return np.asarray(stored[key])
        except Exception as error:  # noqa: BLE001 - damaged archives raise nearly anything
            raise _damaged(path, error) from None


def _open(path: Path) -> Any:
    try:
        # Only .npy files can be mapped; an .npz file is an archive.
        return np.load(path, mmap_mode="r" if path.suffix.lower() == ".npy" else None, allow_pickle=False)
    except FileNotFoundError:
        raise
    except Exception as error:  # noqa: BLE001 - damaged archives raise nearly anything
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = str(error).partition("\n")[0]
    return ValueError(f"{path} cannot be read as a file of arrays of numbers ({reason})")


def _cached(path: Path, key: str | None) -> Array:
    """`_read`, cached as long as the file does not change."""
    # A file that replaces another one of the same size has another inode or another time.
    about = path.stat()
    return _cached_state(path, key, (about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns))


@lru_cache(maxsize=4)
def _cached_state(path: Path, key: str | None, state: tuple[int, ...]) -> Array:
    del state  # only a part of the cache's key
    return _read(path, key)


def _pixels(images: Array) -> Tensor:
    """Images (N, C, H, W) of an array with or without channels, first or last."""
    if images.dtype.kind != "f" and images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 or floats in [0, 1], got {_type(images)}")
    if images.dtype.kind == "f" and images.dtype.itemsize > 8:
        images = images.astype(np.float64)  # torch has no longer floats
    # torch takes arrays in the byte order of the machine only.
    pixels = torch.from_numpy(np.ascontiguousarray(images, images.dtype.newbyteorder("=")))
    return pixels[:, None] if pixels.ndim == 3 else _channels_first(pixels).contiguous()


def _channels_first(pixels: Tensor) -> Tensor:
    """(..., H, W, C) as (..., C, H, W); channels are last if only the last axis can be 1 or 3 channels."""
    if pixels.ndim >= 3 and pixels.shape[-3] not in {1, 3} and pixels.shape[-1] in {1, 3}:
        return pixels.movedim(-1, -3)
    return pixels


def _classes(labels: Array) -> Tensor:
    """Classes (N,) of an array (N,) or (N, 1)."""
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise ValueError(
            f"labels must be one class for each image, got shape {labels.shape} with a column for every class (use "
            "labels.argmax(1) if they are one-hot)"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers, got {_type(labels)}")
    if labels.dtype.kind == "u" and labels.size and int(labels.max()) >= 2**63:
        raise ValueError(f"labels must be below 2**63, got {int(labels.max())}")
    flat = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    return torch.from_numpy(flat.astype(np.int64))


def _type(array: Array) -> str:
    """Name of the type of the array's elements."""
    return {"U": "text", "S": "text", "O": "objects", "V": "records"}.get(array.dtype.kind, str(array.dtype))


def _resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """The largest centered crop of the shape `size`, resized with anti-aliasing."""
    if pixels.shape[1:] == size:
        return pixels
    scale = min(pixels.shape[1] / size[0], pixels.shape[2] / size[1])
    height, width = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
    cropped = pixels[None, :, top : top + height, left : left + width]
    return F.interpolate(cropped, size, mode="bilinear", antialias=True)[0].clamp(0, 1)
