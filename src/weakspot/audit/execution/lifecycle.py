"""Audits: a plan carried out shard by shard into a folder, resumable after any crash.

Order of writes, so that a crash at any point loses at most the shards in progress: the list of images, run.json, then
for every shard its maps, then its records (whose existence implies the maps), then the compacted tables, and at last
run.json with the digests and the status "complete". All of these are atomic and durable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from weakspot._checks import first_line, require, warn
from weakspot._io.files import locked
from weakspot._io.urls import FetchError
from weakspot.audit.execution.attacked_groups import ShardResult
from weakspot.audit.execution.audit_engine import Backlog, Engine, EngineOptions, open_engine
from weakspot.audit.execution.preparation import (
    Prepared,
    check_same_model,
    default_shard,
    find_damage,
    load_planned,
    prepare,
    read_listing,
    recover,
)
from weakspot.audit.plan.plan import Plan
from weakspot.audit.store.digests import DamagedError, StoppedError, enumerated
from weakspot.audit.store.maps import MAPS, MapWriter
from weakspot.audit.store.records import (
    LISTING,
    RECORDS,
    SHARDS,
    SKIPPED,
    Note,
    clear_drafts,
    compact,
    read_notes,
    shard_files,
    write_shard,
)
from weakspot.audit.store.run import PACKAGES, Run, open_run
from weakspot.audit.store.run_info import RUN_FILE, ImageCounts, MissingImages, RunInfo, now
from weakspot.audit.store.stores import LocalStore, open_store
from weakspot.audit.store.verification import damaged_tables

LOCK = "audit.lock"
NAMED = 5  # missing images whose names run.json gives
OUTPUTS = (RUN_FILE, LISTING, RECORDS, SKIPPED, SHARDS, MAPS)


@dataclass(frozen=True)
class AuditProgress:
    """The progress of an audit.

    Attributes:
        done: number of images done, including those of earlier sessions and those that could not be read.
        total: number of images.
        speed: images per second in this session.
    """

    done: float
    total: int
    speed: float

    @property
    def seconds_left(self) -> float:
        """Remaining time at this speed; infinity before a speed is known."""
        return (self.total - self.done) / self.speed if self.speed else float("inf")


Watch = Callable[[AuditProgress], None]


@dataclass(frozen=True)
class Session:
    """How one session of an audit runs; changes no result. See the arguments of `audit`."""

    engine: EngineOptions
    batch_size: int | None
    command: str
    watch: Watch | None


def audit(
    plan: Plan,
    out: Path | str,
    *,
    batch_size: int | None = None,
    command: str = "",
    watch: Watch | None = None,
    engine: str = "local",
    workers: int | None = None,
    address: str | None = None,
) -> Run:
    """Carry out a plan.

    Args:
        plan: what to do.
        out: folder, created if it does not exist; or a URL, to which results are sent as they arrive.
        batch_size: images attacked at once; changes no result. By default all of a shard, fewer if memory runs out.
        command: recorded in run.json.
        watch: called with the `AuditProgress` whenever it changes.
        engine: local, ray or the name of an installed engine; changes no result.
        workers: of Ray; by default one per CPU or GPU.
        address: of a Ray cluster; by default the one this process has joined, or one started on this machine.

    Raises:
        ValueError: if the plan does not fit; if `out` holds a run already, or another process writes to it.
        FileNotFoundError: if none of the sources exists.
        StoppedError: if `out` cannot be written, an image cannot be fetched, or Ray gives up.
    """
    require("an audit", *PACKAGES, extra="audit")
    plan = plan.resolved()
    session = Session(EngineOptions(engine, workers, address), batch_size, command, watch)
    with open_store(out) as store, open_engine(session.engine) as ready, _storage_errors(store):
        folder, created = store.folder, not store.folder.exists()
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"out must be a folder, got {folder}, which is a file")
        folder.mkdir(parents=True, exist_ok=True)
        # Locked before the folder is checked: of two processes that start at once, one must see the other's run.
        with locked(folder, LOCK):
            store.check_free(OUTPUTS)
            # From here on a crash leaves a run that `resume` starts from the beginning.
            RunInfo.planned(plan, command).write(folder)
            try:
                prepared = prepare(plan, folder, command)
            except (ValueError, FileNotFoundError):
                for name in (RUN_FILE, LISTING):
                    (folder / name).unlink(missing_ok=True)
                if created:
                    (folder / LOCK).unlink(missing_ok=True)
                    folder.rmdir()
                raise
            return _run_missing_shards(prepared, store, session, ready)


def resume(
    out: Path | str,
    *,
    batch_size: int | None = None,
    command: str = "",
    watch: Watch | None = None,
    engine: str = "local",
    workers: int | None = None,
    address: str | None = None,
) -> Run:
    """Continue an audit that was interrupted or lacks images, and repair one that is damaged.

    If the audit is complete, every stored file is compared with its digest, and nothing is done if all are intact.
    Before an incomplete audit continues, the images that were already attacked are compared as well.

    Arguments and errors are those of `audit`.

    Raises:
        FileNotFoundError: if there is no such run.
        ValueError: if the model has changed.
        DamagedError: if the list of images is damaged.
    """
    require("an audit", *PACKAGES, extra="audit")
    session = Session(EngineOptions(engine, workers, address), batch_size, command, watch)
    with open_store(out) as store, _storage_errors(store):
        store.fetch()
        RunInfo.read(store.folder, store.name)  # before a lock is made where no run is
        # The lock also holds for a complete run: its repair writes.
        with locked(store.folder, LOCK):
            return _resume(store, session)


def _resume(store: LocalStore, session: Session) -> Run:
    folder = store.folder
    info = RunInfo.read(folder, store.name)  # again: it may have been finished before the lock was held
    plan = info.plan
    # Safe under the lock: whoever made these drafts is dead.
    clear_drafts(folder)
    if info.status == "planned":
        with open_engine(session.engine) as engine:
            prepared = prepare(plan.resolved(), folder, info.command or session.command)
            return _run_missing_shards(prepared, store, session, engine)
    listing, damage = read_listing(folder, info), find_damage(store)
    # Shards and maps are intact; only the compacted tables can still be damaged.
    if info.complete and not damage:
        tables = damaged_tables(folder, info)
        if not tables:
            store.finish()
            return open_run(store.name)
        if len(shard_files(folder)) == -(-len(listing) // (plan.shard or 1)):
            warn(f"damaged files ({enumerated(tables)}) are written again from the shards", UserWarning)
            return _finish(store, info, len(listing))
    with open_engine(session.engine) as engine:
        classifier = load_planned(plan.model)
        check_same_model(info, classifier)
        remarks = recover(store, listing, plan.shard or default_shard(classifier), damage)
        if remarks or info.status != "running":  # no needless write: any can meet a full disk
            info = replace(info, status="running", missing=None).with_remarks(remarks)
            info.write(folder)
        return _run_missing_shards(Prepared(plan, classifier, listing, info), store, session, engine)


def _run_missing_shards(prepared: Prepared, store: LocalStore, session: Session, engine: Engine) -> Run:
    """Compute and write every shard that does not exist, then finish the run."""
    folder, plan, listing, info = store.folder, prepared.plan, prepared.listing, prepared.info
    # A remote run becomes resumable before its first shard is sent.
    store.save_info()
    total, size = len(listing), plan.shard or default_shard(prepared.classifier)
    existing = shard_files(folder)
    missing = [number for number in range(-(-total // size)) if number not in existing]
    backlog = Backlog(plan, prepared.classifier, listing, size, missing, session.batch_size)
    maps = None
    if plan.maps:
        maps = MapWriter(folder, total, [attack.label for attack in plan.attacks], plan.regions, size)
    started = time.perf_counter()
    before = done = sum(min(size, total - number * size) for number in existing)

    def report(images: float) -> None:
        if session.watch is not None:
            elapsed = time.perf_counter() - started
            session.watch(AuditProgress(images, total, (images - before) / elapsed if elapsed else 0.0))

    def write(number: int, result: ShardResult) -> None:
        nonlocal info
        # A remark is on the disk before the shard that it concerns: a crash in between cannot lose it.
        if set(result.remarks) - set(info.remarks):
            info = info.with_remarks(result.remarks)
            info.write(folder)
        # Maps first: the existence of the shard's file says that they are complete.
        files = {} if maps is None else maps.write(number, result.maps)
        note = Note(result.read, result.skipped, result.missing, result.contents, result.seconds, files)
        store.add(write_shard(folder, number, result.rows, note))

    report(done)
    unread: list[
        tuple[str, str]
    ] = []  # missing images of shards that are not written, because all are missing
    # One shard is written while the next is computed. `closing` stops the engine and the executor waits for the
    # writer, however the block ends.
    with (
        ThreadPoolExecutor(1, thread_name_prefix="weakspot-writer") as writer,
        closing(engine.results(backlog, lambda images: report(done + images))) as results,
    ):
        written: Future[None] | None = None
        for number, result in results:
            if written is not None:
                written.result()  # raises what the writer raised
            # Without a file the shard counts as missing, so that the next session tries it again.
            if result.missing and not result.read:
                unread += result.missing
                continue
            written = writer.submit(write, number, result)
            done += min(size, total - number * size)
            report(done)
        if written is not None:
            written.result()
    report(done)
    return _finish(store, replace(info, engine=dict(engine.about)), total, unread)


def _finish(store: LocalStore, info: RunInfo, total: int, unread: Sequence[tuple[str, str]] = ()) -> Run:
    """Write what is true of all shards together: the complete tables, or which images are missing."""
    folder = store.folder
    # Counts come from the notes on the disk, not from this session, which may have computed only some shards.
    notes = list(read_notes(folder))
    missing = sorted([*unread, *(pair for note in notes for pair in note.missing)])
    counts = ImageCounts(
        total,
        sum(note.read for note in notes),
        sum(len(note.skipped) for note in notes),
        len(missing) or None,
    )
    info = replace(info, images=counts, missing=None)
    if missing:
        names = tuple(name for name, _ in missing[:NAMED])
        absent = MissingImages(len(missing), names, missing[0][1])
        replace(info, status="incomplete", missing=absent).write(folder)
        store.save_info()
        return open_run(store.name)
    # Working time of all sessions; the wall time between them says nothing.
    seconds = sum(note.seconds for note in notes)
    # The digests come from compaction, so run.json is written after the tables that it vouches for.
    replace(
        info,
        status="complete",
        checksums={**info.checksums, **compact(folder)},
        finished=now(),
        seconds=round(seconds, 3),
        images_per_second=round(total / seconds, 3) if seconds else None,
    ).write(folder)
    store.finish()
    clear_drafts(folder)
    return open_run(store.name)


@contextmanager
def _storage_errors(store: LocalStore) -> Iterator[None]:
    """Turn errors of the system while a folder is written into one sentence."""
    try:
        yield
    except (FileNotFoundError, DamagedError):
        raise  # these name what is missing
    except FetchError as error:
        raise StoppedError(f"{error}; continue with --resume once it can", resumable=True) from error
    except OSError as error:
        reason = error.strerror or first_line(error)
        remedy = f"; what was written is intact: continue with weakspot audit --resume {store.name} once there is room"
        raise StoppedError(
            f"{store.name} cannot be written ({reason}){remedy if store.begun else ''}", resumable=store.begun
        ) from error
