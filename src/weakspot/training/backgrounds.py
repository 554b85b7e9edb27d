"""Background masks of all images of a data set, found once and stored as bits."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from weakspot._checks import ImageWarning, quiet
from weakspot._io.files import write_atomic
from weakspot._progress import Progress
from weakspot.datasets import LabeledImages
from weakspot.regions import background
from weakspot.training.checkpoint import data_fingerprint

CHUNK = 64  # images per task of a thread


class Backgrounds:
    """Background masks by row of the data, one bit per site."""

    def __init__(self, bits: np.ndarray, size: tuple[int, int]) -> None:
        self.bits, self.size = bits, size

    def masks(self, rows: Tensor) -> Tensor:
        """Bool (n, 1, H, W), true in the background."""
        height, width = self.size
        flat = np.unpackbits(self.bits[rows.numpy()], axis=1, count=height * width)
        return torch.from_numpy(flat).bool().view(-1, 1, height, width)

    def subset(self, rows: Tensor) -> Backgrounds:
        """The masks of these rows only."""
        return Backgrounds(self.bits[rows.numpy()], self.size)


def find_backgrounds(
    data: LabeledImages, *, cache: Path | None = None, progress: Progress | None = None
) -> Backgrounds:
    """The background of every image by `regions.background`, on all cores.

    Args:
        data: N images.
        cache: a folder that stores the masks under the fingerprint of the data. Finished chunks survive a crash. Only
            one process may write at a time.
        progress: called with the fraction done.
    """
    height, width = data.shape[1:]
    stored = None if cache is None else cache / f"backgrounds-{data_fingerprint(data)}.npy"
    shape = (len(data), -(-height * width // 8))
    if stored is not None and (earlier := _load_bits(stored, shape)) is not None:
        return Backgrounds(earlier, (height, width))
    bits = np.empty(shape, np.uint8)
    part = None if stored is None else stored.with_suffix(".part")
    done = 0 if part is None else _resume_part(part, bits)
    chunks = torch.arange(len(data)).split(CHUNK)[done:]

    def find(rows: Tensor) -> np.ndarray:
        # With thousands of images, nobody reads which of them fell back to the inner rectangle.
        with quiet(ImageWarning):
            return np.packbits(background(data.images(rows)).flatten(1).numpy(), axis=1)

    # OpenCV releases the interpreter lock, so threads are enough.
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for rows, packed in zip(chunks, pool.map(find, chunks), strict=True):
            bits[rows[0] : rows[-1] + 1] = packed
            if part is not None:
                with part.open("ab") as file:
                    file.write(packed.tobytes())
            if progress is not None:
                progress(float(rows[-1] + 1) / len(data))
    if stored is not None and part is not None:
        write_atomic(stored, lambda draft: _save_bits(draft, bits))
        part.unlink(missing_ok=True)
    return Backgrounds(bits, (height, width))


def _resume_part(part: Path, bits: np.ndarray) -> int:
    """Fill `bits` with the whole chunks of an unfinished call, truncate the file to them, and return their number."""
    part.parent.mkdir(parents=True, exist_ok=True)
    written = np.fromfile(part, np.uint8) if part.is_file() else np.empty(0, np.uint8)
    width = int(bits.shape[1])
    # A killed process may have left half a chunk.
    rows = min(len(written) // width, len(bits)) // CHUNK * CHUNK
    bits[:rows] = written[: rows * width].reshape(rows, width)
    part.write_bytes(bits[:rows].tobytes())
    return rows // CHUNK


def _load_bits(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The masks of an earlier call; None if there are none or the file is damaged."""
    try:
        bits: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return bits if bits.shape == shape and bits.dtype == np.uint8 else None


def _save_bits(path: Path, bits: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, bits, allow_pickle=False)
