"""Hugging Face data sets, read with the library `datasets`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from weakspot._checks import require
from weakspot._errors import first_line
from weakspot.datasets.labeled import LabeledImages, names_of_classes
from weakspot.images import fitted

SPLITS = {"train": ("train",), "test": ("test", "validation", "valid")}
IMAGES, LABELS = ("image", "img", "pixel_values"), ("label", "labels", "fine_label")


def read_hub(name: str, split: str, *, size: tuple[int, int] | None, channels: int) -> LabeledImages:
    """Read a data set that `save_to_disk` wrote to a directory, or a data set of the hub.

    Args:
        name: directory, or name on the hub.
        split: "train" or "test", which may be named validation there.
        size: (height, width) to which images are cropped and resized; by default that of the first image.
        channels: 3 for color, 1 for gray.

    Raises:
        ValueError: if the library is not installed, or the data set holds no images with labels.
        FileNotFoundError: if there is no such split.
    """
    require(f"hf:{name}", "datasets", extra="datasets")
    import datasets

    try:
        loaded: Any = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name)
    except Exception as error:
        raise ValueError(f"hf:{name} cannot be loaded as a data set ({first_line(error)})") from error
    data = _of_split(name, loaded, split)
    image_column, label_column = (
        next((column for column in data.column_names if column in names), None) for names in (IMAGES, LABELS)
    )
    if image_column is None or label_column is None:
        raise ValueError(
            f"hf:{name} must have the columns image and label, got {', '.join(data.column_names)}"
        )
    if not isinstance(data.features[image_column], datasets.Image):
        kind = _type(data.features[image_column])
        raise ValueError(f"hf:{name}: column {image_column} must hold images (datasets.Image), got {kind}")
    if not len(data):
        raise ValueError(f"hf:{name} must have at least one row, got none")
    labels, names = _labels(name, data, label_column)
    # Decodes images even if decoding is switched off in the stored data set.
    images = data.cast_column(image_column, datasets.Image())
    pixels = _Column(f"hf:{name}", images, image_column, size, channels)
    if size is None:
        first = pixels.image(0)
        pixels = replace(pixels, size=(first.height, first.width))
    height, width = pixels.size or (0, 0)
    return LabeledImages(labels, names, (channels, height, width), f"{name} {split}", pixels, held=False)


def _of_split(name: str, loaded: Any, split: str) -> Any:
    """The data set of a split. A single data set without splits counts as the split it names, or as training."""
    parts = loaded if isinstance(loaded, dict) else {_own_split(loaded): loaded}
    part = next((key for key in SPLITS[split] if key in parts), None)
    if part is None:
        raise FileNotFoundError(
            f"hf:{name} must have a split {' or '.join(SPLITS[split])}, got {', '.join(parts)}"
        )
    return parts[part]


def _own_split(data: Any) -> str:
    name = str(data.split).partition("[")[0]  # "train[:10%]" is a part of train
    return name if any(name in names for names in SPLITS.values()) else "train"


def _labels(name: str, data: Any, column: str) -> tuple[Tensor, tuple[str, ...]]:
    feature = data.features[column]
    if not str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
        raise ValueError(
            f"hf:{name}: column {column} must hold integers, got {_type(feature)} (class_encode_column({column!r}) "
            "encodes text)"
        )
    numbers = list(data[column][:])
    wrong = next((row for row, number in enumerate(numbers) if number is None or number < 0), None)
    if wrong is not None:
        raise ValueError(
            f"hf:{name}: {column} must be a class of at least 0, got {numbers[wrong]} in row {wrong} (remove rows "
            "without a class)"
        )
    try:
        labels = torch.tensor(numbers, dtype=torch.int64)
        return labels, names_of_classes(labels, len(data), getattr(feature, "names", None))
    except (ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"hf:{name}: {error}") from None


def _type(feature: Any) -> str:
    return str(getattr(feature, "dtype", None) or type(feature).__name__)


@dataclass(frozen=True)
class _Column:
    """The images in a column of a data set."""

    source: str
    data: Any
    name: str
    size: tuple[int, int] | None
    channels: int

    def __call__(self, rows: Tensor) -> Tensor:
        arrays = [np.array(fitted(self.image(row), self.size, self.channels)) for row in rows.tolist()]
        stacked = torch.from_numpy(np.stack(arrays))
        return stacked[:, None] if self.channels == 1 else stacked.permute(0, 3, 1, 2).contiguous()

    def image(self, row: int) -> Image.Image:
        try:
            image = self.data[row][self.name]
            if image is not None:
                image.load()
        except Exception as error:  # decoders raise nearly anything on damaged input
            raise ValueError(
                f"{self.source}: the image in row {row} cannot be read ({first_line(error)})"
            ) from error
        if not isinstance(image, Image.Image):
            raise ValueError(
                f"{self.source}: row {row} must hold an image, got none (remove it from the data)"
            )
        return image
