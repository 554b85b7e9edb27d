"""A worker of the Ray engine: holds the model and does shards by number."""

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

from weakspot._checks import describe_error, warn
from weakspot.audit.plan.image_list import entries
from weakspot.audit.plan.plan import Plan
from weakspot.audit.store.run import versions
from weakspot.audit.work.batches import AuditModel
from weakspot.audit.work.preparation import load_planned
from weakspot.audit.work.shard import ShardResult, audit_shard
from weakspot.models.probe import Probe

if TYPE_CHECKING:
    import pyarrow as pa


DEATHS = 3  # of workers, over one shard of images


@dataclass(frozen=True, eq=False)
class Task:
    """What a worker has to know.

    Attributes:
        plan: resolved, with the kind of device that the model is on.
        listing: of all images.
        size: images of a shard.
        batch_size: images attacked at once; None for as many as memory holds.
        fingerprint: of the model's weights where the audit was started.
        probe: what the model answers there.
        versions: of what decides a result there.
        sources: those that are files or folders there.
        threads: that the worker may use.
        paths: where modules are looked for there.
        folder: its working directory.
        workers: how many there are.
        attempts: handle of the `Attempts` that all workers share.
    """

    plan: Plan
    listing: pa.Table
    size: int
    batch_size: int | None
    fingerprint: str
    probe: Probe
    versions: Mapping[str, str]
    sources: tuple[str, ...]
    threads: int
    paths: tuple[str, ...]
    folder: str
    workers: int
    attempts: Any


class GivenUpError(Exception):
    """Something was tried too often, each time at the cost of a worker."""


class Attempts:
    """An actor of its own that counts what was begun and not ended: Ray tries again without end."""

    def __init__(self) -> None:
        self.begun: Counter[str] = Counter()

    def begin(self, what: str) -> int:
        """How often it was begun by now."""
        self.begun[what] += 1
        return self.begun[what]

    def end(self, what: str) -> None:
        """It came to an end, whatever that was; counts from nothing."""
        del self.begun[what]


@contextmanager
def _attempt(task: Task, what: str, most: int) -> Iterator[None]:
    """Raises GivenUpError where it was begun more often than that."""
    import ray

    if ray.get(task.attempts.begin.remote(what)) > most:
        raise GivenUpError(f"{what} was given up after {most} workers had died of it")
    try:
        yield
    finally:
        ray.get(task.attempts.end.remote(what))


class Worker:
    """Takes tables of one shard number each.

    Nothing is raised here: what goes wrong is sent in place of a result, so that it arrives as it was and not as Ray's
    account of it.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.trouble: Exception | None = None
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                with _attempt(task, "loading the model", DEATHS + task.workers):
                    self.machine = _machine(task)
            except Exception as error:  # noqa: BLE001
                self.trouble = error
        self.said = _plain(said)

    def __call__(self, batch: pa.Table) -> pa.Table:
        import pyarrow as pa

        (number,) = batch["number"].to_pylist()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = self._result(number)
        content = pickle.dumps((found, [*self.said, *_plain(said)]), protocol=5)
        return pa.table({"number": [number], "content": pa.array([content], pa.large_binary())})

    def _result(self, number: int) -> ShardResult | Exception:
        if self.trouble is not None:
            return _sendable(self.trouble)
        mine = entries(self.task.listing, number * self.task.size, self.task.size)
        try:
            with _attempt(self.task, f"shard {number} ({mine[0].name} and what follows)", DEATHS):
                return audit_shard(self.machine, self.task.plan, mine)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - what an attack or a region raises, too
            return _sendable(error)


def _machine(task: Task) -> AuditModel:
    """The model, loaded and checked.

    Raises:
        ValueError: when model or images are not what they are where the audit was started.
    """
    torch.set_num_threads(task.threads)
    sys.path.extend(path for path in task.paths if path not in sys.path)
    if Path(task.folder).is_dir():
        os.chdir(task.folder)
    node = platform.node()
    for source in task.sources:
        if not Path(source).exists():
            raise ValueError(
                f"{source}: there is no such file or folder on the machine {node} of the Ray cluster; accepted is what "
                "all its machines share, or a URL"
            )
    machine = AuditModel.of(load_planned(task.plan.model), task.plan, task.listing, task.batch_size)
    found = machine.watch.weights
    if found != task.fingerprint:
        raise ValueError(
            f"model {task.plan.model.spec} has other weights on the machine {node} (fingerprint {found}) than where "
            f"the audit was started ({task.fingerprint}); accepted is the same weights everywhere"
        )
    if not machine.watch.probe.agrees(task.probe):
        raise ValueError(
            f"model {task.plan.model.spec} has the same weights on the machine {node} but gives other logits than "
            "where the audit was started; install the same version of its code on all machines"
        )
    other = [f"{name} {value} there, {task.versions.get(name)} here" for name, value in versions().items()
             if value != task.versions.get(name)]  # fmt: skip
    if other:
        warn(
            f"versions on the machine {node} are others ({'; '.join(other)}); last digits may differ",
            UserWarning,
        )
    return machine


def _plain(said: list[warnings.WarningMessage]) -> list[tuple[str, type[Warning]]]:
    return [(str(warning.message), warning.category) for warning in said]


def _sendable(error: BaseException) -> Exception:
    """The error itself, without the places it went through, or one like it where it cannot be sent."""
    try:
        same = pickle.loads(pickle.dumps(error))  # noqa: S301 - made in this line
    except Exception:  # noqa: BLE001 - its constructor may take anything
        return RuntimeError(f"{type(error).__name__}: {str(error).strip()}")
    return same if isinstance(same, Exception) else RuntimeError(describe_error(error))
