"""What is done and what is left: results go to the disk while the next are computed.

Order of writes: groups to unfinished/ every few seconds; once a shard has all its groups its maps, then its records,
whose existence implies the maps; then its unfinished files are removed. Each write is atomic and durable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import TracebackType

from weakspot.audit.execution.audit_engine import Backlog
from weakspot.audit.execution.job import Job
from weakspot.audit.store.maps import MapWriter
from weakspot.audit.store.records import count_rows, shard_files, write_shard
from weakspot.audit.store.run_info import RunInfo
from weakspot.audit.store.stores import LocalStore
from weakspot.audit.store.unfinished import GroupKey, GroupResult, merged, write_unfinished

SAVE_EVERY = 5.0  # seconds between writes to unfinished/, beside the seconds that a group takes


class Ledger:
    """Stores results as they arrive. On leaving the block, everything that arrived is on the disk.

    Args:
        store: of the run.
        job: of the audit.
        info: content of run.json.
        kept: results of groups that an earlier session has stored.

    Attributes:
        info: as the last write left it.
        unread: (name, reason) of the images of shards that are not stored, because all of their images are missing.
        done: number of attacks done: images x attacks x regions, of files that could not be read as well.
        saved: number of attacks whose records are on the disk.
    """

    def __init__(self, store: LocalStore, job: Job, info: RunInfo, kept: Iterable[GroupResult] = ()) -> None:
        self.store, self.job, self.info = store, job, info
        existing = shard_files(store.folder)
        self.results: dict[int, dict[GroupKey, GroupResult]] = {
            number: {} for number in job.shards if number not in existing
        }
        for result in kept:
            self.results[result.key.shard][result.key] = result
        self.unsaved: list[GroupResult] = []
        self.unread: list[tuple[str, str]] = []
        self.done = sum(job.size(number) for number in existing) * len(job.plan.cells)
        self.done += sum(len(result.images.contents) for result in kept)
        self.saved = count_rows(existing.values()) + sum(len(result.rows) for result in kept)
        self.saved_at = time.monotonic()
        self.written: Future[None] | None = None
        self.maps: MapWriter | None = None
        if job.plan.maps:
            labels = [attack.label for attack in job.plan.attacks]
            self.maps = MapWriter(store.folder, len(job.listing), labels, job.plan.regions, job.shard)

    @property
    def backlog(self) -> Backlog:
        """The groups that are left to compute, shard by shard."""
        left = {
            number: [key for key in self.job.groups(number) if key not in results]
            for number, results in self.results.items()
        }
        return {number: keys for number, keys in left.items() if keys}

    def add(self, result: GroupResult) -> None:
        """Store a result soon; raises OSError if an earlier one could not be stored."""
        self.results[result.key.shard][result.key] = result
        self.unsaved.append(result)
        self.done += len(result.images.contents)
        self._store_complete(result.key.shard)
        if time.monotonic() - self.saved_at >= SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Store the results that are not on the disk yet."""
        waiting, self.unsaved = self.unsaved, []
        for number in {result.key.shard for result in waiting}:
            results = [result for result in waiting if result.key.shard == number]
            self._submit(partial(self._write_unfinished, results))
        self.saved_at = time.monotonic()

    def _store_complete(self, number: int) -> None:
        if len(self.results[number]) == len(self.job.groups(number)):
            results = self.results.pop(number)
            new = [result for result in self.unsaved if result.key.shard == number]
            self.unsaved = [result for result in self.unsaved if result.key.shard != number]
            rows = sum(len(result.rows) for result in new)
            self._submit(partial(self._write_shard, number, list(results.values()), rows))

    def _submit(self, write: Callable[[], None]) -> None:
        # One write at a time: what waits is in memory.
        if self.written is not None:
            self.written.result()
        self.written = self.writer.submit(write)

    def _write_unfinished(self, results: list[GroupResult]) -> None:
        self.store.add_unfinished(write_unfinished(self.store.folder, results))
        self.saved += sum(len(result.rows) for result in results)

    def _write_shard(self, number: int, results: list[GroupResult], rows: int) -> None:
        shard = merged(results, self.job.shape(number))
        # Without a file the shard counts as missing, so that the next session tries it again.
        if shard.note.missing and not shard.note.read:
            self.unread += shard.note.missing
            return
        # A remark is on the disk before the shard that it concerns: a crash in between cannot lose it.
        remarks = [remark for result in results for remark in result.remarks]
        if set(remarks) - set(self.info.remarks):
            self.info = self.info.with_remarks(remarks)
            self.info.write(self.store.folder)
        files = {} if self.maps is None else self.maps.write(number, shard.maps)
        self.store.add(write_shard(self.store.folder, number, shard.rows, replace(shard.note, maps=files)))
        self.saved += rows
        self.store.drop_unfinished({number})

    def __enter__(self) -> Ledger:
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="weakspot-writer")
        # A session may have ended between the last group of a shard and the shard.
        for number in list(self.results):
            self._store_complete(number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.writer:
            # After an error of the disk, what could not be written is computed again.
            if not isinstance(error, OSError):
                self.save()
                if self.written is not None:
                    self.written.result()
