"""Whatever is sent to the gallery: a reply or one sentence, nothing written, and the next question still answered."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from benchmarks.gallery_run import synthetic_run
from tests.audit.fixtures import NETWORKS, audit_pictures
from weakspot.audit import open_run
from weakspot.explorer import record_table
from weakspot.explorer.desk import Desk
from weakspot.explorer.gallery import Gallery
from weakspot.explorer.gallery_desk import RecordDesk, answered
from weakspot.explorer.messages import Request, RequestError

NAMES = ("run", "records", "record", "histogram", "thumbnails", "weak_regions", "sql")
FILES = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzzed")
    synthetic_run(folder / "run", 60, classes=4, pictures=2)
    return folder


@pytest.fixture(scope="module")
def gallery(folder: Path) -> Gallery:
    return Gallery(open_run(folder / "run"))


def asked(gallery: Gallery, name: str, body: Any) -> dict[str, Any]:
    """The reply, or {"error": sentence} for anything that the server turns into one."""
    try:
        reply = answered(gallery, name, Request(body))
    except RequestError as error:
        sentence = str(error)
        assert sentence
        assert "Traceback" not in sentence
        return {"error": sentence}
    json.dumps(reply, allow_nan=False)
    return reply


def is_well(gallery: Gallery) -> None:
    assert asked(gallery, "records", {})["count"] == 240
    assert asked(gallery, "sql", {"query": "select count(*) from outcomes"})["rows"] == [[240]]


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
columns = st.sampled_from(
    ["id", "l2", "label", "fooled", "image", "overlap_iou", "error", "no such column", '"; drop table']
)
orders = st.fixed_dictionaries({"column": columns}, optional={"descending": st.booleans() | json_values})
conditions = (
    st.lists(json_values, max_size=4)
    | st.fixed_dictionaries({"bins": st.lists(st.integers(-3, 40), max_size=3) | json_values})
    | st.fixed_dictionaries({"contains": json_values})
    | json_values
)
bodies = st.fixed_dictionaries(
    {},
    optional={
        "filters": st.dictionaries(columns, conditions, max_size=4) | json_values,
        "sort": orders | json_values,
        "after": json_values | st.text(alphabet="ABCabc019=_-", max_size=30),
        "size": json_values,
        "column": columns | json_values,
        "search": json_values,
        "id": json_values | st.integers(0, 300),
        "ids": st.lists(st.integers(-5, 300), max_size=5) | json_values,
        "picture": st.sampled_from(["clean", "adversarial", "change", "adversarial_after"]) | json_values,
        "query": st.text(max_size=60) | json_values,
    },
)  # fmt: skip


@FILES
@given(name=st.sampled_from(NAMES), body=bodies)
@example(name="records", body={"size": "1"})
def test_any_body_gets_a_reply_or_a_sentence(gallery: Gallery, name: str, body: Any) -> None:
    asked(gallery, name, body)
    is_well(gallery)


WORDS = (
    "select * from outcomes records gallery numbered images where ( ) , ; 1 'x' with as delete insert into values copy "
    "to attach install load set pragma call create table drop view update returning union all recursive "
    "read_csv('/etc/passwd') glob('/*') range(1000000) join group by order limit null ' \" -- /* $f0 $value"
)


@FILES
@given(query=st.lists(st.sampled_from(WORDS.split()), max_size=12).map(" ".join))
def test_any_words_of_sql_change_nothing(
    gallery: Gallery, query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_table, "TYPED_SECONDS", 1.0)
    asked(gallery, "sql", {"query": query})
    is_well(gallery)


@pytest.mark.parametrize(
    "query",
    [
        "drop view outcomes", "create table t as select 1", "insert into outcomes select * from outcomes",
        "with d as (delete from outcomes returning label) select * from d", "update outcomes set label = 1",
        "with d as (insert into gallery values (1) returning 1) select * from d", "select 1; drop view outcomes",
        "select * from '{folder}/secret.csv'", "select * from read_text('{folder}/secret.csv')",
        "select * from read_blob('/etc/passwd')", "select * from glob('/*')",
        "select * from read_parquet('{folder}/*')",
        "select * from sniff_csv('{folder}/secret.csv')", "copy outcomes to '{folder}/stolen.csv'",
        "copy (select 1) to stdout", "export database '{folder}/stolen'", "attach '{folder}/stolen.db'",
        "attach ':memory:' as other", "use memory", "install httpfs", "load json", "call pragma_version()",
        "select * from 'https://example.com/a.csv'", "select * from duckdb_secrets()",
        "select * from enable_logging(storage='file', storage_path='{folder}/log')", "set threads = 1",
        "set memory_limit = '64GB'", "reset lock_configuration", "pragma enable_profiling = 'json'",
        "select * from query('drop view outcomes')", "prepare p as select 1", "begin", "vacuum", "checkpoint",
        "explain analyze select 1", "pivot outcomes on label", "select * from folder", "select getenv('HOME')",
        "import database '{folder}'",
        "merge into outcomes using records on false when not matched then insert values (1)",
        "", "   ", "-- nothing", "select", "x" * 30_000,
    ],
)  # fmt: skip
def test_sql_that_is_more_than_a_question_is_refused(gallery: Gallery, folder: Path, query: str) -> None:
    (folder / "secret.csv").write_text("a,b\n1,2\n")
    before = sorted(folder.rglob("*"))
    assert "error" in asked(gallery, "sql", {"query": query.replace("{folder}", str(folder))})
    assert sorted(folder.rglob("*")) == before
    is_well(gallery)


@pytest.mark.parametrize(
    "query",
    [
        "select sum(a.range * b.range) from range(1000000) a, range(1000000) b",
        "with recursive t(x) as (select 1 union all select x + 1 from t) select max(x) from t",
        "select string_agg(range::varchar) from range(100000000)",
        "select list(range) from range(100000000)",
        "select range(50000000)",
        "select repeat('x', 400000000)",
    ],
)
def test_sql_without_end_ends(gallery: Gallery, query: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_table, "TYPED_SECONDS", 0.5)
    assert "error" in asked(gallery, "sql", {"query": query})  # of the time, or of the memory
    is_well(gallery)


def cursor_of(gallery: Gallery, **body: Any) -> Any:
    return gallery.answer("records", {**body, "size": 3})["next"]


def test_cursors_of_other_queries_and_forged_ones_are_refused(gallery: Gallery) -> None:
    own = cursor_of(gallery, filters={"label": [1]}, sort={"column": "l2"})
    assert "error" not in asked(
        gallery, "records", {"filters": {"label": [1]}, "sort": {"column": "l2"}, "after": own}
    )
    query = json.loads(base64.urlsafe_b64decode(own))[0]
    contents: tuple[object, ...] = (
        [query, "text", 3], [query, 1.0, "3"], [query, 1.0, True], [query, 1e400, 3], [query, 1.0, 2**70],
        [query, 1.0], [query], "x", 3, None, {}, [query, [1], 3], [query, {}, 3],
    )  # fmt: skip
    forged = [json.dumps(content) for content in contents]
    others: list[Any] = [
        cursor_of(gallery, filters={"label": [2]}, sort={"column": "l2"}),
        cursor_of(gallery, filters={"label": [1]}, sort={"column": "l1"}),
        cursor_of(gallery, filters={"label": [1]}, sort={"column": "l2", "descending": True}),
        cursor_of(gallery),
        own[:-4], "", "é", 7, ["x"], {}, True,
        *(base64.urlsafe_b64encode(text.encode()).decode() for text in (*forged, "[" * 5000)),
    ]  # fmt: skip
    for cursor in others:
        reply = asked(
            gallery, "records", {"filters": {"label": [1]}, "sort": {"column": "l2"}, "after": cursor}
        )
        assert "after must be the cursor of the page before" in reply.get("error", "")


@pytest.mark.parametrize(
    ("name", "body", "sentence"),
    [
        ("records", {"filters": {"margin": [1]}}, "did you mean"),
        ("histogram", {"column": 3}, "column must be one of"),
        ("histogram", {}, "column must be one of"),
        ("records", {"filters": {"l2": {"bins": [0, 30]}}}, "bins must be two numbers between 0 and 29"),
        ("records", {"filters": {"image": {"bins": [0, 1]}}}, "column must hold numbers, got image"),
        ("records", {"filters": {"fooled": ["yes"]}}, "value of fooled must be true or false"),
        (
            "records",
            {"filters": {"label": [10**30]}},
            "value of label must be a number between -2**63 and 2**63, got 1000",
        ),
        ("records", {"filters": {"label": list(range(300))}}, "at most 200 values, got 300"),
        ("records", {"size": 201}, "size must be a number from 1 to 200"),
        ("records", {"sort": "l2"}, "sort must be"),
        ("record", {"id": 240}, "id must be that of a record, got 240"),
        ("record", {"id": -1}, "id must be the number of a record, got -1"),
        ("record", {"id": "-1"}, "id must be the number of a record, got '-1'"),
        ("thumbnails", {"ids": list(range(201))}, "at most 200"),
        ("thumbnails", {"ids": [0], "picture": "adversarial_after"}, "picture must be one of"),
    ],
)
def test_sentences_name_what_is_wrong(gallery: Gallery, name: str, body: Any, sentence: str) -> None:
    assert sentence in asked(gallery, name, body)["error"]


def test_a_list_as_a_body_is_refused(gallery: Gallery) -> None:
    desk = RecordDesk(gallery, "No model here.")
    for name, body, sentence in (
        ("records", [], "JSON object"),
        ("nothing", {}, "no such request"),
        ("open", {"id": 0}, "No model here."),
        ("image", {}, "no such request"),
    ):
        with pytest.raises(RequestError, match=sentence):
            desk.ask(name, body).result(60)
    assert desk.ask("hello", {}).result(60)["gallery"] is True
    events: list[Any] = []
    assert desk.subscribe("attack", {}, events.append).result.done()
    assert events == [{"event": "error", "error": "No model here."}]
    desk.close()
    with pytest.raises(RequestError, match="the explorer has been closed"):
        desk.ask("run", {}).result(60)


@pytest.fixture(scope="module")
def audited_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return audit_pictures(tmp_path_factory.mktemp("odd"))


@pytest.fixture
def odd(audited_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(audited_folder, tmp_path / "run")


def test_an_interrupted_run_shows_the_records_that_it_has(odd: Path) -> None:
    about = json.loads((odd / "run.json").read_text())
    about["status"] = "running"
    about["checksums"] = {"images.parquet": about["checksums"]["images.parquet"]}
    (odd / "run.json").write_text(json.dumps(about))
    for name in ("records.parquet", "skipped.parquet"):
        (odd / name).unlink()
    shards = sorted((odd / "shards").glob("*.parquet"))
    shards[-1].unlink()
    gallery = Gallery(open_run(odd))
    reply = asked(gallery, "run", {})
    assert 0 < reply["records"] < 56
    assert "is not complete" in reply["remarks"][0]
    content = bytearray(shards[0].read_bytes())
    content[len(content) // 2] ^= 255
    shards[0].write_bytes(content)
    with pytest.raises(OSError, match="is damaged: shards/"):
        Gallery(open_run(odd))


def test_a_run_of_another_format_is_refused_with_a_sentence(odd: Path) -> None:
    about = json.loads((odd / "run.json").read_text())
    for change, sentence in (({"schema": 99}, "newer weakspot"), ({"kind": "explain"}, "weakspot audit")):
        (odd / "run.json").write_text(json.dumps({**about, **change}))
        with pytest.raises(ValueError, match=sentence):
            Gallery(open_run(odd))


def test_a_run_whose_maps_are_gone_or_broken_still_shows_its_records(odd: Path) -> None:
    (odd / "maps.zarr/clean/zarr.json").write_text("{")
    reply = Gallery(open_run(odd))
    assert asked(reply, "records", {"size": 2})["count"] == 56
    shutil.rmtree(odd / "maps.zarr")
    gone = Gallery(open_run(odd))
    assert asked(gone, "run", {})["pictures"] == []
    assert "missing" in asked(gone, "thumbnails", {"ids": [0]})["pictures"]["0"]


def test_the_desk_opens_records_on_the_bench_once(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakspot
    from weakspot.explorer.bench import Bench
    from weakspot.explorer.gallery_desk import gallery_questions

    (odd.parent / "audited_networks.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(str(odd.parent))
    model = weakspot.load("audited_networks:build", input_size=(24, 24))
    desk = Desk(Bench(model), gallery_questions(Gallery(open_run(odd))))
    try:
        assert desk.ask("hello", {}).result(60)["gallery"] is True
        first: Any = desk.ask("open", {"id": 5}).result(60)
        again: Any = desk.ask("open", {"id": 4}).result(60)  # the same image under another attack or region
        assert first["image"] == again["image"] == 0
        assert first["seed"] == 0
        other: Any = desk.ask("open", {"id": 9}).result(60)
        assert other["image"] == 1
        assert (first["attack"], first["region"]) != (again["attack"], again["region"])
        exhibit = desk.bench.exhibit(0)
        exhibit.label += 1  # as if the picture had been dropped, and misclassified
        third: Any = desk.ask("open", {"id": 5}).result(60)
        assert desk.bench.exhibit(third["image"]).label == exhibit.label - 1
        with pytest.raises(RequestError, match="id must be"):
            desk.ask("open", {"id": "../../etc/passwd"}).result(60)
    finally:
        desk.close()
