"""`weakspot train` on arrays and folders, cut off and again, and on what cannot be meant."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tests.cli.conftest import Run
from tests.training.tiny import halves
from weakspot import cli, load, training
from weakspot._io.files import locked

QUICK = ("--epochs", "2", "--batch-size", "20", "--steps", "2", "--learning-rate", "0.05")


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    images, labels = halves(240)
    pixels = (images[:, 0] * 255).round().byte().numpy()
    np.savez(
        tmp_path / "digits.npz",
        x_train=pixels[:200],
        y_train=labels[:200],
        x_test=pixels[200:],
        y_test=labels[200:],
    )
    return tmp_path / "digits.npz"


def test_a_network_is_trained_judged_and_used(run: Run, digits: Path, tmp_path: Path) -> None:
    ended = run(
        "train",
        digits,
        "--recipe",
        "full",
        "--budget",
        "linf:0.05",
        *QUICK,
        "--out",
        "runs/full",
        "--evaluate",
        "own",
    )
    assert ended.code == 0, ended.err
    assert "full, epoch 2: loss" in ended.err
    assert all(test in ended.out for test in training.TESTS)
    written = {
        path.name for path in (tmp_path / "runs/full").iterdir() if not path.name.startswith("backgrounds")
    }
    assert written == {"model.safetensors", "training.json"}
    record = json.loads((tmp_path / "runs/full/training.json").read_text())
    assert record["settings"]["recipe"] == "full"
    assert record["settings"]["budget"] == "0.05 L-infinity"
    assert record["settings"]["step_size"] == pytest.approx(2.5 * 0.05 / 2)
    assert load("runs/full", device="cpu")(torch.rand(1, 1, 16, 12)).shape == (1, 2)
    again = run(
        "train", digits, "--recipe", "full", "--budget", "linf:0.05", *QUICK, "--out", "runs/full", "--json"
    )
    assert "epoch" not in again.err
    assert json.loads(again.out)["weights"] == record["weights"]
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 12), dtype=np.uint8)).save("digit.png")
    used = run("explain", "digit.png", "--model", "runs/full", "--analyses", "cam", "--out", "seen", "-q")
    assert used.code == 0, used.err


def test_a_matrix_is_a_table_a_picture_and_sentences(run: Run, digits: Path, tmp_path: Path) -> None:
    command = (
        "train", digits, "--evaluate", "matrix", "--recipes", "standard,localized", "--seeds", "2", *QUICK,
        "--limit", "30", "--strongest", "10", "--out", "runs/matrix",
    )  # fmt: skip
    ended = run(*command)
    assert ended.code == 0, ended.err
    assert "localized" in ended.out
    table = pd.read_csv(tmp_path / "runs/matrix/accuracy.csv")
    assert set(table["recipe"]) == {"standard", "localized"}
    assert set(table["seeds"]) == {2}
    with Image.open(tmp_path / "runs/matrix/matrix.png") as picture:
        assert picture.width > 800
    same = run(*command, "--json")
    assert json.loads(same.out)["accuracy"][0]["accuracy"] == pytest.approx(table["accuracy"][0], abs=1e-6)
    assert load("runs/matrix/standard-1", device="cpu").name == "two_conv trained standard"


UNSEEDED = """

def unseeded():
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 2))
"""


def test_folders_of_pictures_and_a_network_of_ones_own(run: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with (tmp_path / "tiny_networks.py").open("a") as file:
        file.write(UNSEEDED)
    for number, name in enumerate(("dark", "light")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for picture in range(20):
            pixels = rng.integers(0, 128, (20, 24, 3)) + 127 * number
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / name / f"{picture}.jpg")
    ended = run(
        "train", "photos", "--recipe", "localized", "--model", "tiny_networks:build", "--size", "16x16", *QUICK, "-q",
        "--workers", "1",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert (ended.out, ended.err) == ("", "")
    record = json.loads((tmp_path / "weakspot-train/training.json").read_text())
    assert record["network"]["spec"] == "tiny_networks:build"
    assert record["network"]["class_names"] == ["dark", "light"]
    again = run(
        "train",
        "photos",
        "--recipe",
        "localized",
        "--model",
        "tiny_networks:unseeded",
        "--size",
        "16x16",
        *QUICK,
        "--out",
        "own",
    )
    assert again.code == 0, again.err
    assert "--model tiny_networks:unseeded --weights own/model.safetensors" in again.out
    torch.rand(3)
    same = run(
        "train",
        "photos",
        "--recipe",
        "localized",
        "--model",
        "tiny_networks:unseeded",
        "--size",
        "16x16",
        *QUICK,
        "--out",
        "own",
        "-q",
    )
    assert same.code == 0, same.err


def test_an_interrupted_training_says_so_and_goes_on(
    run: Run,
    digits: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ("train", digits, "--recipe", "full", *QUICK, "--out", "cut")
    from weakspot.training import loop
    from weakspot.training.adversary import perturbed

    calls = [0]

    def interrupting(*arguments: object, **options: object) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 12:
            raise KeyboardInterrupt
        return perturbed(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "perturbed", interrupting)
    ended = run(*command)
    assert ended.code == 5
    assert "interrupted; the same command goes on from cut" in ended.err
    cut = run(*command, "--json")
    assert cut.code == 0, cut.err
    whole = run(*command[:-1], "whole", "--json")
    assert json.loads(cut.out)["weights"] == json.loads(whole.out)["weights"]


def test_a_folder_that_another_training_writes_to_is_refused_in_one_sentence(
    run: Run,
    digits: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "held").mkdir()
    with locked(tmp_path / "held", "training.lock"):
        ended = run("train", digits, *QUICK, "--out", "held")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"weakspot: held is being written by process {os.getpid()} on ")
    assert ended.err.endswith(" (wait for it, or give another folder)\n")
    assert list((tmp_path / "held").iterdir()) == []


def test_recipes_and_tests_are_listed(run: Run) -> None:
    listed = json.loads(run("train", "--list", "--json").out)
    assert {row["name"] for row in listed} == {*training.RECIPES, *training.TESTS}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "no data was named"),
        (("missing",), 4, "missing: there is no such file or folder"),
        (("digits.npz", "--recipe", "fulll"), 2, "got 'fulll' (did you mean 'full'?)"),
        (("digits.npz", "--model", "resnet19"), 2, "got 'resnet19' (did you mean 'resnet18'"),
        (("digits.npz", "--model", "nowhere:build"), 2, "there is no module 'nowhere'"),
        (("digits.npz", "--budget", "0.3"), 2, "budget"),
        (("digits.npz", "--step-size", "tiny"), 2, "step_size"),
        (("digits.npz", "--fraction", "2"), 2, "attacked_fraction must be between 0 and 1, got 2.0"),
        (("digits.npz", "--evaluate", "all"), 2, "--evaluate must be one of"),
        (("digits.npz", "--size", "big"), 2, "size"),
        (("digits.npz", "--out", "digits.npz"), 2, "out must be a folder, got the file digits.npz"),
        (
            ("digits.npz", "--batch-size", "1000"),
            2,
            "batch_size must be at most the 180 images to train on, got 1000",
        ),
        (("digits.npz", "--evaluate", "matrix", "--recipes", "standard,foo"), 2, "got 'foo'"),
        (
            ("digits.npz", "--evaluate", "matrix", "--recipe", "full"),
            2,
            "--recipe goes without --evaluate matrix",
        ),
        (
            ("digits.npz", "--recipe", "standard", "--fraction", "0.2"),
            2,
            "--fraction does nothing with the recipe standard",
        ),
        (
            ("digits.npz", "--recipe", "standard", "--steps", "2"),
            2,
            "--steps does nothing with the recipe standard",
        ),
        (
            ("digits.npz", "--recipe", "noise", "--step-size", "1"),
            2,
            "--step-size does nothing with the recipe noise",
        ),
        (
            ("digits.npz", "--recipe", "fast", "--steps", "2", "--step-size", "1"),
            2,
            "--steps and --step-size do nothing with the recipe fast",
        ),
        (("digits.npz", "--fraction", "0", "--steps", "3"), 2, "--steps does nothing with --fraction 0"),
        (
            ("digits.npz", "--evaluate", "matrix", "--recipes", "standard,noise", "--steps", "3"),
            2,
            "--steps does nothing with the recipes standard, noise",
        ),
        (("digits.npz", "--size", "16x16"), 2, "--size does nothing with digits.npz, which holds arrays"),
        (("digits.npz", "--channels", "1"), 2, "--channels does nothing with digits.npz"),
        (("digits.npz", "--workers", "1"), 2, "--workers does nothing with digits.npz"),
        (("digits.npz", "--recipes", "full"), 2, "--recipes goes with --evaluate matrix"),
        (("digits.npz", "--limit", "3"), 2, "--limit goes with --evaluate own or matrix"),
        (("digits.npz", "--evaluate", "own", "--seeds", "2"), 2, "--seeds goes with --evaluate matrix"),
        (("digits.npz", "--device", "abacus"), 2, "device is 'abacus'"),
        (("digits.npz", "--model", "tiny_networks:build", *QUICK), 2, "channels"),
    ],
)
def test_mistakes_get_one_sentence(
    run: Run,
    digits: Path,
    arguments: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    assert digits.exists()
    ended = run("train", *arguments)
    assert ended.code == code, ended.err
    assert said in ended.err
    assert len([line for line in ended.err.splitlines() if line.strip()]) == 1
    assert "Traceback" not in ended.err


def test_help_shows_examples(run: Run) -> None:
    ended = run("train", "--help")
    assert "weakspot train mnist/ --recipe localized" in ended.out
    assert cli.app is not None
