"""Results of shards that are not complete yet, so that a crash loses seconds of work and not a whole shard.

The unit of work is a group: some consecutive images of a shard under one attack in one region. Groups that are done are
written every few seconds to a new file unfinished/SHARD-DIGEST.safetensors. Once all groups of a shard are done, they
are merged into the shard, and its unfinished files are removed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from weakspot._io.files import write_atomic
from weakspot.audit.plan.schema import Reader
from weakspot.audit.store.digests import digest_of
from weakspot.audit.store.maps import MapBlock, Values, merge_block
from weakspot.audit.store.records import Note, merged_rows, shard_number

if TYPE_CHECKING:
    import pyarrow as pa

UNFINISHED = "unfinished"
SUFFIX = ".safetensors"


class GroupKey(NamedTuple):
    """A group: some consecutive images of a shard under one attack in one region.

    Attributes:
        shard: number of the shard.
        start: place of the first image in the shard.
        attack: number of the attack in the plan.
        region: number of the region in the plan.
    """

    shard: int
    start: int
    attack: int
    region: int


@dataclass(frozen=True)
class ImageFacts:
    """What was seen when some listed images were opened.

    Attributes:
        contents: digest of each image's stored content, in order; None for those that were not read.
        skipped: (name, reason) of files that are no pictures.
        missing: (name, reason) of files that are unavailable, and of images without one of their controls.
    """

    contents: tuple[str | None, ...]
    skipped: tuple[tuple[str, str], ...]
    missing: tuple[tuple[str, str], ...]


@dataclass(frozen=True, eq=False)
class GroupResult:
    """The outcome of one group.

    Attributes:
        key: which group.
        rows: of the records, one per image that could be read.
        maps: name -> block of the n listed images.
        images: what was seen when the images were opened.
        seconds: wall time.
        remarks: about the model so far.
    """

    key: GroupKey
    rows: pa.Table
    maps: Mapping[str, MapBlock]
    images: ImageFacts
    seconds: float
    remarks: tuple[str, ...] = ()


def unfinished_files(folder: Path) -> list[Path]:
    """The files of unfinished shards."""
    return sorted((folder / UNFINISHED).glob(f"[0-9]*-*{SUFFIX}"))


def write_unfinished(folder: Path, results: Sequence[GroupResult]) -> Path:
    """Write results of one shard to a file of their own; on return it has reached the disk."""
    import pyarrow as pa

    arrays: dict[str, Values] = {}
    facts = []
    for number, result in enumerate(results):
        # Rows are stored as the bytes of an Arrow stream, because safetensors holds arrays alone.
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, result.rows.schema) as stream:
            stream.write_table(result.rows)
        arrays[f"{number}/rows"] = np.frombuffer(sink.getvalue(), np.uint8)
        for name, block in result.maps.items():
            arrays[f"{number}/values/{name}"] = np.ascontiguousarray(block.values)
            if block.scale is not None:
                arrays[f"{number}/scale/{name}"] = block.scale
        facts.append(
            {
                "key": result.key,
                "images": asdict(result.images),
                "seconds": result.seconds,
                "remarks": result.remarks,
                "about": {name: dict(block.about) for name, block in result.maps.items()},
            }
        )
    content = save(arrays, {"groups": json.dumps(facts)})
    shard = results[0].key.shard
    path = folder / UNFINISHED / f"{shard:07d}-{digest_of(content, shard)}{SUFFIX}"
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, lambda draft: draft.write_bytes(content), durable=True)
    return path


def read_unfinished(path: Path) -> list[GroupResult]:
    """The results in a file of `write_unfinished`."""
    import pyarrow as pa

    results = []
    with safe_open(path, "numpy") as file:
        names = set(file.keys())
        for number, facts in enumerate(json.loads(file.metadata()["groups"])):
            blocks = {}
            for name, about in facts["about"].items():
                place = f"{number}/scale/{name}"
                scale = file.get_tensor(place) if place in names else None
                blocks[name] = MapBlock(file.get_tensor(f"{number}/values/{name}"), about, scale)
            rows = pa.ipc.open_stream(pa.py_buffer(file.get_tensor(f"{number}/rows").tobytes())).read_all()
            seen = Reader().table(ImageFacts, facts["images"], "images")
            key, seconds, remarks = GroupKey(*facts["key"]), facts["seconds"], tuple(facts["remarks"])
            results.append(GroupResult(key, rows, blocks, seen, seconds, remarks))
    return results


def remove_unfinished(folder: Path, shards: Iterable[int]) -> None:
    """Remove the unfinished files of these shards and, once it is empty, their folder."""
    shards, home = set(shards), folder / UNFINISHED
    for path in unfinished_files(folder):
        if shard_number(path) in shards:
            path.unlink()
    # It is empty as well if the disk was full when its first file was written.
    if home.is_dir() and not any(home.iterdir()):
        home.rmdir()


@dataclass(frozen=True, eq=False)
class ShardResult:
    """All groups of a shard together.

    Attributes:
        rows: one per image that could be read x attack x region, by image.
        maps: of all images of the shard, including those that could not be read.
        note: the facts that are stored beside the rows, without those about maps.
    """

    rows: pa.Table
    maps: Mapping[str, MapBlock]
    note: Note


def merged(results: Iterable[GroupResult], shape: tuple[int, int, int]) -> ShardResult:
    """Merge all groups of a shard; their order of arrival changes nothing.

    Args:
        results: of the groups.
        shape: numbers of images, attacks and regions of the shard.
    """
    # In the order of the plan, which the rows of an image keep when all rows are sorted by image.
    ordered = sorted(results, key=lambda result: (result.key.attack, result.key.region, result.key.start))
    contents: list[str | None] = [None] * shape[0]
    skipped: dict[int, Sequence[tuple[str, str]]] = {}
    missing: dict[int, dict[tuple[str, str], None]] = defaultdict(dict)
    blocks: dict[str, MapBlock] = {}
    for result in ordered:
        key, images = result.key, result.images
        contents[key.start : key.start + len(images.contents)] = images.contents
        # Every cell opens the same images and skips the same files, so each group of images counts once.
        skipped[key.start] = images.skipped
        # Some cells alone lack a control of an image.
        missing[key.start].update(dict.fromkeys(images.missing))
        for name, block in result.maps.items():
            merge_block(blocks, name, block, shape, (key.start, key.attack, key.region))
    note = Note(
        # An image has a row in every cell; the first cell counts it once.
        sum(len(result.rows) for result in ordered if result.key.attack == result.key.region == 0),
        tuple(pair for start in sorted(skipped) for pair in skipped[start]),
        tuple(pair for start in sorted(missing) for pair in missing[start]),
        tuple(contents),
        sum(result.seconds for result in ordered),
    )
    return ShardResult(merged_rows([result.rows for result in ordered]), blocks, note)
