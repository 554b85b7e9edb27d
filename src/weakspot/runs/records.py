"""Records of a run: one Parquet file per shard while it goes on, one for all at its end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from weakspot.writing import write_whole

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

FILE, SKIPPED, SHARDS = "records.parquet", "skipped.parquet", "shards"
NOTE = b"weakspot"  # key of a shard's note: what could not be read, how long it took
ROWS = 50_000  # of a row group of the compacted file; what compaction holds in memory


class Note(NamedTuple):
    """What a shard says besides its rows.

    Attributes:
        read: images that could be read.
        skipped: (name, reason) of those that could not.
        seconds: of wall time.
    """

    read: int
    skipped: Sequence[tuple[str, str]]
    seconds: float


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard of that number is, or will be."""
    return folder / SHARDS / f"{number:07d}.parquet"


def finished_shards(folder: Path) -> set[int]:
    """Numbers of the shards that are there, whole."""
    return {int(path.stem) for path in (folder / SHARDS).glob("[0-9]*.parquet")}


def write_shard(folder: Path, number: int, rows: pd.DataFrame, note: Note) -> None:
    """Write one shard, whole or not at all; that it is there says that its maps are, too."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pandas(rows, preserve_index=False)
    table = table.replace_schema_metadata({NOTE: json.dumps(note._asdict()).encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    path = shard_path(folder, number)
    path.parent.mkdir(exist_ok=True)
    write_whole(path, lambda draft: draft.write_bytes(content), durable=True)


def read_notes(folder: Path) -> Iterator[Note]:
    """The notes of all shards that are there, in order."""
    import pyarrow.parquet as pq

    for number in sorted(finished_shards(folder)):
        schema = pq.read_schema(shard_path(folder, number))
        said = json.loads(schema.metadata[NOTE])
        yield Note(said["read"], [(name, why) for name, why in said["skipped"]], said["seconds"])


def unified_schema(folder: Path) -> pa.Schema:
    """All columns of all shards, in the order of appearance, numbers widened where shards differ."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema: pa.Schema | None = None
    for number in sorted(finished_shards(folder)):
        own = pq.read_schema(shard_path(folder, number)).remove_metadata()
        known = own if schema is None else schema
        schema = known if known.equals(own) else pa.unify_schemas([known, own], promote_options="permissive")
    return pa.schema([]) if schema is None else schema


def compact(folder: Path) -> None:
    """Make records.parquet and skipped.parquet of all shards, in order; the shards stay until `drop_shards`.

    One shard is in memory at a time, and `ROWS` rows to be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = unified_schema(folder)

    def write(draft: Path) -> None:
        waiting: list[pa.Table] = []
        with pq.ParquetWriter(draft, schema, compression="zstd") as writer:
            for number in sorted(finished_shards(folder)):
                waiting.append(_with_schema(pq.read_table(shard_path(folder, number)), schema))
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
    write_whole(folder / SKIPPED, lambda draft: pq.write_table(table, draft), durable=True)
    write_whole(folder / FILE, write, durable=True)


def _with_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    columns = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def drop_shards(folder: Path) -> None:
    """Remove the shards, and what writers that died have left."""
    shutil.rmtree(folder / SHARDS, ignore_errors=True)
    clear_drafts(folder)


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
    write_whole(path, lambda draft: draft.write_text(text, "utf-8"), durable=True)


def _files(folder: Path) -> list[Path]:
    if (folder / FILE).is_file() and not finished_shards(folder):
        return [folder / FILE]
    return [shard_path(folder, number) for number in sorted(finished_shards(folder))]


def has_records(folder: Path) -> bool:
    """Whether there is a row, or could be: a shard of a run that goes on, or the file of one that is complete."""
    return bool(_files(folder))


def read_all(folder: Path) -> pa.Table:
    """All records that are there, of a run that goes on too."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = _files(folder)
    if files == [folder / FILE]:
        return pq.read_table(files[0])
    schema = unified_schema(folder)
    return pa.concat_tables(
        [_with_schema(pq.read_table(file), schema) for file in files] or [schema.empty_table()]
    )


def scan(folder: Path) -> pa.dataset.Dataset:
    """The same, to be read from the disk piece by piece."""
    import pyarrow.dataset as ds

    files = _files(folder)
    schema = None if files == [folder / FILE] else unified_schema(folder)
    return ds.dataset([str(file) for file in files], schema=schema, format="parquet")
