"""Writing: a file is there whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any], *, durable: bool = False) -> None:
    """Let `write` make a draft beside `path` and put it in its place: there whole, or not at all.

    Where it is to be `durable`, it has reached the disk on return and outlives a loss of power. What a link points to
    is replaced, not the link; a pipe or a device is written to as it is.
    """
    if path.exists() and not path.is_file():
        write(path)
        return
    path = Path(os.path.realpath(path))
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(draft)
        if durable:
            synchronize(draft)
        draft.replace(path)
        if durable:
            synchronize(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def synchronize(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk; of folders where the system can do that."""
    if path.is_dir():
        with suppress(OSError):
            _wait_for(path)
    else:
        _wait_for(path)


def _wait_for(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
