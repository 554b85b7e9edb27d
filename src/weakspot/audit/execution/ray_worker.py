"""A worker of the Ray engine: holds the model and computes the groups of shards by number."""

from __future__ import annotations

import os
import pickle
import platform
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weakspot._checks import warn
from weakspot._errors import describe_error
from weakspot.audit.execution.attacked_groups import attack_groups
from weakspot.audit.execution.batches import AuditModel
from weakspot.audit.execution.job import Backlog, Job
from weakspot.audit.execution.preparation import load_planned
from weakspot.audit.plan.plan import Plan
from weakspot.audit.store.run_info import changed_versions
from weakspot.audit.store.unfinished import GroupResult
from weakspot.models.identity import Probe

if TYPE_CHECKING:
    import pyarrow as pa

DEATHS = 3  # workers that may die on one shard
Warnings = list[tuple[str, type[Warning]]]


@dataclass(frozen=True, eq=False)
class Task:
    """What a worker must know.

    Attributes:
        plan: resolved, with the kind of device that the model is on.
        listing: all images.
        backlog: what is left to compute.
        fingerprint: of the model's weights where the audit was started.
        probe: the model's answers there.
        versions: of everything that decides a result, there.
        sources: those that are files or folders there.
        threads: CPU threads of the worker.
        paths: module search path there.
        folder: working directory there.
        workers: number of workers.
        attempts: handle of the `Attempts` actor that all workers share.
    """

    plan: Plan
    listing: pa.Table
    backlog: Backlog
    fingerprint: str
    probe: Probe
    versions: Mapping[str, str]
    sources: tuple[str, ...]
    threads: int
    paths: tuple[str, ...]
    folder: str
    workers: int
    attempts: Any  # an actor handle, whose methods Ray generates


@dataclass(frozen=True, eq=False)
class Reply:
    """What a worker sends: a result or the exception in its place, and the warnings on the way."""

    result: GroupResult | Exception
    warnings: Warnings


class GivenUpError(Exception):
    """Something was attempted too often, each time at the cost of a worker."""


class Attempts:
    """An actor that counts what was begun and not ended: Ray itself retries without limit."""

    def __init__(self) -> None:
        self.begun: Counter[str] = Counter()

    def begin(self, description: str) -> int:
        """How often it has been begun."""
        self.begun[description] += 1
        return self.begun[description]

    def end(self, description: str) -> None:
        """It has ended, in whatever way; the count starts over."""
        del self.begun[description]


@contextmanager
def _attempt(task: Task, description: str, most: int) -> Iterator[None]:
    """Raises GivenUpError if this has been begun more often than that."""
    import ray

    if ray.get(task.attempts.begin.remote(description)) > most:
        raise GivenUpError(f"{description} was given up after {most} workers had died of it")
    try:
        yield
    finally:
        ray.get(task.attempts.end.remote(description))


@contextmanager
def _recorded(messages: Warnings) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages += [(str(warning.message), warning.category) for warning in caught]


class Worker:
    """Computes the groups of shards, given tables of one shard number each.

    It raises nothing: an exception is sent in place of a result, so that it arrives as it was and not as Ray's account
    of it.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.error: Exception | None = None
        self.warnings: Warnings = []
        with _recorded(self.warnings):
            try:
                # Every worker begins once, so deaths are those beyond the number of workers.
                with _attempt(task, "loading the model", DEATHS + task.workers):
                    self.job, self.model = _load(task)
            except Exception as error:  # noqa: BLE001
                self.error = error

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        import pyarrow as pa

        # batch_size=1 in `map_batches`.
        (number,) = batch["number"].to_pylist()
        results = self._results(number)
        while True:
            # Those of loading the model go out with every result; the process that gets them shows each once.
            messages = list(self.warnings)
            with _recorded(messages):
                # The generator does its work inside `next`, so its warnings are caught here.
                result = next(results, None)
            if result is None:
                return
            content = pickle.dumps(Reply(result, messages), protocol=5)
            # Large, because the offsets of plain binary columns end at 2 GiB.
            yield pa.table({"content": pa.array([content], pa.large_binary())})

    def _results(self, number: int) -> Iterator[GroupResult | Exception]:
        if self.error is not None:
            yield _sendable(self.error)
            return
        first = self.job.entries(number, count=1)[0].name
        try:
            with _attempt(self.task, f"shard {number} ({first} and what follows)", DEATHS):
                yield from attack_groups(self.model, self.job, self.task.backlog[number], lambda _: None)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - an attack or a region may raise anything
            yield _sendable(error)


def _load(task: Task) -> tuple[Job, AuditModel]:
    """The job here, with the model loaded and compared.

    Raises:
        ValueError: if model or images differ from those where the audit was started.
    """
    # Before the model is loaded: some libraries size their thread pools on first use.
    torch.set_num_threads(task.threads)
    sys.path.extend(path for path in task.paths if path not in sys.path)
    if Path(task.folder).is_dir():
        os.chdir(task.folder)
    node = platform.node()
    for source in task.sources:
        if not Path(source).exists():
            raise ValueError(
                f"{source} does not exist on the machine {node} of the Ray cluster (give a folder that all its "
                "machines share, or a URL)"
            )
    spec = task.plan.model.spec
    job = Job.of(task.plan, load_planned(task.plan.model), task.listing)
    model = AuditModel(job)
    if model.watch.weights != task.fingerprint:
        raise ValueError(
            f"model {spec} has other weights on the machine {node} (fingerprint {model.watch.weights}) than where the "
            f"audit was started ({task.fingerprint}; use the same weights everywhere)"
        )
    if not model.watch.probe.agrees(task.probe):
        raise ValueError(
            f"model {spec} has the same weights on the machine {node} but returns other logits than where the audit "
            "was started (install the same version of its code on all machines)"
        )
    changes = changed_versions(task.versions, then="here", now="there")
    if changes:
        warn(f"the machine {node} has other versions ({changes}); the last digits may differ", UserWarning)
    return job, model


def _sendable(error: BaseException) -> Exception:
    """The exception without its traceback, or a similar one if it cannot be sent."""
    try:
        same = pickle.loads(pickle.dumps(error))  # noqa: S301 - made in this line
    except Exception:  # noqa: BLE001 - its constructor may take anything
        return RuntimeError(f"{type(error).__name__}: {str(error).strip()}")
    return same if isinstance(same, Exception) else RuntimeError(describe_error(error))
