"""`weakspot defend`: what it evaluates, writes and prints; labels; defenses of one's own; bad input."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from tests.cli.conftest import TINY as MODEL
from tests.cli.conftest import Run
from weakspot import Linf, _progress, defenses, load, read_images
from weakspot._checks import NotFiniteError
from weakspot.cli.app import Failure
from weakspot.cli.defend import _is_random, _meanings, _print
from weakspot.cli.defense_choice import find_defense
from weakspot.defenses.verdicts import AttackRow
from weakspot.report.figures import accuracy_figure

TINY = (*MODEL, "--steps", "2", "--queries", "4")
QUICK = (*MODEL, "--steps", "1", "--queries", "1")
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


class Alone(nn.Module):
    # Calls no network: its layers are one product. Its classes are far apart, so no attack fools it.
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.1], [0.0], [0.0], [0.0]]))

    def forward(self, images):
        return images.mean((1, 2, 3))[:, None] @ self.weight.T + torch.tensor([10.0, 0.0, 0.0, 0.0])


def alone(classifier):
    return Alone()


def unchanged(classifier):
    return classifier


def nothing(classifier):
    return {"network": classifier}


def failing(classifier):
    raise RuntimeError("no such luck")


number = 3


class OneAtATime(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        assert len(images) == 1
        return self.model(images)


def one_at_a_time(model):
    return OneAtATime(model)
"""

BETWEEN = """
import torch
from torch import nn


class OnLevels(nn.Module):
    # Class 1 on images whose values are whole levels of 8 bits.
    def __init__(self):
        super().__init__()
        self.scale = nn.Conv2d(1, 1, 1)

    def forward(self, images):
        levels = 255 * images
        off = (levels - levels.round()).abs().amax((1, 2, 3)) - 0.01 + 0 * self.scale(images).sum((1, 2, 3))
        return torch.stack([off, -off], 1)


def build():
    return OnLevels().eval()
"""


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of defenses in the working directory."""
    (tmp_path / "own_defenses.py").write_text(FOREIGN)
    monkeypatch.delitem(__import__("sys").modules, "own_defenses", raising=False)
    return "own_defenses"


@pytest.mark.slow
def test_table_verdict_figure_and_record_are_written_and_agree(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    ended = run(
        "defend", photographs, *TINY, "--set", "fraction=0.1", "--set", "fill=blur", "--budget", "linf:2/255",
        "--seed", 3, "--all",
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
        model, defenses.neutralizing(model, fraction=0.1, fill="blur"), images, labels, budget=Linf(2 / 255), steps=2,
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
    assert record["labels"] == "the model's predictions on the clean images"
    with Image.open(folder / "defense.png") as sheet:
        assert sheet.width > 800


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (NotFiniteError("NaN for image 0 of 9"), 2, "NaN for image 0 of 9"),
        (RuntimeError("out of memory"), 1, "unexpected RuntimeError: out of memory"),
    ],
)
def test_whatever_ends_the_command_the_attacks_that_had_finished_are_kept(
    run: Run,
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    reason: str,
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("weakspot.defenses.attack_sequence.square_search", interrupt)
    ended = run("defend", photographs, *TINY, "--budget", "linf:1/255", "--out", "made")
    assert ended.code == code, ended.err
    assert f"weakspot: {reason}" in ended.err
    table = pd.read_csv(tmp_path / "made/defense.csv")
    assert table["attack"].tolist()[0] == "clean"
    assert not table["attack"].str.startswith("square search").any()
    if code != 1:
        assert f"no verdict: {', '.join(table['attack'])}" in ended.err
    document = json.loads((tmp_path / "made/defense.json").read_text())
    assert document["status"] == "cannot be judged"
    assert "was interrupted after white-box (region of importance). Accuracy so far" in document["verdict"]


def test_nothing_is_kept_where_no_attack_had_finished(
    run: Run, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("weakspot.defenses.attack_sequence.is_correct", interrupt)
    ended = run("defend", photographs, *TINY, "--out", "none")
    assert (ended.code, ended.err.splitlines()[-1]) == (130, "weakspot: interrupted; nothing was written")


@pytest.mark.slow
def test_json_is_nothing_but_json_and_quiet_is_quiet(run: Run, photographs: Path) -> None:
    ended = run("defend", photographs, *TINY, "--json", "--oracle", "--set", "fraction=0.1", "--out", "made")
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    assert document["attacks"][-1]["attack"] == "oracle region"
    assert {
        "undefended",
        "undefended_low",
        "undefended_high",
        "defended",
        "defended_low",
        "defended_high",
    } < set(document["attacks"][0])
    ended = run("defend", photographs / "chelsea.png", *TINY, "--quiet", "--out", "made")
    assert (ended.code, ended.out) == (0, "")


def test_the_oracle_is_shown_and_named_for_what_it_is(run: Run, photographs: Path) -> None:
    options = (*QUICK, "--oracle", "--set", "fraction=.1", "--out", "made")
    ended = run("defend", photographs / "chelsea.png", *options, "--budget", "linf:0.01")
    assert ended.code == 0, ended.err
    # Of eight rows, those that fooled no further image are left out; the oracle is asked for, and no attack.
    assert re.search(r"^oracle region +\d", ended.out, re.MULTILINE)
    assert (
        "oracle region: the transferred attack alone; the region is taken from the clean image" in ended.out
    )
    left_out = re.search(r"\.\.\. and (\d) attacks? that fooled no further image", ended.out)
    assert left_out is not None
    assert int(left_out[1]) < 7
    assert "\n1 image, in " in ended.out
    # A budget between two gray levels is not the one that is spent.
    assert "so 0.01 L-infinity is cut to 2/255 L-infinity" in ended.err
    assert json.loads(Path("made/run.json").read_text())["attacks"].startswith(
        "2/255 L-infinity, 1 step, at most "
    )
    assert "is cut" not in run("defend", photographs / "chelsea.png", *options, "--budget", "linf:2/255").err


def test_a_defense_without_a_network_inside_is_not_said_to_have_one(
    run: Run, photographs: Path, foreign: str
) -> None:
    inside = "PGD with the gradients of the network inside the defended model"
    (Path("labels.csv")).write_text("file,label\nphotos/chelsea.png,0\n")
    options = (*QUICK, "--labels", "labels.csv", "--all", "--out", "made")
    ended = run("defend", photographs / "chelsea.png", "-D", f"{foreign}:alone", *options)
    assert ended.code == 0, ended.err
    assert "from other starts, because no network was found inside it" in ended.out
    assert inside not in ended.out
    ended = run(
        "defend", photographs / "chelsea.png", "-D", f"{foreign}:rounded", *QUICK, "--all", "--out", "made"
    )
    assert inside in ended.out
    # The attacks before it fooled every image: nothing was left to look for a network with.
    row = {"attack": AttackRow.STRAIGHT, "agreement": math.nan}
    assert _meanings(None, pd.DataFrame([row])) == {AttackRow.STRAIGHT: f"{inside}, if it calls one"}


def test_accuracies_that_are_not_whole_are_not_rounded_to_whole_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = {"attack": "clean", "images": 1000}
    sides = {"undefended": 0.999, "undefended_low": 0.994, "undefended_high": 1.0}
    sides |= {"defended": 0.001, "defended_low": 0.0, "defended_high": 0.006}
    _print(pd.DataFrame([row | sides]), "So.", "labels.csv", {"clean": "no attack"}, every=True)
    assert re.search(r"clean +99.9% +99.4%-100% +0.1% +0%-0.6%", capsys.readouterr().out)


def test_the_figure_rounds_as_the_table_does_and_sets_the_oracle_apart() -> None:
    row = {"attack": "clean", "undefended": 0.999, "undefended_low": 0.994, "undefended_high": 1.0}
    row |= {"defended": 0.001, "defended_low": 0.0, "defended_high": 0.006}
    axis = accuracy_figure(pd.DataFrame([row, row | {"attack": "oracle region"}]), "So.").axes[0]
    assert {text.get_text() for text in axis.texts} == {"99.9%", "0.1%"}
    assert [" ".join(tick.get_text().split()) for tick in axis.get_yticklabels()] == [
        "clean",
        "oracle region (transferred attack alone)",
    ]


def test_the_models_answers_are_those_to_the_images_that_are_attacked(run: Run) -> None:
    """Gray samples lie between two of 256 levels, and so may a decision."""
    Path("between.py").write_text(BETWEEN)
    ended = run(
        "defend", "--samples", "--model", "between:build", "--size", "8x8", "--mean", "0", "--steps", 1,
        "--queries", 1, "--all", "--out", "made",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert "clean accuracy is 100% by definition" in ended.out
    assert re.search(r"^clean +100%", ended.out, re.MULTILINE)


def test_masked_units_are_evaluated(run: Run, photographs: Path) -> None:
    settings = ("--defense", "mask_units", "--set", "layer=0", "--set", "units=0,3")
    ended = run("defend", photographs, *QUICK, *settings, "--json", "--out", "made")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["defense"] == "mask_units, layer=0, units=0,3"


@pytest.mark.slow
def test_a_defense_of_the_user_is_evaluated(run: Run, photographs: Path, foreign: str) -> None:
    def evaluated(name: str, *arguments: object) -> tuple[dict[str, dict[str, float]], str]:
        ended = run(
            "defend", photographs, *QUICK, "-D", f"{foreign}:{name}", *arguments, "--json", "--out", "made"
        )
        assert ended.code == 0, ended.err
        return {row["attack"]: row for row in json.loads(ended.out)["attacks"]}, ended.err

    table, notes = evaluated("unchanged")
    assert all(row["undefended"] == row["defended"] for row in table.values())
    assert "note" not in notes
    evaluated("rounded", "--set", "levels=6")
    evaluated("noisy")
    table, notes = evaluated("noisy", "--draws", 2, "--substitute", "tiny_networks:build")
    assert "transferred from the substitute" in table
    assert (
        " (two thirds on the random defense, on 2 draws), "
        in json.loads(Path("made/run.json").read_text())["attacks"]
    )
    assert (
        notes.count("gets pixels in [0, 1] as they are") == 1
    )  # --mean and --std are those of the attacked model
    assert "(let it return weakspot.Classifier.wrap(network, mean=..., std=...) unless" in notes


@pytest.mark.slow
def test_limit_takes_images_chosen_by_the_seed(run: Run, photographs: Path) -> None:
    def chosen(seed: int) -> list[str]:
        ended = run("defend", photographs, *QUICK, "--limit", 2, "--seed", seed, "--quiet", "--out", "made")
        assert ended.code == 0, ended.err
        images: list[str] = json.loads(Path("made/run.json").read_text())["images"]
        return images

    every = {path.name for path in photographs.iterdir()}
    several = [chosen(seed) for seed in range(2)]
    assert all(len(names) == 2 and set(names) < every for names in several)
    assert chosen(0) == several[0]
    assert len({tuple(names) for names in several}) > 1


@pytest.mark.slow
def test_progress_is_printed_where_there_is_no_terminal(
    run: Run, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_progress, "FIRST_LINE", 0.02)
    monkeypatch.setattr(_progress, "LINE_EVERY", 0.02)
    ended = run("defend", photographs, *QUICK, "--out", "made")
    assert ended.code == 0
    assert re.search(r"^attacking: \d+% of 4 images, ", ended.err, re.MULTILINE)
    ended = run("defend", photographs, *QUICK, "--out", "made", "--quiet")
    assert (ended.out, ended.err) == ("", "")


@pytest.mark.slow
def test_labels_come_from_a_table_or_from_folders(run: Run, photographs: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in photographs.iterdir())
    (tmp_path / "names.txt").write_text("cat\ncup\nrocket\nbike\n")
    (tmp_path / "labels.csv").write_text(
        "File,label\n"
        + "\n".join(
            f"photos/{name},{label}" for name, label in zip(names, ("cat", 1, "bike", 2), strict=True)
        )
    )
    options = (*QUICK, "--classes", "names.txt", "--json", "--out", "made")
    model = load("tiny_networks:build", input_size=(64, 64))
    read = model(read_images(photographs, size=(64, 64))[0]).argmax(1).tolist()
    table = run("defend", photographs, "--labels", "labels.csv", *options)
    assert table.code == 0, table.err
    document = json.loads(table.out)
    assert document["labels"] == "labels.csv"
    correct = [predicted == label for predicted, label in zip(read, (0, 1, 3, 2), strict=True)]
    assert document["attacks"][0]["undefended"] == pytest.approx(sum(correct) / 4)
    for name, label in zip(names, ("cat", "cup", "bike", "rocket"), strict=True):
        (tmp_path / "sorted" / label).mkdir(parents=True)
        (photographs / name).rename(tmp_path / "sorted" / label / name)
    folders = run("defend", "sorted", "--labels", "folders", *options)
    assert folders.code == 0, folders.err
    assert json.loads(folders.out)["attacks"] == document["attacks"]
    # One folder alone: its name is not lost with what all paths share.
    single = run("defend", "sorted/cat", "--labels", "folders", *options)
    assert single.code == 0, single.err


def test_folders_without_class_names_stand_for_classes_in_sorted_order(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    for number, path in enumerate(sorted(photographs.iterdir())):
        (tmp_path / "sorted" / f"n0{number}").mkdir(parents=True)
        path.rename(tmp_path / "sorted" / f"n0{number}" / path.name)
    ended = run("defend", "sorted", "--labels", "folders", *QUICK, "--out", "made")
    assert ended.code == 0, ended.err
    assert "note: labels: the 4 folders stand for the 4 classes in sorted order (n00 is class 0)" in ended.err


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("neutralise", [], "did you mean 'neutralize'?"),
        ("nowhere:make", [], "defense nowhere:make: there is no module 'nowhere'"),
        ("FOREIGN:rouned", [], "did you mean 'rounded'"),
        ("FOREIGN:nothing", [], "must return a torch.nn.Module that takes images in [0, 1]"),
        ("FOREIGN:number", [], "must be a function of the undefended classifier, got int"),
        ("FOREIGN:failing", [], "RuntimeError: no such luck"),
        ("FOREIGN:rounded", ["steps=2"], "TypeError"),
        ("neutralize", ["fractoin=0.1"], "did you mean 'fraction'?"),
        ("neutralize", ["fraction"], "--set must be NAME=VALUE, got 'fraction'"),
        ("neutralize", ["fraction=2"], "fraction"),
        ("neutralize", ["fraction=much"], "fraction must be between 0 and 1, got 'much'"),
        ("neutralize", ["fraction=null"], "fraction must be between 0 and 1, got None"),
        ("neutralize", ["randomness=2"], "randomness"),
        ("neutralize", ["seed=3"], "--set seed has no effect without randomness"),
        ("neutralize", ["seed=3", "randomness=0"], "--set seed has no effect without randomness"),
        ("mask_units", [], "mask_units needs layer and units"),
        ("mask_units", ["layer=0", "units=a"], "units must be integers separated by commas"),
        ("mask_units", ["layer=9", "units=0"], "layer"),
    ],
)
@pytest.mark.usefixtures("run")
def test_a_defense_that_cannot_be_made_is_one_sentence(
    foreign: str, name: str, settings: list[str], message: str
) -> None:
    classifier = load("tiny_networks:build", input_size=(64, 64))
    with pytest.raises((Failure, ValueError)) as caught:
        find_defense(name.replace("FOREIGN", foreign), settings, classifier)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--defense", "mask_units", "--oracle"), 2, "--oracle needs --defense neutralize, got mask_units"),
        (("--budget", "linf"), 2, "linf"),
        (("--fraction", "3"), 2, "fraction must be between 0 and 1, got 3.0"),
        (("--draws", "5"), 2, "--draws has no effect with neutralize, which is not random"),
        (("--labels", "nowhere.csv"), 4, "nowhere.csv"),
        (("--labels", "few.csv"), 2, "few.csv"),
        (("--labels", "folders"), 2, "photos"),
        (("--out", "photos"), 2, "--out photos holds images that are read"),
        (("--substitute", "tiny_networks:gray"), 2, "tiny_networks:gray does not take images"),
    ],
)
def test_a_wrong_option_is_one_sentence(
    run: Run, photographs: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    (tmp_path / "few.csv").write_text("file,label\nchelsea.png,1\n")
    ended = run("defend", photographs, *QUICK, *arguments)
    assert (ended.code, message in ended.err) == (code, True), ended.err
    assert ended.err.count("weakspot:") == 1
    assert not (tmp_path / "weakspot-defend" / "run.json").exists()


def test_missing_and_unreadable_images_end_with_code_4(run: Run, photographs: Path, tmp_path: Path) -> None:
    assert run("defend").code == 2
    assert run("defend", "nowhere", *QUICK).code == 4
    (tmp_path / "note.txt").write_text("not an image")
    ended = run(
        "defend", photographs / "chelsea.png", tmp_path / "note.txt", *QUICK, "--json", "--out", "made"
    )
    assert ended.code == 4
    assert len(json.loads(ended.out)["skipped"]) == 1


@pytest.mark.usefixtures("run")
def test_a_defense_that_takes_one_image_at_a_time_is_one_sentence(foreign: str) -> None:
    classifier = load("tiny_networks:build", input_size=(64, 64))
    defended = find_defense(f"{foreign}:one_at_a_time", [], classifier)
    images = torch.rand(3, 3, 64, 64)
    message = r"--defense x must take the images of model, of shape \(3, 64, 64\) each, and return logits"
    with pytest.raises(ValueError, match=message):
        _is_random(classifier, defended, images, "--defense x", 0)
    assert not _is_random(classifier, defended, images[:1], "--defense x", 0)
