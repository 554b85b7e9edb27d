"""The Ray engine: Ray Data hands shards to workers that hold the model, and gets back their groups."""

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
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from weakspot._checks import require, warn
from weakspot._errors import first_line
from weakspot._io.urls import is_url
from weakspot.audit.execution.attacked_groups import Progress
from weakspot.audit.execution.audit_engine import Engine, Results
from weakspot.audit.execution.job import Backlog, Job
from weakspot.audit.execution.ray_worker import Attempts, GivenUpError, Reply, Task, Worker
from weakspot.audit.store.digests import StoppedError
from weakspot.audit.store.run_info import versions
from weakspot.audit.store.unfinished import GroupResult
from weakspot.models.identity import fingerprint, probe

if TYPE_CHECKING:
    import pyarrow as pa

OBJECT_STORE = 2**30  # bytes of shared memory of a cluster that is started here; more goes to the disk
PATIENCE = 10  # seconds in which a cluster must answer
AHEAD = 2  # shards per worker: the one it works on, and the next
# Of Ray Data. A block of its own for each result, which therefore arrives as soon as it is there.
SETTINGS = {"enable_progress_bars": False, "print_on_execution_start": False, "target_max_block_size": 1}
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@contextmanager
def open_ray(workers: int | None, address: str | None) -> Iterator[Engine]:
    """The engine on the cluster at that address, on the one this process has joined, or on one started here.

    A cluster that is started or joined here is left when the block ends; one that was joined before is left alone.

    Args:
        workers: number of workers that a cluster started here has room for; by default one per CPU.
        address: of a cluster, or None.

    Raises:
        ValueError: if Ray is not installed, or no cluster answers.
    """
    require("the engine ray", "ray", extra="ray")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
        import ray.data
    with _quiet_ray_data():
        if ray.is_initialized():
            if address is not None:
                raise ValueError(
                    f"ray-address must be left out, got {address!r}: this process has joined a Ray cluster"
                )
            yield RayEngine(workers)
            return
        try:
            _start(workers, address or os.environ.get("RAY_ADDRESS"))
            yield RayEngine(workers)
        finally:
            ray.shutdown()


def _start(workers: int | None, address: str | None) -> None:
    import ray

    own = address is None or address == "local"
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _check_answers(address)
        with _environment(), _silent_stderr(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(
                address="local" if own else address,
                # Every worker needs a CPU of the cluster, even if the machine has fewer.
                num_cpus=max(workers or 1, _cpus()) if own else None,
                object_store_memory=OBJECT_STORE if own else None,
                include_dashboard=False if own else None,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
            )
    except Exception as error:
        reason = first_line(error)
        problem = (
            "the engine ray could not be started on this machine"
            if own
            else f"ray-address must be that of a running Ray cluster, got {address!r}"
        )
        raise ValueError(f"{problem} ({reason})") from error
    finally:
        # Ray replaces the handler of SIGTERM with one that ends the process; the caller's handler stays.
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGTERM, handler)


def _check_answers(address: str | None) -> None:
    """Raises OSError if nothing answers at host:port, for which Ray would wait many minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Discard standard error, also of C++ libraries, which write to the file descriptor."""
    try:
        sys.stderr.flush()
        saved = os.dup(2)
    except (OSError, AttributeError):
        yield  # there is no standard error
        return
    try:
        with Path(os.devnull).open("w") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@contextmanager
def _environment() -> Iterator[None]:
    """Set `ENVIRONMENT` for the processes that Ray starts; variables that are set already stay."""
    added = ENVIRONMENT.keys() - os.environ.keys()
    os.environ.update({name: ENVIRONMENT[name] for name in added})
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
    """A stream that drops what Ray's own threads write: reports of dead workers, which are replaced."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if threading.current_thread().name.startswith("ray_"):
            return len(text)
        return self._stream.write(text) or 0


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    import ray.data

    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    before = {name: getattr(context, name) for name in SETTINGS if hasattr(context, name)}
    for name in before:
        setattr(context, name, SETTINGS[name])
    try:
        with contextlib.redirect_stdout(_WithoutRay(sys.stdout)):
            yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            setattr(context, name, value)


class RayEngine:
    """Computes shards on the workers of a Ray cluster.

    Args:
        workers: their number; None for as many as there are CPUs or GPUs.
    """

    def __init__(self, workers: int | None) -> None:
        self.workers = workers
        self.about: Mapping[str, str | int | None] = {"name": "ray"}

    def results(self, job: Job, backlog: Backlog, progress: Progress) -> Results:
        del progress  # workers report whole groups only
        if not backlog:
            return
        import ray
        from ray.exceptions import RayError

        workers, threads, gpus = allocation(job.classifier.mean.device.type, self.workers)
        self.about = {"name": "ray", "version": ray.__version__, "workers": workers, "threads": threads}
        try:
            with closing(_replies(job, backlog, min(workers, len(backlog)), threads, gpus)) as batches:
                for batch in batches:
                    for content in batch["content"].to_pylist():
                        yield _unpacked(content)
        except (RayError, GivenUpError) as error:
            reason = first_line(error)
            if isinstance(error, RayError):
                reason = f"Ray has stopped: {type(error).__name__}: {reason}"
            raise StoppedError(
                f"{reason}; what was written is intact: continue with --resume, with fewer --workers if memory ran out",
                resumable=True,
            ) from error


def allocation(device: str, workers: int | None) -> tuple[int, int, float]:
    """The number of workers, CPU threads per worker (the most that fit, or OMP_NUM_THREADS), and GPUs per worker.

    Raises:
        ValueError: if the cluster has too few CPUs for so many workers, or no GPU.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    gpus = sum(node.get("GPU", 0) for node in nodes) if device == "cuda" else 0
    if device == "cuda" and not gpus:
        raise ValueError("device must be cpu, got cuda: the Ray cluster has no GPU")
    count = workers or max(1, int(gpus) or sum(cpus))
    # A worker's threads are on one machine: count workers per machine.
    fitting = [
        threads
        for threads in range(1, max(cpus, default=0) + 1)
        if sum(own // threads for own in cpus) >= count
    ]
    if not fitting:
        raise ValueError(
            f"workers must be at most {sum(cpus)}, the number of CPUs of the Ray cluster, got {count}"
        )
    # More threads than cores of a worker's share would slow all workers down.
    requested = os.environ.get("OMP_NUM_THREADS", "")
    most = int(requested) if requested.isdigit() and int(requested) else max(fitting)
    return count, min(max(fitting), most), min(1.0, gpus / count)


def _replies(
    job: Job, backlog: Backlog, workers: int, threads: int, gpus: float
) -> Generator[pa.Table, None, None]:
    """Tables of content, usually of one row, as they arrive."""
    import ray

    device = job.classifier.mean.device.type
    sources = (source for source in job.plan.sources if not is_url(source))
    task = Task(
        plan=replace(job.plan, model=replace(job.plan.model, device=device)),
        listing=job.listing,
        backlog=backlog,
        fingerprint=fingerprint(job.classifier),
        probe=probe(job.classifier),
        versions=versions(),
        sources=tuple(source for source in sources if Path(source).exists()),
        threads=threads,
        # The empty entry stands for the working directory, which is another one in a worker's process.
        paths=tuple(path or str(Path.cwd()) for path in sys.path),
        folder=str(Path.cwd()),
        workers=workers,
        # It takes no CPU from the workers, and is restarted however often it dies.
        attempts=ray.remote(num_cpus=0, max_restarts=-1)(Attempts).remote(),
    )
    # One block per shard, so that Ray hands out shards one by one.
    numbers = ray.data.from_items(
        [{"number": number} for number in backlog], override_num_blocks=len(backlog)
    )
    results = numbers.map_batches(
        Worker,
        fn_constructor_args=(task,),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=AHEAD),
        num_cpus=threads,
        num_gpus=gpus or None,
    )
    yield from results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _unpacked(content: bytes) -> GroupResult:
    """The result that a worker sent, with its warnings raised; or its exception, raised."""
    reply: Reply = pickle.loads(content)  # noqa: S301 - from our own worker, like everything that Ray carries
    # Raised in this process, so that the user's filters apply and repetitions are shown once.
    for message, category in reply.warnings:
        warn(message, category)
    if isinstance(reply.result, Exception):
        raise reply.result
    return reply.result
