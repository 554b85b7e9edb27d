"""Engines: what computes the shards of an audit. This file holds the one of this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from weakspot.audit.execution.attacked_groups import audit_shard
from weakspot.audit.execution.audit_engine import Backlog, Engine, Progress, Results
from weakspot.audit.execution.batches import AuditModel


class LocalEngine:
    """Computes one shard after the other in this process."""

    about: Mapping[str, str | int | None] = {"name": "local"}

    def results(self, backlog: Backlog, progress: Progress) -> Results:
        model = AuditModel.of(backlog.classifier, backlog.plan, backlog.listing, backlog.batch_size)
        for number in backlog.missing:
            images = backlog.entries(number)
            count = len(images)

            def advance(fraction: float, count: int = count) -> None:
                progress(fraction * count)

            yield number, audit_shard(model, backlog.plan, images, advance)


@contextmanager
def open_local(workers: int | None, address: str | None) -> Iterator[Engine]:
    """The local engine, which has neither workers nor an address."""
    for name, value in (("workers", workers), ("ray-address", address)):
        if value is not None:
            raise ValueError(
                f"{name} must be left out for the engine local, got {value} (or use --engine ray)"
            )
    yield LocalEngine()
