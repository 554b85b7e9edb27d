"""IDX files, the format of MNIST and Fashion-MNIST: a magic number, the shape, and bytes."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from weakspot.datasets.labeled import LabeledImages, from_tensors

PARTS = {"train": "train", "test": "t10k"}
KINDS = {"images": "idx3", "labels": "idx1"}
MAX_AXES = 4
MAX_COMPRESSION = 1032  # the largest factor by which deflate compresses
BLOCK = 2**20  # bytes read at once


def has_idx(folder: Path) -> bool:
    """Whether the folder holds the images of a split."""
    return any(_find(folder, part, "images") is not None for part in PARTS.values())


def read_idx_folder(folder: Path, split: str) -> LabeledImages:
    """Read the images and labels of a split into memory.

    Raises:
        FileNotFoundError: if a file of the split does not exist.
        ValueError: if a file is damaged.
    """
    arrays = []
    for kind in KINDS:
        path = _find(folder, PARTS[split], kind)
        if path is None:
            raise FileNotFoundError(
                f"{folder} must hold {_names(PARTS[split], kind)[0]}, with or without .gz"
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
                return _read(file, path, path.stat().st_size)
            with gzip.open(file) as unpacked:
                return _read(unpacked, path, path.stat().st_size * MAX_COMPRESSION)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path} cannot be read as {'a gzip' if packed else 'an IDX'} file ({error})"
        ) from None


def _read(file: IO[bytes] | gzip.GzipFile, path: Path, most: int) -> Tensor:
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
    while len(body) <= announced and (block := file.read(min(BLOCK, announced + 1 - len(body)))):
        body += block
    if len(body) != announced:
        holds = f"{len(body)} bytes" if len(body) < announced else "more bytes"
        raise ValueError(f"{path} is damaged: its header announces {shape}, but it holds {holds}")
    if not announced:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(body, dtype=torch.uint8).reshape(shape)


def _find(folder: Path, part: str, kind: str) -> Path | None:
    return next((folder / name for name in _names(part, kind) if (folder / name).is_file()), None)


def _names(part: str, kind: str) -> list[str]:
    return [
        f"{part}-{kind}{between}{KINDS[kind]}-ubyte{packed}" for packed in ("", ".gz") for between in "-."
    ]
