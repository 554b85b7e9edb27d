"""`weakspot dissect` on a concept set, on images with masks, on folders, under attack, and with wrong options."""

from __future__ import annotations

import html
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.cli.conftest import Run
from tests.dissection.test_units import planted
from weakspot.cli.app import Failure
from weakspot.cli.attacked_units import parse_mask

TINY = ("--model", "tiny_networks:build", "--size", "32x32", "--layer", "0", "--quantile", "0.05")


def test_a_concept_set_is_dissected_and_all_files_are_written(run: Run, tmp_path: Path) -> None:
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
    assert json.loads(again.out)["layers"][0]["units"] == 8


def test_a_quantile_of_zero_is_not_replaced_by_the_default(run: Run, tmp_path: Path) -> None:
    ended = run("dissect", planted(tmp_path / "set"), *TINY[:-1], "0", "--out", "units")
    assert (ended.code, "quantile must be a fraction between 0 and 1" in ended.err) == (2, True)


def test_images_with_masks_and_folders_of_images(run: Run, tmp_path: Path) -> None:
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
    # The same concepts serve again; other ones are not mixed with them.
    again = run("dissect", "photos", "--masks", "masks", "--names", "names.txt", *TINY, "--out", "one", "-q")
    assert again.code == 0, again.err
    (tmp_path / "names.txt").write_text("under\nover\n")
    named = ("photos", "--masks", "masks", "--names", "names.txt")
    for changed in (named, ("textures",)):
        ended = run("dissect", *changed, *TINY, "--out", "one")
        assert ended.code == 2
        assert "holds the concepts of an earlier run with other images or options" in ended.err


def draw(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(3)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def test_units_under_attack_are_in_the_page_the_tables_and_the_json(run: Run, tmp_path: Path) -> None:
    dataset, photos = planted(tmp_path / "set"), draw(tmp_path / "photos", 12)
    attack = ("--images", photos, "--budget", "linf:16/255", "--steps", "4")
    ended = run("dissect", dataset, *TINY, *attack, "--mask", "sensitive:2", "--out", "units", "--json")
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    table = pd.read_csv(tmp_path / "units/0.csv")
    assert {"concept", "iou", "sensitivity", "noise", "p_value", "change"} <= set(table)
    assert (table["images"] == 12).all()
    masking = pd.read_csv(tmp_path / "units/0-masking.csv")
    assert masking["masked"].tolist()[:2] == ["none", "these units"]
    assert (masking["images"] == 6).all()
    assert [row["masked"] for row in document["masking"]["0"]] == masking["masked"].tolist()
    page = (tmp_path / "units/report.html").read_text()
    sentences = document["sentences"]["0"]
    assert len(sentences) >= 4
    for sentence in sentences:
        assert html.escape(sentence, quote=True).replace("&#x27;", "&#39;") in page
    assert page.count("<circle") == int((table["sensitivity"] > 0).sum())
    assert "PGD" in json.loads((tmp_path / "units/run.json").read_text())["attack"]
    people = run("dissect", dataset, *TINY, *attack, "--mask", "0,3", "--out", "units")
    assert people.code == 0, people.err
    assert f"\n0: {sentences[0]}" in people.out
    assert (pd.read_csv(tmp_path / "units/0-masking.csv")["images"] == 12).all()
    again = run("dissect", dataset, *TINY, "--out", "units", "-q")
    assert again.code == 0
    assert "Under attack" not in (tmp_path / "units/report.html").read_text()


@pytest.mark.parametrize(
    ("text", "layers", "message"),
    [
        ("many", 1, "--mask must be sensitive, sensitive:COUNT or unit numbers such as 3,17, got 'many'"),
        ("sensitive:0", 1, "--mask must be sensitive"),
        ("1,2", 0, "--mask 1,2 must go with exactly one --layer, got 0"),
    ],
)
def test_a_mask_is_units_or_a_number_of_sensitive_units(text: str, layers: int, message: str) -> None:
    with pytest.raises(Failure) as caught:
        parse_mask(text, layers)
    assert message in str(caught.value)
    valid = {None: None, "sensitive": 0, "sensitive:3": 3, "1, 2": [1, 2]}
    assert [parse_mask(given, 1) for given in valid] == list(valid.values())


def test_a_wrong_option_is_one_sentence(run: Run, tmp_path: Path) -> None:
    dataset, photos = planted(tmp_path / "set"), draw(tmp_path / "photos", 3)
    for arguments, message in (
        ((), "one of a folder of labeled images and --demo must be given"),
        ((dataset, "--demo"), "one of a folder"),
        (("nowhere",), "nowhere: no such folder"),
        (("--demo", "--masks", "m"), "--masks has no effect with --demo"),
        (("--demo", "--void", "0", "--names", "n"), "--names and --void have no effect with --demo"),
        ((dataset, *TINY, "--names", "n"), "--names has no effect without --masks"),
        ((dataset, *TINY, "--masks", "m"), "--masks needs --names, a file with one class name per line"),
        ((dataset, *TINY, "--mask", "sensitive"), "--mask has no effect without --images"),
        ((dataset, *TINY, "--budget", "linf:1/255", "--steps", "3"), "--budget and --steps have no effect"),
        ((dataset, *TINY[:4], "--layer", "9"), "9"),
        ((dataset, *TINY, "--images", photos, "--mask", "99"), "units"),
        ((dataset, *TINY, "--images", photos / "0.png"), "--images must hold at least 2 images, got 1"),
        ((dataset, *TINY, "--images", photos, "--mask", "sensitive"), "at least 4 images, got 3"),
        ((dataset, *TINY, "--images", "nowhere.png"), "nowhere.png: no such file or folder"),
    ):
        ended = run("dissect", *arguments)
        assert ended.code in {2, 4}
        assert message in ended.err
        assert ended.err.count("weakspot:") == 1
