"""`weakspot reproduce` on folders of images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from weakspot.cli import app
from weakspot.cli.app import Failure
from weakspot.cli.reproduce import _command
from weakspot.reproduction import Material

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


NETWORK = """
import torch
from weakspot import Classifier

def build():
    torch.manual_seed({seed})
    layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    return Classifier.wrap(torch.nn.Sequential(*layers, torch.nn.Linear(8, 10)).eval(), input_size={size})
"""


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """300 images of noise with labels, in CIFAR's binary format."""
    folder = tmp_path / "cifar"
    folder.mkdir()
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 256, (300, 1 + 3072), dtype=np.uint8)
    rows[:, 0] %= 10
    (folder / "test_batch.bin").write_bytes(rows.tobytes())
    return folder


def test_random_weights_test_nothing(tmp_path: Path, cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "guessing_network.py").write_text(NETWORK.format(seed=0, size=(32, 32)))
    monkeypatch.syspath_prepend(tmp_path)
    for paper in ("spatial", "promotion", "one-pixel"):
        arguments = ["reproduce", paper, "--data", str(cifar), "--model", "guessing_network:build", "--quick"]
        result = runner.invoke(app, [*arguments, "--out", str(tmp_path / "out"), "--json"])
        assert result.exit_code == 0, result.output
        claims = json.loads(result.stdout)["claims"]
        assert {claim["verdict"] for claim in claims} == {"cannot be tested on this data"}
        assert "not clearly more than guessing among 10 classes" in claims[0]["measured"]


def test_a_network_of_another_size_is_told_the_option(
    tmp_path: Path, cifar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "large_network.py").write_text(NETWORK.format(seed=0, size=(64, 64)))
    monkeypatch.syspath_prepend(tmp_path)
    result = runner.invoke(
        app, ["reproduce", "spatial", "--data", str(cifar), "--model", "large_network:build"]
    )
    assert "--size 32x32" in str(result.output) + str(result.exception)


def test_the_same_photographs_are_drawn_with_the_same_seed(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(1)
    for number in range(6):
        pixels = generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("no picture")
    outputs = []
    for seed, run in ((0, "a"), (0, "b")):
        arguments = [
            "reproduce",
            "one-pixel",
            "--data",
            str(folder),
            "--limit",
            "3",
            "--seed",
            str(seed),
            "--json",
        ]
        result = runner.invoke(app, [*arguments, "--out", str(tmp_path / run)])
        assert result.exit_code == 0, result.output
        outputs.append(json.loads(result.stdout)["claims"])
        assert "3 photographs of photos, labeled by the network itself" in json.loads(result.stdout)["data"]
    assert outputs[0] == outputs[1]
    one = [
        "reproduce",
        "one-pixel",
        "--data",
        str(folder),
        "--limit",
        "1",
        "--json",
        "--out",
        str(tmp_path / "c"),
    ]
    about = json.loads(runner.invoke(app, one).stdout)["data"]
    assert "1 photograph of photos, labeled by the network itself" in about


@pytest.mark.parametrize("kind", ["photographs", "labeled"])
def test_each_picture_counts_once(
    kind: str, tmp_path: Path, cifar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, drawn = tmp_path / "photos", []
    folder.mkdir()
    if kind == "photographs":
        for number in range(6):
            pixels = np.random.default_rng(number % 3).integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    else:
        folder = cifar
        (folder / "test_batch.bin").write_bytes((cifar / "test_batch.bin").read_bytes() * 2)
    (tmp_path / "small_network.py").write_text(NETWORK.format(seed=0, size=(32, 32)))
    monkeypatch.syspath_prepend(tmp_path)

    def measured(_: str, material: Material, *args: object, **__: object) -> None:
        drawn.append(material.images)
        raise KeyboardInterrupt

    monkeypatch.setattr("weakspot.reproduction.reproduce", measured)
    arguments = ["--data", str(folder), "--model", "small_network:build", "--out", str(tmp_path / "out")]
    runner.invoke(app, ["reproduce", "one-pixel", *arguments, "--limit", "20"])
    assert len(drawn[0]) == (3 if kind == "photographs" else 20)
    assert len(drawn[0].flatten(1).unique(dim=0)) == len(drawn[0])


def test_training_without_its_extra_is_refused_before_anything_is_measured(
    tmp_path: Path, cifar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "untrained_network.py").write_text(NETWORK.format(seed=0, size=(32, 32)))
    (cifar / "data_batch_1.bin").write_bytes((cifar / "test_batch.bin").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("weakspot._checks.importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("weakspot.reproduction.reproduce", pytest.fail)
    monkeypatch.setattr(Material, "why_not", "")
    arguments = ["--data", str(cifar), "--model", "untrained_network:build", "--out", str(tmp_path / "out")]
    result = runner.invoke(app, ["reproduce", "localized", *arguments])
    message = "reproduce localized needs lightning-fabric: pip install 'weakspot[train]'"
    assert str(result.exception) == message


@pytest.mark.parametrize(
    ("paper", "stored", "code"),
    [
        ("spatial", "", 130),
        ("spatial", ".attacking-0-{key}.safetensors", 5),
        ("spatial", ".spatial-regions-correlate-{key}.json", 5),
        ("spatial", ".perceptual-less-visible-{key}.json", 130),
        ("spatial", ".spatial-{key}-spent.json", 130),
        ("spatial", "..spatial-{key}-spent.json.1.2", 130),
        ("spatial", ".spatial-regions-correlate-another0key.json", 130),
        ("spatial", "networks-quick/localized-0/checkpoint.pt", 130),
        ("localized", "networks-quick/localized-0/checkpoint.pt", 5),
        ("localized", "networks-full/localized-0/checkpoint.pt", 130),
    ],
)
def test_an_interrupted_reproduction_says_whether_it_can_be_resumed(
    paper: str, stored: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: str, material: Material, out: Path, **__: object) -> None:
        if stored:
            path = out / stored.format(key=material.key)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("weakspot.reproduction.reproduce", interrupted)
    out = tmp_path / "out"
    result = runner.invoke(app, ["reproduce", paper, "--limit", "1", "--out", str(out)])
    assert isinstance(result.exception, Failure)
    kept = f"the same command resumes from {out}" if code == 5 else "nothing was written"
    assert (result.exception.code, str(result.exception)) == (code, f"interrupted; {kept}")


@pytest.mark.parametrize(
    "options",
    [["--data", "/home/me/photos", "--out", "/home/me/x"], ["--data=/home/me/photos", "--out=/home/me/x"]],
)
def test_the_command_of_a_page_names_no_place_of_this_machine(
    options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["weakspot", "reproduce", "spatial", *options, "-q"])
    assert _command() == "weakspot reproduce spatial --data photos"


@pytest.mark.parametrize(("name", "reason"), [("test_batch.bin", "must"), ("data_batch_1.bin", "must")])
def test_damaged_data_are_no_folder_of_photographs(
    name: str, reason: str, tmp_path: Path, cifar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small_network.py").write_text(NETWORK.format(seed=0, size=(32, 32)))
    monkeypatch.syspath_prepend(tmp_path)
    (cifar / name).write_bytes((cifar / "test_batch.bin").read_bytes()[:-7])
    arguments = ["--data", str(cifar), "--model", "small_network:build", "--out", str(tmp_path / "out")]
    result = runner.invoke(app, ["reproduce", "one-pixel", *arguments])
    assert isinstance(result.exception, Failure)
    assert name in str(result.exception)
    assert "none of the images" not in str(result.exception)
