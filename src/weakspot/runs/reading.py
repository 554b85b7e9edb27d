"""Reading: the images of one shard, and what could not be read."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from weakspot.classifier import Classifier
from weakspot.images import open_pictures
from weakspot.runs.arrays import array_image
from weakspot.runs.listing import Entry
from weakspot.runs.places import fetched, is_url, local_copy

GONE = "the file is no longer there, or cannot be read any more; skipped"


@dataclass(frozen=True, eq=False)
class Opened:
    """Images that could be read, and those that could not.

    Attributes:
        images: (n, C, H, W) in [0, 1], at the model's size.
        entries: of these n images.
        contents: n digests of what is stored, the same wherever a file lies.
        remarks: n sentences, empty where there is nothing to say.
        skipped: (name, reason) of the others.
    """

    images: Tensor
    entries: Sequence[Entry]
    contents: Sequence[str]
    remarks: Sequence[str]
    skipped: Sequence[tuple[str, str]]


def open_entries(entries: Sequence[Entry], classifier: Classifier) -> Opened:
    """Open every image of a shard; what cannot be read is skipped, with the reason."""
    good: list[tuple[Entry, Tensor, str, str]] = []
    skipped = []
    remote = [entry for entry in entries if is_url(_text(entry)) and entry.row < 0 and not entry.trouble]
    contents = dict(
        zip((entry.index for entry in remote), fetched([_text(entry) for entry in remote]), strict=True)
    )
    for entry in entries:
        pixels: Tensor | None
        if entry.trouble:
            pixels, content, remark = None, b"", entry.trouble
        elif entry.index in contents:
            pixels, content, remark = _opened_content(entry, contents.pop(entry.index), classifier)
        else:
            pixels, content, remark = _opened(entry, classifier)
        if pixels is None:
            skipped.append((entry.name, remark or "it cannot be read; skipped"))
        else:
            good.append((entry, pixels, hashlib.blake2b(content, digest_size=8).hexdigest(), remark))
    images = torch.stack([pixels for _, pixels, _, _ in good]) if good else torch.empty(0)
    return Opened(
        images, [one[0] for one in good], [one[2] for one in good], [one[3] for one in good], skipped
    )


def _text(entry: Entry) -> str:
    return os.fsdecode(entry.path)


def _opened_content(
    entry: Entry, content: bytes | None, classifier: Classifier
) -> tuple[Tensor | None, bytes, str]:
    if content is None:
        return None, b"", GONE
    with tempfile.TemporaryDirectory(prefix="weakspot-") as folder:
        path = Path(folder, "picture").with_suffix(Path(entry.name).suffix)
        path.write_bytes(content)
        return _opened(replace(entry, path=os.fsencode(path)), classifier)


def _opened(entry: Entry, classifier: Classifier) -> tuple[Tensor | None, bytes, str]:
    text = _text(entry)
    path = local_copy(text) if is_url(text) else Path(text)
    if entry.row >= 0:
        return array_image(path, entry.row, classifier.input_size, classifier.channels)
    try:
        (picture,) = open_pictures(path, size=classifier.input_size, channels=classifier.channels)
        return picture.pixels, path.read_bytes() if picture.pixels is not None else b"", picture.remark
    except (OSError, ValueError):  # ValueError: it has become a folder, which holds any number
        return None, b"", GONE
