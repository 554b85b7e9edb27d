"""Audits: a plan carried out group by group into a folder, resumable after any crash.

Order of writes, so that a crash at any point loses seconds of work: the list of images, run.json, the groups and shards
(see `job`), then the compacted tables, and at last run.json with the digests and the status "complete". All of these
are atomic and durable.
"""

import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, Unpack

from weakspot._checks import require, warn
from weakspot._errors import first_line
from weakspot._io.files import locked
from weakspot._io.urls import FetchError
from weakspot._progress import ProgressOption, shown
from weakspot.audit.execution.audit_engine import Engine, open_engine
from weakspot.audit.execution.job import Job, Ledger
from weakspot.audit.execution.preparation import (
    check_same_model,
    find_damage,
    load_planned,
    prepare,
    read_listing,
    recover,
)
from weakspot.audit.plan.plan import Plan
from weakspot.audit.store.digests import DamagedError, StoppedError, enumerated
from weakspot.audit.store.maps import MAPS
from weakspot.audit.store.records import (
    LISTING,
    RECORDS,
    SHARDS,
    SKIPPED,
    compact,
    damaged_tables,
    read_notes,
    shard_files,
)
from weakspot.audit.store.run import PACKAGES, Run, open_run
from weakspot.audit.store.run_info import RUN_FILE, ImageCounts, MissingImages, RunInfo, now
from weakspot.audit.store.stores import LocalStore, clear_drafts, open_store
from weakspot.audit.store.unfinished import UNFINISHED, unfinished_files

LOCK = "audit.lock"
NAMED = 5  # missing images whose names run.json gives
OUTPUTS = (RUN_FILE, LISTING, RECORDS, SKIPPED, SHARDS, UNFINISHED, MAPS)


class AuditInterrupt(KeyboardInterrupt):
    """An audit was interrupted; what was done before is saved.

    Attributes:
        saved: number of attacks whose records are saved.
    """

    def __init__(self, saved: int, planned: int, name: str) -> None:
        super().__init__(
            f"{saved:,} of {planned:,} planned attacks are saved; resume with weakspot audit --resume "
            f"{shlex.quote(name)}"
        )
        self.saved = saved


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


class SessionOptions(TypedDict, total=False):
    """How one session of an audit runs; none of these changes a result.

    Attributes:
        command: recorded in run.json.
        watch: called with the `AuditProgress` whenever it changes.
        progress: True for a bar on standard error or in the notebook, or a function of the fraction done.
        engine: local, ray or the name of an installed engine; by default local.
        workers: of Ray; by default one per CPU or GPU.
        address: of a Ray cluster; by default the one this process has joined, or one started on this machine.
    """

    command: str
    watch: Callable[[AuditProgress], None] | None
    progress: ProgressOption
    engine: str
    workers: int | None
    address: str | None


def audit(plan: Plan, out: Path | str, **session: Unpack[SessionOptions]) -> Run:
    """Carry out a plan.

    Args:
        plan: what to do.
        out: folder, created if it does not exist; or a URL, to which results are sent as they arrive.
        **session: see `SessionOptions`.

    Raises:
        ValueError: if the plan does not fit; if `out` holds a run already, or another process writes to it.
        FileNotFoundError: if none of the sources exists.
        StoppedError: if `out` cannot be written, an image cannot be fetched, or Ray gives up.
        AuditInterrupt: a KeyboardInterrupt that says how much is saved.
    """
    require("an audit", *PACKAGES, extra="audit")
    plan = plan.resolved()
    with open_store(out) as store, _open_engine(session) as engine, _storage_errors(store):
        folder, created = store.folder, not store.folder.exists()
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"out must be a folder, got {folder}, which is a file")
        folder.mkdir(parents=True, exist_ok=True)
        # Locked before the folder is checked: of two processes that start at once, one must see the other's run.
        with locked(folder, LOCK):
            store.check_free(OUTPUTS)
            # From here on a crash leaves a run that `resume` starts from the beginning.
            info = RunInfo.planned(plan, session.get("command", ""))
            info.write(folder)
            try:
                job, info = prepare(info, folder)
                return _carry_out(Ledger(store, job, info), engine, session)
            except (ValueError, FileNotFoundError):
                # A plan that cannot be carried out leaves no run: to resume it would end in the same error.
                if not shard_files(folder) and not unfinished_files(folder):
                    for name in (RUN_FILE, LISTING):
                        (folder / name).unlink(missing_ok=True)
                    shutil.rmtree(folder / MAPS, ignore_errors=True)
                    if created and {path.name for path in folder.iterdir()} <= {LOCK}:
                        (folder / LOCK).unlink(missing_ok=True)
                        folder.rmdir()
                raise


def resume(out: Path | str, **session: Unpack[SessionOptions]) -> Run:
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
    with open_store(out) as store, _storage_errors(store):
        store.fetch()
        RunInfo.read(store.folder, store.name)  # before a lock is made where no run is
        # The lock also holds for a complete run: its repair writes.
        with locked(store.folder, LOCK):
            return _resume(store, session)


def _resume(store: LocalStore, session: SessionOptions) -> Run:
    folder = store.folder
    info = RunInfo.read(folder, store.name)  # again: it may have been finished before the lock was held
    # Safe under the lock: whoever made these drafts is dead.
    clear_drafts(folder)
    if info.status == "planned":
        with _open_engine(session) as engine:
            planned = replace(
                info, plan=info.plan.resolved(), command=info.command or session.get("command", "")
            )
            job, info = prepare(planned, folder)
            return _carry_out(Ledger(store, job, info), engine, session)
    listing, damage = read_listing(folder, info), find_damage(store)
    # Shards and maps are intact; only the compacted tables can still be damaged.
    if info.complete and not damage:
        tables = damaged_tables(folder, info)
        if not tables:
            store.finish()
            return open_run(store.name)
        # With every shard intact, the tables can be made again without the network.
        if len(shard_files(folder)) == -(-len(listing) // (info.plan.shard or 1)):
            warn(f"damaged files ({enumerated(tables)}) are written again from the shards", UserWarning)
            return _finish(store, info, len(listing))
    with _open_engine(session) as engine:
        job = Job.of(info.plan, load_planned(info.plan.model), listing)
        check_same_model(info, job.classifier)
        kept, remarks = recover(store, job, damage)
        if remarks or info.status != "running":  # no needless write: any can meet a full disk
            info = replace(info, status="running", missing=None).with_remarks(remarks)
            info.write(folder)
        return _carry_out(Ledger(store, job, info, kept), engine, session)


def _open_engine(session: SessionOptions) -> AbstractContextManager[Engine]:
    return open_engine(session.get("engine", "local"), session.get("workers"), session.get("address"))


def _carry_out(ledger: Ledger, engine: Engine, session: SessionOptions) -> Run:
    """Compute and store every group that is left, then finish the run."""
    # A remote run becomes resumable before its first results are sent.
    ledger.store.save_info()
    job, watch = ledger.job, session.get("watch")
    cells = len(job.plan.cells)
    started, before = time.perf_counter(), ledger.done

    def report(attacks: float = 0.0) -> None:
        done = ledger.done + attacks
        if bar is not None:
            bar(done / job.attacks if job.attacks else 1.0)
        if watch is not None:
            elapsed = time.perf_counter() - started
            speed = (done - before) / cells / elapsed if elapsed else 0.0
            watch(AuditProgress(done / cells, len(job.listing), speed))

    try:
        # The engine stops before the ledger is closed, however the block ends.
        with (
            shown(session.get("progress"), "auditing", total=len(job.listing)) as bar,
            ledger,
            closing(engine.results(job, ledger.backlog, report)) as results,
        ):
            report()
            for result in results:
                ledger.add(result)
                report()
    # The ledger has been closed by now, so that the number of saved attacks is final.
    except KeyboardInterrupt:
        raise AuditInterrupt(ledger.saved, job.attacks, ledger.store.name) from None
    info = replace(ledger.info, engine=dict(engine.about))
    return _finish(ledger.store, info, len(job.listing), ledger.unread)


def _finish(store: LocalStore, info: RunInfo, total: int, unread: Sequence[tuple[str, str]] = ()) -> Run:
    """Write what is true of all shards together: the complete tables, or which images are missing."""
    # Counts come from the notes on the disk, not from this session, which may have computed only some shards.
    notes = list(read_notes(store.folder))
    missing = sorted([*unread, *(pair for note in notes for pair in note.missing)])
    read, skipped = sum(note.read for note in notes), sum(len(note.skipped) for note in notes)
    info = replace(info, images=ImageCounts(total, read, skipped, len(missing) or None), missing=None)
    if missing:
        names = tuple(name for name, _ in missing[:NAMED])
        absent = MissingImages(len(missing), names, missing[0][1])
        replace(info, status="incomplete", missing=absent).write(store.folder)
        store.save_info()
    else:
        # Working time of all sessions; the wall time between them says nothing.
        seconds = sum(note.seconds for note in notes)
        # The digests come from compaction, so run.json is written after the tables that it vouches for.
        replace(
            info,
            status="complete",
            checksums={**info.checksums, **compact(store.folder, notes)},
            finished=now(),
            seconds=round(seconds, 3),
            images_per_second=round(total / seconds, 3) if seconds else None,
        ).write(store.folder)
        store.finish()
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
