"""The report of a run: every number is that of the records, whatever the run is like."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
import sys
import zlib
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.audit.fixtures import NETWORKS, TINY, draw_pictures, networks, pictures, small_plan
from weakspot.audit import AttackPlan, ModelPlan, audit, open_run, summarize, write_run_report
from weakspot.audit.execution import lifecycle
from weakspot.audit.page.run_page import run_report
from weakspot.audit.store.records import shard_files
from weakspot.statistics import proportion_interval
from weakspot.statistics.number_format import percent

__all__ = ["networks", "pictures"]  # fixtures
HOSTILE = "<script>document.title='broken'<\\script>"  # a slash cannot be in a name
ANALYSES = ("overlap", "promotion", "propagation")


class Reader(HTMLParser):
    """Collects tags, tables (rows of cells) and what the page carries."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.table = ""
        self.cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.table = str(dict(attrs)["id"]).removeprefix("table-")
            self.tables[self.table] = []
        elif tag == "tr":
            self.tables[self.table].append([])
        elif tag in {"td", "th"}:
            self.tables[self.table][-1].append("")
        self.cell = tag in {"td", "th"} or (self.cell and tag in {"button", "small"})

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag not in {"td", "th"}

    def handle_data(self, data: str) -> None:
        if self.cell:
            self.tables[self.table][-1][-1] += data

    def frame(self, name: str) -> pd.DataFrame:
        head, *rows = self.tables[name]
        return pd.DataFrame(rows, columns=head)

    @property
    def drawings(self) -> dict[str, Any]:
        packed = re.search(r'<script type="text/plain" id="drawings">([^<]*)</script>', self.text)
        assert packed is not None
        drawings: dict[str, Any] = json.loads(zlib.decompress(b64decode(packed[1])))
        return drawings

    def values(self, title: str) -> list[dict[str, Any]]:
        """All rows of data of the drawing of this title."""
        (number,) = re.findall(rf'<h4>{title}</h4>\s*<div class="chart" data-chart="(\d+)"', self.text)
        spec = self.drawings["specs"][int(number)]
        return [row for rows in spec["datasets"].values() for row in rows]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an audit with everything in it."""
    folder = tmp_path_factory.mktemp("reported")
    (folder / "audited_networks.py").write_text(NETWORKS)
    draw_pictures(folder / "pictures", 20)
    (folder / "pictures" / "cat" / f"{HOSTILE}.png").write_bytes(b"\x89PNG")
    (folder / "pictures" / "fish").rename(folder / "pictures" / HOSTILE)
    plan = small_plan(
        folder / "pictures",
        analyses=ANALYSES,
        regions=("none", "cam", "matched:cam"),
        shard=8,
        group=8,
        model=replace(TINY, classes=("cat", "dog", HOSTILE, "</script><b>owl</b>")),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        audit(plan, folder / "run")
        sys.modules.pop("audited_networks", None)
    return folder / "run"


@pytest.fixture(scope="module")
def read(made: Path) -> Reader:
    return Reader(run_report(open_run(made)))


def test_robust_accuracy_equals_the_records(made: Path, read: Reader) -> None:
    records, table = open_run(made).records, read.frame("robust")
    assert len(table) == 6
    for row in table.to_dict("records"):
        selected = records[(records["attack"] == row["attack"]) & (records["region"] == row["region"])]
        robust, low, high = map(percent, proportion_interval(~selected["success_8bit"].to_numpy(dtype=bool)))
        assert row["robust accuracy [95%]"] == f"{robust} {low} to {high}"
        assert row["area"] == percent(float(selected["region_fraction"].mean()))
        assert int(row["images"]) == len(selected)
    summary = summarize(open_run(made))
    assert [row["robust"] for row in read.values("Robust accuracy by region") if "robust" in row][:6] == [
        pytest.approx(cell.robust_accuracy, rel=1e-3) for cell in summary.cells
    ]
    assert summary.weakest.replace("'", "&#39;") in read.text


def test_distributions_equal_the_records(made: Path, read: Reader) -> None:
    records, table = open_run(made).records, read.frame("distributions")
    names = {
        "margin after the attack": "margin_adversarial",
        "effect in roi": "effect_in_roi",
        "last spread": "last_spread",
    }
    for row in table[table["score"].isin(list(names))].to_dict("records"):
        selected = records[(records["attack"] == row["attack"]) & (records["region"] == row["region"])]
        values = selected[names[row["score"]]].to_numpy(dtype=float)
        values = values[np.isfinite(values)]
        assert int(row["images"]) + int(row["unknown"]) == len(selected)
        assert float(row["median"]) == pytest.approx(np.median(values), rel=5e-3)
        assert float(row["mean"]) == pytest.approx(values.mean(), rel=5e-3)
    assert not [score for score in table["score"] if score.endswith((" p", " null"))]
    bars = [row for row in read.values("margin after the attack") if "images" in row]
    assert sum(row["images"] for row in bars) == len(records)
    counts = pd.DataFrame(bars).groupby("outcome")["images"].sum()
    # An image that is misclassified without an attack was not fooled by it.
    assert counts.get("fooled", 0) == (records["success_8bit"] & records["correct"]).sum()
    assert counts["misclassified without an attack"] == (~records["correct"].astype(bool)).sum() > 0
    for bar in bars:  # below zero a margin is lost, up to the bar that zero lies in
        assert bar["outcome"] != "withstood" or bar["high"] > 0
        assert bar["outcome"] != "fooled" or bar["low"] <= 0


def test_classes_have_exact_intervals_and_adversarial_classes(made: Path, read: Reader) -> None:
    records, table = open_run(made).records, read.frame("classes")
    assert table["label"].tolist() == ["cat", "dog", HOSTILE]
    for row in table.to_dict("records"):
        selected = records[records["label_name"] == row["label"]]
        images = selected.drop_duplicates("index")
        assert int(row["images"]) == len(images)
        assert row["clean accuracy"] == percent(float(images["correct"].mean()))
        for attack, region, heading in (
            ("pgd", "cam", "pgd · cam"),
            ("few_pixel", "none", "few_pixel · whole image"),
        ):
            held = ~selected[(selected["attack"] == attack) & (selected["region"] == region)][
                "success_8bit"
            ].to_numpy(dtype=bool)
            fraction, low, high = proportion_interval(held)
            assert row[heading] == f"{percent(fraction)} {percent(low)} to {percent(high)}"
        adversarial_class = selected[selected["success_8bit"] & selected["correct"]][
            "adversarial_class_name"
        ].value_counts()
        if len(adversarial_class):
            assert (
                f"{adversarial_class.max()} of {adversarial_class.sum()} fooled"
                in row["most often fooled into"]
            )
            assert (
                adversarial_class[row["most often fooled into"].partition(" ")[0]] == adversarial_class.max()
            )
        else:
            assert row["most often fooled into"] == ""


def test_layer_curves_compare_successes_with_failures(made: Path, read: Reader) -> None:
    run, table = open_run(made), read.frame("depth")
    records = run.records
    spread = run.maps["propagation/curves/spread"]
    for row in table[table["measure"] == "spread"].to_dict("records"):
        cell = (
            ["pgd", "few_pixel"].index(row["attack"]),
            ["none", "cam", "matched:cam"].index(row["region"]),
        )
        selected = records[
            (records["attack"] == row["attack"]) & (records["region"] == row["region"]) & records["correct"]
        ]
        for outcome, success in (("fooled", True), ("withstood", False)):
            places = selected[selected["success_8bit"] == success]["index"].to_numpy()
            assert int(row[f"images {'that ' if not success else ''}{outcome}"]) == len(places)
            shown_mean = row[f"{outcome} [95%]"].split(" ")[0]
            if len(places):
                assert float(shown_mean) == pytest.approx(
                    spread[:][places, cell[0], cell[1], -1].mean(), rel=6e-3, abs=1e-6
                )
            else:
                assert shown_mean == ""
    assert "so there is no control to compare with" in read.text  # nothing that was correctly classified fell


def test_the_page_requests_nothing(read: Reader) -> None:
    for tag, attributes in read.tags:
        for name in ("src", "href", "action", "data", "poster"):
            value = attributes.get(name) or ""
            assert value == "" or value.startswith(("data:image/", "#")), (tag, name, value[:80])
    assert "default-src 'none'" in read.text
    assert "unsafe-eval" not in read.text
    assert "@import" not in read.text
    assert not re.search(r"https?://", read.text)  # the libraries, which name their schemas, are compressed
    assert "$schema" not in json.dumps(read.drawings)
    assert '"url"' not in json.dumps(read.drawings)


def test_names_from_outside_are_escaped(read: Reader) -> None:
    assert HOSTILE not in read.text
    assert HOSTILE.replace("<", "&lt;").replace(">", "&gt;").replace("'", "&#39;") in read.text
    assert "<b>owl" not in read.text
    assert len([tag for tag, _ in read.tags if tag == "script"]) == 4


def test_a_small_page_holds_its_libraries_once(read: Reader) -> None:
    assert len(read.text) < 1_500_000
    assert len(re.findall(r'id="libraries">[A-Za-z0-9+/=]{100000,}<', read.text)) == 1


def test_the_queries_on_the_page_run(read: Reader) -> None:
    shell, python = (html.unescape(text) for text in re.findall(r"<pre>(.*?)</pre>", read.text, re.DOTALL))
    exec(compile(python, "query", "exec"), {})  # noqa: S102 - our own page
    (command, option, query) = shlex.split(shell)
    assert (command, option) == ("duckdb", "-c")
    assert len(duckdb.execute(query).df()) == 6


def test_skipped_images_are_listed(read: Reader) -> None:
    assert read.frame("skipped")["image"].tolist() == [f"cat/{HOSTILE}.png"]
    assert "1 image was skipped and is not in any number above" in read.text


@pytest.mark.slow
def test_an_incomplete_run_states_how_much_is_done(
    networks: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lifecycle, "compact", stop)
    with pytest.raises(KeyboardInterrupt):
        audit(small_plan(pictures), networks / "cut")
    shard_files(networks / "cut")[1].unlink()
    read = Reader(run_report(open_run(networks / "cut")))
    assert "This audit is not complete: 10 of 14 images are in finished shards" in read.text
    assert set(read.frame("robust")["images"]) == {"10"}
    for shard in (networks / "cut/shards").iterdir():
        shard.unlink()
    bare = run_report(open_run(networks / "cut"))
    assert "0 of 14 images are in finished shards" in bare
    assert "No shard is finished yet." in bare
    assert "duckdb" not in bare


QUICK = (AttackPlan("pgd", settings=(("steps", 2),)),)


@pytest.mark.parametrize(
    ("count", "changes", "shown"),
    [
        (1, {"maps": False, "labels": "predictions"}, ("1 image", "The run stored no maps")),
        (
            4,
            {
                "attacks": (AttackPlan("pgd", budget="linf:0.00001", settings=(("steps", 1),)),),
                "labels": "predictions",
                "analyses": (),
            },
            ("no adversarial classes to report", "own predictions", "stored maps of the analysis overlap"),
        ),
        (
            3,
            {"labels": "predictions", "attacks": (AttackPlan("carlini_wagner", settings=(("steps", 9),)),)},
            ("by the size of the smallest change",),
        ),
        (3, {"regions": ("cam&~cam", "none")}, ("confined to cam&amp;~cam (0% of the image)",)),
    ],
    ids=["one image, no maps", "no success, no analyses", "minimal norm", "empty region"],
)
def test_unusual_runs_have_pages_without_nan(
    networks: Path, count: int, changes: dict[str, Any], shown: tuple[str, ...]
) -> None:
    folder = draw_pictures(networks / "few", count)
    plan = small_plan(folder, **{"attacks": QUICK, "regions": ("none",), **changes})
    read = Reader(run_report(audit(plan, networks / "run")))
    assert all(text in read.text for text in shown)
    for rows in read.tables.values():
        assert not [cell for row in rows for cell in row if re.search(r"\bnan\b|\binf\b", cell)]
    assert not re.search(r"\b(nan|inf)\b", " ".join(re.findall(r'class="finding">([^<]*)', read.text)))


def test_a_run_without_a_readable_image_has_a_page(networks: Path) -> None:
    broken = networks / "broken"
    broken.mkdir()
    for name in ("one.png", "two.jpg"):
        (broken / name).write_bytes(b"not a picture")
    folder = networks / "run"
    read = Reader(run_report(audit(small_plan(broken, attacks=QUICK), folder)))
    assert "No image could be used. Skipped: " in read.text
    assert "No shard is finished yet." not in read.text


def test_a_network_that_returns_nan_has_a_page(networks: Path, pictures: Path) -> None:
    plan = small_plan(pictures, attacks=QUICK)
    mute = replace(plan, model=replace(plan.model, spec="audited_networks:mute"))
    read = Reader(run_report(audit(mute, networks / "run")))
    assert "No attack has a known outcome, so nothing could be measured." in read.text
    assert set(read.frame("robust")["robust accuracy [95%]"]) == {""}


def test_gray_pictures_and_a_thousand_classes(networks: Path) -> None:
    folder = networks / "gray"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(rng.integers(0, 255, (28, 28), dtype=np.uint8)).save(folder / f"{number}.png")
    (networks / "gray_network.py").write_text(
        "import torch\nfrom torch import nn\n\ndef build():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), "
        "nn.Linear(4, 1000)).eval()\n"
    )
    plan = small_plan(folder, attacks=QUICK, model=ModelPlan("gray_network:build", size=(28, 28)))
    read = Reader(run_report(audit(plan, networks / "run")))
    assert len([tag for tag, attributes in read.tags if tag == "img"]) == 3 * 6
    assert 1 <= len(read.frame("classes")) <= 6
    sys.modules.pop("gray_network", None)


@pytest.mark.slow
def test_the_page_is_reproducible_written_atomically_and_changes_no_file_of_the_run(
    made: Path, tmp_path: Path, read: Reader
) -> None:
    copied = Path(shutil.copytree(made, tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()}
    path = write_run_report(open_run(copied), tmp_path / "deep" / "page.html")
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]
    assert path.read_text("utf-8").replace(str(copied), str(made)) == read.text
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()} == before
