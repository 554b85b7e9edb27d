"""`weakspot dissect` on a concept set, on pictures with masks, on folders, and on what cannot be meant."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from tests.cli.test_explain import Run, run  # noqa: F401 - a fixture
from tests.dissection.test_units import planted

TINY = ("--model", "tiny_networks:build", "--size", "32x32", "--layer", "0", "--quantile", "0.05")


def test_a_concept_set_is_dissected_and_everything_promised_is_written(run: Run, tmp_path: Path) -> None:  # noqa: F811
    dataset = planted(tmp_path / "set")
    ended = run("dissect", dataset, *TINY, "--out", "units")
    assert ended.code == 0, ended.err
    written = {path.name for path in (tmp_path / "units").iterdir()}
    assert written == {"report.html", "0.csv", "scores.csv", "run.json", "cache"}
    table = pd.read_csv(tmp_path / "units/0.csv")
    assert table["unit"].tolist() == list(range(8))
    assert f"Report: {tmp_path / 'units' / 'report.html'}" in ended.out
    about = json.loads((tmp_path / "units/run.json").read_text())
    assert about["quantile"] == "0.05"
    again = run("dissect", dataset, *TINY, "--out", "units", "--json")
    assert json.loads(again.out)["layers"][0]["units"] == "8"


def test_pictures_with_masks_and_folders_of_pictures(run: Run, tmp_path: Path) -> None:  # noqa: F811
    rng = np.random.default_rng(0)
    for number in range(4):
        for folder in ("photos", "masks", f"textures/kind{number % 2}"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        photo = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        mask = np.zeros((32, 32), np.uint8)
        mask[:16] = 1
        photo[:16, :, 0] //= 2
        Image.fromarray(photo).save(tmp_path / "photos" / f"{number}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{number}.png")
        Image.fromarray(photo).save(tmp_path / "textures" / f"kind{number % 2}" / f"{number}.png")
    (tmp_path / "names.txt").write_text("low\nhigh\n")
    ended = run("dissect", "photos", "--masks", "masks", "--names", "names.txt", *TINY, "--out", "one", "-q")
    assert ended.code == 0, ended.err
    assert set(pd.read_csv(tmp_path / "one/concepts/label.csv")["name"]) == {"low", "high"}
    ended = run("dissect", "textures", *TINY, "--out", "two", "-q")
    assert ended.code == 0, ended.err
    assert set(pd.read_csv(tmp_path / "two/concepts/label.csv")["name"]) == {"kind0", "kind1"}
    ended = run("dissect", "photos", "--masks", "masks", "--names", "names.txt", *TINY, "--out", "one")
    assert ended.code == 2
    assert "holds concepts from before" in ended.err


def test_what_cannot_be_meant_is_told_in_a_sentence(run: Run, tmp_path: Path) -> None:  # noqa: F811
    dataset = planted(tmp_path / "set")
    for arguments, told in (
        ((), "give either a folder of labelled pictures or --demo"),
        ((dataset, "--demo"), "give either"),
        (("nowhere",), "there is no such folder"),
        (("--demo", "--masks", "m"), "--masks does nothing with --demo"),
        (("--demo", "--void", "0", "--names", "n"), "--names and --void do nothing with --demo"),
        ((dataset, *TINY, "--names", "n"), "--names does nothing without --masks"),
        ((dataset, *TINY, "--void", "0"), "--void does nothing without --masks"),
        ((dataset, *TINY[:4], "--layer", "9"), "layers has '9'"),
        ((dataset, *TINY, "--denominator", "none"), "denominator is 'none'"),
    ):
        ended = run("dissect", *arguments)
        assert ended.code in {2, 4}
        assert told in ended.err
        assert ended.err.count("weakspot:") == 1
