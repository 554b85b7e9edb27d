"""Backgrounds of a whole data set: found once, kept as bits."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from weakspot.checks import ImageWarning, quiet
from weakspot.datasets import Labelled
from weakspot.defenses.training.identity import data_fingerprint
from weakspot.regions import background
from weakspot.writing import write_whole

CHUNK = 64  # images at once in a thread


class Backgrounds:
    """Masks by row of the data: bool, one bit a site."""

    def __init__(self, bits: np.ndarray, size: tuple[int, int]) -> None:
        self.bits, self.size = bits, size

    def masks(self, rows: Tensor) -> Tensor:
        """Bool (n, 1, H, W), true where the background is."""
        height, width = self.size
        flat = np.unpackbits(self.bits[rows.numpy()], axis=1, count=height * width)
        return torch.from_numpy(flat).bool().view(-1, 1, height, width)


def find_backgrounds(
    data: Labelled,
    *,
    cache: Path | None = None,
    progress: Callable[[float], None] | None = None,
) -> Backgrounds:
    """The background of every image, by `regions.background`, on all cores.

    Args:
        data: N images.
        cache: a folder where they are kept under a name made of the data, so that they are found once; what was found
            before a death is kept too. One process at a time.
        progress: called with the share done.
    """
    height, width = data.shape[1:]
    kept = None if cache is None else cache / f"backgrounds-{data_fingerprint(data)}.npy"
    shape = (len(data), -(-height * width // 8))
    if kept is not None and (held := _read(kept, shape)) is not None:
        return Backgrounds(held, (height, width))
    bits = np.empty(shape, np.uint8)
    part = None if kept is None else kept.with_suffix(".part")
    done = 0 if part is None else _taken_up(part, bits)
    chunks = torch.arange(len(data)).split(CHUNK)[done:]

    def find(rows: Tensor) -> np.ndarray:
        # Which images of many thousands had to do with the rectangle is no news to anybody.
        with quiet(ImageWarning):
            return np.packbits(background(data.images(rows)).flatten(1).numpy(), axis=1)

    # OpenCV leaves the interpreter's lock alone while it works, so threads are enough.
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for rows, found in zip(chunks, pool.map(find, chunks), strict=True):
            bits[rows[0] : rows[-1] + 1] = found
            if part is not None:
                with part.open("ab") as file:
                    file.write(found.tobytes())
            if progress is not None:
                progress(float(rows[-1] + 1) / len(data))
    if kept is not None and part is not None:
        _keep(kept, bits)
        part.unlink(missing_ok=True)
    return Backgrounds(bits, (height, width))


def _taken_up(part: Path, bits: np.ndarray) -> int:
    """Fill in the whole chunks that an earlier call wrote before it died, and cut off what follows; their number."""
    part.parent.mkdir(parents=True, exist_ok=True)
    held = np.fromfile(part, np.uint8) if part.is_file() else np.empty(0, np.uint8)
    width = int(bits.shape[1])
    rows = min(len(held) // width, len(bits)) // CHUNK * CHUNK
    bits[:rows] = held[: rows * width].reshape(rows, width)
    part.write_bytes(bits[:rows].tobytes())
    return rows // CHUNK


def _read(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """What an earlier call kept, None where there is nothing or it is damaged: then it is found again."""
    try:
        bits: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return bits if bits.shape == shape and bits.dtype == np.uint8 else None


def _keep(path: Path, bits: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(draft: Path) -> None:
        with draft.open("wb") as file:
            np.save(file, bits, allow_pickle=False)

    write_whole(path, write)
