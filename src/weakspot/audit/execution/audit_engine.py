"""Engines, which compute the groups of an audit. They change no result, so plans do not name one.

An engine is found by the entry-point group `weakspot.engines`: a function (workers, address) that returns a context
manager of an `Engine`. This file has the one of this process.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from weakspot._checks import check_count, unknown_choice
from weakspot._plug_ins import entry_points
from weakspot.audit.execution.attacked_groups import Progress, attack_groups
from weakspot.audit.execution.batches import AuditModel
from weakspot.audit.execution.job import Backlog, Job
from weakspot.audit.store.unfinished import GroupResult

GROUP = "weakspot.engines"
Results = Generator[GroupResult, None, None]


class Engine(Protocol):
    """Computes groups; usable inside the block of `open_engine`."""

    @property
    def about(self) -> Mapping[str, str | int | None]:
        """What run.json records about it."""

    def results(self, job: Job, backlog: Backlog, progress: Progress) -> Results:
        """The result of every group of the backlog, in any order, as soon as it is known.

        Args:
            job: of the audit.
            backlog: what is not computed yet.
            progress: called with the number of attacks done in groups that have not been yielded yet.
        """


def open_engine(
    name: str = "local", workers: int | None = None, address: str | None = None
) -> AbstractContextManager[Engine]:
    """An engine by name; what it starts (such as a cluster) ends with the block.

    Raises:
        ValueError: if there is no such engine, the options do not fit, or a package or cluster is missing.
    """
    engines = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in engines:
        raise ValueError(unknown_choice("engine", name, sorted(engines)))
    if workers is not None:
        check_count("workers", workers)
    factory: Callable[[int | None, str | None], AbstractContextManager[Engine]] = engines[name].load()
    return factory(workers, address)


class LocalEngine:
    """Computes one group after the other in this process."""

    about: Mapping[str, str | int | None] = {"name": "local"}

    def results(self, job: Job, backlog: Backlog, progress: Progress) -> Results:
        model = AuditModel(job)
        for groups in backlog.values():
            yield from attack_groups(model, job, groups, progress)


@contextmanager
def open_local(workers: int | None, address: str | None) -> Iterator[Engine]:
    """The local engine, which has neither workers nor an address."""
    for name, value in (("workers", workers), ("ray-address", address)):
        if value is not None:
            raise ValueError(
                f"{name} must be left out for the engine local, got {value} (or use --engine ray)"
            )
    yield LocalEngine()
