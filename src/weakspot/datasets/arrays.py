"""Arrays in an .npz file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weakspot.datasets.labelled import Labelled, from_tensors

IMAGES = ("images", "x", "data")
LABELS = ("labels", "y")


def read_npz(path: Path, split: str) -> Labelled:
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
