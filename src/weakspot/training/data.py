"""Augmentation: random crops and flips, of images and of their masks alike.

Backgrounds of a whole data set: found once, kept as bits.

Held-out images: how a network in training does on pictures that it is not trained on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from weakspot._checks import ImageWarning, ModelWarning, quiet
from weakspot._io.files import write_atomic
from weakspot._state import EvalMode
from weakspot.attacks import pgd
from weakspot.classifier import Classifier, predict
from weakspot.datasets import LabeledImages
from weakspot.regions import background
from weakspot.training.checkpoint import data_fingerprint
from weakspot.training.config import Settings

ROOM = 8  # a crop moves by up to a part of this of the side


class Moves:
    """A shift and a flip for each of some images.

    They are drawn from (seed, epoch) for all rows of the data at once, so an image moves alike in whatever batch and on
    whatever device it is.
    """

    def __init__(self, augment: str, count: int, size: tuple[int, int], seed: int, epoch: int) -> None:
        self.room = tuple(max(1, side // ROOM) if "crop" in augment else 0 for side in size)
        generator = torch.Generator().manual_seed(mixed_seed(seed, epoch, 1))
        self.shifts = torch.stack(
            [torch.randint(-room, room + 1, (count,), generator=generator) for room in self.room], 1
        )
        self.flips = torch.rand(count, generator=generator) < (0.5 if "flip" in augment else 0)
        self.still = augment == "none"

    def apply(self, rows: Tensor, pixels: Tensor, *, fill: float = 0) -> Tensor:
        """Images or masks (n, C, H, W) of these rows (n,) of the data, moved; what comes in from outside is `fill`."""
        if self.still:
            return pixels
        height, width = pixels.shape[2:]
        down, right = self.room
        padded = F.pad(pixels, (right, right, down, down), value=fill)
        shifts = self.shifts[rows]
        lines = shifts[:, :1] + down + torch.arange(height)
        places = torch.arange(width).expand(len(rows), -1)
        places = torch.where(self.flips[rows][:, None], width - 1 - places, places) + shifts[:, 1:] + right
        # One gather of sites: a quarter of what indexing by image, line and place takes.
        sites = (lines[:, :, None] * padded.shape[3] + places[:, None]).flatten(1).to(pixels.device)
        moved = padded.flatten(2).gather(2, sites[:, None].expand(-1, pixels.shape[1], -1))
        return moved.view(pixels.shape)


def mixed_seed(*parts: int) -> int:
    """One seed from several whole numbers; nearby ones give unrelated seeds.

    >>> mixed_seed(0, 1) != mixed_seed(1, 0)
    True
    """
    import hashlib

    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


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
    data: LabeledImages,
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

    write_atomic(path, write)


STEPS = 10  # of the attack that judges; many-step, so that it sees what single-step training overfits to
FALL, PART = 0.2, 0.5  # robust accuracy that lost more than this, and this part of its best, has collapsed


class HeldOut(NamedTuple):
    """Images (N, C, H, W), labels (N,), and the region (N, 1, H, W) of the attack, None for everywhere."""

    images: Tensor
    labels: Tensor
    region: Tensor | None

    @property
    def constant(self) -> float:
        """The share that the commonest class has."""
        return float(self.labels.bincount().max()) / len(self.labels)

    def judge(self, classifier: Classifier, settings: Settings) -> dict[str, float]:
        """Shares of the images that are read rightly: as they are ("clean"), and attacked ("robust")."""
        device = classifier.mean.device
        images, labels = self.images.to(device), self.labels.to(device)
        with EvalMode(classifier):
            clean = predict(classifier, images).argmax(1) == labels
            with quiet(ModelWarning):  # an untrained network may well have no gradient
                attacked = pgd(
                    classifier,
                    images,
                    labels,
                    budget=settings.budget,
                    region=None if self.region is None else self.region.to(device),
                    steps=STEPS,
                    stop_early=True,
                )
            robust = predict(classifier, attacked.adversarial).argmax(1) == labels
        return {"clean": float(clean.double().mean()), "robust": float((clean & robust).double().mean())}


def collapsed(robust: Sequence[float], constant: float) -> bool:
    """Whether the last of these accuracies says that robustness was there and is lost.

    What a network had that always names the commonest class, right for the share `constant`, was no robustness.

    Catastrophic overfitting (Wong et al. 2020, arXiv 2001.03994): a network learns to stand single steps alone, and
    its accuracy under many steps falls to nothing from one epoch to the next.

    >>> collapsed([0.3, 0.41, 0.02], 0.1), collapsed([0.3, 0.41, 0.35], 0.1), collapsed([0.5, 0.1], 0.5)
    (True, False, False)
    """
    best = max(robust)
    gained = best - constant
    return gained > FALL / 2 and robust[-1] < best - FALL and robust[-1] - constant < PART * gained
