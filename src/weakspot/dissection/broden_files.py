"""The files of a concept set in Broden's layout: tables in CSV, masks in PNG, and a folder that appears complete.

The layout is that of network dissection's own data set (Bau et al. 2017): images/ with the images and masks, index.csv
with one line per image, label.csv with one line per label. A mask's pixel is red + 256 x green; blue is 0.
"""

import csv
import io
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from weakspot._checks import quiet
from weakspot.images import MAX_PIXELS

BASE_COLUMNS = ("image", "split", "ih", "iw", "sh", "sw")
LARGEST_LABEL = 65_535  # the largest number in the red and green bytes of a mask

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Entry:
    """A line of index.csv.

    Attributes:
        image: path below images/.
        size: (height, width) of the image.
        shape: (height, width) of its masks.
        cells: category to the content of its column.
        fractions: label number to the fraction of the sites that it covers, for each label of the image.
    """

    image: str
    size: tuple[int, int]
    shape: tuple[int, int]
    cells: Mapping[str, str]
    fractions: Mapping[int, float]


# ---------------------------------------------------------------- tables


def read_table(path: Path, required: Sequence[str]) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header and rows of a CSV file, each row with its line number; cells are stripped of surrounding spaces.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a table.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist (a concept set is a folder with images/, index.csv and label.csv)"
        )
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True)
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be a CSV file in UTF-8, got: {error}") from None
    lines = [(line, cells) for line, cells in lines if any(cells)]
    header = lines[0][1] if lines else []
    missing = [name for name in required if name not in header]
    if missing:
        raise ValueError(f"{path} must have the columns {', '.join(required)}, got none named {missing[0]!r}")
    if "" in header or len(set(header)) < len(header):
        raise ValueError(f"{path}, line 1: each column must have a name of its own, got {', '.join(header)}")
    for line, cells in lines[1:]:
        if len(cells) != len(header):
            raise ValueError(
                f"{path}, line {line} must have {len(header)} cells, one for each column, got {len(cells)}"
            )
    return header, lines[1:]


def read_label_table(path: Path) -> dict[int, tuple[str, tuple[str, ...]]]:
    """Label number to name and categories, from label.csv; the unlabeled, 0, is left out."""
    header, lines = read_table(path, ("number", "name", "category"))
    labels: dict[int, tuple[str, tuple[str, ...]]] = {}
    for line, row in lines:
        cells = dict(zip(header, row, strict=True))
        number = parse_number(cells["number"])
        if not 0 <= number <= LARGEST_LABEL or number in labels:
            raise ValueError(
                f"{path}, line {line}: number must be an integer from 0 to {LARGEST_LABEL} that no other line has, got "
                f"{cells['number']!r}"
            )
        # "material(36);object(3)": the number in parentheses counts images.
        categories = tuple(
            re.sub(r"\([^()]*\)$", "", item.strip()).strip() for item in cells["category"].split(";")
        )
        if number == 0:
            continue
        if not any(categories):
            raise ValueError(
                f"{path}, line {line}: category must name columns of index.csv, joined by ;, got none for label "
                f"{number}"
            )
        labels[number] = (cells["name"], categories)
    return labels


def parse_number(item: str) -> int:
    """The number that a cell holds, or -1; a long number is cut to nine digits, too large for a label anyway."""
    return int(item.lstrip("0")[:9] or 0) if item.isascii() and item.isdigit() else -1


def write_tables(folder: Path, labels: Mapping[str, Mapping[int, str]], entries: Sequence[Entry]) -> None:
    """Write index.csv, category.csv, label.csv and a c_<category>.csv for each category.

    Frequency counts the images that hold a label; coverage sums the fractions of their sites.

    Args:
        folder: of the concept set.
        labels: category to label number to name; each number belongs to one category.
        entries: the lines of index.csv.
    """
    fractions: dict[int, list[float]] = {number: [] for names in labels.values() for number in names}
    for entry in entries:
        for number, fraction in entry.fractions.items():
            fractions[number].append(fraction)
    counts = {number: (len(parts), f"{sum(parts):.6g}") for number, parts in fractions.items()}
    numbered = sorted(
        (number, name, category) for category, names in labels.items() for number, name in names.items()
    )
    _write_csv(
        folder / "index.csv",
        ("image", "split", "ih", "iw", "sh", "sw", *labels),
        (
            (entry.image, "train", *entry.size, *entry.shape, *(entry.cells.get(name, "") for name in labels))
            for entry in entries
        ),
    )
    _write_csv(
        folder / "category.csv",
        ("name", "first", "last", "count", "frequency"),
        (
            (category, min(names), max(names), len(names), sum(category in entry.cells for entry in entries))
            for category, names in labels.items()
        ),
    )
    _write_csv(
        folder / "label.csv",
        ("number", "name", "category", "frequency", "coverage", "syns"),
        (
            (number, name, f"{category}({counts[number][0]})", *counts[number], "")
            for number, name, category in numbered
        ),
    )
    for category, names in labels.items():
        _write_csv(
            folder / f"c_{category}.csv",
            ("code", "number", "name", "frequency", "coverage"),
            (
                (code, number, name, *counts[number])
                for code, (number, name) in enumerate(sorted(names.items()), 1)
            ),
        )


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


@contextmanager
def draft_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write in. It is renamed to `out` at the end, and removed after an exception.

    Raises:
        ValueError: if `out` is a file or a folder that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        state = "is not empty" if out.is_dir() else "is a file"
        raise ValueError(f"out must be an empty or a new folder, got {out}, which {state}")
    out.parent.mkdir(parents=True, exist_ok=True)
    private = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        draft = private / out.name  # mkdtemp's folder is readable by this user alone; the result must not be
        draft.mkdir()
        yield draft
        if out.exists():
            out.rmdir()
        draft.replace(out)
    finally:
        shutil.rmtree(private, ignore_errors=True)


# ---------------------------------------------------------------- masks


def half(size: tuple[int, int]) -> tuple[int, int]:
    """The shape of an image's masks: half its size, rounded up."""
    return (size[0] + 1) // 2, (size[1] + 1) // 2


def label_fractions(labels: Labels) -> dict[int, float]:
    """Label number to the fraction of the sites that it covers, without 0."""
    numbers, counts = np.unique(labels, return_counts=True)
    fractions = (counts / labels.size).tolist()
    return {number: fraction for number, fraction in zip(numbers.tolist(), fractions, strict=True) if number}


def nearest(labels: Labels, shape: tuple[int, int], crop: tuple[int, int] | None = None) -> Labels:
    """Labels (H, W) resized to `shape` by nearest neighbor, so that no label is a mixture of two.

    With `crop`, a (height, width), only the largest centered part with that aspect ratio is used.
    """
    if labels.shape == shape and crop is None:
        return labels
    scale = 1.0 if crop is None else min(labels.shape[0] / crop[0], labels.shape[1] / crop[1])
    spans = labels.shape if crop is None else (crop[0] * scale, crop[1] * scale)
    # Centers of the new sites, (i + .5) * step, after the margin that the crop leaves on each side.
    rows, columns = (
        ((own - span) / 2 + (np.arange(side) + 0.5) * (span / side)).astype(np.int64)
        for own, side, span in zip(labels.shape, shape, spans, strict=True)
    )
    return np.asarray(labels[rows[:, None], columns])


def write_labels(path: Path, labels: Labels) -> None:
    """Write label numbers (H, W) below 65536 as a color PNG that `read_labels` reads."""
    colors = np.stack([labels % 256, labels // 256, np.zeros_like(labels)], axis=2).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colors).save(path)


def read_labels(path: Path) -> Labels:
    """(H, W) label numbers of a mask: R + 256 G of a color PNG whose B is 0, or the value of a gray one.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a PNG.
    """
    mode, pixels = read_pixels(path)
    if mode in {"L", "I;16", "I"}:  # older Pillow versions read 16 bits as I
        return pixels.astype(np.int64)
    if mode != "RGB":
        raise ValueError(
            f"{path} must be a PNG in 8-bit RGB, or in 8-bit or 16-bit grayscale without a palette, got mode {mode}"
        )
    if pixels[..., 2].any():
        row, column = (int(place[0]) for place in pixels[..., 2].nonzero())
        raise ValueError(
            f"{path} must have blue 0 everywhere, because a mask's label is red + 256 green, got blue "
            f"{pixels[row, column, 2]} at row {row}, column {column}"
        )
    wide: Labels = pixels[..., :2].astype(np.int64)  # bytes times 256 would overflow
    return np.asarray(wide[..., 0] + 256 * wide[..., 1])


def read_pixels(path: Path) -> tuple[str, NDArray[np.generic]]:
    """Mode and pixels of a PNG as they are stored; the indices if it has a palette.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read or is too large.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist (index.csv or the masks folder names this PNG mask)")
    try:
        content = path.read_bytes()
        mode, pixels = _decode(content)
    except Image.DecompressionBombError:
        raise ValueError(
            f"{path} must be a mask of at most {MAX_PIXELS // 10**6} million pixels, got a larger one"
        ) from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} must be a PNG mask, got another format") from None
    # Pillow's decoders raise nearly any exception on damaged input; all of them mean the same to the user.
    except Exception as error:
        raise ValueError(f"{path} must be a PNG mask, got a damaged one: {error}") from error
    # Pillow drops the lower byte of 16-bit colors, which would hold a label. Byte 24 of every PNG is its bit depth.
    return ("RGB with 16 bits" if mode == "RGB" and content[24] == 16 else mode), pixels


def _decode(content: bytes) -> tuple[str, NDArray[np.generic]]:
    with quiet():  # the caller reports problems by file name; Pillow's own warnings do not have it
        with Image.open(io.BytesIO(content), formats=("PNG",)) as opened:
            opened.verify()  # checksums: without them, some damage decodes to other labels
        with Image.open(io.BytesIO(content), formats=("PNG",)) as opened:
            if opened.height * opened.width > MAX_PIXELS:
                raise Image.DecompressionBombError
            return opened.mode, np.asarray(opened)
