"""Images with their classes, decoded when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from weakspot._checks import check_classes
from weakspot.images import open_pictures

MOST_CLASSES = 100_000  # more are identifiers taken for classes: a network of them would fill the memory
UNSIGNED = {torch.uint16, torch.uint32, torch.uint64}  # torch stores them and cannot compare them


@dataclass(frozen=True)
class LabeledImages:
    """Images and the class of each.

    Attributes:
        labels: (N,) int64.
        class_names: one per class.
        shape: (C, H, W) of every image.
        name: what records call it.
        pixels: row numbers (n,) to these images, (n, C, H, W), bytes or floats in [0, 1].
        held: whether all images lie in memory, so that asking costs next to nothing.
    """

    labels: Tensor
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]
    name: str
    pixels: Callable[[Tensor], Tensor]
    held: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, rows: Tensor) -> Tensor:
        """(n, C, H, W) float32 in [0, 1]."""
        return as_float(self.pixels(rows))

    def subset(self, rows: Tensor) -> LabeledImages:
        """These rows alone."""
        return replace(self, labels=self.labels[rows], pixels=_Subset(self.pixels, rows))


def from_tensors(
    images: Tensor, labels: Tensor, *, class_names: Sequence[str] | None = None, name: str = "tensors"
) -> LabeledImages:
    """Images (N, C, H, W), bytes or floats in [0, 1], and their classes (N,); images are not copied.

    Images stay on their device and take no gradients; classes are brought to the CPU.

    Raises:
        ValueError: when they do not fit each other, or there are more than 100,000 classes.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or 0 in images.shape:
        what = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"images is {what}; accepted is a tensor (N, C, H, W) of bytes or of floats in [0, 1]"
        )
    images = images.detach()
    if images.is_floating_point():
        low, high = float(images.min()), float(images.max())
        if not (low >= -1e-5 and high <= 1 + 1e-5):  # NaN too
            raise ValueError(f"images span {low:.3g} to {high:.3g}; accepted are floats in [0, 1] or bytes")
    elif images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}; accepted are bytes (uint8) or floats in [0, 1]")
    if isinstance(labels, Tensor):
        labels = labels.cpu()
        labels = labels.long() if labels.dtype in UNSIGNED else labels
    names = names_of_classes(labels, len(images), class_names)
    _, channels, height, width = images.shape
    return LabeledImages(labels.long(), names, (channels, height, width), name, _Held(images))


def names_of_classes(labels: Tensor, count: int, class_names: Sequence[str] | None) -> tuple[str, ...]:
    """One name per class: those given, or the classes' numbers.

    Raises:
        ValueError: when `labels` are not one class for each of `count` images, or do not fit the names.
    """
    check_classes(labels, count)
    classes = int(labels.max()) + 1
    if classes > MOST_CLASSES:
        raise ValueError(
            f"labels holds class {classes - 1}; accepted are at most {MOST_CLASSES} classes, numbered from 0"
        )
    names = tuple(class_names or (str(number) for number in range(classes)))
    if len(names) < classes:
        raise ValueError(f"labels holds class {classes - 1}; there are names for {len(names)} classes")
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
    """Picture files, cropped at the center and resized to `size` (height, width) each time that they are asked for.

    A file that cannot be read when its turn comes is an error that names it: what was left out of a training would
    change it in silence.
    """
    return LabeledImages(
        labels, tuple(class_names), (channels, *size), name, _Files(tuple(paths), size, channels), held=False
    )


def as_float(pixels: Tensor, layout: torch.memory_format = torch.preserve_format) -> Tensor:
    """Bytes as floats in [0, 1], floats as they are; in this layout."""
    floats = pixels.to(torch.float32, memory_format=layout)
    return floats.div_(255) if pixels.dtype == torch.uint8 else floats


# Classes rather than closures: worker processes are sent copies of them.
@dataclass(frozen=True)
class _Held:
    tensor: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        return self.tensor[rows.to(self.tensor.device)]  # the images of these rows alone are copied


@dataclass(frozen=True)
class _Subset:
    every: Callable[[Tensor], Tensor]
    rows: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        return self.every(self.rows[rows])


@dataclass(frozen=True)
class _Files:
    paths: tuple[Path, ...]
    size: tuple[int, int]
    channels: int

    def __call__(self, rows: Tensor) -> Tensor:
        return torch.stack([self.read(self.paths[row]) for row in rows.tolist()])

    def read(self, path: Path) -> Tensor:
        if not path.is_file():
            raise ValueError(f"{path}: the file is gone since the folder was listed; give the data anew")
        (picture,) = open_pictures(path, size=self.size, channels=self.channels)
        if picture.pixels is None:
            raise ValueError(f"{path}: {picture.remark.removesuffix('; skipped')}; take it out of the data")
        return (picture.pixels * 255).round().byte()
