"""The Ray engine: Ray Data hands shards to workers that hold the model, on this machine or on a cluster."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from weakspot.checks import warn
from weakspot.models.fingerprint import fingerprint
from weakspot.models.probe import probe
from weakspot.runs.engines import Results, Work
from weakspot.runs.execution import ShardResult
from weakspot.runs.folder import versions
from weakspot.runs.places import is_url
from weakspot.runs.ray_session import session
from weakspot.runs.ray_worker import Attempts, GivenUpError, Task, Worker
from weakspot.runs.stopping import StoppedError

AHEAD = 2  # shards that a worker holds: the one it works on, and the next


class RayEngine:
    """Workers of a Ray cluster.

    Args:
        workers: how many, or None for as many as there are CPUs or GPUs.
    """

    def __init__(self, workers: int | None) -> None:
        self.workers = workers
        self.about: Mapping[str, Any] = {"name": "ray"}

    def results(self, work: Work, progress: Callable[[float], None]) -> Results:
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


def _batches(work: Work, workers: int, threads: int, gpus: float) -> Generator[Any, None, None]:
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
