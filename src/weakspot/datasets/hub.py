"""Hugging Face data sets, where the library `datasets` is installed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weakspot.datasets.labelled import Labelled
from weakspot.images import fitted

SPLITS = {"train": ("train",), "test": ("test", "validation", "valid")}
IMAGES, LABELS = ("image", "img", "pixel_values"), ("label", "labels", "fine_label")


def read_hub(name: str, split: str, *, size: tuple[int, int] | None, channels: int) -> Labelled:
    """A data set that `save_to_disk` wrote to a directory, or of that name on the hub.

    Args:
        name: directory or name.
        split: "train" or "test", which may be called validation there.
        size: (height, width) pictures are cropped and resized to; those of the first picture where not given.
        channels: 3 for colour, 1 for grey.

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
    if isinstance(held, dict):
        part = next((key for key in SPLITS[split] if key in held), None)
        if part is None:
            raise FileNotFoundError(
                f"hf:{name} has no split {' or '.join(SPLITS[split])}, only {', '.join(held)}"
            )
        held = held[part]
    image_column, label_column = (
        next((column for column in held.column_names if column in names), None) for names in (IMAGES, LABELS)
    )
    if image_column is None or label_column is None:
        raise ValueError(
            f"hf:{name} has the columns {', '.join(held.column_names)}; accepted are image and label"
        )
    feature = held.features[label_column]
    labels = torch.tensor(held[label_column][:], dtype=torch.int64)
    names = getattr(feature, "names", None) or [str(number) for number in range(int(labels.max()) + 1)]
    first = held[0][image_column]
    height, width = size or (first.height, first.width)

    pixels = _Column(held, image_column, (height, width), channels)
    return Labelled(labels, tuple(names), (channels, height, width), f"{name} {split}", pixels, held=False)


@dataclass(frozen=True)
class _Column:
    """Pictures in a column of a data set."""

    held: Any
    name: str
    size: tuple[int, int]
    channels: int

    def __call__(self, rows: Tensor) -> Tensor:
        pictures = self.held[rows.tolist()][self.name]
        arrays = [np.array(fitted(picture, self.size, self.channels)) for picture in pictures]
        stacked = torch.from_numpy(np.stack(arrays))
        return stacked[:, None] if self.channels == 1 else stacked.permute(0, 3, 1, 2).contiguous()
