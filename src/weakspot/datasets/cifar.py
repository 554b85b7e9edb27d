"""CIFAR-10 and CIFAR-100 in the binary format of their authors: labels and pixels, byte by byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from weakspot.datasets.labeled import LabeledImages, from_tensors

PIXELS = 3 * 32 * 32
FILES = {
    "train": ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "train"),
    "test": ("test_batch", "test"),
}
CIFAR100_FILES = {"train", "test"}
NAMES = ("batches.meta.txt", "fine_label_names.txt")
PICKLES = ("data_batch_1", "test_batch", "batches.meta")  # the Python version of CIFAR-10


def has_cifar(folder: Path) -> bool:
    """Whether the folder holds a file of CIFAR-10 or CIFAR-100, in the binary or the Python version."""
    return any(_files(folder, split) for split in FILES) or any((folder / name).is_file() for name in PICKLES)


def read_cifar_folder(folder: Path, split: str) -> LabeledImages:
    """Read the images and (fine) labels of a split into memory, from as many of its files as exist.

    Raises:
        FileNotFoundError: if none of the files exists.
        ValueError: if a file is damaged.
    """
    files = _files(folder, split)
    if not files:
        if any((folder / name).is_file() for name in PICKLES):
            raise ValueError(
                f"{folder} must hold the binary version of CIFAR, got Python's pickles, which could run code (get the "
                "binary version, or pass the tensors of torchvision.datasets to from_tensors)"
            )
        raise FileNotFoundError(f"{folder} must hold {' or '.join(f'{name}.bin' for name in FILES[split])}")
    images, labels = zip(*(_read(path) for path in files), strict=True)
    try:
        return from_tensors(
            torch.cat(images), torch.cat(labels), class_names=_names(folder), name=f"{folder.name} {split}"
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _files(folder: Path, split: str) -> list[Path]:
    paths = [folder / f"{name}.bin" for name in FILES[split]]
    # Other files may be called train.bin and test.bin, too: those of CIFAR-100 hold at least one image.
    least = {path: PIXELS if path.stem in CIFAR100_FILES else 0 for path in paths}
    return [path for path in paths if path.is_file() and path.stat().st_size >= least[path]]


def _read(path: Path) -> tuple[Tensor, Tensor]:
    content = np.fromfile(path, np.uint8)
    is_cifar100 = path.stem in CIFAR100_FILES
    head = 2 if is_cifar100 else 1  # CIFAR-100 has a coarse label before the fine one
    if not len(content) or len(content) % (head + PIXELS):
        raise ValueError(
            f"{path} is damaged: its size must be a multiple of {head + PIXELS}, got {len(content)} bytes"
        )
    rows = torch.from_numpy(content).view(-1, head + PIXELS)
    labels = rows[:, head - 1].long()
    classes = 100 if is_cifar100 else 10
    if int(labels.max()) >= classes:
        raise ValueError(
            f"{path} is damaged: labels must be between 0 and {classes - 1}, got {int(labels.max())}"
        )
    return rows[:, head:].reshape(-1, 3, 32, 32), labels


def _names(folder: Path) -> list[str] | None:
    path = next((folder / name for name in NAMES if (folder / name).is_file()), None)
    try:
        return None if path is None else path.read_text("utf-8").split()
    except UnicodeDecodeError:
        raise ValueError(f"{path} must hold class names in UTF-8") from None
