"""Listing: every image of an audit by name, before any is opened, and the class it stands for."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from weakspot._io.urls import exists, files, is_url, local_copy
from weakspot.datasets.arrays import ARRAYS, array_labels, array_length

if TYPE_CHECKING:
    import pyarrow as pa


FILE_COLUMNS = ("file", "path", "image", "filename", "name")
CLASS_COLUMNS = ("class_index", "label", "class", "target", "index")


@dataclass(frozen=True)
class Entry:
    """One image to be opened.

    Attributes:
        index: its place in the listing, and in every map.
        name: what records call it: its path below what all sources share; of an array, and its row.
        path: the file, or its URL.
        row: of the array, -1 in a picture file.
        label: its class, -1 where the model's own prediction is to be it.
        label_from: "folder", "csv", "array" or "prediction".
        trouble: why it cannot be used, else empty.
    """

    index: int
    name: str
    path: bytes
    row: int
    label: int
    label_from: str
    trouble: str


class _Found(NamedTuple):
    path: Path  # of what a URL names, the URL made a path, for its name alone
    place: bytes  # path or URL to open
    row: int
    folder: str  # the first folder below the source, or empty
    label: int
    trouble: str


def list_images(
    sources: Sequence[str],
    class_names: Sequence[str],
    class_count: int,
    *,
    labels: str = "auto",
    limit: int | None = None,
    seed: int = 0,
) -> pa.Table:
    """A table of `Entry`, sorted by name: the same whatever the order of sources, and of files on the disk.

    Args:
        sources: absolute paths or URLs; what is not there is left out.
        class_names: of the model; may be empty.
        class_count: how many classes the model has.
        labels: as in `Plan`.
        limit: how many images at most, drawn by name and seed.
        seed: of that draw.

    Raises:
        ValueError: when labels were asked for that are not there, naming the file or folder.
    """
    import pyarrow as pa

    present = {Path(os.path.normpath(source)): source for source in sorted(sources) if exists(source)}
    classes = _classes(class_names, class_count)
    rows = {source: list(_walk(source, present[source])) for source in sorted(present)}
    root = _root(rows)
    table = _read_table(Path(labels), classes, class_count) if Path(labels).suffix else None
    found: dict[str, tuple[_Found, int, str]] = {}
    for source, inside in rows.items():
        by_folder = _by_folder(present[source], inside, classes, labels)
        for one in inside:
            name = _name(one, root)
            label, label_from, trouble = -1, "prediction", one.trouble
            if table is not None:
                label, label_from = _looked_up(table, one, source), "csv"
                if label < 0 and not trouble:
                    trouble = f"{Path(labels).name} has no class for it; skipped"
            elif labels != "predictions" and one.label >= 0:
                label, label_from = one.label, "array"
                if label >= class_count:
                    trouble = f"its label is {label}; the model has {class_count} classes; skipped"
            elif one.folder in by_folder:
                label, label_from = by_folder[one.folder], "folder"
            found.setdefault(name, (one._replace(trouble=trouble), label, label_from))
    names = sorted(found)
    if limit is not None and limit < len(names):
        names = sorted(sorted(names, key=lambda name: _draw(name, seed))[:limit])
    chosen = [found[name] for name in names]
    return pa.table(
        {
            "name": pa.array(names, pa.large_string()),
            "path": pa.array([one.place for one, _, _ in chosen], pa.large_binary()),
            "row": pa.array([one.row for one, _, _ in chosen], pa.int64()),
            "label": pa.array([label for _, label, _ in chosen], pa.int64()),
            "label_from": pa.array([label_from for _, _, label_from in chosen], pa.string()),
            "trouble": pa.array([one.trouble for one, _, _ in chosen], pa.string()),
        }
    )


def entries(listing: pa.Table, start: int, count: int) -> list[Entry]:
    """Some of a listing's images."""
    return [Entry(start + place, **row) for place, row in enumerate(listing.slice(start, count).to_pylist())]


def _walk(source: Path, text: str) -> Iterator[_Found]:
    if is_url(text):
        yield from _walk_url(source, text)
        return
    if source.suffix.lower() in ARRAYS and source.is_file():
        labels = array_labels(source)
        for row in range(array_length(source)):
            yield _Found(source, os.fsencode(source), row, "", -1 if labels is None else int(labels[row]), "")
        return
    if not source.is_dir():
        yield _Found(source, os.fsencode(source), -1, "", -1, _unreadable(source))
        return
    closed: list[Path] = []
    for folder, inner, names in os.walk(source, onerror=lambda error: closed.append(Path(error.filename))):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                path = Path(folder, name)
                below = path.relative_to(source).parts
                yield _Found(
                    path, os.fsencode(path), -1, below[0] if len(below) > 1 else "", -1, _unreadable(path)
                )
    for path in closed:
        yield _Found(path, os.fsencode(path), -1, "", -1, "no permission to read the folder; skipped")


def _unreadable(path: Path) -> str:
    """Why a file cannot be read already when it is listed; what happens to it later makes it missing."""
    if os.access(path, os.R_OK):
        return ""
    return "no permission to read the file; skipped" if path.exists() else "a link to nothing; skipped"


def _walk_url(source: Path, url: str) -> Iterator[_Found]:
    if source.suffix.lower() in ARRAYS:
        for one in _walk(local_copy(url), ""):
            yield one._replace(path=source, place=url.encode())
        return
    for found, below in files(url):
        folder, slash, _ = below.partition("/")
        yield _Found(source / below, found.encode(), -1, folder if slash else "", -1, "")


def _root(rows: Mapping[Path, Sequence[_Found]]) -> Path | None:
    """What names are relative to: the one folder, or what several sources share; None where they share nothing."""
    sources = list(rows)
    if len(sources) == 1 and _is_folder(sources[0], rows[sources[0]]):
        return sources[0]
    try:
        return Path(os.path.commonpath([source.parent for source in sources])) if sources else Path()
    except ValueError:  # paths and URLs
        return None


def _is_folder(source: Path, inside: Sequence[_Found]) -> bool:
    return source.is_dir() or any(one.path != source for one in inside)


def _name(found: _Found, root: Path | None) -> str:
    near = found.path if root is None else Path(os.path.relpath(found.path, root))
    path = near.as_posix().encode("utf-8", "surrogateescape")
    printable = path.decode("utf-8", "backslashreplace")
    return printable if found.row < 0 else f"{printable}#{found.row:07d}"


def _draw(name: str, seed: int) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8, key=str(seed).encode()).digest()


def _classes(class_names: Sequence[str], class_count: int) -> Mapping[str, int]:
    """Spellings of class names to their numbers; what names two classes names none."""
    spelled: dict[str, int] = {}
    for number, name in enumerate(class_names):
        for spelling in {_plain(name), _plain(name.partition(",")[0])}:
            spelled[spelling] = -1 if spelling in spelled else number
    numbers = {str(number): number for number in range(class_count)}
    return {key: number for key, number in {**numbers, **spelled}.items() if number >= 0}


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", " ").replace("-", " ")


def _by_folder(
    source: str, inside: Sequence[_Found], classes: Mapping[str, int], labels: str
) -> dict[str, int]:
    """Folder to class, where every folder of the source is named like one."""
    if labels not in {"auto", "folders"}:
        return {}
    folders = {one.folder for one in inside if one.folder}
    known = {folder: classes[_plain(folder)] for folder in folders if _plain(folder) in classes}
    if len(known) == len(folders) and (folders or labels == "auto"):
        return known
    if labels == "folders":
        odd = min(folders - known.keys()) if folders else ""
        why = f"its folder {odd!r} is named like none of the model's classes" if odd else "it has no folders"
        raise ValueError(
            f"labels is 'folders', but {source}: {why}; accepted is one folder for each class, or another --labels"
        )
    return {}


def _read_table(path: Path, classes: Mapping[str, int], class_count: int) -> dict[str, int]:
    """File name to class of a CSV file."""
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(file)
        heads = {(head or "").strip().lower(): head for head in reader.fieldnames or ()}
        columns = [
            next((heads[name] for name in names if name in heads), None)
            for names in (FILE_COLUMNS, CLASS_COLUMNS)
        ]
        if columns[0] is None or columns[1] is None:
            raise ValueError(
                f"labels: {path} has the columns {', '.join(heads) or 'none'}; accepted are file and label (a class's "
                "name or number) in the first line"
            )
        table = {}
        for row in reader:
            said = _plain(row[columns[1]] or "")
            if said not in classes:
                raise ValueError(
                    f"labels: {path} has {row[columns[1]]!r} for {row[columns[0]]}; accepted are the model's class "
                    f"names and numbers from 0 to {class_count - 1}"
                )
            table[Path(row[columns[0]] or "").as_posix()] = classes[said]
    return table


def _looked_up(table: Mapping[str, int], found: _Found, source: Path) -> int:
    """The class by the path below the source, by the path from the source on, or by the file's own name."""
    name = found.path.name if found.row < 0 else str(found.row)
    below = found.path.relative_to(source).as_posix() if found.path != source else name
    for spelling in (below, f"{source.name}/{below}", name):
        if spelling in table:
            return table[spelling]
    return -1
