"""Hugging Face data sets, where the library `datasets` is installed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from weakspot.datasets.labeled import LabeledImages, names_of_classes
from weakspot.images import fitted

SPLITS = {"train": ("train",), "test": ("test", "validation", "valid")}
IMAGES, LABELS = ("image", "img", "pixel_values"), ("label", "labels", "fine_label")


def read_hub(name: str, split: str, *, size: tuple[int, int] | None, channels: int) -> LabeledImages:
    """A data set that `save_to_disk` wrote to a directory, or of that name on the hub.

    Args:
        name: directory or name.
        split: "train" or "test", which may be called validation there.
        size: (height, width) pictures are cropped and resized to; those of the first picture where not given.
        channels: 3 for color, 1 for gray.

    Raises:
        ValueError: when the library is missing, or the data set holds no pictures with labels.
        FileNotFoundError: when the split is not there.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(f"hf:{name} needs the library datasets: pip install 'weakspot[datasets]'") from None
    try:
        held: Any = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name)
    except Exception as error:
        raise ValueError(
            f"hf:{name} cannot be loaded as a data set: {str(error).partition(chr(10))[0]}"
        ) from error
    held = _of_split(name, held, split)
    image_column, label_column = (
        next((column for column in held.column_names if column in names), None) for names in (IMAGES, LABELS)
    )
    if image_column is None or label_column is None:
        raise ValueError(
            f"hf:{name} has the columns {', '.join(held.column_names)}; accepted are image and label"
        )
    if not isinstance(held.features[image_column], datasets.Image):
        kind = _kind(held.features[image_column])
        raise ValueError(
            f"hf:{name}: the column {image_column} holds {kind}; accepted are pictures (datasets.Image)"
        )
    if not len(held):
        raise ValueError(f"hf:{name} holds no rows; accepted is at least one picture")
    labels, names = _labels(name, held, label_column)
    pixels = _Column(
        f"hf:{name}", held.cast_column(image_column, datasets.Image()), image_column, size, channels
    )
    if size is None:
        first = pixels.picture(0)
        pixels = replace(pixels, size=(first.height, first.width))
    height, width = pixels.size or (0, 0)
    return LabeledImages(labels, names, (channels, height, width), f"{name} {split}", pixels, held=False)


def _of_split(name: str, held: Any, split: str) -> Any:
    """One of several data sets; one alone is that of the split that it says, and of training where it says none."""
    parts = held if isinstance(held, dict) else {_own_split(held): held}
    part = next((key for key in SPLITS[split] if key in parts), None)
    if part is None:
        raise FileNotFoundError(
            f"hf:{name} has no split {' or '.join(SPLITS[split])}, only {', '.join(parts)}"
        )
    return parts[part]


def _own_split(held: Any) -> str:
    said = str(held.split).partition("[")[0]
    return said if any(said in names for names in SPLITS.values()) else "train"


def _labels(name: str, held: Any, column: str) -> tuple[Tensor, tuple[str, ...]]:
    feature = held.features[column]
    if not str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
        raise ValueError(
            f"hf:{name}: the column {column} holds {_kind(feature)}; accepted are whole numbers, which "
            f"class_encode_column({column!r}) makes of text"
        )
    numbers = list(held[column][:])
    wrong = next((row for row, number in enumerate(numbers) if number is None or number < 0), None)
    if wrong is not None:
        raise ValueError(
            f"hf:{name}: {column} is {numbers[wrong]} in row {wrong}, which says that it has none; accepted are "
            "classes 0 and up, so leave such rows out"
        )
    try:
        labels = torch.tensor(numbers, dtype=torch.int64)
        return labels, names_of_classes(labels, len(held), getattr(feature, "names", None))
    except (ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"hf:{name}: {error}") from None


def _kind(feature: Any) -> str:
    return str(getattr(feature, "dtype", None) or type(feature).__name__)


@dataclass(frozen=True)
class _Column:
    """Pictures in a column of a data set."""

    source: str
    held: Any
    name: str
    size: tuple[int, int] | None
    channels: int

    def __call__(self, rows: Tensor) -> Tensor:
        arrays = [np.array(fitted(self.picture(row), self.size, self.channels)) for row in rows.tolist()]
        stacked = torch.from_numpy(np.stack(arrays))
        return stacked[:, None] if self.channels == 1 else stacked.permute(0, 3, 1, 2).contiguous()

    def picture(self, row: int) -> Image.Image:
        try:
            picture = self.held[row][self.name]
            if picture is not None:
                picture.load()
        except Exception as error:  # decoders raise nearly anything on damaged input
            reason = str(error).partition(chr(10))[0]
            raise ValueError(f"{self.source}: the picture in row {row} cannot be read ({reason})") from error
        if not isinstance(picture, Image.Image):
            raise ValueError(f"{self.source}: there is no picture in row {row}; take it out of the data")
        return picture
