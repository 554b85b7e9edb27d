"""Records of a run: one Parquet file per shard, and at the end one for all.

A shard's file is called NUMBER-DIGEST.parquet, the digest being of its content and number, so that a damaged shard, and
one in another's place, is known by its name. The shards stay when the run is complete: what is damaged later can be
written again, or computed again shard by shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weakspot._io.files import write_atomic
from weakspot.audit.plan.limits import Limit, limit_of
from weakspot.audit.plan.plan import Plan, is_minimal
from weakspot.audit.store.integrity import digest_of, file_digest

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


FILE, SKIPPED, SHARDS, LISTING = "records.parquet", "skipped.parquet", "shards", "images.parquet"
NOTE = b"weakspot"  # key of a shard's note: what could not be read, how long it took
ROWS = 50_000  # of a row group of the compacted file; what compaction holds in memory


@dataclass(frozen=True)
class Note:
    """What a shard says besides its rows.

    Attributes:
        read: images that could be read.
        skipped: (name, reason) of files that are no pictures.
        missing: (name, reason) of files that were listed and are not to be had: the shard is to be done again.
        contents: digest of every image's stored content, in the order of the listing; None of those not to be had.
        seconds: of wall time.
        maps: path below maps.zarr to size and digest, of every file that this shard's maps are in.
    """

    read: int
    skipped: Sequence[tuple[str, str]]
    missing: Sequence[tuple[str, str]] = ()
    contents: Sequence[str | None] = ()
    seconds: float = 0.0
    maps: Mapping[str, tuple[int, str]] = field(default_factory=dict)


def shard_files(folder: Path) -> dict[int, Path]:
    """Number to file of the shards that are there."""
    found = {shard_number(path): path for path in sorted((folder / SHARDS).glob("[0-9]*-*.parquet"))}
    return {number: found[number] for number in sorted(found)}


def shard_number(shard: Path) -> int:
    """The number that a shard's file is named by."""
    return int(shard.stem.partition("-")[0])


def finished_shards(folder: Path) -> set[int]:
    """Numbers of the shards that are there, whole."""
    return set(shard_files(folder))


def is_sound(shard: Path) -> bool:
    """Whether a shard's file has the content that its name says."""
    return shard.stem.partition("-")[2] == file_digest(shard, shard_number(shard))


def write_shard(folder: Path, number: int, rows: pd.DataFrame, note: Note) -> Path:
    """Write one shard, whole or not at all; that it is there says that its maps are, too. Returns its file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pandas(rows, preserve_index=False)
    table = table.replace_schema_metadata({NOTE: json.dumps(asdict(note)).encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    path = folder / SHARDS / f"{number:07d}-{digest_of(content, number)}.parquet"
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, lambda draft: draft.write_bytes(content), durable=True)
    return path


def read_notes(folder: Path) -> Iterator[Note]:
    """The notes of all shards that are there, in order."""
    for path in shard_files(folder).values():
        yield read_note(path)


def read_note(shard: Path) -> Note:
    """The note of the shard in that file."""
    import pyarrow.parquet as pq

    said: dict[str, Any] = json.loads(pq.read_schema(shard).metadata[NOTE])
    for name in ("skipped", "missing"):
        said[name] = [(image, why) for image, why in said[name]]
    said["maps"] = {path: (size, digest) for path, (size, digest) in said["maps"].items()}
    return Note(**said)


def unified_schema(folder: Path) -> pa.Schema:
    """All columns of all shards, in the order of appearance, numbers widened where shards differ."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema: pa.Schema | None = None
    for path in shard_files(folder).values():
        own = pq.read_schema(path).remove_metadata()
        known = own if schema is None else schema
        schema = known if known.equals(own) else pa.unify_schemas([known, own], promote_options="permissive")
    if schema is None:
        from weakspot.audit.work.cell_rows import no_rows

        schema = pa.Schema.from_pandas(no_rows(), preserve_index=False).remove_metadata()
    return schema


def compact(folder: Path) -> dict[str, str]:
    """Make records.parquet and skipped.parquet of all shards, in order; returns the digest of each.

    One shard is in memory at a time, and `ROWS` rows to be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = unified_schema(folder)

    def write(draft: Path) -> None:
        waiting: list[pa.Table] = []
        with pq.ParquetWriter(draft, schema, compression="zstd") as writer:
            for path in shard_files(folder).values():
                waiting.append(_with_schema(pq.read_table(path), schema))
                if sum(map(len, waiting)) >= ROWS:
                    writer.write_table(pa.concat_tables(waiting))
                    waiting.clear()
            if waiting:
                writer.write_table(pa.concat_tables(waiting))

    skipped = [pair for note in read_notes(folder) for pair in note.skipped]
    names, reasons = ([pair[place] for pair in skipped] for place in (0, 1))
    table = pa.table(
        {"image": pa.array(names, pa.large_string()), "reason": pa.array(reasons, pa.large_string())}
    )
    write_atomic(folder / SKIPPED, lambda draft: pq.write_table(table, draft), durable=True)
    write_atomic(folder / FILE, write, durable=True)
    return {name: file_digest(folder / name) for name in (FILE, SKIPPED)}


def _with_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    columns = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def clear_drafts(folder: Path) -> None:
    """Remove drafts of writers that died; nobody else may be writing."""
    for place in (folder, folder / SHARDS):
        for draft in (*place.glob(".*.parquet.*"), *place.glob(".*.json.*")):
            draft.unlink(missing_ok=True)
    for draft in folder.glob("maps.zarr/**/*.partial"):
        draft.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """A JSON file, whole or not at all."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomic(path, lambda draft: draft.write_text(text, "utf-8"), durable=True)


def _files(folder: Path, *, complete: bool) -> list[Path]:
    return [folder / FILE] if complete else list(shard_files(folder).values())


def has_records(folder: Path, *, complete: bool) -> bool:
    """Whether there is a row, or could be: a shard of a run that goes on, or the file of one that is complete."""
    return complete or bool(shard_files(folder))


def read_all(folder: Path, *, complete: bool) -> pa.Table:
    """All records that are there: of a complete run those of its one file, else those of its shards."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = _files(folder, complete=complete)
    if complete:
        return pq.read_table(files[0])
    schema = unified_schema(folder)
    return pa.concat_tables(
        [_with_schema(pq.read_table(file), schema) for file in files] or [schema.empty_table()]
    )


def scan(folder: Path, *, complete: bool) -> pa.dataset.Dataset:
    """The same, to be read from the disk piece by piece."""
    import pyarrow.dataset as ds

    files = _files(folder, complete=complete)
    schema = None if complete else unified_schema(folder)
    return ds.dataset([str(file) for file in files], schema=schema, format="parquet")


ROUNDING = (1e-5, 1e-6)  # of a distance in float32, relative and absolute


def outcomes_query(plan: Plan, *, eight_bit: bool) -> str:
    """SQL for the records with two more columns, both null if it is unknown how the attack ended.

    `fooled`: whether the attacked image is misclassified (reaches its target); for a minimal-norm attack whatever its
    size. `robust`: whether the image counts in robust accuracy; also null for attacks that have none.
    """
    fooled = "success_8bit" if eight_bit else "success"
    cases = [
        f"when {quoted(attack.label)} then {_within(limit_of(plan, attack), fooled)}"
        for attack in plan.attacks
        if is_minimal(attack)
    ]
    robust = f"case attack {' '.join(cases)} else not {fooled} end" if cases else f"not {fooled}"
    return f"select *, {fooled} as fooled, ({robust})::boolean as robust from records"  # noqa: S608 - ours


def _within(limit: Limit | None, fooled: str) -> str:
    if limit is None:
        return "null"
    most = limit.amount * (1 + ROUNDING[0]) + ROUNDING[1]
    return f"not ({fooled} and {limit.kind} <= {most!r})"


def quoted(text: str) -> str:
    """A text as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"
