"""Recovery: what has to be done again before an audit goes on.

Shards that are damaged, shards with images that were changed since they were attacked, and shards with missing images
that are back. All of them are named, removed and done again as a whole, which gives the other images of a shard the
same rows again.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weakspot._checks import warn
from weakspot.audit.plan.image_list import entries
from weakspot.audit.store.integrity import DamagedError, file_digest, listed
from weakspot.audit.store.maps import drop_array, drop_maps, map_files
from weakspot.audit.store.records import LISTING, read_note, shard_files, shard_number
from weakspot.audit.store.remote import LocalStore
from weakspot.audit.store.run import versions
from weakspot.audit.store.verification import damaged_maps, damaged_shards
from weakspot.audit.work.shard_images import content_digests
from weakspot.classifier import Classifier
from weakspot.models.probe import Watch, read_probe

if TYPE_CHECKING:
    import pyarrow as pa


AT_ONCE = 8


def read_listing(folder: Path, about: Mapping[str, Any]) -> pa.Table:
    """The list of images as it was when the audit began.

    Raises:
        DamagedError: if it is not; nothing can be done again then.
    """
    import pyarrow.parquet as pq

    path = folder / LISTING
    try:
        same = file_digest(path) == about["checksums"][LISTING]
    except (OSError, KeyError):
        same = False
    if not same:
        raise DamagedError(
            f"{path} is damaged, and without the list of images the audit cannot go on; start another"
        )
    return pq.read_table(path)


def check_same(about: Mapping[str, Any], classifier: Classifier) -> None:
    """Raise ValueError if the model is another than the one the audit began with; warn if libraries are.

    Compared are the weights and, within a tolerance, the answers to fixed probe images.
    """
    model, spec, found = about["model"], about["plan"]["model"]["spec"], Watch(classifier)
    if found.weights != model["fingerprint"]:
        raise ValueError(
            f"model {spec} has other weights than when the audit began (fingerprint {found.weights}, then "
            f"{model['fingerprint']}); start another audit"
        )
    if not found.probe.agrees(read_probe(model["probe"])):
        raise ValueError(
            f"model {spec} has the same weights as when the audit began but gives other logits, so its code, its "
            "normalization or a library has changed; start another audit"
        )
    now = versions()
    other = [f"{name} {about['versions'].get(name)} then, {value} now" for name, value in now.items()
             if about["versions"].get(name) != value]  # fmt: skip
    if other:
        warn(f"versions have changed ({'; '.join(other)}); last digits may differ", UserWarning)


def find_damage(place: LocalStore) -> dict[int, list[str]]:
    """Shard number to the files of it, records or maps, that are gone or not what was written."""
    folder, sizes = place.folder, place.map_sizes()
    bad: dict[int, list[str]] = {}
    for shard in damaged_shards(folder):
        bad.setdefault(shard_number(shard), []).append(f"{shard.parent.name}/{shard.name}")
    sound = {number: path for number, path in shard_files(folder).items() if number not in bad}
    known = {number: read_note(path) for number, path in sound.items()}
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="weakspot-verify") as pool:
        found = list(pool.map(lambda note: damaged_maps(folder, note, sizes), known.values()))
    for number, paths in zip(known, found, strict=True):
        if paths:
            bad[number] = [f"maps.zarr/{path}" for path in paths]
    strays = [
        (path, number)
        for path, number in map_files(folder)
        if number in known and path not in known[number].maps
    ]
    for path, number in strays:
        bad.setdefault(number, []).append(f"maps.zarr/{path}")
    return bad


def recover(place: LocalStore, listing: pa.Table, size: int, damage: Mapping[int, list[str]]) -> list[str]:
    """Remove the shards that are to be done again.

    Args:
        place: of the run.
        listing: of all images.
        size: images of a shard.
        damage: of `find_damage`.

    Returns:
        Sentences that name what was damaged and which images were changed.
    """
    remarks = []
    paths = [path for number in sorted(damage) for path in damage[number]]
    for path in paths:
        if path.endswith("/zarr.json"):
            drop_array(place.folder, path.removeprefix("maps.zarr/"))
    if damage:
        files = listed(dict.fromkeys(paths))
        images = sum(len(entries(listing, number * size, size)) for number in damage)
        remarks.append(
            f"Damaged files were found ({files}); the results of the {images:,} images in their blocks were discarded."
        )
    changed, returned = _changed(place.folder, listing, size, skip=damage)
    if changed:
        names = [name for number in sorted(changed) for name in changed[number]]
        were = "1 image was" if len(names) == 1 else f"{len(names):,} images were"
        remarks.append(
            f"{were} changed after being attacked ({listed(names)}); the earlier results were discarded."
        )
    for sentence in remarks:
        warn(sentence, UserWarning)
    place.drop({*damage, *changed, *returned})
    unfinished = {number for _, number in map_files(place.folder)} - set(shard_files(place.folder))
    drop_maps(place.folder, unfinished)  # of a writer that died: the next may write fewer arrays
    return remarks


def _changed(
    folder: Path, listing: pa.Table, size: int, skip: Mapping[int, object]
) -> tuple[dict[int, list[str]], set[int]]:
    """Shard number to the images that are others by now, and the shards with missing images of which some are back."""
    changed: dict[int, list[str]] = {}
    returned = set()
    for number, path in shard_files(folder).items():
        if number in skip:
            continue
        note, mine = read_note(path), entries(listing, number * size, size)
        now = content_digests(mine)
        names = [
            entry.name
            for entry, then, digest in zip(mine, note.contents, now, strict=True)
            if then is not None and digest is not None and then != digest
        ]
        if names:
            changed[number] = names
        missing = {name for name, _ in note.missing}
        if any(digest is not None for entry, digest in zip(mine, now, strict=True) if entry.name in missing):
            returned.add(number)
    return changed, returned
