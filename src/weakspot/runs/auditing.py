"""Audits: a plan carried out shard by shard into a folder, from which it can go on after any death."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weakspot.checks import warn
from weakspot.classifier import Classifier
from weakspot.lock import locked
from weakspot.models.fingerprint import fingerprint
from weakspot.runs.engines import Engine, Work, opened
from weakspot.runs.execution import ShardResult
from weakspot.runs.folder import versions
from weakspot.runs.maps import MapStore
from weakspot.runs.mirror import Kept, kept
from weakspot.runs.plan import Plan
from weakspot.runs.plan_files import read_mapping
from weakspot.runs.preparing import Prepared, beginning, load_planned, now, prepare, usual_shard
from weakspot.runs.records import (
    Note,
    clear_drafts,
    compact,
    drop_shards,
    finished_shards,
    read_notes,
    write_json,
    write_shard,
)
from weakspot.runs.run import ABOUT, LISTING, Run, read_about
from weakspot.runs.stopping import StoppedError

LOCK = "audit.lock"
OURS = (ABOUT, LISTING, "records.parquet", "skipped.parquet", "shards", "maps.zarr")


@dataclass(frozen=True)
class Standing:
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


Watch = Callable[[Standing], None]


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
        watch: called with the `Standing` as it changes.
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
            return _go(prepared, place, batch_size, watch, ready)


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
    """Go on with an audit that was cut off; of one that is complete nothing is done.

    Arguments and errors are those of `audit`.

    Raises:
        FileNotFoundError: when there is no such run.
        ValueError: when model or folder are not what they were.
    """
    with kept(out) as place, _writing(place):
        place.fetch()
        read_about(place.folder)
        return _resumed(place, batch_size, command, watch, (engine, workers, address))


def _resumed(
    place: Kept,
    batch_size: int | None,
    command: str,
    watch: Watch | None,
    who: tuple[str, int | None, str | None],
) -> Run:
    out = place.folder
    with locked(out, LOCK):
        about = read_about(out)  # again: it may have been finished in the meantime
        plan = read_mapping(about["plan"])
        if about["status"] == "complete":
            drop_shards(out)
            place.end()
            return place.run()
        clear_drafts(out)
        with opened(*who) as ready:
            if about["status"] == "planned":
                prepared = prepare(plan.resolved(), out, about["command"] or command)
                return _go(prepared, place, batch_size, watch, ready)
            classifier = load_planned(plan.model)
            _check_same(about, classifier)
            import pyarrow.parquet as pq

            prepared = Prepared(plan, classifier, pq.read_table(out / LISTING), about)
            return _go(prepared, place, batch_size, watch, ready)


def _go(prepared: Prepared, place: Kept, batch_size: int | None, watch: Watch | None, engine: Engine) -> Run:
    """Every shard that is missing, then the end."""
    out = place.folder
    place.begin()
    plan, listing = prepared.plan, prepared.listing
    total, size = len(listing), plan.shard or usual_shard(prepared.classifier)
    done = finished_shards(out)
    missing = [number for number in range(-(-total // size)) if number not in done]
    work = Work(plan, prepared.classifier, listing, size, missing, batch_size)
    store = None
    if plan.maps:
        store = MapStore(out, total, [attack.label for attack in plan.attacks], plan.regions, size)
    started = time.perf_counter()
    before = images = sum(min(size, total - number * size) for number in done)

    def tell(done: float) -> None:
        if watch is not None:
            elapsed = time.perf_counter() - started
            watch(Standing(done, total, (done - before) / elapsed if elapsed else 0.0))

    def write(number: int, result: ShardResult) -> None:
        if store is not None:
            store.write(number, result.maps)
        write_shard(out, number, result.rows, Note(result.read, result.skipped, result.seconds))
        place.add(number)

    tell(images)
    # One shard is written while the next is worked on; at the end of the block, however it comes, that is done.
    with (
        ThreadPoolExecutor(1, thread_name_prefix="weakspot-writer") as writer,
        closing(engine.results(work, lambda part: tell(images + part))) as results,
    ):
        written: Future[None] | None = None
        for number, result in results:
            if written is not None:
                written.result()
            written = writer.submit(write, number, result)
            images += min(size, total - number * size)
            tell(images)
        if written is not None:
            written.result()
    tell(images)
    compact(out)
    notes = list(read_notes(out))
    read, skipped = sum(note.read for note in notes), sum(len(note.skipped) for note in notes)
    seconds = sum(note.seconds for note in notes)
    finished = {
        **prepared.about,
        "status": "complete",
        "engine": dict(engine.about),
        "images": {"listed": total, "read": read, "skipped": skipped},
        "finished": now(),
        "seconds": round(seconds, 3),
        "images_per_second": round(total / seconds, 3) if seconds else None,
    }
    write_json(out / ABOUT, finished)
    place.end()
    drop_shards(out)
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


def _check_same(about: Mapping[str, Any], classifier: Classifier) -> None:
    """Raises ValueError where the model is another; warns where what computes is."""
    found = fingerprint(classifier)
    if found != about["model"]["fingerprint"]:
        raise ValueError(
            f"model {about['plan']['model']['spec']} has other weights than when the audit began (fingerprint {found}, "
            f"then {about['model']['fingerprint']}); start another audit"
        )
    now = versions()
    other = [f"{name} {about['versions'].get(name)} then, {value} now" for name, value in now.items()
             if about["versions"].get(name) != value]  # fmt: skip
    if other:
        warn(
            f"versions have changed ({'; '.join(other)}); last digits may differ",
            UserWarning,
        )


@contextmanager
def _writing(place: Kept) -> Iterator[None]:
    """Turns what the system says of a folder that cannot be written into one sentence."""
    try:
        yield
    except FileNotFoundError:
        raise  # says itself what is missing
    except OSError as error:
        why = error.strerror or str(error).strip().partition("\n")[0]
        go_on = f"; what is there is whole: go on by weakspot audit --resume {place.name} once there is room"
        raise StoppedError(
            f"{place.name} cannot be written ({why}){go_on if place.begun else ''}", resumable=place.begun
        ) from error
