"""The list of images of an audit: every image by name, before any is opened, and the class it is attacked as."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from weakspot._io.urls import files, is_url, local_copy
from weakspot.datasets.arrays import ARRAYS, array_labels, array_length
from weakspot.datasets.labels import FOLDERS, ClassIndex, folder_classes, read_labels

if TYPE_CHECKING:
    import pyarrow as pa

LABELS = ("auto", FOLDERS, "predictions")  # sources of labels; any other text is the path of a label file


@dataclass(frozen=True)
class Entry:
    """One image of the list.

    Attributes:
        index: its place in the list, and in every map.
        name: its name in records: the path below what all sources share and, for an array, the row.
        path: the file, or its URL.
        row: of the array; -1 for a picture file.
        label: its class; -1 if the model's own prediction becomes the label.
        label_from: "folder", "array", "prediction", or the name of a format of label files, such as "csv".
        error: why it cannot be used; empty otherwise.
    """

    index: int
    name: str
    path: bytes
    row: int
    label: int
    label_from: str
    error: str


class _Image(NamedTuple):
    path: Path  # for a URL, the URL as a path, used for names alone
    location: bytes  # path or URL to open
    row: int = -1
    folder: str = ""  # the first folder below the source
    label: int = -1
    error: str = ""
    label_from: str = "prediction"

    @property
    def table_path(self) -> Path:
        """The path by which a table of labels lists the image; for an array, its row below the file."""
        return self.path if self.row < 0 else self.path / str(self.row)


def list_images(
    sources: Sequence[str],
    class_names: Sequence[str],
    class_count: int,
    *,
    labels: str = "auto",
    limit: int | None = None,
    seed: int = 0,
) -> pa.Table:
    """A table of `Entry`, sorted by name, independent of the order of sources and of files on the disk.

    Args:
        sources: absolute paths or URLs that exist.
        class_names: of the model; may be empty.
        class_count: number of classes of the model.
        labels: as in `Plan`.
        limit: largest number of images, drawn by name and seed.
        seed: of that draw.

    Raises:
        ValueError: if the labels that were asked for do not exist, naming the file or folder.
    """
    # A URL becomes a path for the names of its images alone; what is opened is the source.
    present = {Path(os.path.normpath(source)): source for source in sorted(sources)}
    classes = ClassIndex(tuple(class_names), class_count)
    images = {source: list(_walk(source, present[source])) for source in sorted(present)}
    root = _common_root(images)
    folders = {
        source: _folder_labels(present[source], group, classes, labels) for source, group in images.items()
    }
    table = None if labels in LABELS else read_labels(Path(labels), classes)
    numbers = (
        {}
        if table is None
        else table.find_all(image.table_path for group in images.values() for image in group)
    )

    def with_label(image: _Image, by_folder: Mapping[str, int]) -> _Image:
        if table is not None:
            label = numbers.get(image.table_path, -1)
            error = f"{Path(labels).name} has no class for it; skipped" if label < 0 else ""
            return image._replace(label=label, label_from=table.format.name, error=image.error or error)
        if labels != "predictions" and image.label >= 0:
            excess = f"its label is {image.label}; the model has {class_count} classes; skipped"
            error = excess if image.label >= class_count else image.error
            return image._replace(label_from="array", error=error)
        if image.folder in by_folder:
            return image._replace(label=by_folder[image.folder], label_from="folder")
        return image._replace(label=-1)

    named: dict[str, _Image] = {}
    # A file below two sources is listed once, by the first of them.
    for source, group in images.items():
        for image in group:
            named.setdefault(_name(image, root), with_label(image, folders[source]))
    # Sorted by name: the index of an image does not depend on the order of the disk.
    names = sorted(named)
    if limit is not None and limit < len(names):
        names = sorted(sorted(names, key=lambda name: _draw(name, seed))[:limit])
    return _table(names, [named[name] for name in names])


def _table(names: Sequence[str], images: Sequence[_Image]) -> pa.Table:
    import pyarrow as pa

    return pa.table(
        {
            "name": pa.array(names, pa.large_string()),
            "path": pa.array([image.location for image in images], pa.large_binary()),
            "row": pa.array([image.row for image in images], pa.int64()),
            "label": pa.array([image.label for image in images], pa.int64()),
            "label_from": pa.array([image.label_from for image in images], pa.string()),
            "error": pa.array([image.error for image in images], pa.string()),
        }
    )


def entries(listing: pa.Table, start: int, count: int) -> list[Entry]:
    """Some consecutive images of a list."""
    return [Entry(start + place, **row) for place, row in enumerate(listing.slice(start, count).to_pylist())]


def _walk(source: Path, location: str) -> Iterator[_Image]:
    """All images of a source; hidden files and folders are left out."""
    if is_url(location):
        yield from _walk_url(source, location)
        return
    if source.suffix.lower() in ARRAYS and source.is_file():
        labels = array_labels(source)
        for row in range(array_length(source)):
            yield _Image(source, os.fsencode(source), row, label=-1 if labels is None else int(labels[row]))
        return
    if not source.is_dir():
        yield _Image(source, os.fsencode(source), error=_unreadable(source))
        return
    closed: list[Path] = []
    roots = [os.path.realpath(source)]
    for folder, inner, names in os.walk(
        source, onerror=lambda error: closed.append(Path(error.filename)), followlinks=True
    ):
        shown = (name for name in sorted(inner) if not name.startswith("."))
        # Changed in place: `os.walk` enters the folders that are left in this list.
        inner[:] = [name for name in shown if _is_new(Path(folder, name), roots)]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            below = path.relative_to(source).parts
            first = below[0] if len(below) > 1 else ""
            yield _Image(path, os.fsencode(path), folder=first, error=_unreadable(path))
    # A folder without permission is an entry of its own, so that it is reported as skipped.
    for path in closed:
        yield _Image(path, os.fsencode(path), error="no permission to read the folder; skipped")


def _is_new(folder: Path, roots: list[str]) -> bool:
    """Whether a folder is to be entered; a link only if it leads out of everything that is entered anyway."""
    if not folder.is_symlink():
        return True
    target = os.path.realpath(folder)
    if any(os.path.commonpath([target, root]) in {target, root} for root in roots):
        return False  # the same images would be listed again, or without end
    roots.append(target)
    return True


def _unreadable(path: Path) -> str:
    """Why a file cannot be read when it is listed; a file that becomes unavailable later is missing instead."""
    if os.access(path, os.R_OK):
        return ""
    return "no permission to read the file; skipped" if path.exists() else "a link to nothing; skipped"


def _walk_url(source: Path, url: str) -> Iterator[_Image]:
    if source.suffix.lower() in ARRAYS:
        # The rows are counted in a local copy; what is stored as their place is the URL.
        for image in _walk(local_copy(url), ""):
            yield image._replace(path=source, location=url.encode())
        return
    for file, below in files(url):
        folder, slash, _ = below.partition("/")
        yield _Image(source / below, file.encode(), folder=folder if slash else "")


def _common_root(images: Mapping[Path, Sequence[_Image]]) -> Path | None:
    """The base of names: the only folder, or what several sources share; None if they share nothing."""
    sources = list(images)
    if len(sources) == 1 and (
        sources[0].is_dir() or any(image.path != sources[0] for image in images[sources[0]])
    ):
        return sources[0]
    try:
        return Path(os.path.commonpath([source.parent for source in sources])) if sources else Path()
    except ValueError:  # paths and URLs
        return None


def _name(image: _Image, root: Path | None) -> str:
    near = image.path if root is None else Path(os.path.relpath(image.path, root))
    # Bytes of a file name that are no text become escapes such as \xff, so that every name can be stored.
    path = near.as_posix().encode("utf-8", "surrogateescape")
    printable = path.decode("utf-8", "backslashreplace")
    return printable if image.row < 0 else f"{printable}#{image.row:07d}"


def _draw(name: str, seed: int) -> bytes:
    # By name, so that the same images are drawn whatever else lies in the folder's order.
    return hashlib.blake2b(name.encode(), digest_size=8, key=str(seed).encode()).digest()


def _folder_labels(source: str, images: Sequence[_Image], classes: ClassIndex, labels: str) -> dict[str, int]:
    """Folder -> class; empty unless folders are labels or, for "auto", every folder is named for a class."""
    if labels not in {"auto", FOLDERS}:
        return {}
    folders = {image.folder for image in images if image.folder}
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
