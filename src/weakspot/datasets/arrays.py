"""Arrays in an .npz file.

Arrays: many images of one size in one .npz or .npy file, with or without labels.
"""

from __future__ import annotations

import zipfile
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

IMAGES = ("images", "x", "data")
LABELS = ("labels", "y")


def read_npz(path: Path, split: str) -> LabeledImages:
    """images and labels, or x_train, y_train, x_test, y_test, in memory; channels may come first or last.

    Arrays that name no split are those of training. No others than those of the split are read.

    Raises:
        FileNotFoundError: when the split is not there.
        ValueError: when the file is damaged or holds no such arrays.
    """
    try:
        file = np.load(path, allow_pickle=False)
    except Exception as error:  # noqa: BLE001 - damaged archives raise nearly anything
        raise _damaged(path, error) from None
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError(f"{path} is one array; accepted is an .npz file that holds images and labels")
    with file:
        keys = _keys(path, file.files, split)
        try:
            images, labels = (file[key] for key in keys)
        except Exception as error:  # noqa: BLE001 - likewise
            raise _damaged(path, error) from None
    try:
        return from_tensors(_pixels(images), _classes(labels), name=f"{path.stem} {split}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = str(error).partition("\n")[0]
    return ValueError(f"{path} cannot be read as an .npz file of arrays of numbers ({reason})")


def _keys(path: Path, held: list[str], split: str) -> list[str]:
    """What the images and the labels of the split are called in the file."""
    spelled = {key.lower(): key for key in held}
    found = []
    for names in (IMAGES, LABELS):
        of_split = [f"{name}_{split}" for name in names] + [f"{split}_{name}" for name in names]
        accepted = [*of_split, *(names if split == "train" else ())]
        key = next((spelled[name] for name in accepted if name in spelled), None)
        if key is None:
            there = ", ".join(held[:20]) or "nothing"
            if any(name in key.split("_") for key in spelled for name in names):
                raise FileNotFoundError(
                    f"{path}: there is no {accepted[0]} or {accepted[1]} in it, only {there}"
                )
            raise ValueError(f"{path} holds {there}; accepted are {names[0]} or {names[0]}_{split}")
        found.append(key)
    return found


def _pixels(images: NDArray[Any]) -> Tensor:
    if images.dtype.kind != "f" and images.dtype != np.uint8:
        raise ValueError(f"images are {_said(images)}; accepted are bytes (uint8) or floats in [0, 1]")
    if images.dtype.kind == "f" and images.dtype.itemsize > 8:
        images = images.astype(np.float64)  # torch knows no longer floats
    pixels = torch.from_numpy(np.ascontiguousarray(images, images.dtype.newbyteorder("=")))
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    if pixels.ndim == 4 and pixels.shape[1] not in {1, 3} and pixels.shape[3] in {1, 3}:
        pixels = pixels.permute(0, 3, 1, 2).contiguous()
    return pixels


def _classes(labels: NDArray[Any]) -> Tensor:
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise ValueError(
            f"labels are {labels.shape}, a column for every class; accepted is the number of its class for every "
            "image, labels.argmax(1) where they are one-hot"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels are {_said(labels)}; accepted are whole numbers")
    if labels.dtype.kind == "u" and labels.size and int(labels.max()) >= 2**63:
        raise ValueError(f"labels holds class {int(labels.max())}; accepted are whole numbers below 2**63")
    one_each = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    return torch.from_numpy(one_each.astype(np.int64))


def _said(array: NDArray[Any]) -> str:
    """What a person calls the type of its elements."""
    return {"U": "text", "S": "text", "O": "objects", "V": "records"}.get(array.dtype.kind, str(array.dtype))


ARRAYS = (".npz", ".npy")
IMAGE_KEYS = ("images", "x_test", "x", "data", "arr_0")
CLASSES = ("labels", "y_test", "y", "targets", "arr_1")
ACCEPTED = "uint8, or floats in [0, 1], of shape (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels"


def array_length(path: Path) -> int:
    """How many images it holds.

    Raises:
        ValueError: when it is no such array, naming the file.
    """
    return len(_images(path))


def array_labels(path: Path) -> NDArray[Any] | None:
    """(N,) the labels beside the images, or None where there are none.

    Raises:
        ValueError: when they do not fit the images.
    """
    stored = _opened(path)
    found = (
        None
        if not isinstance(stored, dict)
        else next((stored[key] for key in CLASSES if key in stored), None)
    )
    if found is None:
        return None
    labels: NDArray[Any] = np.asarray(found).squeeze()
    if labels.shape != (array_length(path),) or labels.dtype.kind not in "iu" or (labels < 0).any():
        raise ValueError(
            f"{path} has labels of shape {labels.shape} and type {labels.dtype}; accepted is one class number for each "
            f"of its {array_length(path)} images"
        )
    return labels


def array_image(
    path: Path, row: int, size: tuple[int, int], channels: int
) -> tuple[Tensor | None, bytes, str]:
    """One image (C, H, W) in [0, 1], or None; its bytes as they are stored; and why there is none.

    Raises:
        FileNotFoundError: when the file is no longer there.
        ValueError: when it is no such array any more.
        IndexError: when it has fewer images now.
    """
    stored = np.ascontiguousarray(_images(path)[row])
    content = stored.tobytes()
    pixels = torch.from_numpy(stored.astype(np.float32)) / (255 if stored.dtype == np.uint8 else 1)
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif pixels.shape[-1] in {1, 3} and pixels.shape[0] not in {1, 3}:
        pixels = pixels.permute(2, 0, 1).contiguous()
    if not bool(pixels.isfinite().all()) or float(pixels.min()) < 0 or float(pixels.max()) > 1:
        return None, content, "its values are not all within [0, 1]; skipped"
    if pixels.shape[0] != channels:
        pixels = luma(pixels[None])[0] if channels == 1 else pixels.expand(channels, -1, -1).contiguous()
    return _fitted(pixels, size), content, ""


def stored_image(path: Path, row: int) -> bytes:
    """The bytes of one image as they are stored; errors are those of `array_image`."""
    return np.ascontiguousarray(_images(path)[row]).tobytes()


def _fitted(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """The largest centered crop of the asked shape, resized with anti-aliasing."""
    if pixels.shape[1:] == size:
        return pixels
    scale = min(pixels.shape[1] / size[0], pixels.shape[2] / size[1])
    height, width = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
    cropped = pixels[None, :, top : top + height, left : left + width]
    return F.interpolate(cropped, size, mode="bilinear", antialias=True)[0].clamp(0, 1)


def _images(path: Path) -> NDArray[np.generic]:
    stored = _opened(path)
    if isinstance(stored, dict):
        images = next((stored[key] for key in IMAGE_KEYS if key in stored), None)
        if images is None:
            raise ValueError(
                f"{path} holds {', '.join(stored) or 'nothing'}; accepted is an array named images"
            )
    else:
        images = stored
    colored = images.ndim == 4 and (images.shape[1] in {1, 3} or images.shape[3] in {1, 3})
    if (
        not (images.ndim == 3 or colored)
        or images.dtype.kind not in "fu"
        or (images.dtype.kind == "u" and images.dtype != np.uint8)
    ):
        raise ValueError(
            f"{path} holds images of shape {images.shape} and type {images.dtype}; accepted are {ACCEPTED}"
        )
    return images


def _opened(path: Path) -> dict[str, NDArray[np.generic]] | NDArray[np.generic]:
    """A .npy file stays on the disk; a .npz archive is read whole, once for as long as the file stays as it is."""
    about = path.stat()
    return _loaded(path, (about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns))


@lru_cache(maxsize=2)
def _loaded(path: Path, state: tuple[int, ...]) -> dict[str, NDArray[np.generic]] | NDArray[np.generic]:
    del state  # part of the key alone
    try:
        if path.suffix.lower() == ".npy":
            stored: NDArray[np.generic] = np.load(path, mmap_mode="r", allow_pickle=False)
            return stored
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged or no array of numbers ({error})") from None
