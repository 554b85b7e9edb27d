"""Reading: the images of one shard, and what could not be read.

A file that is there and is no picture is skipped. A file that was listed and is not to be had any more is missing: it
may come back, so an audit without it is not complete.

Picture files: a batch of images as PNGs.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

import torch
from PIL import Image
from torch import Tensor

from weakspot._io.files import write_atomic
from weakspot._io.urls import fetched, is_url, local_copy
from weakspot.audit.plan.image_list import Entry
from weakspot.audit.store.integrity import digest_of, file_digest
from weakspot.classifier import Classifier
from weakspot.datasets.arrays import array_image, stored_image
from weakspot.images import open_pictures

AT_ONCE = 8  # files that are read at the same time to be compared
Read = tuple[Tensor | None, str, str]  # pixels (C, H, W) or None, digest of what is stored, remark


class MissingError(Exception):
    """A listed file is not to be had any more."""


@dataclass(frozen=True, eq=False)
class Opened:
    """Images that could be read, and those that could not.

    Attributes:
        images: (n, C, H, W) in [0, 1], at the model's size.
        entries: of these n images.
        contents: n digests of what is stored, the same wherever a file lies.
        remarks: n sentences, empty where there is nothing to say.
        skipped: (name, reason) of files that are no pictures.
        missing: (name, reason) of files that are not to be had.
        digests: of every entry that was asked for, in order; None of those that were not read.
    """

    images: Tensor
    entries: Sequence[Entry]
    contents: Sequence[str]
    remarks: Sequence[str]
    skipped: Sequence[tuple[str, str]]
    missing: Sequence[tuple[str, str]]
    digests: Sequence[str | None]


def open_entries(entries: Sequence[Entry], classifier: Classifier) -> Opened:
    """Open every image of a shard; what cannot be read is skipped or missing, with the reason."""
    good: list[tuple[Entry, Tensor, str, str]] = []
    skipped, missing = [], []
    digests: list[str | None] = [None] * len(entries)
    contents = _fetched(entries)
    for place, entry in enumerate(entries):
        if entry.trouble:
            skipped.append((entry.name, entry.trouble))
            continue
        try:
            if entry.index in contents:
                pixels, digest, remark = _opened_content(entry, contents.pop(entry.index), classifier)
            else:
                pixels, digest, remark = _opened(entry, classifier)
        except MissingError as error:
            missing.append((entry.name, str(error)))
            continue
        digests[place] = digest
        if pixels is None:
            skipped.append((entry.name, remark or "it cannot be read; skipped"))
        else:
            good.append((entry, pixels, digest, remark))
    images = torch.stack([pixels for _, pixels, _, _ in good]) if good else torch.empty(0)
    own = [one[0] for one in good], [one[2] for one in good], [one[3] for one in good]
    return Opened(images, *own, skipped, missing, digests)


def content_digests(entries: Sequence[Entry]) -> list[str | None]:
    """Digests of the stored content as it is now, as `Opened.digests` has them, without decoding anything."""
    contents = _fetched(entries)

    def look(entry: Entry) -> str | None:
        try:
            if entry.trouble:
                return None
            if entry.index in contents:
                content = contents[entry.index]
                return None if content is None else digest_of(content)
            path = _path(entry)
            if entry.row >= 0:
                return digest_of(stored_image(path, entry.row))
            return file_digest(path) if _is_regular(path) else ""
        except (MissingError, OSError, ValueError, IndexError):
            return None

    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="weakspot-compare") as pool:
        return list(pool.map(look, entries))


def _text(entry: Entry) -> str:
    return os.fsdecode(entry.path)


def _fetched(entries: Sequence[Entry]) -> dict[int, bytes | None]:
    """Contents of the pictures that lie at a URL, by index; None of those that are not there."""
    remote = [entry for entry in entries if is_url(_text(entry)) and entry.row < 0 and not entry.trouble]
    contents = fetched([_text(entry) for entry in remote])
    return dict(zip((entry.index for entry in remote), contents, strict=True))


def _opened_content(entry: Entry, content: bytes | None, classifier: Classifier) -> Read:
    if content is None:
        raise MissingError("the file is no longer there, or may not be read any more")
    with tempfile.TemporaryDirectory(prefix="weakspot-") as folder:
        path = Path(folder, "picture").with_suffix(Path(entry.name).suffix)
        path.write_bytes(content)
        return _opened(replace(entry, path=os.fsencode(path)), classifier)


def _opened(entry: Entry, classifier: Classifier) -> Read:
    """Raises MissingError when the file is not to be had."""
    path = _path(entry)
    if entry.row >= 0:
        try:
            pixels, content, remark = array_image(path, entry.row, classifier.input_size, classifier.channels)
        except (OSError, ValueError, IndexError) as error:  # it had this row when it was listed
            raise MissingError(f"the array can no longer be read ({_first_line(error)})") from error
        return pixels, digest_of(content), remark
    try:
        if not _is_regular(path):
            return None, "", "not a regular file; skipped"
        (picture,) = open_pictures(path, size=classifier.input_size, channels=classifier.channels)
        # Read to its end, so that a file of which the system cannot give the rest is not taken for a damaged picture.
        return picture.pixels, file_digest(path), picture.remark
    except (OSError, ValueError) as error:  # ValueError: it has become a folder, which holds any number
        raise MissingError(_why(error)) from error


def _path(entry: Entry) -> Path:
    text = _text(entry)
    try:
        return local_copy(text) if is_url(text) else Path(text)
    except FileNotFoundError as error:
        raise MissingError(_why(error)) from error


def _is_regular(path: Path) -> bool:
    """Whether it is a file that can be read, False of pipes and devices.

    Raises:
        OSError: when there is no such file, or no permission to read it, or its disk does not answer.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError("a folder has taken its place")
    if not stat.S_ISREG(mode):
        return False
    with path.open("rb"):
        return True


def _why(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file is no longer there"
    if isinstance(error, PermissionError):
        return "there is no longer permission to read the file"
    said = error.strerror if isinstance(error, OSError) and error.strerror else _first_line(error)
    return f"the file can no longer be read ({said})"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


LONGEST = 180  # bytes of a file name


def write_pngs(images: Tensor, names: Sequence[str], folder: Path) -> list[str]:
    """Write (N, C, H, W) in [0, 1] to NAME.png each, rounded to 8 bits.

    Args:
        images: gray or color.
        names: of the pictures they were made of, folders in them kept; their suffixes go, and equal ones are numbered.
        folder: made where it is missing.

    Returns:
        Paths within `folder`, one for each image.
    """
    written, taken = [], {str(parent).lower() for name in names for parent in _stem(name).parents}
    for image, name in zip(images, names, strict=True):
        stem = _stem(name)
        path, number = stem.with_name(stem.name + ".png"), 1
        while str(path).lower() in taken:
            number += 1
            path = stem.with_name(f"{stem.name}-{number}.png")
        taken.add(str(path).lower())
        levels = (image.detach().cpu().clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
        picture = Image.fromarray(levels if levels.shape[-1] == 3 else levels[..., 0])
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / path, partial(picture.save, format="PNG"))
        written.append(str(path))
    return written


def _stem(name: str) -> PurePosixPath:
    """The name without suffix, inside its folder, short enough for any file system."""
    parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in {"/", "..", "."}]
    whole = PurePosixPath(*parts) if parts else PurePosixPath("image")
    return whole.with_name(whole.stem.encode()[:LONGEST].decode(errors="ignore") or "image")
