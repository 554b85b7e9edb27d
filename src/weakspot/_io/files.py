"""Files that are written whole or not at all, and the lock of a folder that one process writes to."""

import json
import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

_lock_handles: set[int] = set()  # file descriptors of the locks that this process holds


def write_atomic(path: Path, write: Callable[[Path], object], *, durable: bool = False) -> None:
    """Write a file so that readers see the old content or the new one, never a part.

    Args:
        path: of the file. If it is a symbolic link, the file that it points to is replaced and the link stays; a pipe
            or a device is written to directly.
        write: writes the content to the path of a draft in the same folder, which then replaces the file.
        durable: whether to return only after the file has reached the disk, so that it survives a loss of power.
    """
    if path.exists() and not path.is_file():
        write(path)
        return
    path = Path(os.path.realpath(path))
    # In the same folder, because a rename is atomic only within a file system. Named by process and thread, because
    # two of them may write one file at once.
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        write(draft)
        # Before the rename: a loss of power must not leave the new name with no content behind it.
        if durable:
            synchronize(draft)
        draft.replace(path)
        if durable:
            synchronize(path.parent)  # the new name is an entry of the folder
    finally:
        draft.unlink(missing_ok=True)


def synchronize(path: Path) -> None:
    """Wait until a file, or the entries of a folder, have reached the disk."""
    if path.is_dir():
        with suppress(OSError):  # some systems cannot synchronize folders
            _fsync(path)
    else:
        _fsync(path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class LockedError(ValueError):
    """Another process is writing to the folder."""


@contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Hold a lock of the folder.

    The operating system releases the lock when the process that holds it ends, however it ends, so a dead process on
    this machine blocks nobody. Processes that the holder has forked do not hold the lock. Whether a holder on another
    machine is alive cannot be checked.

    Args:
        folder: must exist.
        name: of the lock file. It names the holder and is removed with the lock.

    Raises:
        LockedError: if another process holds the lock; the message names it.
        OSError: if the folder is not writable.
    """
    path = folder / name
    handle = _acquire(path)
    _lock_handles.add(handle)
    try:
        holder = {
            "pid": os.getpid(),
            "host": platform.node(),
            "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        }
        # A holder that died leaves its own content, which may be longer.
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(holder).encode(), 0)
        yield
    finally:
        if handle in _lock_handles:  # a forked child that leaves the block does not release the parent's lock
            path.unlink(
                missing_ok=True
            )  # before the release: a process that opens the path later makes a new file
            _lock_handles.remove(handle)
            os.close(handle)


def _close_in_child() -> None:
    """Close a forked child's copies of the descriptors, which would hold the lock after the parent's death."""
    for handle in _lock_handles:
        os.close(handle)
    _lock_handles.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def _acquire(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        acquired, holder = _try_lock(handle), _holder(handle)
        # A lock file of another machine counts even if this system could lock it: network file systems differ.
        if acquired and holder.get("host", platform.node()) == platform.node():
            if path.exists() and path.stat().st_ino == os.fstat(handle).st_ino:
                return handle
            os.close(handle)  # the previous holder removed the file between open and lock; try again
            continue
        os.close(handle)
        raise LockedError(_locked_message(path, holder))


def _try_lock(handle: int) -> bool:
    """Lock the file if it is free; on systems without file locks, check whether the recorded process is alive."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # Windows has no fcntl, and some network file systems have no locks.
    except (ImportError, OSError):
        pid = _holder(handle).get("pid")
        return pid is None or pid == str(os.getpid()) or not _is_alive(int(pid))
    return True


def _is_alive(pid: int) -> bool:
    try:
        # On POSIX, signal 0 only checks whether the process exists.
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it is alive and belongs to another user
    return True


def _holder(handle: int) -> dict[str, str]:
    """The content of a lock file: pid, host and since; empty if it is none."""
    try:
        content = json.loads(os.pread(handle, 4096, 0) or b"{}")
    except ValueError:
        return {}
    return {key: str(value) for key, value in content.items()} if isinstance(content, dict) else {}


def _locked_message(path: Path, holder: dict[str, str]) -> str:
    process = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'this machine')}"
    is_local = holder.get("host", platform.node()) == platform.node()
    remedy = "wait for it, or give another folder" if is_local else f"if that process is dead, delete {path}"
    return f"{path.parent} is being written by {process} since {holder.get('since', 'just now')} ({remedy})"
