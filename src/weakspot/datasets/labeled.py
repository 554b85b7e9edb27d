"""Images with their classes, decoded on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from weakspot._checks import check_class_names, check_classes
from weakspot.images import open_pictures

MAX_CLASSES = (
    100_000  # more are probably identifiers; a network with that many outputs would exhaust the memory
)
UNSIGNED = {torch.uint16, torch.uint32, torch.uint64}  # torch cannot compare these types


@dataclass(frozen=True, repr=False)
class LabeledImages:
    """Images and the class of each.

    Attributes:
        labels: (N,) int64.
        class_names: one per class.
        shape: (C, H, W) of every image.
        name: for records and messages.
        pixels: function of row numbers (n,) that returns these images, (n, C, H, W), bytes or floats in [0, 1].
        held: whether all images are in memory, so that `pixels` costs almost nothing.
    """

    labels: Tensor
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]
    name: str
    pixels: Callable[[Tensor], Tensor]
    held: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        storage = "in memory" if self.held else "decoded on demand"
        sides = " x ".join(map(str, self.shape))
        return (
            f"LabeledImages({self.name!r}: {len(self)} x {sides}, {len(self.class_names)} classes, {storage})"
        )

    def images(self, rows: Tensor) -> Tensor:
        """These images, (n, C, H, W) float32 in [0, 1]."""
        return as_float(self.pixels(rows))

    def subset(self, rows: Tensor | Sequence[int]) -> LabeledImages:
        """Only these rows, by their numbers or a bool mask (N,)."""
        # Also a list and a mask become numbers, which images are looked up by.
        chosen = torch.arange(len(self))[rows.cpu() if isinstance(rows, Tensor) else list(rows)]
        return replace(self, labels=self.labels[chosen], pixels=partial(_from_subset, self.pixels, chosen))


def from_tensors(
    images: Tensor, labels: Tensor, *, class_names: Sequence[str] | None = None, name: str = "tensors"
) -> LabeledImages:
    """Make a data set of tensors.

    Args:
        images: (N, C, H, W), bytes or floats in [0, 1]. They stay on their device and are not copied.
        labels: (N,) classes.
        class_names: one per class; the class numbers if not given.
        name: for records and messages.

    Raises:
        ValueError: if images and labels do not fit each other, or there are more than 100,000 classes.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or 0 in images.shape:
        value = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be a tensor (N, C, H, W) with at least one pixel, got {value}")
    images = images.detach()
    if images.is_floating_point():
        low, high = float(images.min()), float(images.max())
        if not (low >= -1e-5 and high <= 1 + 1e-5):  # also true for NaN
            raise ValueError(
                f"images must be bytes or floats in [0, 1], got floats from {low:.3g} to {high:.3g}"
            )
    elif images.dtype != torch.uint8:
        raise ValueError(f"images must be bytes (uint8) or floats in [0, 1], got {images.dtype}")
    if isinstance(labels, Tensor):
        labels = labels.cpu()
        labels = labels.long() if labels.dtype in UNSIGNED else labels
    names = names_of_classes(labels, len(images), class_names)
    _, channels, height, width = images.shape
    return LabeledImages(labels.long(), names, (channels, height, width), name, partial(_from_memory, images))


def names_of_classes(labels: Tensor, count: int, class_names: Sequence[str] | None) -> tuple[str, ...]:
    """One name per class: the given ones, or the class numbers.

    Raises:
        ValueError: if `labels` is not one class for each of `count` images, or there are too few names.
    """
    check_classes(labels, count)
    classes = int(labels.max()) + 1
    if classes > MAX_CLASSES:
        raise ValueError(f"labels must be below {MAX_CLASSES}, got {classes - 1} (number the classes from 0)")
    check_class_names(class_names)
    names = tuple(class_names or (str(number) for number in range(classes)))
    if len(names) < classes:
        raise ValueError(f"labels must be below {len(names)}, the number of class names, got {classes - 1}")
    return names


def from_files(
    paths: Sequence[Path],
    labels: Tensor,
    class_names: Sequence[str],
    *,
    size: tuple[int, int],
    channels: int,
    name: str,
) -> LabeledImages:
    """Make a data set of image files, which are cropped at the center and resized to `size` each time they are read.

    A file that cannot be read raises an error that names it: skipping it would silently change the training.
    """
    files = partial(_from_files, tuple(paths), size, channels)
    return LabeledImages(labels, tuple(class_names), (channels, *size), name, files, held=False)


def as_float(pixels: Tensor, layout: torch.memory_format = torch.preserve_format) -> Tensor:
    """Bytes as floats in [0, 1], floats unchanged; in this memory layout."""
    floats = pixels.to(torch.float32, memory_format=layout)
    return floats.div_(255) if pixels.dtype == torch.uint8 else floats


# `partial` and not closures, because worker processes get pickled copies of them.
def _from_memory(images: Tensor, rows: Tensor) -> Tensor:
    return images[rows.to(images.device)]


def _from_subset(pixels: Callable[[Tensor], Tensor], chosen: Tensor, rows: Tensor) -> Tensor:
    return pixels(chosen[rows])


def _from_files(paths: Sequence[Path], size: tuple[int, int], channels: int, rows: Tensor) -> Tensor:
    return torch.stack([_read(paths[row], size, channels) for row in rows.tolist()])


def _read(path: Path, size: tuple[int, int], channels: int) -> Tensor:
    if not path.is_file():
        raise ValueError(f"{path} does not exist any more (load the data again)")
    (picture,) = open_pictures(path, size=size, channels=channels)
    if picture.pixels is None:
        raise ValueError(
            f"{path} cannot be read: {picture.remark.removesuffix('; skipped')} (remove it from the data)"
        )
    # Exact, because the pixels are 8-bit levels; bytes take a quarter of the memory of floats.
    return (picture.pixels * 255).round().byte()
