"""The Ray engine: Ray Data hands shards to workers that hold the model, on this machine or on a cluster.

Ray's session: a cluster started or joined, without its chatter, and left as it was found.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from weakspot._checks import warn
from weakspot._io.urls import is_url
from weakspot.audit.engines.base import Backlog, Results
from weakspot.audit.engines.ray_worker import Attempts, GivenUpError, Task, Worker
from weakspot.audit.store.integrity import StoppedError
from weakspot.audit.store.run import versions
from weakspot.audit.work.shard import ShardResult
from weakspot.models.probe import probe
from weakspot.models.specs import fingerprint

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


AHEAD = 2  # shards that a worker holds: the one it works on, and the next


class RayEngine:
    """Workers of a Ray cluster.

    Args:
        workers: how many, or None for as many as there are CPUs or GPUs.
    """

    def __init__(self, workers: int | None) -> None:
        self.workers = workers
        self.about: Mapping[str, Any] = {"name": "ray"}

    def results(self, work: Backlog, progress: Callable[[float], None]) -> Results:
        del progress  # workers tell only of whole shards
        if not work.missing:
            return
        import ray
        from ray.exceptions import RayError

        workers, threads, gpus = shares(work.classifier.mean.device.type, self.workers)
        self.about = {"name": "ray", "version": ray.__version__, "workers": workers, "threads": threads}
        try:
            with closing(_batches(work, min(workers, len(work.missing)), threads, gpus)) as batches:
                for batch in batches:
                    for number, content in zip(
                        *(batch[name].to_pylist() for name in batch.column_names), strict=True
                    ):
                        yield number, _unpacked(content)
        except (RayError, GivenUpError) as error:
            said = str(error).strip().partition("\n")[0]
            why = (
                said
                if isinstance(error, GivenUpError)
                else f"Ray has stopped: {type(error).__name__}: {said}"
            )
            raise StoppedError(
                f"{why}; what is written is whole: go on by --resume, with fewer --workers where memory was too small",
                resumable=True,
            ) from error


def shares(device: str, workers: int | None) -> tuple[int, int, float]:
    """How many workers, CPU threads of each (as many as there is room for, or OMP_NUM_THREADS), GPUs of each.

    Raises:
        ValueError: when the cluster has too little for so many, or for any.
    """
    import ray

    every: Any = ray.nodes
    nodes = [node["Resources"] for node in every() if node["Alive"]]
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    gpus = sum(node.get("GPU", 0) for node in nodes) if device == "cuda" else 0
    if device == "cuda" and not gpus:
        raise ValueError("device is cuda, but the Ray cluster has no GPU; accepted is --device cpu")
    count = workers or max(1, int(gpus) or sum(cpus))
    fitting = [threads for threads in range(1, max(cpus, default=0) + 1)
               if sum(own // threads for own in cpus) >= count]  # fmt: skip
    if not fitting:
        raise ValueError(f"workers is {count}; accepted are at most {sum(cpus)}, the CPUs of the Ray cluster")
    asked = os.environ.get("OMP_NUM_THREADS", "")
    most = int(asked) if asked.isdigit() and int(asked) else max(fitting)
    return count, min(max(fitting), most), min(1.0, gpus / count)


def _batches(work: Backlog, workers: int, threads: int, gpus: float) -> Generator[Any, None, None]:
    """Tables of number and content, one row each as a rule, as they come."""
    import ray

    task = Task(
        plan=replace(work.plan, model=replace(work.plan.model, device=work.classifier.mean.device.type)),
        listing=work.listing,
        size=work.size,
        batch_size=work.batch_size,
        fingerprint=fingerprint(work.classifier),
        probe=probe(work.classifier),
        versions=versions(),
        sources=tuple(source for source in work.plan.sources if not is_url(source) and Path(source).exists()),
        threads=threads,
        paths=tuple(path or str(Path.cwd()) for path in sys.path),
        folder=str(Path.cwd()),
        workers=workers,
        attempts=ray.remote(num_cpus=0, max_restarts=-1)(Attempts).remote(),
    )
    numbers = ray.data.from_items(
        [{"number": number} for number in work.missing], override_num_blocks=len(work.missing)
    )
    done = numbers.map_batches(
        Worker,
        fn_constructor_args=(task,),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=AHEAD),
        num_cpus=threads,
        num_gpus=gpus or None,
    )
    yield from done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _unpacked(content: bytes) -> ShardResult:
    """What a worker sent: a result and its warnings, or what was raised there."""
    found, said = pickle.loads(content)  # noqa: S301 - made by our own worker, as all that Ray carries
    for message, category in said:
        warn(message, category)
    if isinstance(found, Exception):
        raise found
    return found  # type: ignore[no-any-return]


@contextmanager
def joined(workers: int | None, address: str | None) -> Iterator[RayEngine]:
    """The engine on the cluster at that address, on one that this process has joined already, or on one of its own."""
    with session(workers, address):
        yield RayEngine(workers)
