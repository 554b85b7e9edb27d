"""Verification: whether what a run stores is what was written, asked before anything is concluded from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weakspot.audit.store.integrity import damaged, file_digest
from weakspot.audit.store.maps import FOLDER, chunk_path
from weakspot.audit.store.records import (
    FILE,
    LISTING,
    SHARDS,
    SKIPPED,
    Note,
    is_sound,
    read_note,
    shard_files,
    shard_number,
)


def check_records(folder: Path, about: Mapping[str, Any], name: str) -> None:
    """Compare all records, or the shards of a run that is not complete, with their digests.

    Args:
        folder: of the run.
        about: what run.json says.
        name: what the user calls the folder.

    Raises:
        DamagedError: naming what is not what was written.
    """
    bad = damaged_tables(folder, about)
    if about["status"] != "complete":
        bad += [f"{SHARDS}/{path.name}" for path in damaged_shards(folder)]
    if bad:
        raise damaged(name, bad)


def damaged_tables(folder: Path, about: Mapping[str, Any]) -> list[str]:
    """Names of the run's own Parquet files that are gone or not what was written."""
    names = [LISTING, *([FILE, SKIPPED] if about["status"] == "complete" else [])]
    expected: Mapping[str, str] = about.get("checksums", {})
    known = [name for name in names if name in expected or about["status"] == "complete"]
    return [name for name in known if _digest(folder / name) != expected.get(name)]


def damaged_shards(folder: Path) -> list[Path]:
    """Files of shards that are not what was written, or lie beside another one of the same number."""
    paths = sorted((folder / SHARDS).glob("[0-9]*-*.parquet"))
    first = {shard_number(path): path for path in reversed(paths)}
    return [path for path in paths if not is_sound(path) or first[shard_number(path)] != path]


def damaged_maps(folder: Path, note: Note, sizes: Mapping[str, int] | None = None) -> list[str]:
    """Paths below maps.zarr of the shard's files that are gone or not what was written.

    Args:
        folder: of the run.
        note: of the shard.
        sizes: of the files, where they are kept at a URL: only these are compared.
    """
    if sizes is not None:
        return [path for path, (size, _) in note.maps.items() if sizes.get(path) != size]
    return [path for path, (_, digest) in note.maps.items() if _digest(folder / FOLDER / path) != digest]


def _digest(path: Path) -> str | None:
    try:
        return file_digest(path)
    except OSError:
        return None


class MapCheck:
    """Compares the files that maps are read from with their digests, each once.

    Maps of shards that are not finished have none, and those kept at a URL are left to the checksums of their chunks.

    Args:
        folder: of the run.
        size: images of a shard.
        name: what the user calls the folder.
    """

    def __init__(self, folder: Path, size: int, name: str) -> None:
        self.folder, self.size, self.name = folder, size, name
        self.shards = shard_files(folder)
        self.notes: dict[int, Note] = {}
        self.sound: set[tuple[str, int]] = set()

    def __call__(self, array: str, ndim: int, images: NDArray[np.int64]) -> None:
        """Raise DamagedError where these images of an array lie in a file that is not what was written."""
        bad = []
        for number in np.unique(images // self.size).tolist():
            if (array, number) in self.sound or number not in self.shards:
                continue
            note = self._note(number)
            for path in (f"{array}/zarr.json", chunk_path(array, number, ndim)):
                stored = note.maps.get(path)
                if _digest(self.folder / FOLDER / path) != (None if stored is None else stored[1]):
                    if stored is None and path.endswith("zarr.json"):
                        continue  # a shard of which the array holds nothing does not mention it
                    bad.append(f"{FOLDER}/{path}")
            self.sound.add((array, number))
        if bad:
            raise damaged(self.name, bad)

    def _note(self, number: int) -> Note:
        if number not in self.notes:
            if not is_sound(self.shards[number]):
                raise damaged(self.name, [f"{SHARDS}/{self.shards[number].name}"])
            self.notes[number] = read_note(self.shards[number])
        return self.notes[number]
