"""`build_concepts`: a folder of pictures, with masks or sorted into folders by label, becomes a concept set."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from weakspot._checks import ImageWarning, warn
from weakspot.dissection.broden_files import (
    BASE_COLUMNS,
    LARGEST_LABEL,
    Entry,
    draft_folder,
    half,
    label_fractions,
    nearest,
    read_pixels,
    write_labels,
    write_tables,
)
from weakspot.images import open_pictures

SHAPE_TOLERANCE = (
    0.05  # of height / width; masks that were resized separately from their images differ by less
)

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

    With `masks`, each picture has a PNG with the same path and stem whose pixels are class numbers: gray with 8 or 16
    bits, palette indices, or two values. A class gets the label number value + 1, and masks are stored at half the
    picture's size. Without masks, the first folder below `images` names the label of the whole picture. Every picture
    is in the split "train".

    Args:
        images: a folder. Pictures in subfolders count, names that start with a dot do not.
        out: the folder to create. Nothing of it remains if an error occurs.
        masks: a folder with the same structure as `images`.
        names: of the classes: a list from 0, a mapping from value to name, or a text file with one name per line. With
            two names, a mask of 0 and 255 means the first and the second.
        category: the column of index.csv for the labels.
        void: values that mean that nothing is known there.
        size: (height, width) to which pictures and masks are cropped at their center and resized; pictures are then
            written as PNG. Default: pictures are copied unchanged.

    Returns:
        The path `out`.

    Raises:
        FileNotFoundError: if a folder or the file of names is missing.
        ValueError: if `out` is not empty, a mask is invalid, or nothing is left to write.

    Warns:
        ImageWarning: if pictures are skipped because they have no mask or cannot be read.
    """
    images, out = Path(images).resolve(), Path(out).absolute()
    if not category.strip() or category in BASE_COLUMNS or set(category) & set(";()/\\"):
        raise ValueError(
            f"category must be a name without ; ( ) / \\ that is not one of {', '.join(BASE_COLUMNS)}, got {category!r}"
        )
    if not isinstance(void, Collection):
        raise ValueError(f"void must be a list of values, such as [255], got {void!r}")
    if masks is None and (names is not None or len(void)):
        raise ValueError(f"masks must be given together with names and void, got names {names}, void {void}")
    with draft_folder(out) as draft:
        if masks is None:
            labels, entries = _from_folders(images, draft, category, size)
        else:
            labels = _read_names(names, void)
            pairs = _masked_pictures(images, Path(masks).resolve())
            table = _label_table(labels, void)
            two_valued = set(labels) == {0, 1} and 255 not in void
            entries = []
            folder = _mask_folder(images)
            copied = _copy(images, list(pairs), draft, size)
            if not copied:
                raise ValueError(
                    f"{images} must hold pictures with a PNG of the same stem in {masks}, got none"
                )
            for path, (name, sides) in copied.items():
                mask = _read_mask(pairs[path], sides, table, two_valued=two_valued, size=size)
                plane = f"{folder}/{path.relative_to(images).as_posix()}.png"
                write_labels(draft / "images" / plane, mask)
                entries.append(Entry(name, sides, half(sides), {category: plane}, label_fractions(mask)))
            labels = {value + 1: name for value, name in labels.items() if value not in void}
        write_tables(draft, {category: labels}, entries)
    return out


def _from_folders(
    images: Path, draft: Path, category: str, size: tuple[int, int] | None
) -> tuple[dict[int, str], list[Entry]]:
    """Label names and entries of pictures whose first folder names their label."""
    paths = _pictures(images)
    outside = [path for path in paths if path.parent == images]
    _warn_skipped(images, outside, len(paths), "are in no folder that names a label")
    labeled = [path for path in paths if path.parent != images]
    folders = sorted({path.relative_to(images).parts[0] for path in labeled})
    entries = []
    for path, (name, sides) in _copy(images, labeled, draft, size).items():
        number = folders.index(path.relative_to(images).parts[0]) + 1
        entries.append(Entry(name, sides, half(sides), {category: str(number)}, {number: 1.0}))
    if not entries:
        raise ValueError(
            f"{images} must hold one folder of pictures for each label, got no picture to use (or give masks)"
        )
    return dict(enumerate(folders, 1)), entries


def _masked_pictures(images: Path, masks: Path) -> dict[Path, Path]:
    """Picture to its mask, for the pictures that have one."""
    by_stem = {
        path.relative_to(masks).with_suffix(""): path
        for path in _pictures(masks)
        if path.suffix.lower() == ".png"
    }
    own = set(by_stem.values())  # the masks may lie among the pictures
    paths = [path for path in _pictures(images) if path not in own]
    pairs = {path: by_stem.get(path.relative_to(images).with_suffix("")) for path in paths}
    without = [path for path in paths if pairs[path] is None]
    _warn_skipped(images, without, len(paths), f"have no mask in {masks}")
    return {path: mask for path, mask in pairs.items() if mask is not None}


def _mask_folder(images: Path) -> str:
    """A name for the folder of masks that no folder of pictures has."""
    folder = "masks"
    while (images / folder).exists():
        folder += "_"
    return folder


def _label_table(names: Mapping[int, str], void: Collection[int]) -> NDArray[np.int64]:
    """(LARGEST_LABEL + 1,) the label number of each mask value: value + 1, 0 for void, -1 if there is none."""
    table = np.full(LARGEST_LABEL + 1, -1, dtype=np.int64)
    table[list(names)] = np.array(list(names)) + 1
    # After the names, because a void value may have a name as well.
    table[list(void)] = 0
    return table


def _read_mask(
    path: Path,
    sides: tuple[int, int],
    table: NDArray[np.int64],
    *,
    two_valued: bool,
    size: tuple[int, int] | None,
) -> NDArray[np.int64]:
    """Label numbers of a mask of class numbers, at half the size of its picture; 0 where it is void."""
    mode, pixels = read_pixels(path)
    if mode not in {"1", "L", "P", "I;16", "I"}:
        raise ValueError(
            f"{path} must hold class numbers as 8-bit or 16-bit gray, as indices of a palette, or as black and white, "
            f"got a PNG of mode {mode}"
        )
    values = pixels.astype(np.int64)
    if two_valued and bool(np.isin(values, (0, 255)).all()):
        values //= 255
    labels: NDArray[np.int64] = table[values]
    if (labels < 0).any():
        row, column = (int(place[0]) for place in (labels < 0).nonzero())
        valid = (table >= 0).nonzero()[0].tolist()
        listed = ", ".join(map(str, valid[:20])) + (" and more" if len(valid) > 20 else "")
        raise ValueError(
            f"{path} must hold values in names or void ({listed}), got {values[row, column]} at row {row}, "
            f"column {column}"
        )
    stretch = labels.shape[0] * sides[1] / (labels.shape[1] * sides[0])
    if size is None and abs(stretch - 1) > SHAPE_TOLERANCE:
        raise ValueError(
            f"{path} must have the shape of its picture, {sides[0]} x {sides[1]} (height x width), got "
            f"{labels.shape[0]} x {labels.shape[1]}"
        )
    return nearest(labels, half(sides), crop=size)


def _read_names(names: Names | None, void: Collection[int]) -> dict[int, str]:
    """Class number to name."""
    if names is None:
        raise ValueError("names must be the class names in order of the mask values, got None with masks")
    if isinstance(names, str | Path):
        path = Path(names)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist (names must be a file with one class name per line)"
            )
        try:
            lines = path.read_text("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} must be a text file in UTF-8, got: {error}") from None
        # An empty line is a value without a name: an error only if a mask holds that value.
        by_value = {value: line.strip() for value, line in enumerate(lines) if line.strip()}
    else:
        by_value = dict(names) if isinstance(names, Mapping) else dict(enumerate(names))
    for value in [*by_value, *void]:
        # A class gets the number value + 1, so its value must be one less than the largest number.
        if not isinstance(value, int) or not 0 <= value <= LARGEST_LABEL - (value not in void):
            raise ValueError(
                f"names must hold values from 0 to {LARGEST_LABEL - 1} and void from 0 to {LARGEST_LABEL}, "
                f"got {value!r}"
            )
    if all(value in void for value in by_value):
        raise ValueError(f"names must leave at least one class besides void, got {names}")
    return by_value


def _pictures(folder: Path) -> list[Path]:
    """Files in a folder and its subfolders with the extension of a picture, sorted."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist or is not a folder")
    extensions = Image.registered_extensions()
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in extensions
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _copy(
    images: Path, paths: Sequence[Path], draft: Path, size: tuple[int, int] | None
) -> dict[Path, tuple[str, tuple[int, int]]]:
    """Copy pictures into the draft's images/: the name there and (height, width) of each that can be read."""
    (draft / "images").mkdir()
    copied: dict[Path, tuple[str, tuple[int, int]]] = {}
    unreadable = []
    for path in paths:
        relative = path.relative_to(images)
        if ";" in str(relative) or str(relative) != str(relative).strip():
            raise ValueError(
                f"{path} must have a name without ; and outer spaces, because index.csv lists it"
            )
        # Pixels are decoded even if the file is only copied: nothing else shows that they can be.
        (picture,) = open_pictures(path, size=size)
        if picture.pixels is None:
            unreadable.append(path)
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
    _warn_skipped(images, unreadable, len(paths), "cannot be read")
    return copied


def _warn_skipped(images: Path, skipped: Sequence[Path], total: int, reason: str) -> None:
    if skipped:
        warn(
            f"{images}: {len(skipped)} of {total} pictures {reason} and are skipped; the first is "
            f"{skipped[0].relative_to(images).as_posix()}",
            ImageWarning,
        )
