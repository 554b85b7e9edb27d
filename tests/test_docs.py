"""The docs' examples run as they are printed."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from weakspot import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_python_example_runs(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "example", "exec"), {"__name__": "example"})  # noqa: S102 - our own docs
    if "to_html" in block:
        assert (tmp_path / "report.html").stat().st_size > 100_000
        assert "The attack changed the classification from" in capsys.readouterr().out


def test_the_analysis_of_the_how_to_measures_what_it_says() -> None:
    import torch

    from weakspot import Pairs

    (block,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/how-to-add-an-analysis.md").read_text("utf-8"), re.DOTALL
    )
    names: dict[str, object] = {}
    exec(compile(block, "example", "exec"), names)  # noqa: S102
    clean = torch.full((1, 3, 32, 32), 0.5)
    changed = clean.clone()
    changed[:, :, 0, :3] += 0.1  # three sites on the border
    changed[:, :, 16, 16] += 0.1  # one inside
    found = names["border"](None, Pairs(clean, changed, torch.tensor([0]), torch.tensor([1])))  # type: ignore[operator]
    assert found.scores["border_fraction"][0] == pytest.approx(0.75)


def test_the_command_line_example_of_the_readme_parses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its folder is missing here, so it must end with the code for input that could not be read, not of usage."""
    (command,) = re.findall(
        r"```console\n(weakspot explain .*)\n```", (ROOT / "README.md").read_text("utf-8")
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 4
    assert "photos: there is no such file or folder" in capsys.readouterr().err
