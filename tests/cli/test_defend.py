"""`weakspot defend`: what it evaluates, writes and prints; labels; defenses of one's own; bad input."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from tests.cli.test_explain import Run, photographs, run
from weakspot import Linf, defenses, load, read_images

__all__ = ["photographs", "run"]  # fixtures

TINY = ("--model", "tiny_networks:build", "--size", "64x64", "--steps", "3", "--queries", "4")
FILES = ["defense.csv", "defense.json", "defense.png", "run.json"]
FOREIGN = """
import torch
from torch import nn


class Rounded(nn.Module):
    def __init__(self, classifier, levels):
        super().__init__()
        self.classifier, self.levels = classifier, levels

    def forward(self, images):
        return self.classifier((images * self.levels).round() / self.levels)


class Noisy(nn.Module):
    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, images):
        return self.classifier(images + 0.1 * torch.randn_like(images))


def rounded(classifier, levels=4):
    return Rounded(classifier, levels)


def noisy(classifier):
    return Noisy(classifier)


def bare(classifier):
    return classifier


def nothing(classifier):
    return {"network": classifier}


def failing(classifier):
    raise RuntimeError("no such luck")


number = 3
"""


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of defenses in the working directory."""
    (tmp_path / "shields_of_mine.py").write_text(FOREIGN)
    monkeypatch.delitem(__import__("sys").modules, "shields_of_mine", raising=False)
    return "shields_of_mine"


def test_table_verdict_figure_and_record_are_written_and_agree(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    ended = run(
        "defend", photographs, *TINY, "--set", "fraction=0.1", "--set", "fill=blur", "--budget", "linf:2/255",
        "--seed", 3,
        "--out", "made",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    folder = tmp_path / "made"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    # The same in Python.
    model = load("tiny_networks:build", input_size=(64, 64))
    images, names = read_images(photographs, size=(64, 64))
    labels = model(images).argmax(1)
    expected = defenses.evaluate_defense(
        model, defenses.neutralizing(model, fraction=0.1, fill="blur"), images, labels, budget=Linf(2 / 255), steps=3,
        queries=4, seed=3,
    )  # fmt: skip
    pd.testing.assert_frame_equal(pd.read_csv(folder / "defense.csv"), expected)
    result = defenses.verdict(expected)
    assert ended.out.splitlines()[0] == str(result)
    for name in expected["attack"]:
        assert name in ended.out
    assert "the undefended model's clean accuracy is 100% by definition" in ended.out
    document = json.loads((folder / "defense.json").read_text())
    assert (document["status"], document["verdict"]) == (result.status, result.sentence)
    assert [row["attack"] for row in document["attacks"]] == expected["attack"].tolist()
    record = json.loads((folder / "run.json").read_text())
    assert record["defense"] == "neutralize, fraction=0.1, fill=blur"
    assert record["images"] == names
    assert record["labels"] == "the model's own predictions on the clean pictures"
    with Image.open(folder / "defense.png") as sheet:
        assert sheet.width > 800


def test_json_is_nothing_but_json_and_quiet_is_quiet(run: Run, photographs: Path) -> None:
    ended = run("defend", photographs, *TINY, "--json", "--oracle", "--set", "fraction=0.1", "--out", "made")
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert told["attacks"][-1]["attack"] == "oracle region"
    assert {
        "undefended",
        "undefended_low",
        "undefended_high",
        "defended",
        "defended_low",
        "defended_high",
    } < set(told["attacks"][0])
    ended = run("defend", photographs / "chelsea.png", *TINY, "--quiet", "--out", "made")
    assert (ended.code, ended.out) == (0, "")


def test_masked_units_are_judged(run: Run, photographs: Path) -> None:
    settings = ("--defense", "mask_units", "--set", "layer=0", "--set", "units=0,3")
    ended = run("defend", photographs, *TINY, *settings, "--json", "--out", "made")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["defense"] == "mask_units, layer=0, units=0,3"


def test_a_defense_of_ones_own_plugs_in(run: Run, photographs: Path, foreign: str) -> None:
    def judged(name: str, *arguments: object) -> tuple[dict[str, dict[str, float]], str]:
        ended = run(
            "defend", photographs, *TINY, "-D", f"{foreign}:{name}", *arguments, "--json", "--out", "made"
        )
        assert ended.code == 0, ended.err
        return {row["attack"]: row for row in json.loads(ended.out)["attacks"]}, ended.err

    table, notes = judged("bare")
    assert all(row["undefended"] == row["defended"] for row in table.values())
    assert "note" not in notes
    judged("rounded", "--set", "levels=6")
    judged("noisy")
    table, _ = judged("noisy", "--draws", 2, "--substitute", "tiny_networks:build")
    assert "transferred from the substitute" in table


def test_limit_takes_some_pictures_chosen_by_the_seed(run: Run, photographs: Path) -> None:
    def chosen(seed: int) -> list[str]:
        ended = run("defend", photographs, *TINY, "--limit", 2, "--seed", seed, "--quiet", "--out", "made")
        assert ended.code == 0, ended.err
        images: list[str] = json.loads(Path("made/run.json").read_text())["images"]
        return images

    every = {path.name for path in photographs.iterdir()}
    several = [chosen(seed) for seed in range(4)]
    assert all(len(names) == 2 and set(names) < every for names in several)
    assert chosen(0) == several[0]
    assert len({tuple(names) for names in several}) > 1


def test_progress_is_printed_where_there_is_no_terminal(
    run: Run, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["weakspot.cli.app"], "LINE_EVERY", 0.02)
    ended = run("defend", photographs, *TINY, "--out", "made")
    assert ended.code == 0
    assert re.search(r"^attacking 4 images: \d+% after \d+ s", ended.err, re.MULTILINE)
    ended = run("defend", photographs, *TINY, "--out", "made", "--quiet")
    assert (ended.out, ended.err) == ("", "")


def test_labels_come_from_a_table_or_from_folders(run: Run, photographs: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in photographs.iterdir())
    (tmp_path / "names.txt").write_text("cat\ncup\nrocket\nbike\n")
    (tmp_path / "labels.csv").write_text(
        "File,label\n"
        + "\n".join(
            f"photos/{name},{label}" for name, label in zip(names, ("cat", 1, "bike", 2), strict=True)
        )
    )
    options = (*TINY, "--classes", "names.txt", "--json", "--out", "made")
    model = load("tiny_networks:build", input_size=(64, 64))
    read = model(read_images(photographs, size=(64, 64))[0]).argmax(1).tolist()
    table = run("defend", photographs, "--labels", "labels.csv", *options)
    assert table.code == 0, table.err
    told = json.loads(table.out)
    assert told["labels"] == "labels.csv"
    right = [found == label for found, label in zip(read, (0, 1, 3, 2), strict=True)]
    assert told["attacks"][0]["undefended"] == pytest.approx(sum(right) / 4)
    for name, label in zip(names, ("cat", "cup", "bike", "rocket"), strict=True):
        (tmp_path / "sorted" / label).mkdir(parents=True)
        (photographs / name).rename(tmp_path / "sorted" / label / name)
    folders = run("defend", "sorted", "--labels", "folders", *options)
    assert folders.code == 0, folders.err
    assert json.loads(folders.out)["attacks"] == told["attacks"]
    # One folder alone: its name is not lost with what all paths share.
    single = run("defend", "sorted/cat", "--labels", "folders", *options)
    assert single.code == 0, single.err


def test_folders_that_are_no_names_stand_for_classes_in_sorted_order(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    for number, path in enumerate(sorted(photographs.iterdir())):
        (tmp_path / "sorted" / f"n0{number}").mkdir(parents=True)
        path.rename(tmp_path / "sorted" / f"n0{number}" / path.name)
    ended = run("defend", "sorted", "--labels", "folders", *TINY, "--out", "made")
    assert ended.code == 0, ended.err
    assert "note: labels: the 4 folders stand for the 4 classes in sorted order (n00 is class 0)" in ended.err


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("--defense", "neutralizee"), 2, "got 'neutralizee' (did you mean 'neutralize'?"),
        (("--defense", "nowhere:make"), 2, "defense nowhere:make: there is no module 'nowhere'"),
        (("--defense", "FOREIGN:rouned"), 2, "got 'rouned' (did you mean 'rounded' or 'Rounded'?"),
        (("--defense", "FOREIGN:nothing"), 2, "returned a dict; accepted is a torch.nn.Module"),
        (("--defense", "FOREIGN:number"), 2, "is a int; accepted is a function of the undefended classifier"),
        (("--defense", "FOREIGN:failing"), 2, "RuntimeError: no such luck"),
        (("--defense", "FOREIGN:rounded", "--set", "steps=2"), 2, "TypeError"),
        (("--set", "kep=0.1"), 2, "--set of neutralize must be one of"),
        (("--set", "fraction"), 2, "--set is 'fraction'; accepted is NAME=VALUE"),
        (("--set", "fraction=2"), 2, "fraction must be between 0 and 1, got 2"),
        (("--set", "fraction=much"), 2, "neutralize cannot work with fraction=much"),
        (("--set", "randomness=2"), 2, "randomness is 2"),
        (("--defense", "mask_units"), 2, "mask_units needs layer and units"),
        (("--defense", "mask_units", "--set", "layer=0", "--set", "units=a"), 2, "units is 'a'"),
        (("--defense", "mask_units", "--set", "layer=9", "--set", "units=0"), 2, "layer must be one of"),
        (("--defense", "mask_units", "--oracle"), 2, "--oracle goes with --defense neutralize"),
        (("--budget", "linf"), 2, "budget is 'linf'"),
        (("--fraction", "3"), 2, "fraction must be between 0 and 1, got 3"),
        (("--draws", "5"), 2, "--draws does nothing with neutralize, which is not random; leave it out"),
        (("--set", "seed=3"), 2, "--set seed=3 does nothing without randomness; add --set randomness=0.5"),
        (("--set", "seed=3", "--set", "randomness=0"), 2, "--set seed=3 does nothing without randomness"),
        (("--labels", "nowhere.csv"), 4, "labels must be a CSV file"),
        (
            ("--labels", "odd.csv"),
            2,
            "labels: odd.csv must have the columns file and label, got picture, class",
        ),
        (("--labels", "few.csv"), 2, "labels: few.csv must have a line for every image"),
        (("--labels", "wrong.csv"), 2, "got '17'"),
        (("--labels", "torn.csv"), 2, "labels: torn.csv must give one label for chelsea.png, got 1 and 2"),
        (("--labels", "folders"), 2, "got 'photos'"),
        (("--out", "photos"), 2, "out is photos, inside a folder of pictures"),
        (("--substitute", "tiny_networks:gray"), 2, "model tiny_networks:gray does not take images"),
    ],
)
def test_what_cannot_be_meant_is_told_in_a_sentence(
    run: Run,
    photographs: Path,
    tmp_path: Path,
    foreign: str,
    arguments: tuple[str, ...],
    code: int,
    told: str,
) -> None:
    every = "\n".join(f"{path.name},17" for path in photographs.iterdir())
    for name, text in (
        ("odd.csv", "picture,class\n"),
        ("few.csv", "file,label\nchelsea.png,1\n"),
        ("wrong.csv", f"file,label\n{every}\n"),
        ("torn.csv", "file,label\nchelsea.png,1\nchelsea.png,2\n"),
    ):
        (tmp_path / name).write_text(text)
    given = [part.replace("FOREIGN", foreign) for part in arguments]
    ended = run("defend", photographs, *TINY, *given)
    assert (ended.code, told in ended.err) == (code, True), ended.err
    assert ended.err.count("weakspot:") == 1
    assert not (tmp_path / "weakspot-defend" / "run.json").exists()


def test_pictures_that_are_not_there_or_not_pictures(run: Run, photographs: Path, tmp_path: Path) -> None:
    assert run("defend").code == 2
    assert run("defend", "nowhere", *TINY).code == 4
    (tmp_path / "note.txt").write_text("no picture")
    ended = run(
        "defend", photographs / "chelsea.png", tmp_path / "note.txt", *TINY, "--json", "--out", "made"
    )
    assert ended.code == 4
    assert len(json.loads(ended.out)["skipped"]) == 1


def test_help_has_examples(run: Run) -> None:
    ended = run("defend", "--help")
    assert ended.code == 0
    assert "weakspot defend photos/ --defense neutralize" in ended.out
    assert "package.module:factory" in ended.out  # rich takes :factory: for a picture of one
    assert "defend" in run("--help").out
