"""Before an audit resumes: what was stored is compared with its digests, and images with those that were attacked.

Removed are damaged shards, shards with images that changed since they were attacked, and shards with missing images
that are back. Each is computed again as a whole, which gives its other images the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from weakspot._checks import warn
from weakspot.audit.execution.job import Job
from weakspot.audit.execution.opened_images import content_digests
from weakspot.audit.plan.image_list import Entry
from weakspot.audit.store.digests import DamagedError, enumerated, file_digest
from weakspot.audit.store.maps import MAPS, drop_array, drop_maps, map_files
from weakspot.audit.store.records import LISTING, is_intact, read_note, shard_files, shard_number
from weakspot.audit.store.run_info import RunInfo
from weakspot.audit.store.stores import LocalStore
from weakspot.audit.store.unfinished import (
    UNFINISHED,
    GroupKey,
    GroupResult,
    read_unfinished,
    unfinished_files,
)
from weakspot.audit.store.verification import damaged_maps, damaged_shards

if TYPE_CHECKING:
    import pyarrow as pa

AT_ONCE = 8  # shards that are verified concurrently


def read_listing(folder: Path, info: RunInfo) -> pa.Table:
    """The list of images as it was when the audit began.

    Raises:
        DamagedError: if it differs; nothing can be computed again then.
    """
    import pyarrow.parquet as pq

    path = folder / LISTING
    try:
        intact = file_digest(path) == info.checksums[LISTING]
    except (OSError, KeyError):
        intact = False
    if not intact:
        raise DamagedError(
            f"{path} is damaged, and without the list of images the audit cannot continue (start another)"
        )
    return pq.read_table(path)


def find_damage(store: LocalStore) -> dict[int, list[str]]:
    """Shard number -> its files, records or maps, that are gone or differ from what was written."""
    folder, sizes = store.folder, store.map_sizes()
    bad: dict[int, list[str]] = {}
    for shard in damaged_shards(folder):
        bad.setdefault(shard_number(shard), []).append(f"{shard.parent.name}/{shard.name}")
    for file in unfinished_files(folder):
        if not is_intact(file):
            bad.setdefault(shard_number(file), []).append(f"{UNFINISHED}/{file.name}")
    # Notes of damaged shards are not believed.
    intact = {number: path for number, path in shard_files(folder).items() if number not in bad}
    notes = {number: read_note(path) for number, path in intact.items()}
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="weakspot-verify") as pool:
        damage = list(pool.map(lambda note: damaged_maps(folder, note, sizes), notes.values()))
    for number, paths in zip(notes, damage, strict=True):
        if paths:
            bad[number] = [f"{MAPS}/{path}" for path in paths]
    # Files that no note mentions: another shard's, or written by something else.
    for path, number in map_files(folder):
        if number in notes and path not in notes[number].maps:
            bad.setdefault(number, []).append(f"{MAPS}/{path}")
    return bad


def recover(
    store: LocalStore, job: Job, damage: Mapping[int, list[str]]
) -> tuple[list[GroupResult], list[str]]:
    """Remove what must be computed again.

    Args:
        store: of the run.
        job: of the audit.
        damage: from `find_damage`.

    Returns:
        The results of unfinished shards that can be kept, and remarks that name what was damaged and which images
        changed.
    """
    remarks = []
    paths = [path for number in sorted(damage) for path in damage[number]]
    for path in paths:
        # A damaged description concerns every shard of the array, so the whole array goes.
        if path.endswith("/zarr.json"):
            drop_array(store.folder, path.removeprefix(f"{MAPS}/"))
    if damage:
        files = enumerated(dict.fromkeys(paths))
        images = sum(job.size(number) for number in damage)
        remarks.append(
            f"Damaged files were found ({files}); the results of the {images:,} images in their shards were discarded."
        )
    # Damaged shards are computed again anyway, so their images need no comparison.
    changed, returned = _changed(store.folder, job, skip=damage)
    kept, edited = _kept(store, job, skip=damage)
    if changed or edited:
        names = [*(name for number in sorted(changed) for name in changed[number]), *edited]
        were = "1 image was" if len(names) == 1 else f"{len(names):,} images were"
        remarks.append(
            f"{were} changed after being attacked ({enumerated(names)}); the earlier results were discarded."
        )
    for remark in remarks:
        warn(remark, UserWarning)
    dropped = {*damage, *changed, *returned}
    store.drop(dropped)
    kept = [result for result in kept if result.key.shard not in dropped]
    # Maps without a shard are from a writer that died; its successor may write fewer arrays.
    drop_maps(
        store.folder, {number for _, number in map_files(store.folder)} - set(shard_files(store.folder))
    )
    return kept, remarks


def _changed(folder: Path, job: Job, skip: Mapping[int, object]) -> tuple[dict[int, list[str]], set[int]]:
    """Shard number -> names of its changed images, and the shards with missing images of which some are back."""
    changed: dict[int, list[str]] = {}
    returned = set()
    for number, path in shard_files(folder).items():
        if number in skip:
            continue
        note, images = read_note(path), job.entries(number)
        digests = content_digests(images)
        names = _edited(images, note.contents, digests)
        if names:
            changed[number] = names
        missing = {name for name, _ in note.missing}
        present = {entry.name for entry, digest in zip(images, digests, strict=True) if digest is not None}
        if missing & present:
            returned.add(number)
    return changed, returned


def _edited(images: Sequence[Entry], before: Sequence[str | None], now: Sequence[str | None]) -> list[str]:
    """Names of the images with another content; one that has become unavailable did not change: its rows stay valid."""
    return [
        entry.name
        for entry, then, digest in zip(images, before, now, strict=True)
        if then is not None and digest is not None and then != digest
    ]


def _kept(store: LocalStore, job: Job, skip: Mapping[int, object]) -> tuple[list[GroupResult], list[str]]:
    """The results of unfinished shards whose images are all as they were, and the names of changed images."""
    done = shard_files(store.folder)
    store.drop_unfinished(done)  # of sessions that died before they could remove them
    digests: dict[tuple[int, int], list[str | None]] = {}
    kept: dict[GroupKey, GroupResult] = {}
    edited: dict[str, None] = {}
    for path in unfinished_files(store.folder):
        for result in [] if shard_number(path) in skip else read_unfinished(path):
            images = job.entries_of(result.key)
            place = result.key[:2]
            if place not in digests:
                digests[place] = content_digests(images)
            edited.update(dict.fromkeys(_edited(images, result.images.contents, digests[place])))
            if not result.images.missing and list(result.images.contents) == digests[place]:
                kept[result.key] = result
    return list(kept.values()), list(edited)
