"""The lock of a run folder: one process writes, others are told who it is."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FILE = "audit.lock"


class LockedError(ValueError):
    """Another process writes into the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock.

    The system frees it when its holder dies, however that happens, so that a dead process on this machine blocks
    nobody. What holds it on another machine cannot be asked.

    Raises:
        LockedError: when another process holds it, saying which and since when.
        OSError: when the folder cannot be written.
    """
    path = folder / FILE
    handle = _open(path)
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
        path.unlink(missing_ok=True)  # before it is let go: who opens it later makes a new one
        os.close(handle)


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
