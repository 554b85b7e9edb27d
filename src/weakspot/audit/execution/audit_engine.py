"""The contract of engines, which compute the shards of an audit. They change no result, so plans do not name one.

An engine is found by the entry-point group `weakspot.engines`: a function (workers, address) that returns a context
manager of an `Engine`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from weakspot._checks import check_count, entry_points, unknown_choice
from weakspot.audit.execution.attacked_groups import ShardResult
from weakspot.audit.plan.image_list import Entry, entries
from weakspot.audit.plan.plan import Plan
from weakspot.classifier import Classifier

if TYPE_CHECKING:
    import pyarrow as pa

GROUP = "weakspot.engines"
Results = Generator[tuple[int, ShardResult], None, None]
Progress = Callable[[float], None]


@dataclass(frozen=True)
class EngineOptions:
    """The name of an engine, and the number and address of its workers; see `audit`."""

    name: str = "local"
    workers: int | None = None
    address: str | None = None


@dataclass(frozen=True, eq=False)
class Backlog:
    """The shards that an audit has left to do.

    Attributes:
        plan: resolved.
        classifier: as it was loaded in this process.
        listing: all images.
        size: number of images of a shard.
        missing: numbers of the shards that do not exist yet.
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
    """Computes shards; usable inside the block of `open_engine`."""

    @property
    def about(self) -> Mapping[str, str | int | None]:
        """What run.json records about it."""

    def results(self, backlog: Backlog, progress: Progress) -> Results:
        """Number and result of every missing shard, in any order.

        Args:
            backlog: what is missing.
            progress: called with the number of images done in shards that have not been yielded yet.
        """


def open_engine(options: EngineOptions) -> AbstractContextManager[Engine]:
    """An engine by name; what it starts (such as a cluster) ends with the block.

    Raises:
        ValueError: if there is no such engine, the options do not fit, or a package or cluster is missing.
    """
    engines = {entry.name: entry for entry in entry_points(group=GROUP)}
    if options.name not in engines:
        raise ValueError(unknown_choice("engine", options.name, sorted(engines)))
    if options.workers is not None:
        check_count("workers", options.workers)
    factory: Callable[[int | None, str | None], AbstractContextManager[Engine]]
    factory = engines[options.name].load()
    return factory(options.workers, options.address)
