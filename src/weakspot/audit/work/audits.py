"""Audits: a plan carried out shard by shard into a folder, from which it can go on after any death."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weakspot._checks import warn
from weakspot._io.files import locked
from weakspot._io.urls import FetchError
from weakspot.audit.engines.base import Backlog, Engine, opened
from weakspot.audit.plan.plan import Plan
from weakspot.audit.store.integrity import DamagedError, StoppedError, listed
from weakspot.audit.store.maps import MapStore
from weakspot.audit.store.records import (
    LISTING,
    Note,
    clear_drafts,
    compact,
    finished_shards,
    read_notes,
    write_json,
    write_shard,
)
from weakspot.audit.store.remote import LocalStore, kept
from weakspot.audit.store.run import ABOUT, Run, read_about
from weakspot.audit.store.verification import damaged_tables
from weakspot.audit.work.preparation import Prepared, beginning, load_planned, now, prepare, usual_shard
from weakspot.audit.work.recovery import check_same, find_damage, read_listing, recover
from weakspot.audit.work.shard import ShardResult

if TYPE_CHECKING:
    import pyarrow as pa


LOCK = "audit.lock"
NAMED = 5  # missing images in run.json; how many there are is said beside
OURS = (ABOUT, LISTING, "records.parquet", "skipped.parquet", "shards", "maps.zarr")


@dataclass(frozen=True)
class AuditProgress:
    """How far an audit is.

    Attributes:
        done: images, those of earlier sessions and those that could not be read too.
        total: images.
        speed: images per second of this session.
    """

    done: float
    total: int
    speed: float

    @property
    def seconds_left(self) -> float:
        """At this speed; infinity before there is one."""
        return (self.total - self.done) / self.speed if self.speed else float("inf")


Watch = Callable[[AuditProgress], None]


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
        plan: what is to be done.
        out: folder, made where it is missing; or a URL, where what is found is sent as it is found.
        batch_size: images attacked at once; changes no result. Where not given all of a shard, fewer when memory
            runs out.
        command: what run.json says it was.
        watch: called with the `AuditProgress` as it changes.
        engine: local or ray; changes no result, nor do the next two.
        workers: of Ray; one for each CPU or GPU where not given.
        address: of a Ray cluster; where not given one is started on this machine, unless this process has joined one.

    Raises:
        ValueError: when the plan does not fit, naming what; or `out` holds a run already or is written by another.
        FileNotFoundError: when none of the sources is there.
        StoppedError: when `out` cannot be written, or Ray gives up.
    """
    plan = plan.resolved()
    with kept(out) as place, opened(engine, workers, address) as ready, _writing(place):
        out, fresh = place.folder, not place.folder.exists()
        place.check_free(OURS)
        if out.exists() and not out.is_dir():
            raise ValueError(f"out is {out}, which is a file; accepted is a folder, made where it is missing")
        out.mkdir(parents=True, exist_ok=True)
        with locked(out, LOCK):
            _check_free(out)
            write_json(out / ABOUT, {**beginning(plan, command), "status": "planned"})
            try:
                prepared = prepare(plan, out, command)
            except (ValueError, FileNotFoundError):
                for name in (ABOUT, LISTING):
                    (out / name).unlink(missing_ok=True)
                if fresh:
                    (out / LOCK).unlink(missing_ok=True)
                    out.rmdir()
                raise
            return _run_missing_shards(prepared, place, batch_size, watch, ready)


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
    """Go on with an audit that was cut off or is not complete, and repair one that is damaged.

    Of a complete audit every stored file is compared with its digest; if all are what was written, nothing is done.
    Before an audit goes on, the images that were attacked already are compared, too.

    Arguments and errors are those of `audit`.

    Raises:
        FileNotFoundError: when there is no such run.
        ValueError: when model or folder are not what they were.
        DamagedError: when the list of images is damaged.
    """
    with kept(out) as place, _writing(place):
        place.fetch()
        read_about(place.folder)
        return _resumed(place, batch_size, command, watch, (engine, workers, address))


def _resumed(
    place: LocalStore,
    batch_size: int | None,
    command: str,
    watch: Watch | None,
    who: tuple[str, int | None, str | None],
) -> Run:
    out = place.folder
    with locked(out, LOCK):
        about = read_about(out)  # again: it may have been finished in the meantime
        plan = Plan.from_mapping(about["plan"])
        clear_drafts(out)
        if about["status"] == "planned":
            with opened(*who) as ready:
                prepared = prepare(plan.resolved(), out, about["command"] or command)
                return _run_missing_shards(prepared, place, batch_size, watch, ready)
        listing, damage = read_listing(out, about), find_damage(place)
        if about["status"] == "complete" and not damage:
            tables = damaged_tables(out, about)
            if not tables:
                place.end()
                return place.run()
            if len(finished_shards(out)) == _shard_count(plan, listing):
                warn(f"{listed(tables)} was damaged and is written again", UserWarning)
                return _finished(place, about, len(listing))
        with opened(*who) as ready:
            classifier = load_planned(plan.model)
            check_same(about, classifier)
            said = recover(place, listing, plan.shard or usual_shard(classifier), damage)
            if said or about["status"] != "running":  # each write can meet a full disk
                about = {key: value for key, value in about.items() if key != "missing"}
                about |= {"status": "running", "remarks": _joined(about["remarks"], said)}
                write_json(out / ABOUT, about)
            return _run_missing_shards(
                Prepared(plan, classifier, listing, about), place, batch_size, watch, ready
            )


def _shard_count(plan: Plan, listing: pa.Table) -> int:
    return -(-len(listing) // (plan.shard or 1))


def _joined(remarks: Iterable[str], more: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*remarks, *more]))


def _run_missing_shards(
    prepared: Prepared, place: LocalStore, batch_size: int | None, watch: Watch | None, engine: Engine
) -> Run:
    """Every shard that is missing, then the end."""
    out = place.folder
    place.begin()
    plan, listing, about = prepared.plan, prepared.listing, dict(prepared.about)
    total, size = len(listing), plan.shard or usual_shard(prepared.classifier)
    done = finished_shards(out)
    left = [number for number in range(-(-total // size)) if number not in done]
    work = Backlog(plan, prepared.classifier, listing, size, left, batch_size)
    store = None
    if plan.maps:
        store = MapStore(out, total, [attack.label for attack in plan.attacks], plan.regions, size)
    started = time.perf_counter()
    before = images = sum(min(size, total - number * size) for number in done)

    def tell(done: float) -> None:
        if watch is not None:
            elapsed = time.perf_counter() - started
            watch(AuditProgress(done, total, (done - before) / elapsed if elapsed else 0.0))

    def write(number: int, result: ShardResult) -> None:
        remarks = _joined(about["remarks"], result.remarks)
        if remarks != about["remarks"]:
            about["remarks"] = remarks
            write_json(out / ABOUT, about)
        maps = {} if store is None else store.write(number, result.maps)
        note = Note(result.read, result.skipped, result.missing, result.contents, result.seconds, maps)
        place.add(write_shard(out, number, result.rows, note))

    tell(images)
    unread: list[tuple[str, str]] = []  # of shards that are not written, as all of their images are missing
    # One shard is written while the next is worked on; at the end of the block, however it comes, that is done.
    with (
        ThreadPoolExecutor(1, thread_name_prefix="weakspot-writer") as writer,
        closing(engine.results(work, lambda part: tell(images + part))) as results,
    ):
        written: Future[None] | None = None
        for number, result in results:
            if written is not None:
                written.result()
            if result.missing and not result.read:
                unread += result.missing
                continue
            written = writer.submit(write, number, result)
            images += min(size, total - number * size)
            tell(images)
        if written is not None:
            written.result()
    tell(images)
    about["engine"] = dict(engine.about)
    return _finished(place, about, total, unread)


def _finished(
    place: LocalStore, about: Mapping[str, Any], total: int, unread: Sequence[tuple[str, str]] = ()
) -> Run:
    """Write what is true of all shards together: a complete run, or which images are missing."""
    out = place.folder
    notes = list(read_notes(out))
    missing = sorted([*unread, *(pair for note in notes for pair in note.missing)])
    read, skipped = sum(note.read for note in notes), sum(len(note.skipped) for note in notes)
    about = {key: value for key, value in about.items() if key != "missing"}
    about["images"] = {"listed": total, "read": read, "skipped": skipped}
    if missing:
        about["images"]["missing"] = len(missing)
        names = [name for name, _ in missing[:NAMED]]
        about["missing"] = {"images": len(missing), "names": names, "reason": missing[0][1]}
        write_json(out / ABOUT, {**about, "status": "incomplete"})
        place.begin()
        return place.run()
    checksums = {**about["checksums"], **compact(out)}
    seconds = sum(note.seconds for note in notes)
    finished = {
        **about,
        "status": "complete",
        "checksums": checksums,
        "finished": now(),
        "seconds": round(seconds, 3),
        "images_per_second": round(total / seconds, 3) if seconds else None,
    }
    write_json(out / ABOUT, finished)
    place.end()
    clear_drafts(out)
    return place.run()


def _check_free(out: Path) -> None:
    """Raises ValueError where a run lies already."""
    taken = next((name for name in OURS if (out / name).exists()), None)
    if taken is not None and not (out / ABOUT).exists() and taken == LISTING:
        return  # a run that died before it began
    if taken is not None:
        raise ValueError(
            f"out is {out}, which holds a run already ({taken}); go on with it by --resume {out}, or give another "
            "folder"
        )


@contextmanager
def _writing(place: LocalStore) -> Iterator[None]:
    """Turns what the system says of a folder that cannot be written into one sentence."""
    try:
        yield
    except (FileNotFoundError, DamagedError):
        raise  # says itself what is missing
    except FetchError as error:
        raise StoppedError(f"{error}; go on by --resume once it can", resumable=True) from error
    except OSError as error:
        why = error.strerror or str(error).strip().partition("\n")[0]
        go_on = f"; what is there is whole: go on by weakspot audit --resume {place.name} once there is room"
        raise StoppedError(
            f"{place.name} cannot be written ({why}){go_on if place.begun else ''}", resumable=place.begun
        ) from error
