"""`weakspot reproduce` on folders of images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from weakspot.cli import app

runner = CliRunner()


def test_four_photographs_cannot_confirm_a_relation(tmp_path: Path) -> None:
    result = runner.invoke(app, ["reproduce", "one-pixel", "--out", str(tmp_path), "--json", "--limit", "2"])
    assert result.exit_code == 0, result.output
    verdicts = {claim["verdict"] for claim in json.loads(result.stdout)["claims"]}
    assert verdicts == {"cannot be tested on this data"}
    assert (tmp_path / "one-pixel.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["spacial"], "PAPER must be one of"),
        (["spatial", "--data", "missing"], "--data must be a folder"),
    ],
)
def test_a_wrong_argument_is_one_sentence(arguments: list[str], message: str) -> None:
    result = runner.invoke(app, ["reproduce", *arguments])
    assert result.exit_code != 0
    assert message in str(result.output) + str(result.exception)
