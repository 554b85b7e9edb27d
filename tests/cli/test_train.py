"""`weakspot train` on arrays and folders, cut off and again, and on what cannot be meant."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from PIL import Image

from tests.cli.conftest import Run
from tests.training.tiny import halves
from weakspot import cli, load, training
from weakspot._io.files import locked
from weakspot.cli.app import Failure
from weakspot.cli.train import EvaluationOptions, _check_attacked
from weakspot.cli.training_jobs import print_training

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


def test_a_network_is_trained_tested_and_used(run: Run, digits: Path, tmp_path: Path) -> None:
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


@pytest.mark.slow
def test_a_matrix_is_a_table_a_figure_and_sentences(run: Run, digits: Path, tmp_path: Path) -> None:
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


def test_folders_of_images_and_a_network_of_the_user(run: Run, tmp_path: Path) -> None:
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
    assert "--model tiny_networks:unseeded --weights own/model.safetensors --size 16x16" in again.out
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


def test_an_interrupted_training_can_be_resumed(
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
    assert "interrupted; the same command resumes from cut" in ended.err
    cut = run(*command, "--json")
    assert cut.code == 0, cut.err
    whole = run(*command[:-1], "whole", "--json")
    assert json.loads(cut.out)["weights"] == json.loads(whole.out)["weights"]


def test_a_folder_in_use_by_another_training_is_refused(
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
    ("arguments", "code", "message"),
    [
        ((), 2, "no data was named (give a folder, an .npz file or hf:NAME)"),
        (("missing",), 4, "missing"),
        (("digits.npz", "--recipe", "fulll"), 2, "did you mean 'full'"),
        (("digits.npz", "--model", "resnet19"), 2, "did you mean 'resnet18'"),
        (("digits.npz", "--model", "nowhere:build"), 2, "there is no module 'nowhere'"),
        (("digits.npz", "--budget", "0.3"), 2, "budget"),
        (("digits.npz", "--step-size", "tiny"), 2, "--step-size must be a number such as 0.03 or 8/255"),
        (("digits.npz", "--attacked-fraction", "2"), 2, "attacked_fraction"),
        (("digits.npz", "--out", "digits.npz"), 2, "digits.npz"),
        (("digits.npz", "--attacked-fraction", ".01", "--batch-size", "16"), 2, "no image of a batch of 16"),
        (("digits.npz", "--batch-size", "1000"), 2, "batch_size must be at most the 180 images"),
        (("digits.npz", "--evaluate", "matrix", "--recipes", "standard,foo"), 2, "got 'foo'"),
        (("digits.npz", "--size", "16x16"), 2, "--size has no effect with digits.npz, which holds arrays"),
        (("digits.npz", "--channels", "1", "--workers", "1"), 2, "--channels and --workers have no effect"),
        (("digits.npz", "--device", "abacus"), 2, "device"),
        (("digits.npz", "--model", "tiny_networks:build", *QUICK), 2, "channels"),
    ],
)
def test_a_wrong_option_is_one_sentence(
    run: Run, digits: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    assert digits.exists()
    ended = run("train", *arguments)
    assert (ended.code, message in ended.err) == (code, True), ended.err
    assert len([line for line in ended.err.splitlines() if line.strip()]) == 1


def context(*arguments: str) -> typer.Context:
    """The context of `weakspot train ARGUMENTS`."""
    group = typer.main.get_command(cli.app)
    made: typer.Context = group.commands["train"].make_context("train", [*arguments])  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize(
    ("given", "evaluation", "message"),
    [
        (["--recipe", "full"], EvaluationOptions("matrix"), "--recipe has no effect with --evaluate matrix"),
        (["--recipes", "full"], EvaluationOptions(), "--recipes has no effect without --evaluate matrix"),
        (["--seeds", "2"], EvaluationOptions("own"), "--seeds has no effect without --evaluate matrix"),
        (
            ["--strongest", "3"],
            EvaluationOptions(),
            "--strongest has no effect without --evaluate own or matrix",
        ),
        ([], EvaluationOptions("all"), "--evaluate must be one of none, own, matrix, got 'all'"),
    ],
)
def test_an_option_that_the_evaluation_would_ignore_is_refused(
    given: list[str], evaluation: EvaluationOptions, message: str
) -> None:
    with pytest.raises(Failure) as caught:
        evaluation.check(context(*given))
    assert message in str(caught.value)
    EvaluationOptions("own").check(context("--strongest", "3"))


@pytest.mark.parametrize(
    ("recipes", "given", "message"),
    [
        (
            ["standard"],
            ["--attacked-fraction", ".2"],
            "--attacked-fraction has no effect with the recipe standard",
        ),
        (["standard"], ["--steps", "2"], "--steps has no effect with the recipe standard"),
        (
            ["noise"],
            ["--step-size", "1"],
            "--step-size has no effect with the recipe noise, which does not use PGD",
        ),
        (
            ["fast"],
            ["--steps", "2", "--step-size", "1"],
            "--steps and --step-size have no effect with the recipe",
        ),
        (["standard", "noise"], ["--steps", "3"], "--steps has no effect with the recipes standard, noise"),
        (["full"], ["--steps", "3"], None),
    ],
)
def test_an_option_of_an_attack_that_no_recipe_makes_is_refused(
    recipes: list[str], given: list[str], message: str | None
) -> None:
    if message is None:
        _check_attacked(context(*given), recipes, 0.5)
        message = "--steps has no effect with --attacked-fraction 0"
    with pytest.raises(Failure) as caught:
        _check_attacked(context(*given), recipes, 0.0 if "fraction 0" in message else 0.5)
    assert message in str(caught.value)


def test_limit_takes_the_same_images_again_and_quick_says_what_it_leaves_out(
    run: Run, digits: Path, tmp_path: Path
) -> None:
    def trained(out: str, *options: object) -> dict[str, object]:
        command = ("train", digits, "--recipe", "standard", "--batch-size", 20, "--out", out, *options)
        ended = run(*command)
        assert ended.code == 0, ended.err
        record: dict[str, object] = json.loads((tmp_path / out / "training.json").read_text())
        return record | {"printed": ended.out}

    few, again, others = (
        trained(f"run{number}", "--limit", 60, "--epochs", 1, "--seed", seed)["data"]
        for number, seed in enumerate((0, 0, 1))
    )
    assert few == again
    assert few != others
    assert isinstance(few, dict)
    assert few["images"] == 60
    quick = trained("quick", "--quick")
    assert isinstance(quick["epochs"], list)
    assert len(quick["epochs"]) == 1
    assert "--quick: at most 2,000 images and one epoch, which shows that it works" in str(quick["printed"])
    for option in ("--limit", "--epochs"):
        refused = run("train", digits, "--quick", option, 10)
        assert (refused.code, f"{option} has no effect with --quick" in refused.err) == (2, True)


def test_an_interrupt_says_whether_there_is_anything_to_resume(
    run: Run, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    command = ("train", digits, "--recipe", "full", *QUICK, "--out", "cut")
    with monkeypatch.context() as patch:
        patch.setattr("weakspot.cli.train.read_labeled", interrupt)
        ended = run(*command)
    assert (ended.code, ended.err.strip()) == (130, "weakspot: interrupted; nothing was written")
    with monkeypatch.context() as patch:
        patch.setattr("weakspot.training.loop.Loop._step", interrupt)
        ended = run(*command)
    assert (ended.code, "the same command resumes from cut" in ended.err) == (5, True), ended.err
    assert run(*command).code == 0


def test_accuracies_are_printed_with_their_images_and_a_command_that_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = {"accuracy": 1.0, "low": 0.5, "high": 1.0}
    tests = [{**row, "test": "clean", "images": 6}, {**row, "test": "strongest", "images": 6}]
    print_training({"tests": tests}, 1.0, Path("a run"), matrix=False)
    out = capsys.readouterr().out
    assert "Tested on 6 images." in out
    assert "weakspot explain IMAGES --model 'a run'" in out
    tests[1]["images"] = 1
    print_training({"tests": tests}, 1.0, Path("a run"), matrix=False)
    assert "Images tested: clean 6, strongest 1." in capsys.readouterr().out
