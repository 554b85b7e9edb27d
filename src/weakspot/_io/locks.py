"""The lock of a folder: one process writes, others are told who it is."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_handles: set[int] = set()  # of the locks that this process holds


class LockedError(ValueError):
    """Another process writes into the folder."""


@contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Hold the folder's lock of that name.

    The system frees it when its holder dies, however that happens, so that a dead process on this machine blocks
    nobody; processes that the holder has forked do not hold it. What holds it on another machine cannot be asked.

    Args:
        folder: must be there.
        name: of the file, which says who holds the lock and is gone with it.

    Raises:
        LockedError: when another process holds it, saying which and since when.
        OSError: when the folder cannot be written.
    """
    path = folder / name
    handle = _open(path)
    _handles.add(handle)
    try:
        about = {
            "pid": os.getpid(),
            "host": platform.node(),
            "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        }
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(about).encode(), 0)
        yield
    finally:
        if handle in _handles:  # not in a forked child that leaves the block too
            path.unlink(missing_ok=True)  # before it is let go: who opens it later makes a new one
            _handles.remove(handle)
            os.close(handle)


def _let_go() -> None:
    """In a forked child: a copy of the handle would keep the lock when its holder is dead."""
    for handle in _handles:
        os.close(handle)
    _handles.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _open(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        free, holder = _hold(handle), _holder(handle)
        if free and holder.get("host", platform.node()) == platform.node():
            if path.exists() and path.stat().st_ino == os.fstat(handle).st_ino:
                return handle
            os.close(handle)  # its holder removed it between the two calls
            continue
        os.close(handle)
        raise LockedError(_refusal(path, holder))


def _hold(handle: int) -> bool:
    """Whether the lock could be had; by process number where the system has no locks."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pid = _holder(handle).get("pid")
        return pid is None or pid == os.getpid() or not _alive(int(pid))
    return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it lives and belongs to somebody else
    return True


def _holder(handle: int) -> dict[str, Any]:
    try:
        said = json.loads(os.pread(handle, 4096, 0) or b"{}")
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _refusal(path: Path, holder: dict[str, Any]) -> str:
    who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'this machine')}"
    here = holder.get("host", platform.node()) == platform.node()
    hint = "wait for it, or give another folder" if here else f"if that one is dead, delete {path}"
    return f"{path.parent} is being written by {who} since {holder.get('since', 'just now')}; {hint}"
