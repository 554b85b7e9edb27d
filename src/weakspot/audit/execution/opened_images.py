"""The images of one group, the reasons why others cannot be read, and the regions of other images as controls.

A file that exists and is no picture is skipped. A file that was listed and is unavailable now is missing: it may come
back, so an audit without it is not complete.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weakspot._errors import first_line
from weakspot._io.urls import fetched, is_url, local_copy
from weakspot.audit.plan.image_list import Entry, entries
from weakspot.audit.store.digests import digest_of, file_digest
from weakspot.classifier import Classifier
from weakspot.datasets.arrays import array_image, stored_image
from weakspot.images import open_pictures

if TYPE_CHECKING:
    import pyarrow as pa

AT_ONCE = 8  # files that are read concurrently to be compared
TRIED = 50  # other images tried at most for the controls of one image and region
AREA = 0.1  # largest relative difference between the areas of a region and its control
MEMORY = 64 * 2**20  # bytes of remembered regions
Content = tuple[Tensor | None, str, str]  # pixels (C, H, W) or None, digest of what is stored, remark


class MissingError(Exception):
    """A listed file is unavailable now."""


@dataclass(frozen=True, eq=False)
class OpenedImages:
    """The images of a group that could be read, and those that could not.

    Attributes:
        images: (n, C, H, W) in [0, 1], at the model's size.
        entries: of these n images.
        contents: n digests of the stored content, independent of where a file is.
        remarks: n sentences, empty if there is nothing to remark.
        skipped: (name, reason) of files that are no pictures.
        missing: (name, reason) of files that are unavailable.
        digests: of every entry, in order; None for those that were not read.
    """

    images: Tensor
    entries: Sequence[Entry]
    contents: Sequence[str]
    remarks: Sequence[str]
    skipped: Sequence[tuple[str, str]]
    missing: Sequence[tuple[str, str]]
    digests: Sequence[str | None]


def open_entries(entries: Sequence[Entry], classifier: Classifier) -> OpenedImages:
    """Open some images; those that cannot be read are skipped or missing, with the reason."""
    images: list[Tensor] = []
    facts: list[tuple[Entry, str, str]] = []
    skipped, missing = [], []
    digests: list[str | None] = [None] * len(entries)
    # Remote pictures are fetched together, as each request waits for the network.
    contents = _fetched(entries)
    for place, entry in enumerate(entries):
        if entry.error:
            skipped.append((entry.name, entry.error))
            continue
        try:
            if entry.index in contents:
                # Taken out, so that the bytes of each picture are freed once it is decoded.
                pixels, digest, remark = _open_content(entry, contents.pop(entry.index), classifier)
            else:
                pixels, digest, remark = _open(entry, classifier)
        except MissingError as error:
            missing.append((entry.name, str(error)))
            continue
        digests[place] = digest
        if pixels is None:
            skipped.append((entry.name, remark or "it cannot be read; skipped"))
        else:
            images.append(pixels)
            facts.append((entry, digest, remark))
    return OpenedImages(
        torch.stack(images) if images else torch.empty(0),
        [entry for entry, _, _ in facts],
        [digest for _, digest, _ in facts],
        [remark for _, _, remark in facts],
        skipped,
        missing,
        digests,
    )


def content_digests(entries: Sequence[Entry]) -> list[str | None]:
    """Digests of the stored content now, comparable with `OpenedImages.digests`; nothing is decoded."""
    contents = _fetched(entries)

    def digest(entry: Entry) -> str | None:
        try:
            if entry.error:
                return None
            if entry.index in contents:
                content = contents[entry.index]
                return None if content is None else digest_of(content)
            path = _path(entry)
            # The digest of an array's row covers that row alone: other rows may change.
            if entry.row >= 0:
                return digest_of(stored_image(path, entry.row))
            return file_digest(path) if _is_regular(path) else ""
        except (MissingError, OSError, ValueError, IndexError):
            return None

    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="weakspot-compare") as pool:
        return list(pool.map(digest, entries))


def _location(entry: Entry) -> str:
    return os.fsdecode(entry.path)


def _fetched(entries: Sequence[Entry]) -> dict[int, bytes | None]:
    """Index -> content of the pictures at URLs; None for those that do not exist."""
    remote = [entry for entry in entries if is_url(_location(entry)) and entry.row < 0 and not entry.error]
    contents = fetched([_location(entry) for entry in remote])
    return dict(zip((entry.index for entry in remote), contents, strict=True))


def _open_content(entry: Entry, content: bytes | None, classifier: Classifier) -> Content:
    if content is None:
        raise MissingError("the file no longer exists, or may no longer be read")
    # Through a file, so that pictures behind URLs are read exactly as local ones are.
    with tempfile.TemporaryDirectory(prefix="weakspot-") as folder:
        path = Path(folder, "picture").with_suffix(Path(entry.name).suffix)
        path.write_bytes(content)
        return _open(replace(entry, path=os.fsencode(path)), classifier)


def _open(entry: Entry, classifier: Classifier) -> Content:
    """Raises MissingError if the file is unavailable."""
    path = _path(entry)
    if entry.row >= 0:
        try:
            pixels, content, remark = array_image(path, entry.row, classifier.input_size, classifier.channels)
        except (OSError, ValueError, IndexError) as error:  # the row existed when it was listed
            raise MissingError(f"the array can no longer be read ({first_line(error)})") from error
        return pixels, digest_of(content), remark
    try:
        if not _is_regular(path):
            return None, "", "not a regular file; skipped"
        (picture,) = open_pictures(path, size=classifier.input_size, channels=classifier.channels)
        # The digest reads to the end: if the system cannot deliver the rest of the file, it is missing, not damaged.
        return picture.pixels, file_digest(path), picture.remark
    # ValueError: it is a folder by now, which holds any number of pictures.
    except (OSError, ValueError) as error:
        raise MissingError(_reason(error)) from error


def _path(entry: Entry) -> Path:
    location = _location(entry)
    try:
        return local_copy(location) if is_url(location) else Path(location)
    except FileNotFoundError as error:
        raise MissingError(_reason(error)) from error


def _is_regular(path: Path) -> bool:
    """Whether it is a file that can be read; False for pipes and devices.

    Raises:
        OSError: if there is no such file, no permission to read it, or its disk does not answer.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError("a folder has replaced it")
    if not stat.S_ISREG(mode):
        return False
    # A missing permission and a broken disk show only when the file is opened.
    with path.open("rb"):
        return True


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file no longer exists"
    if isinstance(error, PermissionError):
        return "there is no longer permission to read the file"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    return f"the file can no longer be read ({reason})"


class Donors:
    """Draws other images of a run for each image, and remembers their regions as controls.

    A region that is made from an image (its class activation, its background) often lies in the middle, where most
    attacks achieve most. A copy shifted elsewhere has the same area but not the same tendency; the region of another
    image has both. The draw depends on the seed, the content of the image and the list of images alone, not on shards,
    batches or workers.

    Args:
        listing: all images of the run.
        classifier: images are opened at its input size.
        seed: of the draws.
    """

    def __init__(self, listing: pa.Table, classifier: Classifier, seed: int) -> None:
        self.listing, self.classifier, self.seed = listing, classifier, seed
        # (region text, image) -> digest of the image and its region, packed; None if it has none. Oldest use first.
        self.remembered: OrderedDict[tuple[str, int], tuple[str, NDArray[np.uint8]] | None] = OrderedDict()
        self.bytes = 0

    def regions(
        self,
        text: str,
        make: Callable[[OpenedImages], Tensor | None],
        content: str,
        own: Tensor,
        count: int,
    ) -> tuple[list[Tensor], list[str]]:
        """The regions of the first `count` donors of one image; fewer if there are not enough.

        Skipped are images that cannot be read, for which the region cannot be made, that equal the image itself or an
        earlier donor, or whose region differs in area by more than a tenth. Their regions are used as they are, never
        resized.

        Args:
            text: of the region.
            make: returns the region (1, 1, H, W) of one opened image, or None.
            content: digest of the image.
            own: bool (1, H, W), the image's own region.
            count: number of regions wanted.

        Returns:
            The regions, and the names of donors whose files are missing: once they are back, others may be drawn.
        """
        area = int(own.sum())
        regions: list[Tensor] = []
        missing: list[str] = []
        seen = {content}
        # Donors are tried in an order that depends on the image's content, so that equal images get equal controls.
        for index in self._order(content):
            if len(regions) == count:
                break
            donor = self._donor(text, make, index, missing)
            if donor is None or donor[0] in seen:
                continue
            seen.add(donor[0])
            # Masks are remembered as bits: one eighth of the memory.
            mask = np.unpackbits(donor[1], count=own.numel()).reshape(tuple(own.shape)).astype(bool)
            if abs(int(mask.sum()) - area) <= AREA * area:
                regions.append(torch.from_numpy(mask).to(own.device))
        return regions, missing

    def _order(self, content: str) -> Iterator[int]:
        digest = hashlib.blake2b(content.encode(), digest_size=16, key=str(self.seed).encode()).digest()
        # NumPy guarantees the stream of a seeded PCG64, so that draws are equal on every machine.
        rng = np.random.default_rng(int.from_bytes(digest))
        return iter(rng.permutation(len(self.listing))[:TRIED].tolist())

    def _donor(
        self, text: str, make: Callable[[OpenedImages], Tensor | None], index: int, missing: list[str]
    ) -> tuple[str, NDArray[np.uint8]] | None:
        """Digest of an image and its region, packed."""
        key = (text, index)
        if key in self.remembered:
            self.remembered.move_to_end(key)
            return self.remembered[key]
        # One image at a time: the last bits of its region must not depend on what it is computed with.
        opened = open_entries(entries(self.listing, index, 1), self.classifier)
        if opened.missing:
            missing.append(opened.missing[0][0])  # not remembered: the file may come back
            return None
        mask = make(opened) if opened.entries else None
        donor = None if mask is None else (opened.contents[0], np.packbits(mask.cpu().numpy()))
        self.remembered[key] = donor
        self.bytes += 0 if donor is None else donor[1].nbytes
        while self.bytes > MEMORY:
            _, oldest = self.remembered.popitem(last=False)
            self.bytes -= 0 if oldest is None else oldest[1].nbytes
        return donor
