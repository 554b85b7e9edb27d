"""The files of MNIST (IDX) and of CIFAR (binary version), byte by byte, as their authors publish them.

IDX, also that of Fashion-MNIST, is a magic number, the shape, and bytes. CIFAR-10 and CIFAR-100 are labels and pixels.
"""

import gzip
import math
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from weakspot.datasets.labeled import LabeledImages, from_tensors

IDX_PARTS = {"train": "train", "test": "t10k"}
IDX_KINDS = {"images": "idx3", "labels": "idx1"}
MAX_AXES = 4
MAX_COMPRESSION = 1032  # the largest factor by which deflate compresses
BLOCK = 2**20  # bytes read at once
CIFAR_PIXELS = 3 * 32 * 32
CIFAR_FILES = {
    "train": ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "train"),
    "test": ("test_batch", "test"),
}
CIFAR100_FILES = {"train", "test"}
CIFAR_NAMES = ("batches.meta.txt", "fine_label_names.txt")
CIFAR_PICKLES = ("data_batch_1", "test_batch", "batches.meta")  # the Python version of CIFAR-10


def has_idx(folder: Path) -> bool:
    """Whether the folder holds the images of a split."""
    return any(_find_idx(folder, part, "images") is not None for part in IDX_PARTS.values())


def read_idx_folder(folder: Path, split: str) -> LabeledImages:
    """Read the images and labels of a split into memory.

    Raises:
        FileNotFoundError: if a file of the split does not exist.
        ValueError: if a file is damaged.
    """
    arrays = []
    for kind in IDX_KINDS:
        path = _find_idx(folder, IDX_PARTS[split], kind)
        if path is None:
            raise FileNotFoundError(
                f"{folder} must hold {_idx_names(IDX_PARTS[split], kind)[0]}, with or without .gz"
            )
        arrays.append(read_idx(path))
    images, labels = arrays
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{folder}: images must have shape (N, height, width) and labels (N,), got {tuple(images.shape)} and "
            f"{tuple(labels.shape)}"
        )
    try:
        return from_tensors(images[:, None], labels.long(), name=f"{folder.name} {split}")
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def read_idx(path: Path) -> Tensor:
    """Read the array of bytes (uint8) in an IDX file; not more is unpacked than its header announces.

    Raises:
        ValueError: if it is not an IDX file, or its length does not fit its header.
    """
    packed = path.suffix == ".gz"
    try:
        with path.open("rb") as file:
            if not packed:
                return _read_array(file, path, path.stat().st_size)
            with gzip.open(file) as unpacked:
                return _read_array(unpacked, path, path.stat().st_size * MAX_COMPRESSION)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path} cannot be read as {'a gzip' if packed else 'an IDX'} file ({error})"
        ) from None


def _read_array(file: IO[bytes] | gzip.GzipFile, path: Path, most: int) -> Tensor:
    start = file.read(4)
    if len(start) < 4 or start[:3] != b"\x00\x00\x08":
        raise ValueError(
            f"{path} must be an IDX file of bytes, which starts with 00 00 08, got {start[:3].hex(' ') or 'nothing'}"
        )
    count = start[3]
    if not 1 <= count <= MAX_AXES:
        raise ValueError(f"{path} is damaged: its header must announce 1 to {MAX_AXES} axes, got {count}")
    sides = file.read(4 * count)
    if len(sides) < 4 * count:
        raise ValueError(f"{path} is damaged: it ends within its header")
    shape = [int.from_bytes(sides[4 * axis : 4 * axis + 4]) for axis in range(count)]
    announced = math.prod(shape)
    if announced > most:
        raise ValueError(
            f"{path} is damaged: its header announces {shape}, {announced} bytes, but it can hold at most {most}"
        )
    body = bytearray()  # grows with the content: the header alone must not allocate memory
    # One byte more than announced is asked for: it shows that the file is too long.
    while len(body) <= announced and (block := file.read(min(BLOCK, announced + 1 - len(body)))):
        body += block
    if len(body) != announced:
        holds = f"{len(body)} bytes" if len(body) < announced else "more bytes"
        raise ValueError(f"{path} is damaged: its header announces {shape}, but it holds {holds}")
    if not announced:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(body, dtype=torch.uint8).reshape(shape)


def _find_idx(folder: Path, part: str, kind: str) -> Path | None:
    return next((folder / name for name in _idx_names(part, kind) if (folder / name).is_file()), None)


def _idx_names(part: str, kind: str) -> list[str]:
    # Some copies of MNIST have a dot where the original names have the second hyphen.
    return [
        f"{part}-{kind}{between}{IDX_KINDS[kind]}-ubyte{packed}" for packed in ("", ".gz") for between in "-."
    ]


def has_cifar(folder: Path) -> bool:
    """Whether the folder holds a file of CIFAR-10 or CIFAR-100, in the binary or the Python version."""
    return any(_cifar_files(folder, split) for split in CIFAR_FILES) or any(
        (folder / name).is_file() for name in CIFAR_PICKLES
    )


def read_cifar_folder(folder: Path, split: str) -> LabeledImages:
    """Read the images and (fine) labels of a split into memory, from as many of its files as exist.

    Raises:
        FileNotFoundError: if none of the files exists.
        ValueError: if a file is damaged.
    """
    files = _cifar_files(folder, split)
    if not files:
        if any((folder / name).is_file() for name in CIFAR_PICKLES):
            raise ValueError(
                f"{folder} must hold the binary version of CIFAR, got Python's pickles, which could run code (get the "
                "binary version, or pass the tensors of torchvision.datasets to from_tensors)"
            )
        raise FileNotFoundError(
            f"{folder} must hold {' or '.join(f'{name}.bin' for name in CIFAR_FILES[split])}"
        )
    images, labels = zip(*(_read_batch(path) for path in files), strict=True)
    try:
        return from_tensors(
            torch.cat(images),
            torch.cat(labels),
            class_names=_cifar_names(folder),
            name=f"{folder.name} {split}",
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _cifar_files(folder: Path, split: str) -> list[Path]:
    paths = [folder / f"{name}.bin" for name in CIFAR_FILES[split]]
    # Other files may be called train.bin and test.bin, too: those of CIFAR-100 hold at least one image.
    least = {path: CIFAR_PIXELS if path.stem in CIFAR100_FILES else 0 for path in paths}
    return [path for path in paths if path.is_file() and path.stat().st_size >= least[path]]


def _read_batch(path: Path) -> tuple[Tensor, Tensor]:
    content = np.fromfile(path, np.uint8)
    is_cifar100 = path.stem in CIFAR100_FILES
    head = 2 if is_cifar100 else 1  # CIFAR-100 has a coarse label before the fine one
    if not len(content) or len(content) % (head + CIFAR_PIXELS):
        raise ValueError(
            f"{path} is damaged: its size must be a multiple of {head + CIFAR_PIXELS}, got {len(content)} bytes"
        )
    rows = torch.from_numpy(content).view(-1, head + CIFAR_PIXELS)
    labels = rows[:, head - 1].long()
    classes = 100 if is_cifar100 else 10
    if int(labels.max()) >= classes:
        raise ValueError(
            f"{path} is damaged: labels must be between 0 and {classes - 1}, got {int(labels.max())}"
        )
    return rows[:, head:].reshape(-1, 3, 32, 32), labels


def _cifar_names(folder: Path) -> list[str] | None:
    path = next((folder / name for name in CIFAR_NAMES if (folder / name).is_file()), None)
    try:
        return None if path is None else path.read_text("utf-8").split()
    except UnicodeDecodeError:
        raise ValueError(f"{path} must hold class names in UTF-8") from None
