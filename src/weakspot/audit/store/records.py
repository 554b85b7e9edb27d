"""Records of a run: one Parquet file per shard and, at the end, one for all.

A shard's file is named NUMBER-DIGEST.parquet. The digest covers content and number, so that the name reveals a damaged
shard and one in another's place. Shard files stay after compaction: what is damaged later can be compacted again, or
computed again shard by shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from weakspot._io.files import write_atomic
from weakspot.audit.plan.attack_plan import Limit
from weakspot.audit.plan.plan import Plan
from weakspot.audit.plan.schema import Reader
from weakspot.audit.store.digests import damaged, digest_of, digest_or_none, file_digest
from weakspot.audit.store.run_info import RunInfo

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

RECORDS, SKIPPED, SHARDS, LISTING = "records.parquet", "skipped.parquet", "shards", "images.parquet"
NOTE = b"weakspot"  # key of a shard's note in the metadata of its Parquet schema
ROWS = 50_000  # rows of a row group of the compacted file, and the most that compaction holds in memory
ROUNDING = (1e-5, 1e-6)  # of a distance in float32, relative and absolute
TIMES = ("attack_seconds", "analysis_seconds")
DERIVED = ("fooled", "robust")  # columns computed from the records when they are read
COLUMNS = {
    "index": "int64",
    "image": "str",
    "content": "str",
    "attack": "str",
    "budget": "str",
    "region": "str",
    "region_fraction": "float64",
    "label": "Int64",
    "label_name": "str",
    "label_from": "str",
    "predicted": "Int64",
    "predicted_name": "str",
    "correct": "boolean",
    "success": "boolean",
    "success_8bit": "boolean",
    "adversarial_class": "Int64",
    "adversarial_class_name": "str",
    "confidence_clean": "float64",
    "confidence_adversarial": "float64",
    "margin_clean": "float64",
    "margin_adversarial": "float64",
    "linf": "float64",
    "l2": "float64",
    "l1": "float64",
    "pixels": "Int64",
    "ssim_windowed": "float64",
    "ssim_windowed_min": "float64",
    "ssim_budget_spent": "float64",
    "ssim_local_budget_spent": "float64",
    "n_forward": "Int64",
    "n_backward": "Int64",
    "error": "str",
    "remark": "str",
    "attack_seconds": "float64",
    "analysis_seconds": "float64",
}
"""Columns that every record has, before those of the analyses, and their pandas types."""


@dataclass(frozen=True)
class Note:
    """The facts about a shard that are stored beside its rows.

    Attributes:
        read: number of images that were read.
        skipped: (name, reason) of files that are no pictures.
        missing: (name, reason) of listed files that are unavailable; the shard is computed again once they are back.
        contents: digest of every image's stored content, in the order of the listing; None for unavailable images.
        seconds: wall time.
        maps: path below maps.zarr -> size and digest, for every file that holds maps of this shard.
    """

    read: int
    skipped: tuple[tuple[str, str], ...]
    missing: tuple[tuple[str, str], ...] = ()
    contents: tuple[str | None, ...] = ()
    seconds: float = 0.0
    maps: Mapping[str, tuple[int, str]] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """The bytes that `from_json` reads."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, content: bytes) -> Note:
        """Read what `to_json` wrote."""
        return Reader().table(cls, json.loads(content), "note")


def shard_files(folder: Path) -> dict[int, Path]:
    """Number -> file of the shards that exist, in order."""
    paths = {shard_number(path): path for path in sorted((folder / SHARDS).glob("[0-9]*-*.parquet"))}
    return dict(sorted(paths.items()))


def shard_number(shard: Path) -> int:
    """The number in the name of a shard's file."""
    return int(shard.stem.partition("-")[0])


def is_intact(shard: Path) -> bool:
    """Whether a shard's file has the digest in its name."""
    return shard.stem.partition("-")[2] == file_digest(shard, shard_number(shard))


def write_shard(folder: Path, number: int, rows: pa.Table, note: Note) -> Path:
    """Write one shard atomically and return its file.

    Its maps must be on the disk already: a shard that exists is complete, so the next session skips it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    # In memory first: the name of the file needs the digest of its content.
    sink = pa.BufferOutputStream()
    pq.write_table(rows.replace_schema_metadata({NOTE: note.to_json()}), sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    path = folder / SHARDS / f"{number:07d}-{digest_of(content, number)}.parquet"
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, lambda draft: draft.write_bytes(content), durable=True)
    return path


def as_rows(frame: pd.DataFrame) -> pa.Table:
    """Records as they are stored. Scores that no row has take the type that they have in other rows."""
    import pyarrow as pa

    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    # The null type gives way to any other where tables are joined.
    columns = [
        pa.nulls(len(table)) if name not in COLUMNS and column.null_count == len(table) else column
        for name, column in zip(table.column_names, table.columns, strict=True)
    ]
    return pa.table(columns, names=table.column_names)


def merged_rows(tables: Sequence[pa.Table]) -> pa.Table:
    """The rows of all tables by image; rows of one image stay in order."""
    import numpy as np
    import pyarrow as pa

    table = pa.concat_tables(tables, promote_options="permissive")
    return table.take(np.argsort(table["index"].to_numpy(), kind="stable"))


def read_note(shard: Path) -> Note:
    """The note of the shard in that file."""
    import pyarrow.parquet as pq

    return Note.from_json(pq.read_schema(shard).metadata[NOTE])


def read_notes(folder: Path) -> Iterator[Note]:
    """The notes of all shards, in order."""
    return map(read_note, shard_files(folder).values())


def count_rows(shards: Iterable[Path]) -> int:
    """The number of records in these shards."""
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(path).num_rows for path in shards)


def no_rows() -> pd.DataFrame:
    """The records of a shard in which no image could be read."""
    import pandas as pd

    return pd.DataFrame(columns=list(COLUMNS)).astype(COLUMNS)


def unified_schema(folder: Path) -> pa.Schema:
    """All columns of all shards in the order of appearance; where shards differ, the wider number type."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Shards can differ: an analysis may have scores for some attacks only, or integers where others have fractions.
    schema: pa.Schema | None = None
    for path in shard_files(folder).values():
        own = pq.read_schema(path).remove_metadata()
        if schema is None or not schema.equals(own):
            schema = pa.unify_schemas([schema or own, own], promote_options="permissive")
    if schema is None:
        schema = pa.Schema.from_pandas(no_rows(), preserve_index=False).remove_metadata()
    return schema


def compact(folder: Path, notes: Iterable[Note]) -> dict[str, str]:
    """Write records.parquet and skipped.parquet from all shards and their notes, in order; return the digest of each.

    One shard and at most `ROWS` further rows are in memory at a time.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = unified_schema(folder)

    def write(draft: Path) -> None:
        # Few large row groups instead of one per shard make queries faster.
        waiting: list[pa.Table] = []
        with pq.ParquetWriter(draft, schema, compression="zstd") as writer:
            for path in shard_files(folder).values():
                waiting.append(_with_schema(pq.read_table(path), schema))
                if sum(map(len, waiting)) >= ROWS:
                    writer.write_table(pa.concat_tables(waiting))
                    waiting.clear()
            if waiting:
                writer.write_table(pa.concat_tables(waiting))

    skipped = [pair for note in notes for pair in note.skipped]
    columns = [pa.array([pair[column] for pair in skipped], pa.large_string()) for column in (0, 1)]
    table = pa.table(dict(zip(("image", "reason"), columns, strict=True)))
    write_atomic(folder / SKIPPED, lambda draft: pq.write_table(table, draft), durable=True)
    write_atomic(folder / RECORDS, write, durable=True)
    return {name: file_digest(folder / name) for name in (RECORDS, SKIPPED)}


def _with_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    columns = [
        table[column.name].cast(column.type)
        if column.name in table.column_names
        else pa.nulls(len(table), column.type)
        for column in schema
    ]
    return pa.table(columns, schema=schema)


def scan(folder: Path, *, complete: bool) -> pa.dataset.Dataset:
    """All records, read from the disk piece by piece: records.parquet if the run is complete, else its shards."""
    import pyarrow.dataset as ds

    files = [folder / RECORDS] if complete else list(shard_files(folder).values())
    # A shard may lack columns that others have; under one schema these are null.
    schema = None if complete else unified_schema(folder)
    return ds.dataset([str(file) for file in files], schema=schema, format="parquet")


def outcomes_query(plan: Plan, *, eight_bit: bool) -> str:
    """SQL for the records with two more columns, both null if it is unknown how the attack ended.

    Of several copies of one image with one label only the first is there: copies are no independent observations.

    `fooled`: whether the attacked image is misclassified (reaches its target); for a minimal-norm attack whatever its
    size. `robust`: whether the image counts in robust accuracy; also null for attacks that have none.
    """
    fooled = "success_8bit" if eight_bit else "success"
    cases = [
        f"when {quoted(attack.label)} then {_within(plan.limit_of(attack), fooled)}"
        for attack in plan.attacks
        if attack.is_minimal or not attack.is_known
    ]
    robust = f"case attack {' '.join(cases)} else not {fooled} end" if cases else f"not {fooled}"
    first = 'select min("index") from records group by content, label'
    columns = f"*, {fooled} as fooled, ({robust})::boolean as robust"
    return f'select {columns} from records where content is null or "index" in ({first})'  # noqa: S608 - ours


def _within(limit: Limit | None, fooled: str) -> str:
    if limit is None:
        return "null"
    most = limit.amount * (1 + ROUNDING[0]) + ROUNDING[1]
    # In SQL, `null and false` is false: an unknown outcome would count as robust if its size exceeds the limit.
    return f"case when {fooled} is not null then not ({fooled} and {limit.kind} <= {most!r}) end"


def quoted(text: str) -> str:
    """A text as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"


def check_records(folder: Path, info: RunInfo, name: str) -> None:
    """Compare all records (of an incomplete run, its shards) with their digests.

    Raises:
        DamagedError: naming the files that differ in the run called `name`.
    """
    bad = damaged_tables(folder, info)
    if not info.complete:
        bad += [f"{SHARDS}/{path.name}" for path in damaged_shards(folder)]
    if bad:
        raise damaged(name, bad)


def damaged_tables(folder: Path, info: RunInfo) -> list[str]:
    """Names of the run's own Parquet files that are gone or differ from what was written."""
    # A planned run has no list of images yet, and one that is not complete has no tables.
    names = [LISTING, RECORDS, SKIPPED] if info.complete else [LISTING] if LISTING in info.checksums else []
    return [name for name in names if digest_or_none(folder / name) != info.checksums.get(name)]


def damaged_shards(folder: Path) -> list[Path]:
    """Shard files that differ from what was written, or duplicate the number of another."""
    paths = sorted((folder / SHARDS).glob("[0-9]*-*.parquet"))
    # Reversed, so that the first file in order wins.
    first = {shard_number(path): path for path in reversed(paths)}
    return [path for path in paths if not is_intact(path) or first[shard_number(path)] != path]
