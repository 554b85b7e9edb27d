"""Data of a training, in every form that users have it in, its augmentation, and its background masks.

The masks of all images are found once and stored as bits.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import NoneType
from typing import Generic, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)
from torch.utils.data._utils.collate import default_collate, default_convert

from weakspot._checks import ImageWarning, quiet
from weakspot._errors import describe_error
from weakspot._io.files import write_atomic
from weakspot._progress import Progress
from weakspot._random import float32_noise, mixed_seed
from weakspot.classifier import Classifier
from weakspot.datasets import LabeledImages, from_tensors, read_labeled
from weakspot.datasets.labeled import names_of_classes
from weakspot.regions import background
from weakspot.training.checkpoint import data_fingerprint

Item: TypeAlias = tuple[Tensor, int]
TrainingData: TypeAlias = (
    LabeledImages | tuple[Tensor, Tensor] | Dataset[Item] | DataLoader[Item] | Path | str
)
Key = TypeVar("Key")
Value = TypeVar("Value")
READ_TWICE = 8  # items that are compared with a second reading
CHUNK = 64  # images per task of a thread
LARGEST_SHIFT = 8  # a crop shifts by at most one part in this many of the side


def as_labeled(data: TrainingData, classifier: Classifier, *, workers: int = 0) -> LabeledImages:
    """The data as `LabeledImages`; `train` describes the forms.

    Args:
        data: what the user gave.
        classifier: picture files in a folder are read at its input size and channels.
        workers: processes that read a torch data set for its labels.

    Raises:
        ValueError: if the data has another form, or an item of a torch data set does not fit. The message has the
            index of the item.
    """
    if isinstance(data, DataLoader):
        data = _dataset_of(data)
    if isinstance(data, TensorDataset) and len(data.tensors) == 2:
        data = (data.tensors[0], data.tensors[1])
    if isinstance(data, LabeledImages):
        return data
    if isinstance(data, Path | str):
        return read_labeled(data, size=classifier.input_size, channels=classifier.channels)
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        return from_tensors(*data)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return _from_dataset(data, workers)
    raise ValueError(
        "data must be (images, labels), a LabeledImages, a torch Dataset or DataLoader of (image, label) with a "
        f"length, or the path of a data set, got {type(data).__name__}"
    )


def _dataset_of(loader: DataLoader[Item]) -> Dataset[Item]:
    """The data set of a loader that reads all of it, item by item."""
    sampler, dataset = loader.sampler, loader.dataset
    whole = isinstance(sampler, SequentialSampler | DistributedSampler) or (
        isinstance(sampler, RandomSampler)
        and not sampler.replacement
        and sampler.num_samples == len(sampler.data_source)
    )
    # A sampler that leaves items out usually separates training from validation data.
    if not isinstance(dataset, IterableDataset):
        if not whole or type(loader.batch_sampler) not in {BatchSampler, NoneType}:
            own = sampler if not whole else loader.batch_sampler
            raise ValueError(
                f"data must be a DataLoader of its whole data set, got one with a {type(own).__name__} (give the "
                "data set instead: torch.utils.data.Subset(dataset, indices))"
            )
        if loader.collate_fn not in {default_collate, default_convert}:
            raise ValueError(
                "data must be a DataLoader with the default collate_fn, got one with its own (give the data set "
                "instead, with items (image, label))"
            )
    return dataset


def _from_dataset(dataset: Dataset[Item], workers: int) -> LabeledImages:
    """A data set whose items are read when they are needed; only the labels are held in memory."""
    count = len(dataset)  # type: ignore[arg-type]  # torch declares no length
    if not count:
        raise ValueError("data must hold at least one item, got an empty data set")
    first, _ = read_item(dataset, 0)
    pixels = _DatasetPixels(dataset, tuple(first.shape), first.dtype)
    # Random transforms would move images away from their masks, and make interrupted trainings differ.
    for index in range(min(READ_TWICE, count)):
        once, again = (read_item(dataset, index) for _ in range(2))
        if not torch.equal(once[0], again[0]) or once[1] != again[1]:
            raise ValueError(
                f"data[{index}] must be the same each time it is read, got two versions (remove random transforms "
                "and set TrainConfig.augment, which moves the masks with the images)"
            )
    labels = torch.tensor(list(read_in_workers(pixels.label, range(count), workers)))
    names = names_of_classes(labels, count, None)
    channels, height, width = first.shape
    name = type(dataset).__name__
    return LabeledImages(labels, names, (channels, height, width), name, pixels, held=False)


def read_item(dataset: Dataset[Item], index: int) -> Item:
    """An image (C, H, W) and its label.

    Raises:
        ValueError: if the item is anything else. The message has the index.
    """
    where = f"data[{index}]"
    try:
        item: object = dataset[index]
    except Exception as error:
        raise ValueError(f"{where} cannot be read: {describe_error(error)}") from error
    if not isinstance(item, tuple | list) or len(item) != 2:
        size = f" of {len(item)}" if isinstance(item, tuple | list | dict) else ""
        raise ValueError(f"{where} must be (image, label), got {type(item).__name__}{size}")
    image, label = item
    if not isinstance(image, Tensor) or image.ndim != 3 or 0 in image.shape:
        got = f"shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(
            f"{where} must hold an image tensor (C, H, W), got {got} (convert pictures in the data set, for example "
            "with torchvision's PILToTensor)"
        )
    image = image.detach()
    if image.is_floating_point():
        low, high = float(image.min()), float(image.max())
        if not (low >= -1e-5 and high <= 1 + 1e-5):  # also False for NaN
            raise ValueError(f"{where} must hold floats in [0, 1], got {low:.3g} to {high:.3g}")
    elif image.dtype != torch.uint8:
        raise ValueError(f"{where} must hold floats in [0, 1] or bytes, got {image.dtype}")
    try:
        return image, operator.index(label)
    except (TypeError, ValueError):
        raise ValueError(f"{where} must hold an integer label, got {label!r}") from None


class _DatasetPixels:
    """Pixels by row numbers. A class instead of a closure, so that it can be sent to worker processes."""

    def __init__(self, dataset: Dataset[Item], shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.dataset, self.shape, self.dtype = dataset, shape, dtype

    def __call__(self, rows: Tensor) -> Tensor:
        return torch.stack([self.item(row)[0] for row in rows.tolist()])

    def item(self, index: int) -> Item:
        image, label = read_item(self.dataset, index)
        if tuple(image.shape) != self.shape or image.dtype != self.dtype:
            raise ValueError(
                f"data[{index}] must hold an image like data[0], {self.shape} {self.dtype}, got "
                f"{tuple(image.shape)} {image.dtype}"
            )
        return image, label

    def label(self, index: int) -> int:
        return self.item(index)[1]


class Augmentation:
    """A shift and a flip for every image of the data in one epoch.

    They are drawn from (seed, epoch) for all rows at once, so that an image moves by the same amount in any batch and
    on any device.
    """

    def __init__(self, augment: str, count: int, size: tuple[int, int], seed: int, epoch: int) -> None:
        self.limits = tuple(max(1, side // LARGEST_SHIFT) if "crop" in augment else 0 for side in size)
        generator = torch.Generator().manual_seed(mixed_seed(seed, epoch, 1))
        self.shifts = torch.stack(
            [torch.randint(-limit, limit + 1, (count,), generator=generator) for limit in self.limits], 1
        )
        self.flips = float32_noise(generator, count) < 0.5 * ("flip" in augment)
        self.is_identity = augment == "none"

    def apply(self, rows: Tensor, pixels: Tensor, *, fill: float = 0) -> Tensor:
        """Shift and flip images or masks.

        Args:
            rows: (n,) their row numbers in the data.
            pixels: (n, C, H, W).
            fill: value of sites that come from outside the image.
        """
        if self.is_identity:
            return pixels
        height, width = pixels.shape[2:]
        down, right = self.limits
        padded = F.pad(pixels, (right, right, down, down), value=fill)
        shifts = self.shifts[rows]
        # Source row and column of every site, in the padded image: hence + down and + right.
        lines = shifts[:, :1] + down + torch.arange(height)
        columns = torch.arange(width).expand(len(rows), -1)
        # The shifted crop is mirrored: its site j comes from the mirrored column of j, plus the shift.
        columns = torch.where(self.flips[rows][:, None], width - 1 - columns, columns) + shifts[:, 1:] + right
        # One gather over flat sites takes a quarter of the time of indexing by image, line and column.
        sites = (lines[:, :, None] * padded.shape[3] + columns[:, None]).flatten(1).to(pixels.device)
        moved = padded.flatten(2).gather(2, sites[:, None].expand(-1, pixels.shape[1], -1))
        return moved.view(pixels.shape)


def read_in_workers(read: Callable[[Key], Value], keys: Sequence[Key], workers: int) -> Iterator[Value]:
    """`read` of every key, in order, by this many processes (0: by this one)."""
    loader: DataLoader[Value | ValueError] = DataLoader(
        # The keys serve as the sampler: without a batch size, each of them is read alone and in order.
        _Reader(read, len(keys)),
        sampler=keys,
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator(),  # the default draws from the global generator
    )
    for value in loader:
        if isinstance(value, ValueError):
            raise value
        yield value


class _Reader(Dataset[Value | ValueError], Generic[Key, Value]):
    """Values by key. An exception is returned, because a worker process would reword it."""

    def __init__(self, read: Callable[[Key], Value], count: int) -> None:
        self.read, self.count = read, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: Key) -> Value | ValueError:
        try:
            return self.read(key)
        except ValueError as error:
            return error


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
