"""Verification: whether a run's files are what was written, checked before anything is concluded from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from weakspot.audit.store.digests import damaged, file_digest
from weakspot.audit.store.maps import MAPS, chunk_path
from weakspot.audit.store.records import (
    LISTING,
    RECORDS,
    SHARDS,
    SKIPPED,
    Note,
    is_intact,
    read_note,
    shard_files,
    shard_number,
)
from weakspot.audit.store.run_info import RunInfo


def check_records(folder: Path, info: RunInfo, name: str) -> None:
    """Compare all records (of an incomplete run, its shards) with their digests.

    Raises:
        DamagedError: naming the files that differ in the run called `name`.
    """
    bad = damaged_tables(folder, info)
    if not info.complete:
        bad += [f"{SHARDS}/{path.name}" for path in damaged_shards(folder)]
    if bad:
        raise damaged(name, bad)


def damaged_tables(folder: Path, info: RunInfo) -> list[str]:
    """Names of the run's own Parquet files that are gone or differ from what was written."""
    names = [LISTING, RECORDS, SKIPPED] if info.complete else [LISTING] if LISTING in info.checksums else []
    return [name for name in names if _digest(folder / name) != info.checksums.get(name)]


def damaged_shards(folder: Path) -> list[Path]:
    """Shard files that differ from what was written, or duplicate the number of another."""
    paths = sorted((folder / SHARDS).glob("[0-9]*-*.parquet"))
    # Reversed, so that the first file in order wins.
    first = {shard_number(path): path for path in reversed(paths)}
    return [path for path in paths if not is_intact(path) or first[shard_number(path)] != path]


def damaged_maps(folder: Path, note: Note, sizes: Mapping[str, int] | None = None) -> list[str]:
    """Paths below maps.zarr of a shard's files that are gone or differ from what was written.

    Args:
        folder: of the run.
        note: of the shard.
        sizes: of the files at a URL; if given, only sizes are compared.
    """
    if sizes is not None:
        return [path for path, (size, _) in note.maps.items() if sizes.get(path) != size]
    return [path for path, (_, digest) in note.maps.items() if _digest(folder / MAPS / path) != digest]


def _digest(path: Path) -> str | None:
    try:
        return file_digest(path)
    except OSError:
        return None


class MapCheck:
    """Compares the files that maps are read from with their digests, each once.

    Maps of unfinished shards have no digests. Maps at a URL are left to the checksums of their chunks.

    Args:
        folder: of the run.
        size: number of images of a shard.
        name: the path or URL that the user gave.
    """

    def __init__(self, folder: Path, size: int, name: str) -> None:
        self.folder, self.size, self.name = folder, size, name
        self.shards = shard_files(folder)
        self.notes: dict[int, Note] = {}
        self.checked: set[tuple[str, int]] = set()

    def __call__(self, array: str, ndim: int, images: NDArray[np.int64]) -> None:
        """Raise DamagedError if one of these images of an array is in a file that differs from what was written."""
        bad = []
        # Consecutive images share a shard, and so one file of every array.
        for number in np.unique(images // self.size).tolist():
            if (array, number) in self.checked or number not in self.shards:
                continue
            note = self._note(number)
            for path in (f"{array}/zarr.json", chunk_path(array, number, ndim)):
                size_and_digest = note.maps.get(path)
                if size_and_digest is None and path.endswith("zarr.json"):
                    continue  # the array holds nothing of this shard
                # A chunk that the note does not mention must not exist.
                expected = None if size_and_digest is None else size_and_digest[1]
                if _digest(self.folder / MAPS / path) != expected:
                    bad.append(f"{MAPS}/{path}")
            self.checked.add((array, number))
        if bad:
            raise damaged(self.name, bad)

    def _note(self, number: int) -> Note:
        if number not in self.notes:
            if not is_intact(self.shards[number]):
                raise damaged(self.name, [f"{SHARDS}/{self.shards[number].name}"])
            self.notes[number] = read_note(self.shards[number])
        return self.notes[number]
