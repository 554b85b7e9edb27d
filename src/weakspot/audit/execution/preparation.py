"""Before groups are computed: a new audit is fixed and written down; a resumed one is checked and repaired.

A resumed audit removes damaged shards, shards with images that changed since they were attacked, and shards with
missing images that are back. Each is computed again as a whole, which gives its other images the same rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from weakspot._checks import NotFiniteError, quiet, warn
from weakspot._errors import ModelError, first_line
from weakspot._io.files import write_atomic
from weakspot._io.urls import exists
from weakspot._random import float32_noise
from weakspot._state import preserve_random_state
from weakspot.audit.execution.job import Job
from weakspot.audit.execution.opened_images import content_digests
from weakspot.audit.plan.attack_plan import ModelPlan
from weakspot.audit.plan.image_list import Entry, list_images
from weakspot.audit.plan.plan import Plan
from weakspot.audit.store.digests import DamagedError, enumerated, file_digest
from weakspot.audit.store.maps import MAPS, damaged_maps, drop_array, drop_maps, map_files
from weakspot.audit.store.records import (
    LISTING,
    damaged_shards,
    is_intact,
    read_note,
    shard_files,
    shard_number,
)
from weakspot.audit.store.run_info import ImageCounts, ModelInfo, RunInfo, changed_versions
from weakspot.audit.store.stores import LocalStore
from weakspot.audit.store.unfinished import (
    UNFINISHED,
    GroupKey,
    GroupResult,
    read_unfinished,
    unfinished_files,
)
from weakspot.classifier import Classifier
from weakspot.models import load
from weakspot.models.identity import Watch
from weakspot.models.specs import plain_pixels_note
from weakspot.regions import read_region
from weakspot.statistics.number_format import counted

if TYPE_CHECKING:
    import pyarrow as pa

AT_ONCE = 8  # shards that are verified concurrently


def load_planned(model: ModelPlan) -> Classifier:
    """Load the classifier of a plan.

    Raises:
        ValueError: if it cannot be loaded, or does not accept images of its size.
    """
    classifier = load(
        model.spec,
        weights=model.weights,
        device=model.device,
        mean=model.mean,
        std=model.std,
        input_size=model.size,
        class_names=model.classes,
    )
    try:
        class_count(classifier)
    except ModelError:
        raise
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)[:120]
        size = " x ".join(str(side) for side in (classifier.channels, *classifier.input_size))
        raise ValueError(
            f"model {model.spec} must accept images of {size} (channels x height x width), got: {reason} (give its "
            "size, or mean with one value per channel)"
        ) from None
    return classifier


def class_count(classifier: Classifier) -> int:
    """The number of classes, found by passing a gray image."""
    gray = torch.full((1, classifier.channels, *classifier.input_size), 0.5, device=classifier.mean.device)
    with preserve_random_state(gray.device), torch.no_grad():
        return int(classifier(gray).shape[1])


def prepare(info: RunInfo, out: Path) -> tuple[Job, RunInfo]:
    """Load the model of a planned run, try what can be tried, and list the images."""
    import pyarrow.parquet as pq

    plan = info.plan
    present = [source for source in plan.sources if exists(source)]
    if not present:
        raise FileNotFoundError(f"{plan.sources[0]} does not exist (give a file, folder or array)")
    classifier = load_planned(plan.model)
    count = class_count(classifier)
    if len(classifier.class_names) not in {0, count}:
        raise ValueError(
            f"classes must have {count} names for {classifier.name}, got {len(classifier.class_names)}"
        )
    # A region that cannot be made would otherwise fail after minutes of attacks.
    _try_regions(plan, classifier)
    if plan.model.mean is None and plan.model.std is None:
        remark = plain_pixels_note(plan.model.spec, classifier, "give mean and std, or --mean and --std,")
        if remark:
            warn(remark, UserWarning)
    listing = list_images(
        present,
        classifier.class_names,
        count,
        labels=plan.labels,
        limit=plan.limit,
        seed=plan.seed,
    )
    if not len(listing):
        raise ValueError(f"images must name at least one file, got none in {', '.join(plan.sources[:3])}")
    # The list is on the disk before run.json refers to its digest.
    write_atomic(out / LISTING, lambda draft: pq.write_table(listing, draft), durable=True)
    job, watch = Job.of(plan, classifier, listing), Watch(classifier)
    height, width = classifier.input_size
    info = replace(
        info,
        plan=job.plan,
        status="running",
        model=ModelInfo(classifier.name, watch.weights, count, (height, width), watch.probe),
        device=str(classifier.mean.device),
        images=ImageCounts(len(listing)),
        labels=dict(sorted(Counter(listing["label_from"].to_pylist()).items())),
        absent=tuple(source for source in plan.sources if source not in present),
        remarks=tuple(watch.remarks()),
        checksums={LISTING: file_digest(out / LISTING)},
    )
    info.write(out)
    return job, info


def _try_regions(plan: Plan, classifier: Classifier) -> None:
    """Raises ValueError if a region cannot be made, before anything expensive is computed."""
    texts = [str(spec.control_of) if spec.donor is not None else text for text, spec in plan.specs.items()]
    with quiet():
        # Noise rather than a flat image, which has no background to separate.
        generator = torch.Generator().manual_seed(0)
        images = float32_noise(generator, 1, classifier.channels, *classifier.input_size).to(
            classifier.mean.device
        )
        labels = torch.zeros(1, dtype=torch.long, device=images.device)
        for text in dict.fromkeys(texts):
            try:
                read_region(text, classifier, images, labels, fraction=plan.fraction, seed=plan.seed)
            except NotFiniteError:
                continue  # rows of the records will state it
            except (ValueError, FileNotFoundError) as error:
                message = str(error)
                prefix = "" if message.startswith("region") else f"region {text!r} of regions: "
                raise ValueError(f"{prefix}{message}") from None


def check_same_model(info: RunInfo, classifier: Classifier) -> None:
    """Raise ValueError if the model is not the one the audit began with; warn if versions of libraries changed.

    Compared are the weights and, within a tolerance, the logits of fixed probe images.
    """
    watch, model, spec = Watch(classifier), info.model, info.plan.model.spec
    if model is None or watch.weights != model.fingerprint:
        raise ValueError(
            f"model {spec} must have the weights with which the audit began (fingerprint "
            f"{'none' if model is None else model.fingerprint}), got {watch.weights} (start another audit)"
        )
    if not watch.probe.agrees(model.probe):
        raise ValueError(
            f"model {spec} has the same weights as when the audit began but returns other logits, so its code, its "
            "normalization or a library has changed (start another audit)"
        )
    changes = changed_versions(info.versions)
    if changes:
        warn(f"versions have changed ({changes}); the last digits may differ", UserWarning)


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
        damage = list(pool.map(lambda note: damaged_maps(folder, note.maps, sizes), notes.values()))
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
            f"Damaged files were found ({files}); the results of the {counted(images)} in their shards were discarded."
        )
    # Damaged shards are computed again anyway, so their images need no comparison.
    changed, returned = _changed(store.folder, job, skip=damage)
    kept, edited = _kept(store, job, skip=damage)
    if changed or edited:
        names = [*(name for number in sorted(changed) for name in changed[number]), *edited]
        were = "was" if len(names) == 1 else "were"
        remarks.append(
            f"{counted(len(names))} {were} changed after being attacked ({enumerated(names)}); the earlier results "
            "were discarded."
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
            # Shard and first image: the images of a group are the same under every attack in every region.
            place = result.key[:2]
            if place not in digests:
                digests[place] = content_digests(images)
            edited.update(dict.fromkeys(_edited(images, result.images.contents, digests[place])))
            if not result.images.missing and list(result.images.contents) == digests[place]:
                kept[result.key] = result
    return list(kept.values()), list(edited)
