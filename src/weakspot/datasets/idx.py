"""IDX files, the format of MNIST and Fashion-MNIST: a magic number, sizes, bytes."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from weakspot.datasets.labelled import Labelled, from_tensors

PARTS = {"train": "train", "test": "t10k"}


def has_idx(folder: Path) -> bool:
    """Whether MNIST's four files, or two of them, lie there."""
    return any(_find(folder, f"{part}-images") is not None for part in PARTS.values())


def read_idx_folder(folder: Path, split: str) -> Labelled:
    """The images and labels of a split, in memory.

    Raises:
        FileNotFoundError: when a file of the split is missing.
        ValueError: when one is damaged.
    """
    arrays = []
    for kind in ("images", "labels"):
        path = _find(folder, f"{PARTS[split]}-{kind}")
        if path is None:
            raise FileNotFoundError(
                f"{folder}: there is no {PARTS[split]}-{kind}-idx{3 if kind == 'images' else 1}-ubyte, with or "
                "without .gz"
            )
        arrays.append(read_idx(path))
    images, labels = arrays
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{folder}: images are {tuple(images.shape)} and labels {tuple(labels.shape)}; accepted are "
            "(N, height, width) and (N,)"
        )
    return from_tensors(images[:, None], labels.long(), name=f"{folder.name} {split}")


def read_idx(path: Path) -> Tensor:
    """The bytes in an IDX file in their shape, uint8.

    Raises:
        ValueError: when it is no such file, or its length is not what its head says.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a gzip file ({error})") from None
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is no IDX file of bytes (it must start with 00 00 08)")
    count = content[3]
    shape = [int.from_bytes(content[4 + 4 * axis : 8 + 4 * axis]) for axis in range(count)]
    body = np.frombuffer(content, np.uint8, offset=min(len(content), 4 + 4 * count))
    if len(body) != int(np.prod(shape)):
        raise ValueError(f"{path} is damaged: it says {shape} and holds {len(body)} bytes")
    return torch.from_numpy(body.copy()).reshape(shape)


def _find(folder: Path, start: str) -> Path | None:
    found = [path for path in sorted(folder.glob(f"{start}*ubyte*")) if path.suffix in {"", ".gz"}]
    return found[0] if found else None
