"""Run: what an audit has left on disk, opened to be asked.

The run folder: report, scores, pairs, maps, and how they were made.
"""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import weakspot
from weakspot._io.files import write_atomic
from weakspot._io.urls import is_url, place
from weakspot.audit.store.integrity import listed
from weakspot.audit.store.maps import FOLDER, Maps
from weakspot.audit.store.records import LISTING, SKIPPED, outcomes_query, read_all, read_notes, scan
from weakspot.audit.store.verification import MapCheck, check_records
from weakspot.explanations.explanation import Explanation

if TYPE_CHECKING:
    import duckdb
    import pandas as pd
    import pyarrow as pa

    from weakspot.audit.plan.plan import Plan


SCHEMA = 1  # of the folder; grows when what is written could no longer be read by the version before
KIND = "audit"
ABOUT = "run.json"


def read_about(folder: Path) -> dict[str, Any]:
    """What run.json says.

    Raises:
        FileNotFoundError: when there is no run.
        ValueError: when it is damaged, no audit, or of a newer schema.
    """
    path = folder / ABOUT
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no run (there is no {ABOUT} in it)")
    try:
        about = json.loads(path.read_text("utf-8"))
    except ValueError:
        raise ValueError(f"{path} is damaged: it is no JSON") from None
    if not isinstance(about, dict) or about.get("kind") != KIND:
        raise ValueError(f"{folder} holds a run of another command; accepted is what weakspot audit wrote")
    if not isinstance(about.get("schema"), int) or about["schema"] > SCHEMA:
        raise ValueError(
            f"{folder} was written by a newer weakspot (schema {about.get('schema')}; this one reads up to {SCHEMA}): "
            "upgrade weakspot to open it"
        )
    return about


class Run:
    """A run folder, complete or not.

    Records and maps are compared with their digests before they are read; what is not what was written raises
    DamagedError, an OSError.

    Attributes:
        folder: where it is; of a run kept by URL a copy here of all but its maps, as long as this object lives.
        name: the folder's path, or the URL.
        about: what run.json says: plan, model and its fingerprint, versions, host, times.

    Args:
        folder: of `weakspot audit`, or its URL.
        eight_bit: whether an image counts as fooled if it is misclassified when stored with 8 bits; with False, if it
            is before that. Both are in the records.

    Raises:
        FileNotFoundError: when there is no run.
        ValueError: when it is no audit, or of a newer schema.
    """

    def __init__(self, folder: Path | str, *, eight_bit: bool = True) -> None:
        self.name = str(folder)
        self.eight_bit = eight_bit
        if is_url(folder):
            from weakspot.audit.store.remote import download

            self._copy = tempfile.TemporaryDirectory(prefix="weakspot-")
            download(place(self.name), Path(self._copy.name), self.name, shards=False)
        self.folder = Path(self._copy.name if is_url(folder) else folder)
        self.about = read_about(self.folder)

    def __repr__(self) -> str:
        model = self.about.get("model", {}).get("name", "no model yet")
        return f"Run({self.name!r}: {model}, {self.about['status']})"

    @property
    def complete(self) -> bool:
        """Whether the audit has come to its end; until then there are the records of the shards that are done."""
        return bool(self.about["status"] == "complete")

    @property
    def shortfall(self) -> str:
        """Why nothing final can be said yet, in a sentence; empty where every image that was asked for is in it."""
        absent, missing = self.about.get("absent"), self.about.get("missing")
        go_on = f"weakspot audit --resume {self.name}"
        if not self.complete and missing:
            names = ", ".join(missing["names"]) + (
                ", ..." if missing["images"] > len(missing["names"]) else ""
            )
            return (
                f"the audit is not complete: {missing['images']:,} of {self.about['images']['listed']:,} images cannot "
                f"be read any more ({names}; {missing['reason']}); put them back and go on with {go_on}"
            )
        if not self.complete:
            return f"the audit is not complete; go on with {go_on}"
        if absent:
            return (
                f"the audit lacks {listed(absent)}, which could not be found when it began; start another audit once "
                "it can"
            )
        return ""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is to be known of the model and of earlier sessions before the records are believed, in sentences."""
        return tuple(self.about.get("remarks", ()))

    @cached_property
    def _checked(self) -> Path:
        """The folder, its records compared with their digests."""
        check_records(self.folder, self.about, self.name)
        return self.folder

    @property
    def plan(self) -> Plan:
        """What was asked for, with all defaults."""
        from weakspot.audit.plan.plan import Plan

        return Plan.from_mapping(self.about["plan"])

    @property
    def records(self) -> pd.DataFrame:
        """One row per image x attack x region, in the order of images; all in memory."""
        return _frame(read_all(self._checked, complete=self.complete))

    @property
    def skipped(self) -> pd.DataFrame:
        """Columns image and reason, one row for each that could not be read."""
        import pandas as pd
        import pyarrow.parquet as pq

        if self.complete:
            return _frame(pq.read_table(self._checked / SKIPPED))
        pairs = [pair for note in read_notes(self._checked) for pair in note.skipped]
        return pd.DataFrame(pairs, columns=["image", "reason"], dtype="str")

    @property
    def relation(self) -> duckdb.DuckDBPyRelation:
        """The records as a DuckDB relation: read from the disk as it is asked, whatever their number."""
        return self.sql("select * from records")

    def sql(self, query: str, **values: object) -> duckdb.DuckDBPyRelation:
        """A DuckDB query about the tables records, outcomes, skipped and images; `.df()` makes a DataFrame.

        Values stand in the query as $name. outcomes are the records with the columns fooled and robust (see
        `weakspot.audit.findings.robustness`).

        Raises:
            duckdb.Error: when DuckDB does not understand it.
        """
        return self._connection.sql(query, params=values) if values else self._connection.sql(query)

    @property
    def maps(self) -> Maps:
        """Name to map: `run.maps["overlap"][image, attack, region]` reads one."""
        if is_url(self.name):
            return Maps(f"{self.name.rstrip('/')}/{FOLDER}")
        return Maps(self.folder / FOLDER, self._map_check)

    @cached_property
    def _map_check(self) -> MapCheck:
        return MapCheck(self.folder, self.about["plan"]["shard"] or 1, self.name)

    @cached_property
    def _connection(self) -> duckdb.DuckDBPyConnection:
        import duckdb
        import pyarrow.dataset as ds

        connection = duckdb.connect()
        # Through Arrow rather than by path: a path may hold what DuckDB takes for a pattern.
        connection.register("records", scan(self._checked, complete=self.complete))
        connection.register("skipped", self.skipped)
        connection.execute(
            f"create temp view outcomes as {outcomes_query(self.plan, eight_bit=self.eight_bit)}"
        )
        if (self.folder / LISTING).is_file():
            connection.register("images", ds.dataset(self.folder / LISTING))
        return connection


def _frame(table: pa.Table) -> pd.DataFrame:
    """A DataFrame whose whole numbers and truth values stay such where some are missing."""
    import pandas as pd
    import pyarrow as pa

    kinds = {pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}
    frame = {}
    for field, column in zip(table.schema, table.columns, strict=True):
        own = kinds.get(field.type) if column.null_count else None
        frame[field.name] = column.to_pandas(types_mapper=None if own is None else {field.type: own}.get)
    return pd.DataFrame(frame)


RUN_SCHEMA = 1
FILES = ("report.html", "scores.csv", "pairs.safetensors", "maps.npz", "run.json")


def write_run(explanation: Explanation, folder: Path, about: Mapping[str, Any]) -> dict[str, Path]:
    """Write `FILES` into `folder`, each whole or not at all; others that lie there stay.

    Args:
        explanation: what was found.
        folder: made where it is missing.
        about: what run.json says besides versions.

    Returns:
        File name to path.

    Raises:
        ValueError: when `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out is {folder}, which is a file; accepted is a folder, made where it is missing")
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / name for name in FILES}
    explanation.to_html(paths["report.html"])
    explanation.pairs.save(paths["pairs.safetensors"])
    maps = {name: tensor.numpy() for name, tensor in explanation.maps.items()}
    write_atomic(paths["maps.npz"], lambda draft: _save_maps(draft, maps))
    write_scores(explanation.scores, about, folder)
    return paths


def write_scores(
    scores: pd.DataFrame, about: Mapping[str, Any], folder: Path, *, name: str = "scores.csv"
) -> None:
    """Write the scores under that name and, last of all files, run.json, which says how they were made."""
    write_atomic(folder / name, lambda draft: scores.to_csv(draft, index=False))
    record = {"schema": RUN_SCHEMA, **about, "versions": versions()}
    write_atomic(
        folder / "run.json", lambda draft: draft.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    )


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    return {
        "weakspot": weakspot.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _save_maps(draft: Path, maps: Mapping[str, np.ndarray]) -> None:
    with draft.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **maps)
