"""Queries of a run read its tables and nothing else, and end."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pytest

from tests.audit.fixtures import QUICK, Audited, audited, networks, pictures, small_plan
from weakspot.audit import Run
from weakspot.audit.store import run as runs

__all__ = ["audited", "networks", "pictures"]  # fixtures


@pytest.fixture
def run(audited: Audited, pictures: Path) -> Run:
    return audited("sql", small_plan(pictures, **QUICK, maps=False), pictures.parent / "run")


@pytest.mark.parametrize(
    "query",
    [
        "select * from '{file}'",
        "select * from read_csv('{file}')",
        "select * from read_text('{file}')",
        "select * from glob('{folder}/*')",
        "copy records to '{folder}/stolen.csv'",
        "export database '{folder}/stolen'",
        "attach '{folder}/stolen.db'",
        "install httpfs",
        "load httpfs",
        "select * from 'https://example.com/a.csv'",
        "set enable_external_access = true",
        "set memory_limit = '64GB'",
        "reset lock_configuration",
        "select * from variable",
    ],
)
def test_a_query_reads_and_writes_nothing_else(run: Run, tmp_path: Path, query: str) -> None:
    variable = run.records
    assert len(variable)
    (tmp_path / "secret.csv").write_text("a,b\n1,2\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(duckdb.Error):
        run.sql(query.format(file=tmp_path / "secret.csv", folder=tmp_path)).fetchall()
    assert sorted(tmp_path.rglob("*")) == before
    assert run.sql("select count(*) from records").fetchall() == [(28,)]


def test_a_query_ends(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "SQL_SECONDS", 0.3)
    with pytest.raises(TimeoutError, match=r"query must end within 0\.3 s"):
        run.sql("select sum(a.range * b.range) from range(1000000) a, range(1000000) b")
    assert run.sql("select count(*) from outcomes").fetchall() == [(28,)]


def test_a_query_has_bounded_memory(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "SQL_MEMORY", "50MB")
    with pytest.raises(duckdb.OutOfMemoryException):
        run.sql("select len(list(range::varchar)) from range(20000000)").fetchall()


def test_a_query_that_exceeds_the_memory_writes_no_temporary_files(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "SQL_MEMORY", "50MB")
    assert run.sql("select current_setting('temp_directory')").fetchall() == [("",)]
    with pytest.raises(duckdb.OutOfMemoryException):
        run.sql("select md5(range::varchar) as text from range(2000000) order by text")


def test_values_and_chained_relations(run: Run) -> None:
    rows = run.sql("select image from records where region = $region", region="cam")
    assert len(rows.df()) == 14
    assert rows.aggregate("count(*)").fetchall() == [(14,)]
    assert run.relation.filter("region = 'none'").aggregate("count(*)").fetchall() == [(14,)]


def test_a_connection_of_ones_own_has_no_limits(run: Run, tmp_path: Path) -> None:
    connection = run.connect()
    connection.table("outcomes").select("image").write_csv(str(tmp_path / "images.csv"))
    assert len((tmp_path / "images.csv").read_text().splitlines()) == 29
