"""Listing: every image of an audit by name, before any is opened, and the class it stands for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from weakspot._io.urls import exists, files, is_url, local_copy
from weakspot.datasets.arrays import ARRAYS, array_labels, array_length
from weakspot.datasets.labels import FOLDERS, ClassIndex, LabelTable, folder_classes

if TYPE_CHECKING:
    import pyarrow as pa


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
    classes = ClassIndex(tuple(class_names), class_count)
    rows = {source: list(_walk(source, present[source])) for source in sorted(present)}
    root = _root(rows)
    table = LabelTable.read(Path(labels), classes) if Path(labels).suffix else None
    by_table = (
        {} if table is None else table.find_all(_file(one) for inside in rows.values() for one in inside)
    )
    found: dict[str, tuple[_Found, int, str]] = {}
    for source, inside in rows.items():
        by_folder = _by_folder(present[source], inside, classes, labels)
        for one in inside:
            name = _name(one, root)
            label, label_from, trouble = -1, "prediction", one.trouble
            if table is not None:
                label, label_from = by_table.get(_file(one), -1), "csv"
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


def _by_folder(source: str, inside: Sequence[_Found], classes: ClassIndex, labels: str) -> dict[str, int]:
    """Folder to class; empty if folders are not to be labels, or for "auto" if one is not named for a class."""
    if labels not in {"auto", FOLDERS}:
        return {}
    folders = {one.folder for one in inside if one.folder}
    if labels == FOLDERS and not folders:
        raise ValueError(
            f"labels must not be {FOLDERS} for {source}, got no folders below it (give another --labels)"
        )
    try:
        return folder_classes(folders, classes, sorted_order=labels == FOLDERS)
    except ValueError as error:
        if labels == FOLDERS:
            raise ValueError(f"{error} in {source}") from None
        return {}


def _file(found: _Found) -> Path:
    """The path by which a table of labels lists the image; of an array, its row below the file."""
    return found.path if found.row < 0 else found.path / str(found.row)
