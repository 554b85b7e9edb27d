"""The gallery against brute force over all records in memory, on a synthetic and on an audited run."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from benchmarks.gallery_run import synthetic_run
from tests.audit.fixtures import Audited, audited, networks, pictures, small_plan, store_records
from weakspot.audit import AttackPlan, Run, open_run
from weakspot.audit.findings.distributions import BINS
from weakspot.audit.store.digests import DamagedError
from weakspot.explorer.gallery import MAX_PAGE, Gallery
from weakspot.explorer.record_table import ROWS, RecordTable
from weakspot.explorer.run_findings import Later

__all__ = ["audited", "networks", "pictures"]  # fixtures


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return synthetic_run(tmp_path_factory.mktemp("gallery") / "run", 300, classes=5, pictures=3)


@pytest.fixture(scope="module")
def gallery(synthetic: Run) -> Gallery:
    return Gallery(synthetic)


@pytest.fixture
def run(audited: Audited, pictures: Path) -> Run:
    return audited("gallery", small_plan(pictures), pictures.parent / "run")


def brute(run: Run) -> pd.DataFrame:
    """All outcomes, numbered like the gallery's."""
    frame: pd.DataFrame = run.sql("select * from outcomes").df()
    places = {(attack.label, region): place for place, (attack, region) in enumerate(run.plan.cells)}
    cell = [places[pair] for pair in zip(frame["attack"], frame["region"], strict=True)]
    numbered: pd.DataFrame = frame.assign(id=frame["index"] * len(places) + cell)
    return numbered


def all_pages(gallery: Gallery, **body: Any) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    after = None
    while True:
        reply: Any = gallery.answer("records", {**body, "after": after})
        records += reply["records"]
        after = reply["next"]
        if after is None:
            assert reply["count"] == len(records)
            return records


@pytest.mark.parametrize(
    ("column", "descending"),
    [
        ("id", True), ("image", False), ("margin_adversarial", True), ("l2", False), ("overlap_iou", False),
        ("overlap_iou", True), ("fooled", True), ("label", False), ("label", True), ("pixels", True),
    ],
)  # fmt: skip
def test_pages_in_sequence_are_the_sorted_records(
    gallery: Gallery, synthetic: Run, column: str, descending: bool
) -> None:
    rows = all_pages(gallery, sort={"column": column, "descending": descending}, size=97)
    expected = (
        brute(synthetic)
        .sort_values("id")
        .sort_values(column, ascending=not descending, kind="stable", na_position="last")
    )
    assert [row["id"] for row in rows] == expected["id"].tolist()


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"label_name": ["class 1", "class 2"]}, lambda f: f["label_name"].isin(["class 1", "class 2"])),
        ({"fooled": [True], "region": ["cam"]}, lambda f: f["fooled"] & (f["region"] == "cam")),
        ({"overlap_iou": [None]}, lambda f: f["overlap_iou"].isna()),
        ({"image": {"contains": "1.JPG"}}, lambda f: f["image"].str.contains("1.jpg", regex=False)),
        ({"label": [3, 4]}, lambda f: f["label"].isin([3, 4])),
        ({"attack": []}, lambda f: f["label"] < 0),
        ({"image": {"contains": "%"}}, lambda f: f["label"] < 0),
    ],
)
def test_filters_keep_what_they_say(gallery: Gallery, synthetic: Run, filters: Any, expected: Any) -> None:
    frame = brute(synthetic)
    assert [row["id"] for row in all_pages(gallery, filters=filters)] == frame["id"][expected(frame)].tolist()


@pytest.mark.parametrize("column", ["margin_adversarial", "l2", "label", "pixels", "overlap_iou", "linf"])
def test_a_bin_holds_as_many_records_as_its_filter_finds(gallery: Gallery, column: str) -> None:
    filters = {"region": ["cam"]}
    reply: Any = gallery.answer("histogram", {"column": column, "filters": filters})
    counts = np.sum([*reply["counts"].values(), [0] * BINS], axis=0)
    for first, last in [(place, place) for place in range(BINS)] + [(0, BINS - 1), (3, 11)]:
        found: Any = gallery.answer("records", {"filters": {**filters, column: {"bins": [first, last]}}})
        assert found["count"] == counts[first : last + 1].sum()
    missing: Any = gallery.answer("records", {"filters": {**filters, column: [None]}})
    assert missing["count"] == reply["missing"]
    assert counts.sum() + reply["missing"] == 600


def test_a_histogram_ignores_the_filter_of_its_own_column(gallery: Gallery) -> None:
    plain = gallery.answer("histogram", {"column": "l2"})
    assert plain == gallery.answer("histogram", {"column": "l2", "filters": {"l2": {"bins": [3, 4]}}})
    assert plain != gallery.answer("histogram", {"column": "l2", "filters": {"label": [1]}})
    # The axis stays where it is, so that a brush keeps its place.
    narrowed = gallery.answer("histogram", {"column": "l2", "filters": {"label": [1]}})
    assert (narrowed["low"], narrowed["high"]) == (plain["low"], plain["high"])


def test_values_are_counted_and_searched(gallery: Gallery, synthetic: Run) -> None:
    frame = brute(synthetic)
    reply: Any = gallery.answer("histogram", {"column": "label_name", "filters": {"region": ["cam"]}})
    counts = frame[frame["region"] == "cam"].groupby("label_name")["fooled"].agg(["size", "sum"])
    assert {row["value"]: (row["n"], row["fooled"]) for row in reply["values"]} == {
        str(name): (row["size"], row["sum"]) for name, row in counts.iterrows()
    }
    few: Any = gallery.answer("histogram", {"column": "image", "search": "00001"})
    assert [row["value"] for row in few["values"]] == sorted(
        n for n in frame["image"].unique() if "00001" in n
    )
    assert few["more"] == 0
    many: Any = gallery.answer("histogram", {"column": "image"})
    assert len(many["values"]) + many["more"] == 300


def test_nothing_of_the_size_of_the_run_goes_to_the_page(gallery: Gallery) -> None:
    for name, body in (
        ("run", {}),
        ("records", {"size": MAX_PAGE}),
        ("histogram", {"column": "image"}),
        ("sql", {"query": "select * from records, range(100)"}),
        ("weak_regions", {}),
    ):
        assert len(json.dumps(gallery.answer(name, body), allow_nan=False)) < 500_000


def test_a_record_has_all_of_its_columns(run: Run) -> None:
    reply: Any = Gallery(run).answer("record", {"id": 5})
    values = {row["name"]: row["value"] for row in reply["record"]}
    stored = brute(run).set_index("id").loc[5]
    assert values["image"] == stored["image"]
    assert values["margin_adversarial"] == stored["margin_adversarial"]
    assert set(values) >= set(brute(run).select_dtypes(["number", "bool", "object", "string"]).columns)


def picture_of(gallery: Gallery, number: int, kind: str) -> Image.Image:
    reply: Any = gallery.answer("thumbnails", {"ids": [number], "picture": kind})
    data = reply["pictures"][str(number)]["url"].partition("base64,")[2]
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_pictures_are_those_of_the_record(run: Run) -> None:
    gallery = Gallery(run)
    record: Any = gallery.answer("records", {"filters": {"region": ["cam"], "attack": ["few_pixel"]}})
    for row in record["records"][:3]:
        clean = run.maps["clean"][row["index"]].transpose(1, 2, 0)
        adversarial = run.maps["adversarial"][row["index"], 1, 1].transpose(1, 2, 0)
        np.testing.assert_array_equal(np.asarray(picture_of(gallery, row["id"], "clean")), clean)
        np.testing.assert_array_equal(np.asarray(picture_of(gallery, row["id"], "adversarial")), adversarial)
        change = np.asarray(picture_of(gallery, row["id"], "change")).astype(int)
        same = (clean == adversarial).all(2)
        assert (np.abs(change[same] - 127.5) == 0.5).all()


def test_an_opened_record_is_the_image_that_was_attacked(run: Run) -> None:
    import weakspot

    gallery = Gallery(run)
    model = weakspot.load("audited_networks:build", input_size=(24, 24))
    opened = gallery.record(6, model)
    assert opened.remark == ""
    frame = brute(run).set_index("id")
    assert (opened.name, opened.label) == (frame["image"][6], frame["label"][6])
    assert opened.attack == "few_pixel"
    margin = model(opened.image[None])[0].detach()
    label = int(frame["label"][6])
    rest = margin[[one for one in range(4) if one != label]].max()
    assert float(margin[label] - rest) == pytest.approx(frame["margin_clean"][6], abs=1e-5)
    stored = gallery.record(6)
    assert stored.remark == "This is the stored picture, rounded to 8 bits."
    assert float((stored.image - opened.image).abs().max()) <= 0.5 / 255 + 1e-6
    assert stored.adversarial is not None


def test_a_file_that_changed_since_the_audit_is_not_shown_as_the_audited_one(run: Run) -> None:
    import weakspot

    model = weakspot.load("audited_networks:build", input_size=(24, 24))
    before = Gallery(run).record(0, model)
    location = Path(run.plan.sources[0]) / before.name
    Image.fromarray(np.zeros((24, 24, 3), np.uint8)).save(location)
    opened = Gallery(run).record(0, model)
    assert opened.remark.startswith("The file is not at hand as it was audited")
    assert float((opened.image - before.image).abs().max()) <= 0.5 / 255 + 1e-6
    location.unlink()
    assert Gallery(run).record(0, model).remark


def test_labels_that_are_predictions_are_named(audited: Audited, pictures: Path) -> None:
    for labels in ("predictions", "folders"):
        plan = small_plan(pictures, labels=labels, attacks=(AttackPlan("fgsm"),), analyses=(), maps=False)
        remarks: Any = Gallery(audited(labels, plan, pictures.parent / labels)).answer("run", {})["remarks"]
        assert any("the model's own predictions" in one for one in remarks) == (labels == "predictions")


def test_a_run_without_pictures_says_so(audited: Audited, pictures: Path) -> None:
    run = audited("bare", small_plan(pictures, maps=False), pictures.parent / "run")
    gallery = Gallery(run)
    assert gallery.answer("run", {})["pictures"] == []
    reply: Any = gallery.answer("thumbnails", {"ids": [0]})
    assert "--no-maps" in reply["pictures"]["0"]["missing"]
    with pytest.raises(ValueError, match="must be where the audit read it, or stored in the run"):
        gallery.record(0)


def test_a_damaged_picture_is_named_and_the_others_are_shown(run: Run) -> None:
    (chunk,) = (
        path
        for path in (run.folder / "maps.zarr/clean/c").rglob("*")
        if path.match("0/0/0/0") and path.is_file()
    )
    content = bytearray(chunk.read_bytes())
    content[40] ^= 255
    chunk.write_bytes(content)
    reply: Any = Gallery(run).answer("thumbnails", {"ids": [0, 20]})
    assert "damaged" in reply["pictures"]["0"]["missing"]
    assert reply["pictures"]["20"]["url"].startswith("data:image/png")
    with pytest.raises(DamagedError):
        Gallery(run).record(0)


def test_damaged_records_are_refused(run: Run) -> None:
    content = bytearray((run.folder / "records.parquet").read_bytes())
    content[200] ^= 255
    (run.folder / "records.parquet").write_bytes(content)
    with pytest.raises(DamagedError, match="weakspot audit --resume"):
        Gallery(open_run(run.folder))


@pytest.mark.parametrize("rows", [0, 1])
def test_runs_of_no_and_of_one_record_answer(run: Run, rows: int) -> None:
    store_records(run.folder, run.records.head(rows))
    gallery = Gallery(open_run(run.folder))
    assert gallery.answer("run", {})["records"] == rows
    for column in gallery._table.columns:
        gallery.answer("histogram", {"column": column})
        reply: Any = gallery.answer("records", {"sort": {"column": column}})
        assert len(reply["records"]) == rows
        assert reply["next"] is None
    assert "No class was compared" in str(gallery.answer("weak_regions", {}))
    gallery.answer("sql", {"query": "select * from outcomes"})


def test_a_view_answers_as_the_table_in_memory_does(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("records", {"sort": {"column": "margin_adversarial", "descending": True}, "size": 3}),
        ("histogram", {"column": "linf"}),
        ("histogram", {"column": "label_name"}),
    ]
    table = [Gallery(run).answer(*question) for question in bodies]
    monkeypatch.setattr("weakspot.explorer.record_table.IN_MEMORY", 0)
    assert [Gallery(run).answer(*question) for question in bodies] == table


def test_typed_queries_have_bounded_rows(gallery: Gallery) -> None:
    reply: Any = gallery.answer("sql", {"query": "select * from range(1000000)"})
    assert (len(reply["rows"]), reply["more"]) == (ROWS, True)
    few: Any = gallery.answer(
        "sql", {"query": "select 1 as a, 'nan'::double, 2::hugeint ** 70, repeat('x', 1000), null"}
    )
    assert few["more"] is False
    first = few["rows"][0]
    assert first[:2] == [1, "nan"]
    assert len(first[3]) == 300
    assert first[4] is None
    json.dumps(few, allow_nan=False)


def test_a_background_result_is_computed_once_and_errors_reach_every_request() -> None:
    calls: list[int] = []

    def compute(watch: Callable[[float], None]) -> int:
        calls.append(1)
        watch(0.5)
        return 7

    later = Later(compute)
    assert [later.result(), later.result()] == [7, 7]
    assert (calls, later.fraction) == ([1], 0.5)
    failing: Later[int] = Later(lambda _: 1 // 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            failing.result()


def test_two_threads_get_the_same_answers_at_once(gallery: Gallery) -> None:
    from concurrent.futures import ThreadPoolExecutor

    bodies = [{"filters": {"label": [number % 5]}, "sort": {"column": "l2"}} for number in range(40)]
    alone = [gallery.answer("records", body) for body in bodies]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda body: gallery.answer("records", body), bodies)) == alone


def test_a_closed_table_says_so(synthetic: Run) -> None:
    table = RecordTable(synthetic)
    for _ in range(2):
        table.close()
        with pytest.raises(ValueError, match="the tables have been closed"):
            table.rows("select 1")


def test_a_score_of_any_name_is_read(run: Run) -> None:
    name = 'share of "odd" pixels'
    store_records(run.folder, run.records.assign(**{name: run.records["l2"]}))
    reply: Any = Gallery(open_run(run.folder)).answer("record", {"id": 5})
    values = {row["name"]: row["value"] for row in reply["record"]}
    assert values[name] == values["l2"]


def test_the_table_does_not_keep_the_run_from_answering(synthetic: Run) -> None:
    RecordTable(synthetic)
    assert synthetic.sql("select count(*) from outcomes").fetchall() == [(1200,)]
