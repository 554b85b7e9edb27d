"""Backgrounds of a whole data set: found once, kept as bits."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from weakspot.checks import ImageWarning
from weakspot.datasets import Labelled
from weakspot.regions import background

CHUNK = 64


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
        cache: a folder where they are kept under a name made of the data, so that they are found once.
        progress: called with the share done.
    """
    height, width = data.shape[1:]
    kept = None if cache is None else cache / f"backgrounds-{data_fingerprint(data)}.npy"
    if kept is not None and kept.is_file():
        bits = np.load(kept, mmap_mode="r", allow_pickle=False)
        if bits.shape == (len(data), -(-height * width // 8)):
            return Backgrounds(bits, (height, width))
    chunks = torch.arange(len(data)).split(CHUNK)
    bits = np.empty((len(data), -(-height * width // 8)), np.uint8)

    def find(rows: Tensor) -> np.ndarray:
        return np.packbits(background(data.images(rows)).flatten(1).numpy(), axis=1)

    with warnings.catch_warnings():
        # Which images of many thousands had to do with the rectangle is no news to anybody.
        warnings.simplefilter("ignore", ImageWarning)
        # OpenCV leaves the interpreter's lock alone while it works, so threads are enough.
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for number, (rows, found) in enumerate(zip(chunks, pool.map(find, chunks), strict=True)):
                bits[rows[0] : rows[-1] + 1] = found
                if progress is not None:
                    progress((number + 1) / len(chunks))
    if kept is not None:
        _keep(kept, bits)
    return Backgrounds(bits, (height, width))


def data_fingerprint(data: Labelled) -> str:
    """Sixteen hex digits made of all labels and of up to 256 images spread over the data."""
    import hashlib

    digest = hashlib.sha256(repr((len(data), data.shape)).encode())
    digest.update(data.labels.numpy().tobytes())
    rows = torch.linspace(0, len(data) - 1, min(256, len(data))).round().long()
    digest.update((data.images(rows) * 255).round().byte().numpy().tobytes())
    return digest.hexdigest()[:16]


def _keep(path: Path, bits: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            np.save(file, bits, allow_pickle=False)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
