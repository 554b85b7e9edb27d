"""`weakspot report`: what it writes, and what it refuses in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run

AUDIT = ("--model", "tiny_networks:build", "--size", "32x32", "--set", "pgd.steps=2", "--attacks", "pgd")


def test_an_audit_ends_with_a_report_which_can_be_left_out_and_made_later(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    assert run("audit", photographs, *AUDIT, "--analyses", "overlap", "--out", "made").code == 0
    page = (tmp_path / "made/report.html").read_text("utf-8")
    assert "<title>weakspot: Where" in page
    assert run("audit", photographs, *AUDIT, "--analyses", "none", "--out", "bare", "--no-report").code == 0
    assert not (tmp_path / "bare/report.html").exists()
    ended = run("report", "bare")
    assert (ended.code, ended.out) == (0, f"Written to {tmp_path / 'bare/report.html'}\n")
    ended = run("report", "made", "--out", "other.html", "--quiet")
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    assert (tmp_path / "other.html").read_text("utf-8") == page


def test_a_report_that_finds_no_room_does_not_spoil_the_audit(
    run: Run, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("weakspot.audit.page.run_page.write_atomic", full)
    ended = run("audit", photographs, *AUDIT, "--analyses", "none", "--out", "made")
    assert ended.code == 0
    assert "report.html could not be written (No space left on device)" in ended.err
    assert "(run weakspot report made to try again)" in ended.err
    assert (tmp_path / "made/records.parquet").is_file()


def test_what_is_no_run_is_refused_in_one_sentence(run: Run, tmp_path: Path) -> None:
    def refused(name: str, code: int) -> str:
        ended = run("report", name)
        assert (ended.code, ended.out) == (code, "")
        assert len(ended.err.strip().splitlines()) == 1
        return ended.err

    assert "nothing holds no run" in refused("nothing", 4)
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "holds no run (there is no run.json in it)" in refused("folder", 4)
    (folder / "run.json").write_text("{")
    assert "is damaged" in refused("folder", 2)
    (folder / "run.json").write_text(json.dumps({"schema": 1, "command": "explain"}))
    assert "a run of another command" in refused("folder", 2)
    (folder / "run.json").write_text(json.dumps({"kind": "audit", "schema": 99, "status": "complete"}))
    assert "upgrade weakspot" in refused("folder", 2)


def test_a_folder_is_no_file_to_write_to(run: Run, photographs: Path, tmp_path: Path) -> None:
    assert run("audit", photographs, *AUDIT, "--analyses", "none", "--out", "made", "--no-report").code == 0
    ended = run("report", "made", "--out", tmp_path)
    assert ended.code == 2
    assert "--out must be a file, got the folder" in ended.err


def test_runs_kept_by_url_are_reported_and_compared_where_they_are(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    there = f"file://{tmp_path}/there"
    ended = run("audit", photographs, *AUDIT, "--analyses", "overlap", "--out", there)
    assert ended.code == 0, ended.err
    page = tmp_path / "there/report.html"
    first = page.read_text("utf-8")
    assert "<title>weakspot: Where" in first
    page.unlink()
    ended = run("report", there)
    assert (ended.code, ended.out) == (0, f"Written to {there}/report.html\n")
    assert page.read_text("utf-8") == first
    assert run("audit", photographs, *AUDIT, "--analyses", "overlap", "--out", "here").code == 0
    ended = run("compare", there, "here")
    assert ended.code == 0, ended.err
    assert "has not moved beyond chance" in ended.out
