"""Reading: a concept set batch by batch, images as the network takes them and masks cut likewise.

Writing: a concept set's tables, and a folder that is there whole or not at all.
"""

from __future__ import annotations

import csv
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weakspot.dissection.concepts import Annotation, ConceptSet
from weakspot.images import open_pictures


def image_batches(
    concepts: ConceptSet, size: tuple[int, int], channels: int, batch: int, *, annotated: bool
) -> Iterator[tuple[Tensor, list[Annotation]]]:
    """Images (n, C, H, W) in order, and with them their annotations at half the images' size.

    The next batch is read while the one before is worked on.

    Args:
        concepts: the data set.
        size: height and width that images are cropped and resized to.
        channels: 1 or 3.
        batch: images at once.
        annotated: whether annotations are wanted; else the lists are empty.

    Raises:
        ValueError: when an image cannot be read, naming it.
    """
    starts = range(0, len(concepts), batch)

    def read(start: int) -> tuple[Tensor, list[Annotation]]:
        rows = range(start, min(start + batch, len(concepts)))
        images = torch.stack([picture(concepts, row, size, channels) for row in rows])
        grid = (max(1, size[0] // 2), max(1, size[1] // 2))
        return images, [_cut(concepts.annotation(row), grid) for row in rows] if annotated else []

    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(read, starts[0])
        for following in [*starts[1:], None]:
            ready = coming.result()
            if following is not None:
                coming = reader.submit(read, following)
            yield ready


def picture(concepts: ConceptSet, row: int, size: tuple[int, int], channels: int) -> Tensor:
    """One image (C, H, W), cropped and resized as the network takes it."""
    path = concepts.image(row)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the image that {concepts.folder / 'index.csv'} names is not there")
    (picture,) = open_pictures(path, size=size, channels=channels)
    if picture.pixels is None:
        raise ValueError(f"{path}: {picture.remark.removesuffix('; skipped')}")
    return picture.pixels


def _cut(annotation: Annotation, size: tuple[int, int]) -> Annotation:
    """The annotation with its masks cropped at their center to the shape of `size`, and nearest sites of that size."""
    places = []
    sides = annotation.masks.shape[1:]
    scale = min(side / wanted for side, wanted in zip(sides, size, strict=True))
    for side, wanted in zip(sides, size, strict=True):
        centers = (side - wanted * scale) / 2 + (torch.arange(wanted) + 0.5) * scale
        places.append(centers.floor().long().clamp(0, side - 1))
    return replace(annotation, masks=annotation.masks[:, places[0][:, None], places[1]])


@dataclass(frozen=True)
class Entry:
    """A line of index.csv.

    Attributes:
        image: path below images/.
        size: (height, width) of the image.
        shape: (height, width) of its masks.
        cells: category to what stands in its column.
        shares: label number to the share of sites that it covers, for each label that is there.
    """

    image: str
    size: tuple[int, int]
    shape: tuple[int, int]
    cells: Mapping[str, str]
    fractions: Mapping[int, float]


@contextmanager
def drafted(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write in; it takes the name `out` at the end, and is removed on an exception.

    Raises:
        ValueError: when `out` is a file or holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "is not empty" if out.is_dir() else "is a file"
        raise ValueError(
            f"out is {out}, which {what}; accepted is an empty folder, or one that is not there yet"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    workshop = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        draft = workshop / out.name  # the workshop is for this user's eyes only, what it makes is not
        draft.mkdir()
        yield draft
        if out.exists():
            out.rmdir()
        draft.replace(out)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def half(size: tuple[int, int]) -> tuple[int, int]:
    """The shape of an image's masks: half its size, rounded up."""
    return (size[0] + 1) // 2, (size[1] + 1) // 2


def shares_of(labels: NDArray[np.int64]) -> dict[int, float]:
    """Label number to the share of sites that it covers, without 0."""
    numbers, counts = np.unique(labels, return_counts=True)
    fractions = (counts / labels.size).tolist()
    return {number: fraction for number, fraction in zip(numbers.tolist(), fractions, strict=True) if number}


def write_tables(folder: Path, labels: Mapping[str, Mapping[int, str]], entries: Sequence[Entry]) -> None:
    """Write index.csv, category.csv, label.csv and a c_<category>.csv for each category.

    Frequency counts the images that hold a label; coverage sums the shares of sites that it has in them.

    Args:
        folder: of the concept set.
        labels: category to label number to name; a number belongs to one category.
        entries: the lines of index.csv.
    """
    held: dict[int, list[float]] = {number: [] for names in labels.values() for number in names}
    for entry in entries:
        for number, fraction in entry.fractions.items():
            held[number].append(fraction)
    lines = {
        number: (number, name, category, len(held[number]), f"{sum(held[number]):.6g}")
        for category, names in labels.items()
        for number, name in names.items()
    }
    _write(
        folder / "index.csv",
        ("image", "split", "ih", "iw", "sh", "sw", *labels),
        (
            (entry.image, "train", *entry.size, *entry.shape, *(entry.cells.get(name, "") for name in labels))
            for entry in entries
        ),
    )
    _write(
        folder / "category.csv",
        ("name", "first", "last", "count", "frequency"),
        (
            (category, min(names), max(names), len(names), sum(category in entry.cells for entry in entries))
            for category, names in labels.items()
        ),
    )
    _write(
        folder / "label.csv",
        ("number", "name", "category", "frequency", "coverage", "syns"),
        (
            (number, name, f"{category}({frequency})", frequency, coverage, "")
            for number, name, category, frequency, coverage in (lines[number] for number in sorted(lines))
        ),
    )
    for category, names in labels.items():
        _write(
            folder / f"c_{category}.csv",
            ("code", "number", "name", "frequency", "coverage"),
            (
                (code, number, name, *lines[number][3:])
                for code, (number, name) in enumerate(sorted(names.items()), 1)
            ),
        )


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
