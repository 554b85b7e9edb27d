"""IDX files, the format of MNIST and Fashion-MNIST: a magic number, sizes, bytes."""

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
MOST_AXES = 4
PACKING = 1032  # deflate makes nothing smaller than by this
BLOCK = 2**20


def has_idx(folder: Path) -> bool:
    """Whether MNIST's four files, or two of them, lie there."""
    return any(_find(folder, part, "images") is not None for part in PARTS.values())


def read_idx_folder(folder: Path, split: str) -> LabeledImages:
    """The images and labels of a split, in memory.

    Raises:
        FileNotFoundError: when a file of the split is missing.
        ValueError: when one is damaged.
    """
    arrays = []
    for kind in KINDS:
        path = _find(folder, PARTS[split], kind)
        if path is None:
            raise FileNotFoundError(
                f"{folder}: there is no {_names(PARTS[split], kind)[0]}, with or without .gz"
            )
        arrays.append(read_idx(path))
    images, labels = arrays
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{folder}: images are {tuple(images.shape)} and labels {tuple(labels.shape)}; accepted are "
            "(N, height, width) and (N,)"
        )
    try:
        return from_tensors(images[:, None], labels.long(), name=f"{folder.name} {split}")
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def read_idx(path: Path) -> Tensor:
    """The bytes in an IDX file in their shape, uint8; no more of it is unpacked than its head announces.

    Raises:
        ValueError: when it is no such file, or its length is not what its head says.
    """
    packed = path.suffix == ".gz"
    try:
        with path.open("rb") as file:
            if not packed:
                return _read(file, path, path.stat().st_size)
            with gzip.open(file) as unpacked:
                return _read(unpacked, path, path.stat().st_size * PACKING)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path} cannot be read as {'a gzip' if packed else 'an IDX'} file ({error})"
        ) from None


def _read(file: IO[bytes] | gzip.GzipFile, path: Path, most: int) -> Tensor:
    start = file.read(4)
    if len(start) < 4 or start[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is no IDX file of bytes (it must start with 00 00 08)")
    count = start[3]
    if not 1 <= count <= MOST_AXES:
        raise ValueError(
            f"{path} is damaged: it says that it has {count} axes; accepted are 1 to {MOST_AXES}"
        )
    sides = file.read(4 * count)
    if len(sides) < 4 * count:
        raise ValueError(f"{path} is damaged: it ends within its head")
    shape = [int.from_bytes(sides[4 * axis : 4 * axis + 4]) for axis in range(count)]
    announced = math.prod(shape)
    if announced > most:
        raise ValueError(
            f"{path} is damaged: it says {shape}, which are {announced} bytes, and can hold {most} at most"
        )
    body = bytearray()  # grows by what is there: memory is not taken on the word of a head
    while len(body) <= announced and (block := file.read(min(BLOCK, announced + 1 - len(body)))):
        body += block
    if len(body) != announced:
        holds = f"{len(body)} bytes" if len(body) < announced else "more bytes"
        raise ValueError(f"{path} is damaged: it says {shape} and holds {holds}")
    if not announced:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(body, dtype=torch.uint8).reshape(shape)


def _find(folder: Path, part: str, kind: str) -> Path | None:
    return next((folder / name for name in _names(part, kind) if (folder / name).is_file()), None)


def _names(part: str, kind: str) -> list[str]:
    return [
        f"{part}-{kind}{between}{KINDS[kind]}-ubyte{packed}" for packed in ("", ".gz") for between in "-."
    ]
