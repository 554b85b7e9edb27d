"""`weakspot compare`, `weakspot report` and the gate: what they print, write and refuse."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pandas as pd
import pytest

from tests.cli.conftest import NETWORKS, Run, save
from tests.cli.test_audit import QUICK, TINY
from weakspot import audit as audits
from weakspot import sample_images
from weakspot.audit.findings.comparison import Comparison
from weakspot.cli.app import Failure
from weakspot.cli.gate_options import GateOptions


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two audits, "one" and "two", by PGD with as many steps."""
    folder = tmp_path_factory.mktemp("audited")
    (folder / "tiny_networks.py").write_text(NETWORKS)
    for image, name in zip(*sample_images((64, 64)), strict=True):
        save(image, folder / "photos" / f"{name}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        for name, steps in (("one", 1), ("two", 2)):
            plan = {
                "images": "photos",
                "model": {"spec": "tiny_networks:build", "size": [32, 32]},
                "attacks": [{"name": "pgd", "settings": {"steps": steps}}],
                "analyses": "none",
            }
            audits.audit(audits.Plan.from_mapping(plan), folder / name)
    sys.modules.pop("tiny_networks", None)
    return folder


def test_audits_with_different_attacks_share_only_clean_accuracy(run: Run, audited: Path) -> None:
    ended = run("compare", audited / "one", audited / "two")
    assert ended.code == 0, ended.err
    assert "robust accuracy cannot be compared" in ended.out
    for side, steps in (("one", 1), ("two", 2)):
        assert f"attack pgd with steps={steps} only in {audited / side}" in ended.out
    assert "significant" not in ended.out


def test_a_comparison_is_a_table_a_sentence_and_files(run: Run, audited: Path, tmp_path: Path) -> None:
    ended = run("compare", audited / "one", audited / "one", "--all", "--csv", "moved.csv")
    assert ended.code == 0, ended.err
    for word in (
        "robust_accuracy",
        "margin_adversarial",
        "No change of robust accuracy beyond chance",
        "the same weights",
    ):
        assert word in ended.out
    assert "robust_accuracy" in set(pd.read_csv(tmp_path / "moved.csv")["score"])
    document = json.loads(run("compare", audited / "one", audited / "one", "--json").out)
    assert document["images"] == 4
    assert document["scores"][0]["score"] == "clean_accuracy"


def test_the_terminal_has_the_sentence_first_and_80_columns(
    run: Run, audited: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 30 scores of an attack with a hostile label, five rows, with whole words in the header."""
    label = ":smile: [red]five:\x1b[2J " + "x" * 60
    row = {
        "attack": label,
        "region": "matched:(border&~cam)",
        "images": 50,
        "before": 12345.6,
        "after": -0.0123,
    }
    row |= {"difference": -12345.6, "low": -13456.7, "high": -0.000123, "p": 1e-9, "q": 1e-8}
    table = pd.DataFrame([row | {"score": f"a_score_with_a_long_name_{number}"} for number in range(30)])
    comparison = Comparison(table, 50, (), ("remark",))
    monkeypatch.setattr(audits, "compare", lambda *_: comparison)
    monkeypatch.setenv("COLUMNS", "80")
    ended = run("compare", audited / "one", audited / "two")
    lines = ended.out.splitlines()
    assert lines[0] == comparison.sentence()
    (head,) = [place for place, line in enumerate(lines) if line.startswith("score")]
    assert lines[head].split() == ["score", "under", "before", "after", "difference", "[95%]"]
    assert all(len(line) <= 80 for line in lines[head : head + 6])
    assert lines[head + 6] == "... and 25 more (show them with --all)"
    assert "\x1b" not in ended.out
    assert ":smile:" in ended.out
    assert label.replace("\x1b", "\\x1b") in run("compare", audited / "one", audited / "two", "--all").out


@pytest.mark.parametrize(
    ("count", "shown"), [(1, "1 change of a score is .* .show it"), (2, "2 changes .* .show them")]
)
def test_uncertain_changes_are_counted(
    run: Run, audited: Path, monkeypatch: pytest.MonkeyPatch, count: int, shown: str
) -> None:
    row = {
        "score": "a",
        "attack": "",
        "region": "",
        "images": 50,
        "before": 0.5,
        "after": 0.4,
        "difference": -0.1,
    }
    table = pd.DataFrame([row | {"low": -0.2, "high": 0.1, "p": 0.001, "q": 0.01}] * count)
    monkeypatch.setattr(audits, "compare", lambda *_: Comparison(table, 50, (), ()))
    assert re.search(shown, run("compare", audited / "one", audited / "two").out)


def test_a_failed_gate_ends_with_three_and_writes_junit(run: Run, audited: Path, tmp_path: Path) -> None:
    ended = run(
        "compare", audited / "one", audited / "one", "--fail-if", "difference <= 0", "--junit", "gate.xml"
    )
    assert ended.code == 3
    assert "gate: robust_accuracy / pgd / none: difference <= 0: difference is 0" in ended.err
    root = ET.parse(tmp_path / "gate.xml").getroot()  # noqa: S314 - ours
    assert int(root.attrib["failures"]) == int(root.attrib["tests"]) > 1


@pytest.mark.parametrize(
    ("condition", "code"),
    [
        ("robust_accuracy < 0", 0),
        ("robust_accuracy >= 0", 3),
        ("region == 'none' and margin_adversarial > 1e9", 0),
        ("clean_accuracy < 0.5 or images < 4 or skipped > 0 or errors > 0", 0),
        ("robust_low > robust_high", 0),
    ],
)
def test_a_finished_audit_can_be_gated_later(
    run: Run, audited: Path, tmp_path: Path, condition: str, code: int
) -> None:
    ended = run(
        "audit",
        "--resume",
        audited / "two",
        "--no-report",
        "--fail-if",
        condition,
        "--junit",
        "gate.xml",
        "--json",
    )
    assert ended.code == code, ended.err
    gate = json.loads(ended.out)["gate"]
    assert gate["failed"] == (code == 3)
    assert gate["checks"][0]["condition"] == condition
    assert (tmp_path / "gate.xml").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (GateOptions(["robust_accuracy <"]), "robust_accuracy <"),
        (GateOptions(["robust_accuracy.x < 1"]), "column names"),
        (GateOptions(None, Path("gate.xml")), "--junit has no effect without --fail-if"),
        (
            GateOptions(["images < 1"], Path("nowhere/gate.xml")),
            "--junit must be a file in an existing folder",
        ),
    ],
)
def test_a_gate_that_makes_no_sense_is_refused_before_anything_is_computed(
    options: GateOptions, message: str
) -> None:
    with pytest.raises((Failure, ValueError)) as caught:
        options.check()
    assert message in str(caught.value)


def test_a_gate_is_checked_before_the_audit_starts(run: Run, photographs: Path, tmp_path: Path) -> None:
    ended = run("audit", photographs, *TINY, *QUICK, "--out", "made", "--junit", "gate.xml")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert not (tmp_path / "made").exists()


def test_a_gate_on_an_unknown_column_suggests_a_column(run: Run, audited: Path) -> None:
    ended = run("audit", "--resume", audited / "two", "--no-report", "--fail-if", "robust_acuracy < 1")
    assert ended.code == 2
    assert "did you mean 'robust_accuracy" in ended.err


def test_what_cannot_be_compared_is_one_sentence(run: Run, audited: Path, tmp_path: Path) -> None:
    for arguments, code, message in (
        ((tmp_path / "nowhere", audited / "one"), 4, "holds no run"),
        (
            (audited / "one", audited / "two", "--csv", "nowhere/moved.csv"),
            2,
            "--csv must be a file in an existing folder",
        ),
    ):
        ended = run("compare", *arguments)
        assert (ended.code, ended.err.count("\n")) == (code, 1), ended.err
        assert message in ended.err


@pytest.mark.slow
def test_controls_are_named_in_a_sentence(run: Run, photographs: Path) -> None:
    ended = run(
        "audit", photographs, *TINY, "--attacks", "fmn,pgd", "--set", "fmn.steps=10", "--analyses", "none", "--regions",
        "cam,border&~cam", "--controls", "--out", "made", "--all",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert "matched:(border&~cam)" in ended.out
    assert (
        "fmn fooled no correctly classified image, either in cam (30% of the image) or in its controls."
        in ended.out
    )
    assert "pgd confined to cam (30% of the image) fools 0% of 4 images" in ended.out


@pytest.mark.slow
def test_an_audit_writes_a_report_now_or_later(run: Run, photographs: Path, tmp_path: Path) -> None:
    assert (
        run("audit", photographs, *TINY, *QUICK, "--analyses", "overlap", "--report", "--out", "made").code
        == 0
    )
    page = (tmp_path / "made/report.html").read_text("utf-8")
    assert "<title>weakspot: Where" in page
    assert run("audit", photographs, *TINY, *QUICK, "--out", "bare").code == 0
    assert not (tmp_path / "bare/report.html").exists()
    ended = run("report", "bare")
    assert (ended.code, ended.out) == (0, f"Written to {tmp_path / 'bare/report.html'}\n")
    ended = run("report", "made", "--out", "other.html", "--quiet")
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    assert (tmp_path / "other.html").read_text("utf-8") == page


@pytest.mark.slow
def test_a_full_disk_for_the_report_does_not_spoil_the_audit(
    run: Run, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("weakspot.audit.page.run_page.write_atomic", full)
    ended = run("audit", photographs, *TINY, *QUICK, "--report", "--out", "made")
    assert ended.code == 0
    assert "report.html could not be written (No space left on device)" in ended.err
    assert "(run weakspot report made to try again)" in ended.err
    assert (tmp_path / "made/records.parquet").is_file()


def test_a_folder_without_an_audit_is_one_sentence(run: Run, tmp_path: Path) -> None:
    def refused(name: str, code: int) -> str:
        ended = run("report", name)
        assert (ended.code, ended.out) == (code, "")
        assert len(ended.err.strip().splitlines()) == 1
        return ended.err

    assert "nothing holds no run" in refused("nothing", 4)
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "holds no run (it has no run.json)" in refused("folder", 4)
    (folder / "run.json").write_text("{")
    assert "is damaged" in refused("folder", 2)
    (folder / "run.json").write_text(json.dumps({"schema": 1, "command": "explain"}))
    assert "must be written by weakspot audit" in refused("folder", 2)
    (folder / "run.json").write_text(json.dumps({"kind": "audit", "schema": 99, "status": "complete"}))
    assert "upgrade weakspot" in refused("folder", 2)


def test_a_report_is_a_file(run: Run, audited: Path) -> None:
    ended = run("report", audited / "one", "--out", audited)
    assert (ended.code, "--out must be a file, got the folder" in ended.err) == (2, True)
    Path("names.txt").touch()
    ended = run("report", audited / "one", "--out", "names.txt/deep/page.html")
    message = "--out must be inside a folder, got names.txt/deep/page.html (names.txt is a file)"
    assert (ended.code, message in ended.err) == (2, True), ended.err


@pytest.mark.slow
def test_audits_at_urls_are_reported_and_compared(run: Run, photographs: Path, tmp_path: Path) -> None:
    there = f"file://{tmp_path}/there"
    ended = run("audit", photographs, *TINY, *QUICK, "--report", "--out", there)
    assert ended.code == 0, ended.err
    page = tmp_path / "there/report.html"
    first = page.read_text("utf-8")
    assert "<title>weakspot: Where" in first
    page.unlink()
    ended = run("report", there)
    assert (ended.code, ended.out) == (0, f"Written to {there}/report.html\n")
    assert page.read_text("utf-8") == first
    ended = run("compare", there, there)
    assert ended.code == 0, ended.err
    assert "No change of robust accuracy beyond chance" in ended.out


@pytest.mark.parametrize(
    ("condition", "code", "why"),
    [
        ("high < 0", 3, "cannot be judged: The runs have no attack and region in common"),
        ("score == 'robust_accuracy' and high < 0", 3, "no row has score 'robust_accuracy'"),
        (
            "score != 'clean_accuracy' and high < 0",
            3,
            "cannot be judged: The runs have no attack and region in common",
        ),
        ("score == 'clean_accuracy' and after < 0", 0, ""),
        ("attack == '' and after < 0", 0, ""),
    ],
)
def test_a_gate_on_what_was_not_compared_does_not_pass(
    run: Run, audited: Path, condition: str, code: int, why: str
) -> None:
    ended = run("compare", audited / "one", audited / "two", "--fail-if", condition)
    assert (ended.code, why in ended.err) == (code, True), ended.err
