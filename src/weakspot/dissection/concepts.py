"""Concept sets: images with labeled concepts in Broden's layout, and their images and masks batch by batch."""

import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weakspot.dissection.broden_files import (
    BASE_COLUMNS,
    LARGEST_LABEL,
    nearest,
    parse_number,
    read_label_table,
    read_labels,
    read_table,
)
from weakspot.images import MAX_PIXELS, open_pictures


@dataclass(frozen=True)
class Concept:
    """One label in one category.

    Attributes:
        number: of the label in label.csv, from 1.
        name: in label.csv.
        category: the column of index.csv in which it is labeled.
    """

    number: int
    name: str
    category: str


@dataclass(frozen=True, eq=False)
class Annotation:
    """The labels of one image.

    Attributes:
        concepts: (M,) int64, indices into `ConceptSet.concepts`, ascending, each once.
        masks: (M, sh, sw) bool, the sites of each concept; the label of a whole image covers all sites.
        categories: (K,) bool, which of `ConceptSet.categories` are annotated in this image.
    """

    concepts: Tensor
    masks: Tensor
    categories: Tensor

    def __repr__(self) -> str:
        height, width = self.masks.shape[1:]
        return f"Annotation of {len(self.concepts)} concepts in masks of {height} x {width}"


class _Row(NamedTuple):
    line: int
    image: str
    split: str
    shape: tuple[int, int]
    cells: tuple[tuple[str, ...], ...]  # for each category, its items


@dataclass(frozen=True, eq=False)
class ConceptSet:
    """A folder of images with labeled concepts. Annotations are read when they are needed.

    The layout is that of Broden (Bau et al. 2017, Network Dissection): images/, index.csv and label.csv.

    Attributes:
        folder: of the set.
        categories: the columns of index.csv that hold labels, in order.
        concepts: by label number, then in the order of `categories`.
    """

    folder: Path
    categories: Sequence[str]
    concepts: Sequence[Concept]
    _rows: Sequence[_Row] = field(repr=False)
    # (K, LARGEST_LABEL + 1): index of the concept; len(concepts) for label 0, the unlabeled; -1 if there is none.
    _lookup: NDArray[np.int32] = field(repr=False)

    @classmethod
    def open(cls, folder: Path | str, *, limit: int | None = None) -> Self:
        """Read index.csv and label.csv; images and masks are not read yet.

        Args:
            folder: of the set.
            limit: at most so many images, evenly spaced in index.csv, which lists one source after the other.

        Raises:
            FileNotFoundError: if one of the two files is missing.
            ValueError: if a row of them is invalid, or a path leaves images/.
        """
        folder = Path(folder)
        index = folder / "index.csv"
        header, lines = read_table(index, ("image", "split", "sh", "sw"))
        categories = tuple(name for name in header if name not in BASE_COLUMNS)
        if not categories:
            raise ValueError(
                f"{index} must have a column for at least one category, got only {', '.join(header)}"
            )
        rows = tuple(
            _parse_row(index, line, dict(zip(header, cells, strict=True)), categories)
            for line, cells in lines
        )
        if limit is not None and limit < len(rows):
            rows = tuple(rows[number * len(rows) // limit] for number in range(limit))
        labels = read_label_table(folder / "label.csv")
        concepts = tuple(
            Concept(number, name, category)
            for number, (name, listed) in sorted(labels.items())
            for category in categories
            if category in listed
        )
        # One table lookup turns a mask of label numbers into concepts.
        lookup = np.full((len(categories), LARGEST_LABEL + 1), -1, dtype=np.int32)
        lookup[:, 0] = len(concepts)
        for position, concept in enumerate(concepts):
            lookup[categories.index(concept.category), concept.number] = position
        return cls(folder, categories, concepts, rows, lookup)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return (
            f"ConceptSet of {len(self)} images in {self.folder}\n"
            f"  {len(self.concepts)} concepts in the categories {', '.join(self.categories)}"
        )

    def image(self, index: int) -> Path:
        """The path of an image.

        Raises:
            FileNotFoundError: if it is missing.
        """
        row = self._row(index)
        path = self.folder / "images" / row.image
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist (line {row.line} of index.csv names it)")
        return path

    def split(self, index: int) -> str:
        """The part of the data set that an image belongs to, from index.csv."""
        return self._row(index).split

    def annotation(self, index: int) -> Annotation:
        """The labels of an image. Masks of another size are resized to (sh, sw) by nearest neighbor.

        Raises:
            FileNotFoundError: if a mask is missing.
            ValueError: if a mask cannot be read, or a label is unknown or not listed for its column.
        """
        row = self._row(index)
        everywhere: list[int] = []
        planes: list[NDArray[np.int32]] = []
        for column, items in enumerate(row.cells):
            for item in items:
                number = parse_number(item)
                if number < 0:
                    planes.append(self._read_plane(self.folder / "images" / item, column, row.shape))
                    continue
                position = int(self._lookup[column, number]) if number <= LARGEST_LABEL else -1
                if position < 0:
                    raise self._unknown_label(item, column, f"{self.folder / 'index.csv'}, line {row.line}")
                everywhere.append(position)
        sites = row.shape[0] * row.shape[1]
        # A row for each mask, of which a category may have several.
        maps = np.stack(planes).reshape(-1, sites) if planes else np.empty((0, sites), np.int32)
        return self._annotation(maps, np.array(everywhere, np.int32), row)

    def _annotation(self, maps: NDArray[np.int32], everywhere: NDArray[np.int32], row: _Row) -> Annotation:
        present = np.zeros(len(self.concepts) + 1, dtype=bool)
        present[maps] = True
        present[everywhere] = True
        present[-1] = False  # the unlabeled
        concepts = present.nonzero()[0]
        slots = np.full(len(present), len(concepts))
        slots[concepts] = np.arange(len(concepts))
        # One more mask than concepts, which takes the unlabeled sites and is dropped.
        masks = np.zeros((len(concepts) + 1, maps.shape[1]), dtype=bool)
        masks[slots[maps], np.arange(maps.shape[1])] = True
        masks[slots[everywhere]] = True
        return Annotation(
            torch.from_numpy(concepts.astype(np.int64)),
            torch.from_numpy(masks[:-1].reshape(-1, *row.shape)),
            torch.tensor([bool(items) for items in row.cells]),
        )

    def _read_plane(self, path: Path, column: int, shape: tuple[int, int]) -> NDArray[np.int32]:
        """(sh, sw) the concept of each site, len(concepts) if it has none."""
        labels = nearest(read_labels(path), shape)
        positions: NDArray[np.int32] = self._lookup[column, labels]
        if (positions < 0).any():
            raise self._unknown_label(str(labels[positions < 0][0]), column, str(path))
        return positions

    def _unknown_label(self, label: str, column: int, where: str) -> ValueError:
        same_number = [concept for concept in self.concepts if str(concept.number) == label.lstrip("0")]
        category = self.categories[column]
        if not same_number:
            return ValueError(
                f"{where}: labels in column {category} must be numbers that label.csv lists, or 0 for unlabeled, got "
                f"{label}"
            )
        listed = " and ".join(concept.category for concept in same_number)
        return ValueError(
            f"{where}: label {label} ({same_number[0].name}) must be in a column that label.csv lists for it "
            f"({listed}), got column {category}"
        )

    def _row(self, index: int) -> _Row:
        position = operator.index(index)
        if not 0 <= position < len(self):
            raise ValueError(
                f"index must be between 0 and {len(self) - 1}, the images of {self.folder}, got {position}"
            )
        return self._rows[position]


def _parse_row(path: Path, line: int, cells: Mapping[str, str], categories: Sequence[str]) -> _Row:
    height, width = parse_number(cells["sh"]), parse_number(cells["sw"])
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise ValueError(
            f"{path}, line {line}: sh and sw must be the height and width of masks, integers of at least 1, got "
            f"{cells['sh']!r} and {cells['sw']!r}"
        )
    items = tuple(
        tuple(item for item in map(str.strip, cells[name].split(";")) if item) for name in categories
    )
    if not cells["image"]:
        raise ValueError(f"{path}, line {line}: image must be a path below images/, got an empty cell")
    for name, paths in [("image", (cells["image"],)), *zip(categories, items, strict=True)]:
        for item in paths:
            parts = re.split(r"[/\\]", item)
            # An absolute path begins with a separator, or on Windows with a drive.
            if not parts[0] or ".." in parts or re.match("[A-Za-z]:", item):
                raise ValueError(
                    f"{path}, line {line}: column {name} must hold paths below images/, got {item!r}"
                )
    return _Row(line, cells["image"], cells["split"], (height, width), items)


def image_batches(
    concepts: ConceptSet, size: tuple[int, int], channels: int, batch: int, *, annotated: bool
) -> Iterator[tuple[Tensor, list[Annotation]]]:
    """Images (n, C, H, W) in order, with their annotations at half the images' size.

    The next batch is read in a thread while the caller works on the current one.

    Args:
        concepts: the data set.
        size: height and width that images are cropped and resized to.
        channels: 1 or 3.
        batch: images at once.
        annotated: whether annotations are read; otherwise the lists are empty.

    Raises:
        ValueError: if an image cannot be read; the message names it.
    """
    grid = (max(1, size[0] // 2), max(1, size[1] // 2))

    def read(start: int) -> tuple[Tensor, list[Annotation]]:
        rows = range(start, min(start + batch, len(concepts)))
        images = torch.stack([read_picture(concepts, row, size, channels) for row in rows])
        return images, [_crop(concepts.annotation(row), grid) for row in rows] if annotated else []

    starts = range(0, len(concepts), batch)
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(read, starts[0])
        for following in [*starts[1:], None]:
            ready = coming.result()
            if following is not None:
                coming = reader.submit(read, following)
            yield ready


def read_picture(concepts: ConceptSet, index: int, size: tuple[int, int], channels: int) -> Tensor:
    """One image (C, H, W), cropped at its center and resized."""
    path = concepts.image(index)
    (picture,) = open_pictures(path, size=size, channels=channels)
    if picture.pixels is None:
        raise ValueError(f"{path}: {picture.remark.removesuffix('; skipped')}")
    return picture.pixels


def _crop(annotation: Annotation, size: tuple[int, int]) -> Annotation:
    """The annotation with its masks cropped at their center to the aspect ratio of `size`, and resized to it."""
    sides = annotation.masks.shape[1:]
    scale = min(side / target for side, target in zip(sides, size, strict=True))
    positions = []
    for side, target in zip(sides, size, strict=True):
        # As in `nearest`: the margin of the crop, then the centers of the new sites.
        centers = (side - target * scale) / 2 + (torch.arange(target) + 0.5) * scale
        positions.append(centers.floor().long().clamp(0, side - 1))
    return replace(annotation, masks=annotation.masks[:, positions[0][:, None], positions[1]])
