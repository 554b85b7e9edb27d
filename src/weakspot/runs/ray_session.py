"""Ray's session: a cluster started or joined, without its chatter, and left as it was found."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STORE = 2**30  # bytes of shared memory of a cluster of our own; beyond that Ray goes to the disk
PATIENCE = 10  # seconds for a cluster to answer at all
TALK = ("enable_progress_bars", "print_on_execution_start")  # of Ray Data
SILENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@contextmanager
def session(workers: int | None, address: str | None) -> Iterator[None]:
    """A cluster for the time of the block; one that this process had joined before is used and left alone.

    Args:
        workers: how many are to have room in a cluster of our own; None for one for each CPU.
        address: of a cluster, or None for one of our own.

    Raises:
        ValueError: when Ray is not installed, or no cluster answers.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray
            import ray.data
    except ImportError:
        raise ValueError(
            "engine is 'ray', but Ray is not installed; install it by pip install 'weakspot[ray]'"
        ) from None
    with _quiet():
        if ray.is_initialized():
            if address is not None:
                raise ValueError(
                    f"ray-address is {address!r}, but this process has joined a Ray cluster; accepted is no address"
                )
            yield
            return
        try:
            _start(workers, address or os.environ.get("RAY_ADDRESS"))
            yield
        finally:
            ray.shutdown()


def _start(workers: int | None, address: str | None) -> None:
    import ray

    options: dict[str, Any] = {"address": address}
    if address is None or address == "local":
        room = max(workers or 1, _cpus())
        options = {
            "address": "local", "num_cpus": room, "object_store_memory": STORE, "include_dashboard": False,
        }  # fmt: skip
    ends = signal.getsignal(signal.SIGTERM)
    try:
        _knock(address)
        with _environment(), _silence(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(**options, log_to_driver=False, logging_level=logging.CRITICAL)
    except Exception as error:
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        said = (
            f"ray-address is {address!r}, where no Ray cluster could be joined"
            if "num_cpus" not in options
            else "engine is 'ray', but Ray could not be started on this machine"
        )
        raise ValueError(f"{said} ({why})") from error
    finally:
        # Ray ends the process on SIGTERM; whoever called us has its own way.
        if threading.current_thread() is threading.main_thread() and ends is not None:
            signal.signal(signal.SIGTERM, ends)


def _knock(address: str | None) -> None:
    """Raises OSError where nothing answers at host:port; Ray itself would wait for many minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing on standard error, what libraries in C++ say neither: one line on their own log level comes that way."""
    try:
        sys.stderr.flush()
        kept = os.dup(2)
    except (OSError, AttributeError):
        yield  # there is none
        return
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _environment() -> Iterator[None]:
    """`SILENT`, for what Ray starts, where nothing else was asked for."""
    added = SILENT.keys() - os.environ.keys()
    os.environ.update({name: SILENT[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _WithoutRay:
    """A stream that leaves out what Ray's own threads write into it: reports of dead workers, which are replaced."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if threading.current_thread().name.startswith("ray_"):
            return len(text)
        return int(self._stream.write(text) or 0)


@contextmanager
def _quiet() -> Iterator[None]:
    import ray.data

    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    spoken = {name: getattr(context, name) for name in TALK if hasattr(context, name)}
    for name in spoken:
        setattr(context, name, False)
    try:
        with contextlib.redirect_stdout(_WithoutRay(sys.stdout)):
            yield
    finally:
        logger.setLevel(level)
        for name, value in spoken.items():
            setattr(context, name, value)
