"""`weakspot map`: its sentences, its files, and the images for which there is nothing to find."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from tests.cli.conftest import NAMES, TINY, Run
from weakspot import AttackResult, Pairs
from weakspot._checks import NotFiniteError
from weakspot.cli.map import _summary
from weakspot.vulnerability import WeakSpots, weak_spots

PLANTED = """
import torch
from torch import nn


class Patch(nn.Module):
    # Class 1 wins once rows and columns 8 to 15 are brighter than 11/255 below their mean in `coffee`.
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        value = images[:, :, 8:16, 8:16].mean((1, 2, 3)) + 0 * self.bias
        return torch.stack([0.6 - value, value - 0.6], 1)


def patch():
    return Patch().eval()
"""


def test_sentences_come_first_and_files_hold_the_rest(run: Run, photographs: Path, tmp_path: Path) -> None:
    ended = run("map", photographs, *TINY, "--budget", "linf:64/255", "--out", "spots")
    assert ended.code == 0, ended.err
    scores = pd.read_csv(tmp_path / "spots/scores.csv")
    assert scores["image"].tolist() == NAMES
    lines = ended.out.splitlines()
    found = int(scores["side"].notna().sum())
    none = "No square was found in any of 4 images; this does not mean that none exists."
    some = f"In {found} of 4 images, a square that is enough was found"
    assert lines[0].startswith(some if found else none)
    for name, sentence in zip(NAMES, scores["sentence"], strict=True):
        assert f"{name}: {sentence}" in lines
    assert len(list((tmp_path / "spots/maps").glob("*.png"))) == 4
    pairs = Pairs.load(tmp_path / "spots/pairs.safetensors")
    changed = (pairs.perturbation != 0).any(1).flatten(1).any(1)
    assert bool((changed | torch.tensor(scores["side"].isna().to_numpy())).all())


def test_a_planted_square_is_named_and_a_small_budget_finds_none(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    (tmp_path / "planted_square.py").write_text(PLANTED)
    model = (
        "--model",
        "planted_square:patch",
        "--size",
        "64x64",
        "--effort",
        "verified",
        "--grid",
        8,
        "--json",
    )
    for name in NAMES[2:]:
        (photographs / name).unlink()
    strong = json.loads(run("map", photographs, *model, "--budget", "linf:1").out)["scores"]
    assert all(4 <= row["top"] + row["side"] <= 24 for row in strong)  # it covers a part of the patch
    assert all(row["cells_found"] == 1 for row in strong)  # and only the patch's cell is weak
    weak = json.loads(run("map", photographs, *model, "--budget", "linf:1/255").out)["scores"]
    assert all(row["side"] is None for row in weak)
    assert all(
        row["sentence"].startswith("No square was found in which a change of at most 1/255") for row in weak
    )


def test_cells_are_searched_as_far_as_an_l2_budget_reaches(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    # At the fainter threshold, a change of the patch must have a length of about 0.2 x 14.
    (tmp_path / "far_square.py").write_text(PLANTED.replace("0.6", "0.77"))
    for name in NAMES[2:]:
        (photographs / name).unlink()
    model = ("--model", "far_square:patch", "--size", "64x64", "--effort", "verified", "--grid", 8, "--json")
    for budget, found in (("l2:0.5", 0), ("l2:9", 1)):
        rows = json.loads(run("map", photographs, *model, "--budget", budget).out)["scores"]
        assert [row["cells_found"] for row in rows] == [found, found]
        assert all(row["weakest_cell_found"] is None or row["weakest_cell_found"] > 1 for row in rows)


def test_an_image_with_another_label_needs_no_change(run: Run, photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "planted_square.py").write_text(PLANTED)
    model = ("--model", "planted_square:patch", "--size", "64x64")
    rows = json.loads(run("map", photographs, *model, "--json").out)["scores"]
    labels = tmp_path / "labels.csv"
    lines = [f"photos/{row['image']},{'class 1' if row['label'] == 'class 0' else 'class 0'}" for row in rows]
    labels.write_text("image,label\n" + "\n".join(lines) + "\n")
    ended = run("map", photographs, *model, "--labels", labels)
    assert ended.code == 0, ended.err
    assert ended.out.count("No change is needed: the image is classified as") == 4
    assert ended.out.startswith("No image is classified as its label without a change.")


NONE_FOUND = "No square was found in {}; this does not mean that none exists."
FOUND = "images, a square that is enough was found; "


@pytest.mark.parametrize(
    ("sides", "sentence"),
    [
        ([None], NONE_FOUND.format("the one image")),
        ([None] * 2, NONE_FOUND.format("any of 2 images")),
        (
            [1],
            "In the one image, a square that is enough was found; it is 1 pixel wide.",
        ),
        ([7, None], f"In 1 of 2 {FOUND}it is 7 pixels wide."),
        ([3, 6], f"In 2 of 2 {FOUND}at least half of these squares are at most 3 pixels wide."),
        ([5, 1, 1], f"In 3 of 3 {FOUND}at least half of these squares are at most 1 pixel wide."),
    ],
)
def test_the_summary_is_true_of_one_two_and_no_squares(sides: list[int | None], sentence: str) -> None:
    columns = {"label": "a", "classified_as": "a", "side": pd.array(sides, dtype="Int64")}
    table = pd.DataFrame(columns)
    assert _summary(table) == sentence
    wrong = pd.DataFrame({"label": ["a"], "classified_as": ["b"], "side": pd.array([None], dtype="Int64")})
    said = _summary(pd.concat([table, wrong]))
    assert said == re.sub("(of \\d|the one) image", r"\1 correctly classified image", sentence)


def test_zero_gradients_are_counted_once_over_all_images(run: Run, photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "flat.py").write_text(
        PLANTED.replace("0.6 - value", "0.6 - 0 * value").replace("value - 0.6", "0 * value")
    )
    ended = run("map", photographs, "--model", "flat:patch", "--size", "64x64", "--grid", 2, "--out", "made")
    assert ended.code == 0, ended.err
    assert ended.err.count("is zero everywhere") == 1
    assert "for 4 of 4 images" in ended.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--effort", "quick"), "--effort must be one of estimate, verified, got 'quick'"),
        (("--grid", "0"), "--grid must be"),
        (("--budget", "8"), "budget must be KIND:AMOUNT"),
        (("--budget", "linf:0"), "--budget must be above 0, got linf:0"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(
    run: Run, photographs: Path, options: tuple[str, str], message: str
) -> None:
    ended = run("map", photographs, *TINY, *options)
    assert (ended.code, message in ended.err) == (2, True), ended.err


def test_a_long_name_loses_no_map(run: Run, photographs: Path, tmp_path: Path) -> None:
    long = photographs / f"{'貓' * 80}.png"  # 244 bytes
    (photographs / "chelsea.png").rename(long)
    (tmp_path / "planted_patch.py").write_text(PLANTED)
    ended = run(
        "map", long, "--model", "planted_patch:patch", "--size", "64x64", "--grid", 2, "--out", "made"
    )
    assert ended.code == 0, ended.err
    (picture,) = (tmp_path / "made/maps").iterdir()
    assert picture.name == f"0001 {'貓' * 50}.png"


def test_a_url_is_not_taken_for_a_path(run: Run) -> None:
    ended = run("map", "http://127.0.0.1/cat.png", "--model", "nothing:build")
    assert ended.code == 4
    assert "got http://127.0.0.1/cat.png (URLs are not read" in ended.err


def test_an_interrupt_keeps_the_images_that_are_done_and_nan_skips_only_its_image(
    run: Run, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weakspot._progress.SAVE_EVERY", 0.0)
    monkeypatch.setattr("weakspot._progress.SAVE_AT_MOST", 1.0)
    options = ("map", photographs, *TINY, "--grid", 2)
    assert run(*options, "--out", "whole").code == 0
    whole = pd.read_csv(tmp_path / "whole/scores.csv")
    asked: list[object] = []

    def failing(*arguments: Any, **options: Any) -> WeakSpots:
        asked.append(arguments)
        if len(asked) == 2:
            raise NotFiniteError("NaN")
        if len(asked) == 4:
            raise KeyboardInterrupt
        return weak_spots(*arguments, **options)

    monkeypatch.setattr("weakspot.cli.map.weak_spots", failing)
    ended = run(*options, "--out", "cut")
    assert ended.code == 130
    assert "interrupted; written to cut so far: maps/ (2 files), scores.csv, pairs.safetensors" in ended.err
    skipped = whole["image"][1]
    assert f"{skipped}: Sequential returned NaN or infinity for a changed version; skipped" in ended.err
    kept = pd.read_csv(tmp_path / "cut/scores.csv")
    pd.testing.assert_frame_equal(kept, whole.iloc[[0, 2]].reset_index(drop=True))
    assert len(AttackResult.load(tmp_path / "cut/pairs.safetensors")) == 2
    assert {path.name for path in (tmp_path / "cut/maps").iterdir()} < {
        path.name for path in (tmp_path / "whole/maps").iterdir()
    }


NOISY = """
import torch
from torch import nn


class Noisy(nn.Module):
    def forward(self, images):
        score = images.mean((1, 2, 3)) + torch.randn(len(images))
        return torch.stack([score, -score], 1)


def noisy():
    return Noisy().eval()
"""


@pytest.mark.parametrize("command", ["map", "attack"])
def test_a_random_network_is_noted(run: Run, photographs: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "noisy_network.py").write_text(NOISY)
    for name in NAMES[1:]:
        (photographs / name).unlink()
    note = "returns different logits for the same image: results are one random draw of many"
    for model, noted in ((("--model", "noisy_network:noisy", "--size", "64x64"), True), (TINY, False)):
        assert (note in run(command, photographs, *model).err.replace("\n", " ")) == noted


@pytest.mark.parametrize(("command", "folder"), [("map", "maps"), ("attack", "adversarial")])
def test_pictures_of_an_earlier_run_do_not_stay_among_the_new_ones(
    run: Run, photographs: Path, tmp_path: Path, command: str, folder: str
) -> None:
    quick = (*TINY, "--out", "again", *(("--steps", 1) if command == "attack" else ()))
    assert run(command, photographs, *quick).code == 0
    (tmp_path / "again" / folder / "mine.png").write_bytes(b"not weakspot's")
    assert run(command, photographs / NAMES[-1], *quick).code == 0
    stem = Path(NAMES[-1]).stem
    kept = {f"0001 {stem}.png"} if command == "map" else {f"{stem}.png"}
    assert {path.name for path in (tmp_path / "again" / folder).iterdir()} == kept | {"mine.png"}
