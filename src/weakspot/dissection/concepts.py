"""Broden: what somebody labeled in pictures, read from the layout of network dissection's own data set."""

from __future__ import annotations

import csv
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weakspot.dissection.label_masks import LARGEST_LABEL, nearest, read_labels
from weakspot.images import LARGEST_PICTURE

BASE_COLUMNS = ("image", "split", "ih", "iw", "sh", "sw")


@dataclass(frozen=True)
class Concept:
    """One label in one category.

    Attributes:
        number: of the label in label.csv, from 1.
        name: in label.csv.
        category: the column of index.csv that it is labeled in.
    """

    number: int
    name: str
    category: str


@dataclass(frozen=True, eq=False)
class Annotation:
    """What is labeled in one image.

    Attributes:
        concepts: (M,) int64, indices into `ConceptSet.concepts`, ascending, each once.
        masks: (M, sh, sw) bool, where each lies; the label of a whole image lies everywhere.
        categories: (K,) bool, which of `ConceptSet.categories` somebody annotated in this image.
    """

    concepts: Tensor
    masks: Tensor
    categories: Tensor


class _Row(NamedTuple):
    line: int
    image: str
    split: str
    shape: tuple[int, int]
    cells: tuple[tuple[str, ...], ...]  # for each category, its items


@dataclass(frozen=True, eq=False)
class ConceptSet:
    """A folder of images with labeled concepts; annotations are read when asked for.

    The layout is that of Broden (Bau et al. 2017, Network Dissection): images/, index.csv and label.csv.

    Attributes:
        folder: where it lies.
        categories: the columns of index.csv that hold labels, in their order there.
        concepts: by label number, then in the order of `categories`.
    """

    folder: Path
    categories: Sequence[str]
    concepts: Sequence[Concept]
    _rows: Sequence[_Row] = field(repr=False)
    # (K, LARGEST_LABEL + 1): index of the concept; len(concepts) for 0, the unlabeled; -1 where there is none.
    _lookup: NDArray[np.int32] = field(repr=False)

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Read index.csv and label.csv; images and masks are not looked at yet.

        Raises:
            FileNotFoundError: when one of the two is missing.
            ValueError: when a row of them cannot be meant, or a path leaves images/.
        """
        folder = Path(folder)
        header, lines = _read_table(folder / "index.csv", ("image", "split", "sh", "sw"))
        categories = tuple(name for name in header if name not in BASE_COLUMNS)
        if not categories:
            raise ValueError(
                f"{folder / 'index.csv'} has no category; accepted is at least one column besides "
                f"{', '.join(BASE_COLUMNS)}"
            )
        rows = tuple(
            _read_row(folder / "index.csv", line, dict(zip(header, cells, strict=True)), categories)
            for line, cells in lines
        )
        labels = _read_labels(folder / "label.csv")
        concepts = tuple(
            Concept(number, name, category)
            for number, (name, listed) in sorted(labels.items())
            for category in categories
            if category in listed
        )
        lookup = np.full((len(categories), LARGEST_LABEL + 1), -1, dtype=np.int32)
        lookup[:, 0] = len(concepts)
        for place, concept in enumerate(concepts):
            lookup[categories.index(concept.category), concept.number] = place
        return cls(folder, categories, concepts, rows, lookup)

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, index: int) -> Path:
        """The image's file.

        Raises:
            FileNotFoundError: when it is missing.
        """
        row = self._row(index)
        path = self.folder / "images" / row.image
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: there is no such file, and line {row.line} of index.csv names it"
            )
        return path

    def split(self, index: int) -> str:
        """Which part of the data set the image belongs to, as index.csv says."""
        return self._row(index).split

    def annotation(self, index: int) -> Annotation:
        """What is labeled in an image; masks of another size are resized to (sh, sw) by nearest neighbor.

        Raises:
            FileNotFoundError: when a mask is missing.
            ValueError: when a mask cannot be read, or a label is unknown or not listed for its column.
        """
        row = self._row(index)
        everywhere: list[int] = []
        planes: list[NDArray[np.int32]] = []
        for column, items in enumerate(row.cells):
            for item in items:
                if _is_number(item):
                    number = _whole(item)
                    place = int(self._lookup[column, number]) if number <= LARGEST_LABEL else -1
                    if place < 0:
                        raise self._refusal(item, column, f"{self.folder / 'index.csv'}, line {row.line}")
                    everywhere.append(place)
                else:
                    planes.append(self._read_plane(self.folder / "images" / item, column, row.shape))
        sites = row.shape[0] * row.shape[1]
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
        # One mask more than concepts: it takes the unlabeled sites.
        masks = np.zeros((len(concepts) + 1, maps.shape[1]), dtype=bool)
        masks[slots[maps], np.arange(maps.shape[1])] = True
        masks[slots[everywhere]] = True
        return Annotation(
            torch.from_numpy(concepts.astype(np.int64)),
            torch.from_numpy(masks[:-1].reshape(-1, *row.shape)),
            torch.tensor([bool(items) for items in row.cells]),
        )

    def _read_plane(self, path: Path, column: int, shape: tuple[int, int]) -> NDArray[np.int32]:
        """(sh, sw) the concept of each site, len(concepts) where there is none."""
        labels = nearest(read_labels(path), shape)
        places: NDArray[np.int32] = self._lookup[column, labels]
        if (places < 0).any():
            raise self._refusal(str(labels[places < 0][0]), column, str(path))
        return places

    def _refusal(self, label: str, column: int, where: str) -> ValueError:
        known = [concept for concept in self.concepts if str(concept.number) == label.lstrip("0")]
        category = self.categories[column]
        if not known:
            return ValueError(
                f"{where}: label {label} in column {category} is unknown; accepted are the numbers in label.csv "
                "that it lists for a column, and 0 for nothing"
            )
        listed = " and ".join(concept.category for concept in known)
        return ValueError(
            f"{where}: label {label} ({known[0].name}) stands in column {category}, and label.csv lists it for "
            f"{listed}; accepted are the categories that label.csv lists"
        )

    def _row(self, index: int) -> _Row:
        place = operator.index(index)
        if not 0 <= place < len(self):
            raise ValueError(
                f"index is {place}; accepted are 0 to {len(self) - 1}, the images of {self.folder}"
            )
        return self._rows[place]


def _is_number(item: str) -> bool:
    return item.isascii() and item.isdigit()


def _whole(item: str) -> int:
    """The number that is written there, -1 where there is none; a long one is cut, as it is too large anyway."""
    return int(item.lstrip("0")[:9] or 0) if _is_number(item) else -1


def _read_table(path: Path, required: Sequence[str]) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header and rows of a CSV file, each row with its line number; cells without the space around them."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: there is no such file; accepted is a folder with images/, index.csv and label.csv"
        )
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True)
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); accepted is a CSV file in UTF-8") from None
    lines = [(line, cells) for line, cells in lines if any(cells)]
    header = lines[0][1] if lines else []
    missing = [name for name in required if name not in header]
    if missing:
        raise ValueError(
            f"{path} lacks the column {missing[0]}; accepted is a first line with {', '.join(required)}"
        )
    if "" in header or len(set(header)) < len(header):
        raise ValueError(
            f"{path}, line 1: a column has no name or the name of another; accepted is one name each"
        )
    for line, cells in lines[1:]:
        if len(cells) != len(header):
            raise ValueError(
                f"{path}, line {line} has {len(cells)} cells; accepted are {len(header)}, one for each column"
            )
    return header, lines[1:]


def _read_row(path: Path, line: int, cells: Mapping[str, str], categories: Sequence[str]) -> _Row:
    height, width = _whole(cells["sh"]), _whole(cells["sw"])
    if min(height, width) < 1 or height * width > LARGEST_PICTURE:
        raise ValueError(
            f"{path}, line {line}: sh and sw are {cells['sh']!r} and {cells['sw']!r}; accepted are whole numbers "
            "from 1, the height and width of masks"
        )
    items = tuple(
        tuple(item for item in map(str.strip, cells[name].split(";")) if item) for name in categories
    )
    if not cells["image"]:
        raise ValueError(f"{path}, line {line} names no image; accepted is a path below images/")
    for name, paths in [("image", (cells["image"],)), *zip(categories, items, strict=True)]:
        for item in paths:
            parts = re.split(r"[/\\]", item)
            # An absolute path begins with a separator, or on Windows with a drive.
            if not parts[0] or ".." in parts or re.match("[A-Za-z]:", item):
                raise ValueError(
                    f"{path}, line {line}: {item!r} in column {name} leaves images/; accepted are paths below it"
                )
    return _Row(line, cells["image"], cells["split"], (height, width), items)


def _read_labels(path: Path) -> dict[int, tuple[str, tuple[str, ...]]]:
    """Label number to name and categories."""
    header, lines = _read_table(path, ("number", "name", "category"))
    labels: dict[int, tuple[str, tuple[str, ...]]] = {}
    for line, row in lines:
        cells = dict(zip(header, row, strict=True))
        digits = cells["number"]
        number = _whole(digits)
        if not 0 <= number <= LARGEST_LABEL or number in labels:
            raise ValueError(
                f"{path}, line {line}: number is {digits!r}; accepted are whole numbers up to {LARGEST_LABEL}, "
                "each once"
            )
        # `material(36);object(3)`: what stands in parentheses counts images
        categories = tuple(
            re.sub(r"\([^()]*\)$", "", item.strip()).strip() for item in cells["category"].split(";")
        )
        if number == 0:  # the unlabeled, which some sets list
            continue
        if not any(categories):
            raise ValueError(
                f"{path}, line {line}: label {number} has no category; accepted are columns of index.csv, "
                "joined by ;"
            )
        labels[number] = (cells["name"], categories)
    return labels
