"""CIFAR-10 and CIFAR-100 as their authors ship them: binary files, or pickles of which only arrays are read."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weakspot.datasets.labelled import Labelled, from_tensors

PIXELS = 3 * 32 * 32
FILES = {
    "train": ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "train"),
    "test": ("test_batch", "test"),
}
META = ("batches.meta.txt", "fine_label_names.txt", "batches.meta", "meta")
ARRAYS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


def has_cifar(folder: Path) -> bool:
    """Whether any of the files of CIFAR-10 or CIFAR-100 lie there."""
    return any(_files(folder, split) for split in FILES)


def read_cifar_folder(folder: Path, split: str) -> Labelled:
    """The images and (fine) labels of a split, in memory; as many of its files as are there.

    Raises:
        FileNotFoundError: when none of them is there.
        ValueError: when one is damaged, or a pickle holds more than arrays.
    """
    files = _files(folder, split)
    if not files:
        raise FileNotFoundError(f"{folder}: there is no {' or '.join(FILES[split])}, with or without .bin")
    read = [_read_binary(path) if path.suffix == ".bin" else _read_pickle(path) for path in files]
    images = torch.cat([images for images, _ in read])
    labels = torch.cat([labels for _, labels in read])
    return from_tensors(images, labels, class_names=_names(folder), name=f"{folder.name} {split}")


def _files(folder: Path, split: str) -> list[Path]:
    names = [folder / f"{name}{suffix}" for suffix in (".bin", "") for name in FILES[split]]
    found = [path for path in names if path.is_file()]
    binary = [path for path in found if path.suffix == ".bin"]
    return binary or found


def _read_binary(path: Path) -> tuple[Tensor, Tensor]:
    content = np.fromfile(path, np.uint8)
    head = 2 if path.stem in {"train", "test"} else 1  # CIFAR-100 puts a coarse label before the fine one
    if not len(content) or len(content) % (head + PIXELS):
        raise ValueError(f"{path} is damaged: {len(content)} bytes are no multiple of {head + PIXELS}")
    rows = torch.from_numpy(content).view(-1, head + PIXELS)
    return rows[:, head:].reshape(-1, 3, 32, 32), rows[:, head - 1].long()


def _read_pickle(path: Path) -> tuple[Tensor, Tensor]:
    content = _unpickled(path)
    images = content.get(b"data", content.get("data"))
    labels = next(
        (content[key] for key in (b"labels", b"fine_labels", "labels", "fine_labels") if key in content), None
    )
    if not isinstance(images, np.ndarray) or images.ndim != 2 or images.shape[1] != PIXELS or labels is None:
        raise ValueError(f"{path} holds no data (N, {PIXELS}) with labels")
    return (
        torch.from_numpy(images.astype(np.uint8)).view(-1, 3, 32, 32),
        torch.tensor(np.asarray(labels), dtype=torch.int64),
    )


def _names(folder: Path) -> list[str] | None:
    path = next((folder / name for name in META if (folder / name).is_file()), None)
    if path is None:
        return None
    if path.suffix == ".txt":
        return path.read_text("utf-8").split()
    content = _unpickled(path)
    for key in ("fine_label_names", "label_names"):
        names = content.get(key.encode(), content.get(key))
        if names is not None:
            return [name.decode() if isinstance(name, bytes) else str(name) for name in names]
    return None


def _unpickled(path: Path) -> dict[Any, Any]:
    """The mapping in a pickle that holds numbers, text and arrays; anything else in it is refused, not run."""
    try:
        with path.open("rb") as file:
            content = _OnlyArrays(file, encoding="bytes").load()
    except Exception as error:  # noqa: BLE001 - damaged pickles raise nearly anything
        raise ValueError(f"{path} cannot be read as CIFAR's arrays ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; accepted is CIFAR's mapping of arrays")
    return content


class _OnlyArrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run code")
        return super().find_class(module, name)
