"""Engines: who does the shards of an audit. They change no result, so no plan names one."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from weakspot._checks import check_choice
from weakspot.audit.plan.image_list import Entry, entries
from weakspot.audit.plan.plan import Plan
from weakspot.audit.work.batches import AuditModel
from weakspot.audit.work.shard import ShardResult, audit_shard
from weakspot.classifier import Classifier

if TYPE_CHECKING:
    import pyarrow as pa


ENGINES = ("local", "ray")
Results = Generator[tuple[int, ShardResult], None, None]


@dataclass(frozen=True, eq=False)
class Backlog:
    """What is left to do of an audit.

    Attributes:
        plan: resolved.
        classifier: as it was loaded here.
        listing: of all images.
        size: images of a shard.
        missing: numbers of the shards that are not there yet.
        batch_size: images attacked at once; None for as many as memory holds.
    """

    plan: Plan
    classifier: Classifier
    listing: pa.Table
    size: int
    missing: Sequence[int]
    batch_size: int | None

    def entries(self, number: int) -> list[Entry]:
        """The images of one shard."""
        return entries(self.listing, number * self.size, self.size)


class Engine(Protocol):
    """Does shards; ready while the block of `opened` lasts."""

    @property
    def about(self) -> Mapping[str, Any]:
        """What run.json says of it."""

    def results(self, work: Backlog, progress: Callable[[float], None]) -> Results:
        """Number and result of every missing shard, in any order.

        Args:
            work: what is missing.
            progress: called with the images done of shards that have not been handed out yet.
        """


class LocalEngine:
    """This process, one shard after the other."""

    about: Mapping[str, Any] = {"name": "local"}

    def results(self, work: Backlog, progress: Callable[[float], None]) -> Results:
        machine = AuditModel.of(work.classifier, work.plan, work.listing, work.batch_size)
        for number in work.missing:
            mine = work.entries(number)
            count = len(mine)

            def advance(fraction: float, count: int = count) -> None:
                progress(fraction * count)

            yield number, audit_shard(machine, work.plan, mine, advance)


@contextmanager
def opened(engine: str, workers: int | None = None, address: str | None = None) -> Iterator[Engine]:
    """The engine of that name, its workers' cluster started or joined; what was started here ends with the block.

    Args:
        engine: local or ray.
        workers: how many; of Ray alone, one for each CPU (or GPU, where the model is on one) where not given.
        address: of a Ray cluster; where not given one is started on this machine.

    Raises:
        ValueError: when they do not fit together, Ray is not installed, or no cluster answers.
    """
    check_choice("engine", engine, ENGINES)
    if workers is not None and (not isinstance(workers, int) or isinstance(workers, bool) or workers < 1):
        raise ValueError(f"workers is {workers!r}; accepted is a whole number of at least 1")
    if engine == "local":
        for name, value in (("workers", workers), ("ray-address", address)):
            if value is not None:
                raise ValueError(
                    f"{name} is {value}, but the engine local is one process; accepted with --engine ray"
                )
        yield LocalEngine()
        return
    from weakspot.audit.engines.ray_engine import joined

    with joined(workers, address) as ray_engine:
        yield ray_engine
