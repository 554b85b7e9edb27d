"""Building: a folder of pictures and somebody's labels become a concept set."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from weakspot._checks import ImageWarning, warn
from weakspot.dissection.broden_files import Entry, drafted, half, shares_of, write_tables
from weakspot.dissection.concepts import BASE_COLUMNS
from weakspot.dissection.label_masks import LARGEST_LABEL, nearest, read_pixels, write_labels
from weakspot.images import open_pictures

SHAPE_TOLERANCE = 0.05  # of height / width; masks that were resized apart from their images differ by less

Names = Sequence[str] | Mapping[int, str] | Path | str


def build_concepts(
    images: Path | str,
    out: Path | str,
    *,
    masks: Path | str | None = None,
    names: Names | None = None,
    category: str = "object",
    void: Collection[int] = (),
    size: tuple[int, int] | None = None,
) -> Path:
    """Write a folder of pictures and their labels as a concept set that `ConceptSet.open` reads.

    With `masks`, each picture has a PNG of the same path and stem whose pixels are class numbers: gray of 8 or 16
    bits, the indices of a palette, or two values. A class gets the label number value + 1, and masks are kept at half
    the picture's size. Without, the first folder below `images` names the label of the whole picture. Every picture
    is in the split "train".

    Args:
        images: a folder; pictures in subfolders count, names that start with a dot do not.
        out: the folder to make; there is nothing of it when the work breaks off.
        masks: a folder of the same shape as `images`.
        names: of the classes: a list from 0, value to name, or a text file with one name a line. With two names, a
            mask of 0 and 255 means the first and the second.
        category: the column they are labeled in.
        void: values that mean nothing is known there.
        size: (height, width) that pictures are cropped to at their center and resized to, masks alike; they are then
            written as PNG. Without it pictures are copied as they are.

    Returns:
        The path `out`.

    Raises:
        FileNotFoundError: when a folder or the file of names is missing.
        ValueError: when `out` is not empty, a mask does not fit, or nothing is left to write.

    Warns:
        ImageWarning: when pictures without a mask, or which cannot be read, are skipped.
    """
    images, out = Path(images).resolve(), Path(out).absolute()
    if not category.strip() or category in BASE_COLUMNS or set(category) & set(";()/\\"):
        raise ValueError(
            f"category is {category!r}; accepted is a name without ; ( ) / \\ that is none of {', '.join(BASE_COLUMNS)}"
        )
    if not isinstance(void, Collection):
        raise ValueError(f"void is {void!r}; accepted is a list of values, such as [255]")
    if masks is None and (names is not None or len(void)):
        raise ValueError(
            f"names is {names} and void is {void} without masks; accepted are both with masks only"
        )
    with drafted(out) as draft:
        if masks is None:
            labels, entries = _from_folders(images, draft, category, size)
        else:
            labels = _read_names(names, void)
            entries = _from_masks(images, Path(masks).resolve(), draft, labels, category, void, size)
            labels = {value + 1: name for value, name in labels.items() if value not in void}
        write_tables(draft, {category: labels}, entries)
    return out


def _from_folders(
    images: Path, draft: Path, category: str, size: tuple[int, int] | None
) -> tuple[dict[int, str], list[Entry]]:
    paths = _pictures(images)
    astray = [path for path in paths if path.parent == images]
    _warn_skipped(images, astray, len(paths), "lie in no folder that names a label")
    labeled = [path for path in paths if path.parent != images]
    folders = sorted({path.relative_to(images).parts[0] for path in labeled})
    sizes = _copy(images, labeled, draft, size)
    entries = []
    for path, (name, sides) in sizes.items():
        number = folders.index(path.relative_to(images).parts[0]) + 1
        entries.append(Entry(name, sides, half(sides), {category: str(number)}, {number: 1.0}))
    if not entries:
        raise ValueError(
            f"{images} holds no picture to use; accepted is one folder of pictures for each label"
        )
    return dict(enumerate(folders, 1)), entries


def _from_masks(
    images: Path,
    masks: Path,
    draft: Path,
    names: Mapping[int, str],
    category: str,
    void: Collection[int],
    size: tuple[int, int] | None,
) -> list[Entry]:
    grids = {path.relative_to(masks).with_suffix(""): path for path in _pictures(masks) if _is_png(path)}
    own = set(grids.values())  # masks may lie among the pictures
    paths = [path for path in _pictures(images) if path not in own]
    stems = {path: path.relative_to(images).with_suffix("") for path in paths}
    bare = [path for path in paths if stems[path] not in grids]
    _warn_skipped(images, bare, len(paths), f"have no mask in {masks}")
    sizes = _copy(images, [path for path in paths if stems[path] in grids], draft, size)
    if not sizes:
        raise ValueError(
            f"{images} holds no picture to use; accepted are pictures with a PNG of the same stem in {masks}"
        )
    table = np.full(LARGEST_LABEL + 1, -1, dtype=np.int64)
    table[list(names)] = np.array(list(names)) + 1
    table[list(void)] = 0
    folder = "masks"
    while (images / folder).exists():  # a picture there could have a mask's name
        folder += "_"
    two = set(names) == {0, 1} and 255 not in void
    entries = []
    for path, (name, sides) in sizes.items():
        grid = grids[stems[path]]
        labels = _numbers(grid, table, two)
        stretch = labels.shape[0] * sides[1] / (labels.shape[1] * sides[0])
        if size is None and abs(stretch - 1) > SHAPE_TOLERANCE:
            raise ValueError(
                f"{grid} is {labels.shape[0]} x {labels.shape[1]} and its picture {sides[0]} x {sides[1]} "
                "(height x width); accepted are masks of the picture's shape"
            )
        labels = nearest(labels, half(sides), crop=size)
        plane = f"{folder}/{path.relative_to(images).as_posix()}.png"
        write_labels(draft / "images" / plane, labels)
        entries.append(Entry(name, sides, half(sides), {category: plane}, shares_of(labels)))
    return entries


def _numbers(path: Path, table: NDArray[np.int64], two: bool) -> NDArray[np.int64]:
    """(H, W) label numbers of a mask of class numbers, 0 where it is void."""
    mode, pixels = read_pixels(path)
    if mode not in {"1", "L", "P", "I;16", "I"}:
        raise ValueError(
            f"{path} is a PNG of mode {mode}; accepted are class numbers as 8-bit or 16-bit gray, as indices of a "
            "palette, or as black and white"
        )
    values = pixels.astype(np.int64)
    if two and bool(np.isin(values, (0, 255)).all()):
        values //= 255
    labels: NDArray[np.int64] = table[values]
    if (labels < 0).any():
        row, column = (int(place[0]) for place in (labels < 0).nonzero())
        raise ValueError(
            f"{path} is {values[row, column]} at row {row}, column {column}, which neither names nor void holds; "
            f"accepted are {_some((table >= 0).nonzero()[0].tolist())}"
        )
    return labels


def _some(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:20])) + (" and more" if len(values) > 20 else "")


def _read_names(names: Names | None, void: Collection[int]) -> dict[int, str]:
    """Class number to name."""
    if names is None:
        raise ValueError(
            "names is not given; accepted with masks is a list of class names in order of the values"
        )
    if isinstance(names, str | Path):
        path = Path(names)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such file; accepted is one class name a line")
        try:
            lines = path.read_text("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} cannot be read ({error}); accepted is text in UTF-8") from None
        # An empty line is a value without a name, and refused where a mask holds it.
        read = {value: line.strip() for value, line in enumerate(lines) if line.strip()}
    else:
        read = dict(names) if isinstance(names, Mapping) else dict(enumerate(names))
    for value in [*read, *void]:
        if not isinstance(value, int) or not 0 <= value <= LARGEST_LABEL - (value not in void):
            raise ValueError(f"names or void hold the value {value!r}; accepted are 0 to {LARGEST_LABEL - 1}")
    if all(value in void for value in read):
        raise ValueError(f"names is {names}, which leaves no class besides void; accepted is at least one")
    return read


def _is_png(path: Path) -> bool:
    return path.suffix.lower() == ".png"


def _pictures(folder: Path) -> list[Path]:
    """Files in a folder and its subfolders that are named as pictures, sorted."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder")
    known = Image.registered_extensions()
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in known
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _copy(
    images: Path, paths: Sequence[Path], draft: Path, size: tuple[int, int] | None
) -> dict[Path, tuple[str, tuple[int, int]]]:
    """Pictures into the draft's images/: of each that can be read, its name there and (height, width)."""
    (draft / "images").mkdir()
    copied: dict[Path, tuple[str, tuple[int, int]]] = {}
    unread = []
    for path in paths:
        relative = path.relative_to(images)
        if ";" in str(relative) or str(relative) != str(relative).strip():
            raise ValueError(f"{path}: its name cannot stand in index.csv; accepted are names without ;")
        # Pixels are decoded even to be copied: only so is it known that they can be.
        (picture,) = open_pictures(path, size=size)
        if picture.pixels is None:
            unread.append(path)
            continue
        goal = draft / "images" / (relative if size is None else relative.with_name(f"{path.name}.png"))
        goal.parent.mkdir(parents=True, exist_ok=True)
        if size is None:
            shutil.copyfile(path, goal)
        else:
            levels = (picture.pixels.permute(1, 2, 0) * 255).round().byte()
            Image.fromarray(levels.numpy()).save(goal)
        sides = (picture.pixels.shape[1], picture.pixels.shape[2])
        copied[path] = goal.relative_to(draft / "images").as_posix(), sides
    _warn_skipped(images, unread, len(paths), "cannot be read")
    return copied


def _warn_skipped(images: Path, skipped: Sequence[Path], total: int, why: str) -> None:
    if skipped:
        warn(
            f"{images}: {len(skipped)} of {total} pictures {why} and are skipped, the first is "
            f"{skipped[0].relative_to(images).as_posix()}",
            ImageWarning,
        )
