"""Runs: what an audit has stored, opened for questions, and the folders that other commands write."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from weakspot._checks import require
from weakspot._io.files import write_atomic
from weakspot._io.urls import is_url, place
from weakspot.audit.plan.plan import Plan
from weakspot.audit.store.locked_sql import LockedConnection
from weakspot.audit.store.maps import MAPS
from weakspot.audit.store.records import (
    LISTING,
    SKIPPED,
    check_records,
    outcomes_query,
    read_notes,
    scan,
    shard_files,
)
from weakspot.audit.store.run_info import RUN_FILE, RunInfo, versions
from weakspot.audit.store.stored_maps import MapCheck, StoredMaps
from weakspot.audit.store.stores import download
from weakspot.explanations.explanation import Explanation
from weakspot.statistics.number_format import counted

if TYPE_CHECKING:
    import duckdb
    import pandas as pd
    import pyarrow as pa

FILES = ("report.html", "scores.csv", "pairs.safetensors", "maps.npz", RUN_FILE)
SCHEMA = 1  # of run.json
LONGEST = 180  # bytes of a file name
SQL_MEMORY = "4GB"  # of the queries of `Run.sql`
SQL_SECONDS = 120.0
PACKAGES = ("duckdb", "fsspec", "pyarrow", "zarr")


def open_run(location: Path | str, *, eight_bit: bool = True) -> Run:
    """Open the run in a folder of `weakspot audit`, or at its URL.

    Args:
        location: folder or URL. Of a URL, everything but maps is copied to this machine while the run is in use.
        eight_bit: whether an attacked image counts as misclassified if it is after rounding to 8 bits; with False, if
            it is before rounding. The records hold both.

    Raises:
        FileNotFoundError: if there is no run.
        ValueError: if it is not an audit, is damaged, or was written by a newer weakspot.
    """
    require("an audit", *PACKAGES, extra="audit")
    if not is_url(location):
        return Run(Path(location), name=str(location), eight_bit=eight_bit)
    name = str(location)
    copy = tempfile.TemporaryDirectory(prefix="weakspot-")
    # The shards of a complete run repeat its records.
    download(
        place(name), Path(copy.name), name, shards=lambda folder: not RunInfo.read(folder, name).complete
    )
    run = Run(Path(copy.name), name=name, eight_bit=eight_bit)
    run._copy = copy  # removed together with the run
    return run


class Run:
    """A run, complete or not; `open_run` opens it.

    Records and maps are compared with their digests before they are read. Content that differs from what was written
    raises DamagedError, an OSError.

    Attributes:
        folder: the run's folder, or the local copy of a remote run.
        name: the path or URL that the user gave.
        info: the content of run.json.
        eight_bit: see `open_run`.
    """

    _copy: tempfile.TemporaryDirectory[str] | None = None

    def __init__(self, folder: Path, *, name: str, eight_bit: bool = True) -> None:
        self.folder, self.name, self.eight_bit = folder, name, eight_bit
        self.info = RunInfo.read(folder, name)

    def __repr__(self) -> str:
        model, images = self.info.model, self.info.images
        facts = [self.info.status, "no model yet" if model is None else model.name]
        if images is not None:
            facts.append(counted(images.listed))
        facts += [
            counted(len(self.plan.attacks), "attack"),
            counted(len(self.plan.reported_regions), "region"),
        ]
        return f"Run({self.name!r}: {', '.join(facts)})"

    @property
    def complete(self) -> bool:
        """Whether the audit has finished; until then the records are those of the finished shards."""
        return self.info.complete

    @property
    def has_records(self) -> bool:
        """Whether there are any records: the audit is complete, or at least one shard is."""
        return self.complete or bool(shard_files(self.folder))

    @property
    def shortfall(self) -> str:
        """Why no final conclusion is possible, in a sentence; empty if every requested image was audited."""
        return self.info.shortfall(self.name)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a reader must know about the model and earlier sessions, in sentences."""
        return self.info.remarks

    @property
    def copies(self) -> int:
        """How many of the audited images are copies of an earlier one with the same label."""
        query = "select (select count(distinct index) from records) - (select count(distinct index) from outcomes)"
        return int(self.sql(query).fetchall()[0][0])

    @property
    def plan(self) -> Plan:
        """What was asked for, with all defaults filled in."""
        return self.info.plan

    @cached_property
    def _checked(self) -> Path:
        """The folder, once its records have been compared with their digests."""
        check_records(self.folder, self.info, self.name)
        return self.folder

    @property
    def records(self) -> pd.DataFrame:
        """One row per image x attack x region, in the order of images; all in memory."""
        return _frame(scan(self._checked, complete=self.complete).to_table())

    @property
    def skipped(self) -> pd.DataFrame:
        """Columns image and reason, one row per image that could not be read."""
        import pandas as pd
        import pyarrow.parquet as pq

        if self.complete:
            return _frame(pq.read_table(self._checked / SKIPPED))
        pairs = [pair for note in read_notes(self._checked) for pair in note.skipped]
        return pd.DataFrame(pairs, columns=["image", "reason"], dtype="str")

    @property
    def relation(self) -> duckdb.DuckDBPyRelation:
        """The records as a DuckDB relation, which reads from the disk what a query needs."""
        return self.sql("select * from records")

    def sql(self, query: str, **values: object) -> duckdb.DuckDBPyRelation:
        """Run a DuckDB query on the tables records, outcomes, skipped and images; `.df()` makes a DataFrame.

        outcomes are the records with the columns fooled and robust (see `outcomes_query`), without copies of earlier
        images. A query reads nothing but
        these tables: no files, no network, no extensions. `SQL_MEMORY` and `SQL_SECONDS` bound it; `connect` has no
        such limits.

        Args:
            query: SQL.
            **values: for the placeholders $name in it.

        Raises:
            duckdb.Error: if the query is invalid, needs too much memory, or wants more than these tables.
            TimeoutError: if it takes too long.
        """
        remedy = "use connect, which has no limit"
        return self._locked.sql(query, values, seconds=SQL_SECONDS, remedy=remedy)

    def close(self) -> None:
        """Close the connection of `sql`, which raises from then on; the files are not kept open."""
        self._locked.close()

    def connect(self) -> duckdb.DuckDBPyConnection:
        """A DuckDB connection with the tables of `sql` and without its limits: it can read and write files."""
        import duckdb
        import pyarrow.dataset as ds

        connection = duckdb.connect()
        # Through Arrow rather than by path, in which DuckDB would expand wildcards.
        connection.register("records", scan(self._checked, complete=self.complete))
        connection.register("skipped", self.skipped)
        connection.execute(
            f"create temp view outcomes as {outcomes_query(self.plan, eight_bit=self.eight_bit)}"
        )
        if (self.folder / LISTING).is_file():
            connection.register("images", ds.dataset(self.folder / LISTING))
        return connection

    @property
    def maps(self) -> StoredMaps:
        """Name -> map: `run.maps["overlap"][image, attack, region]` reads one."""
        # Of a run at a URL, only the records were copied: its maps are read from there as they are needed.
        if is_url(self.name):
            return StoredMaps(f"{self.name.rstrip('/')}/{MAPS}")
        return StoredMaps(self.folder / MAPS, self._map_check)

    @cached_property
    def _map_check(self) -> MapCheck:
        return MapCheck(self.folder, self.plan.shard or 1, self.name)

    @cached_property
    def _locked(self) -> LockedConnection:
        return LockedConnection(self.connect(), SQL_MEMORY, strict=True)


def _frame(table: pa.Table) -> pd.DataFrame:
    """A DataFrame in which integers and booleans keep their types even if some are missing."""
    import pandas as pd
    import pyarrow as pa

    nullable = {pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}
    columns = {
        name: column.to_pandas(types_mapper=nullable.get if column.null_count else None)
        for name, column in zip(table.column_names, table.columns, strict=True)
    }
    return pd.DataFrame(columns)


def write_run(explanation: Explanation, folder: Path, about: Mapping[str, object]) -> dict[str, Path]:
    """Write `FILES` into a folder, each atomically; other files in it stay.

    Args:
        explanation: to be written.
        folder: created if it does not exist.
        about: content of run.json besides versions.

    Returns:
        File name -> path.

    Raises:
        ValueError: if `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder, got {folder}, which is a file")
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / name for name in FILES}
    explanation.to_html(paths["report.html"])
    explanation.pairs.save(paths["pairs.safetensors"])
    maps = {name: tensor.numpy() for name, tensor in explanation.maps.items()}
    write_atomic(paths["maps.npz"], lambda draft: _save_maps(draft, maps))
    write_scores(explanation.scores, about, folder)
    return paths


def write_scores(
    scores: pd.DataFrame, about: Mapping[str, object], folder: Path, *, name: str = "scores.csv"
) -> None:
    """Write the scores under that name and, last of all files, the run.json that says how they were made."""
    write_atomic(folder / name, lambda draft: scores.to_csv(draft, index=False))
    text = json.dumps({"schema": SCHEMA, **about, "versions": versions()}, indent=2) + "\n"
    write_atomic(folder / RUN_FILE, lambda draft: draft.write_text(text, "utf-8"))


def _save_maps(draft: Path, maps: Mapping[str, np.ndarray]) -> None:
    with draft.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **maps)


def write_pngs(images: Tensor, names: Sequence[str], folder: Path) -> list[str]:
    """Write images (N, C, H, W) in [0, 1] as NAME.png, rounded to 8 bits.

    Args:
        images: gray or color.
        names: of the original pictures; folders in them are kept, suffixes replaced, and equal names numbered.
        folder: created if it does not exist.

    Returns:
        Paths within `folder`, one per image.
    """
    # Names of folders are taken as well: a picture must not be named like the folder of another.
    written, taken = [], {str(parent).lower() for name in names for parent in _stem(name).parents}
    for image, name in zip(images, names, strict=True):
        stem = _stem(name)
        path, number = stem.with_name(stem.name + ".png"), 1
        while str(path).lower() in taken:  # file systems may ignore case
            number += 1
            path = stem.with_name(f"{stem.name}-{number}.png")
        taken.add(str(path).lower())
        levels = (image.detach().cpu().clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
        picture = Image.fromarray(levels if levels.shape[-1] == 3 else levels[..., 0])
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / path, partial(picture.save, format="PNG"))
        written.append(str(path))
    return written


def _stem(name: str) -> PurePosixPath:
    """The name without suffix, confined to its folder, and short enough for any file system."""
    parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in {"/", "..", "."}]
    path = PurePosixPath(*parts) if parts else PurePosixPath("image")
    # File systems count bytes; a letter that is cut in two is left out.
    return path.with_name(path.stem.encode()[:LONGEST].decode(errors="ignore") or "image")
