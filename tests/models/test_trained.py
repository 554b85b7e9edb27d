"""Folders that a training wrote are models; unfinished or damaged ones are refused, and no code of theirs is run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from weakspot import load, training, zoo
from weakspot.models import available_models


def trained(folder: Path) -> Path:
    model = zoo.build("two_conv", classes=3, channels=1, size=(12, 8))
    images, labels = torch.rand(60, 1, 12, 8), torch.arange(60) % 3
    network = {
        "zoo": "two_conv",
        "classes": 3,
        "channels": 1,
        "size": [12, 8],
        "class_names": ["a", "b", "c"],
    }
    config = training.TrainConfig(recipe="full", epochs=1, steps=1, batch_size=20, held_out=0)
    training.train(model, (images, labels), config, out=folder, about={"network": network})
    return folder


def test_a_trained_folder_is_a_model(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run")
    model = load(str(folder), device="cpu")
    assert not model.training
    assert model.class_names == ("a", "b", "c")
    assert model.input_size == (12, 8)
    assert model.name == "two_conv trained full"
    bare = zoo.build("two_conv", classes=3, channels=1, size=(12, 8))
    by_hand = load(bare, weights=folder / "model.safetensors", device="cpu")
    images = torch.rand(2, 1, 12, 8)
    assert torch.equal(model(images), by_hand(images))


def test_a_folder_without_a_finished_network_of_the_zoo_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained(tmp_path / "run")
    record = json.loads((folder / "training.json").read_text())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "harmful.py").write_text("open('pwned', 'w')\ndef make(): pass\n")

    def message(text: str, match: str) -> None:
        (folder / "training.json").write_text(text)
        with pytest.raises(ValueError, match=match):
            load(str(folder), device="cpu")

    for network in ({"spec": "harmful:make"}, {"zoo": "harmful:make"}, {}):
        message(
            json.dumps({**record, "network": network}),
            "must hold a network of the zoo, got another one .name the network with --model",
        )
    assert not (tmp_path / "pwned").exists()
    message("{", r"training.json is damaged")
    message("[]", r"training.json is damaged")
    message(json.dumps({**record, "network": {"zoo": "two_conv"}}), "is damaged")
    message(json.dumps({**record, "network": {**record["network"], "classes": 4}}), "is damaged")
    (folder / "model.safetensors").write_bytes(b"no")
    message(json.dumps(record), "is damaged")
    (folder / "model.safetensors").unlink()
    message(json.dumps(record), "must hold a finished training")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": [8]}, r"size must be \[height, width\], got \[8\]"),
        ({"size": 8}, "size must be .* got 8"),
        ({"size": [12, -8]}, r"size\[1\] must be an integer from 8 to 4096, got -8"),
        ({"size": [12, 8.0]}, r"size\[1\] must .* got 8.0"),
        ({"size": [10**9, 8]}, r"size\[0\] must .* got 1000000000"),
        (
            {"size": [4096, 4096]},
            "must hold the weights of two_conv with 3 classes, 1 channels and images of 4096",
        ),
        ({"classes": float("inf")}, "classes must be an integer from 2 to 100000, got inf"),
        ({"classes": 10**12}, "classes must .* got 1000000000000"),
        ({"classes": "3"}, "classes must .* got '3'"),
        ({"classes": True}, "classes must .* got True"),
        ({"classes": None}, "classes must .* got None"),
        ({"classes": 4}, "must hold the weights of two_conv with 4 classes"),
        ({"channels": 0}, "channels must be an integer from 1 to 16, got 0"),
        ({"channels": "x" * 1000}, "channels must .* got 'xxx"),
        ({"class_names": 5}, "class_names must be a list of names, got 5"),
        ({"class_names": "abc"}, "class_names must .* got 'abc'"),
        ({"class_names": [["a"], "b", "c"]}, "class_names must be a list"),
        ({"class_names": ["a"]}, "class_names must be one name for each of 3 classes, got 1"),
    ],
)
def test_an_invalid_record_is_refused(shared: Path, changed: dict[str, object], message: str) -> None:
    record = json.loads((shared / "kept.json").read_text())
    reported(
        shared,
        json.dumps({**record, "network": {**record["network"], **changed}}),
        f"is damaged: .*{message}",
    )


@pytest.mark.parametrize("settings", [None, 5, {}, {"recipe": 5}, "missing"])
def test_a_record_without_its_recipe_is_refused(shared: Path, settings: object) -> None:
    record = json.loads((shared / "kept.json").read_text())
    record |= {"settings": settings}
    if settings == "missing":
        del record["settings"]
    reported(shared, json.dumps(record), "is damaged: training.json must have the recipe")


def test_an_endlessly_nested_record_is_refused(shared: Path) -> None:
    reported(shared, "[" * 200_000, "training.json is damaged")
    reported(shared, json.dumps({"network": 5}), "training.json is damaged")
    reported(shared, b"\xff", "training.json is damaged")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = trained(tmp_path_factory.mktemp("trained") / "run")
    (folder / "training.json").rename(folder / "kept.json")
    return folder


def reported(folder: Path, record: str | bytes, message: str) -> None:
    (folder / "training.json").write_bytes(record.encode() if isinstance(record, str) else record)
    with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
        load(str(folder), device="cpu")
    assert re.search(message, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("recipe", ["standard", "localized", "full"])
def test_the_shipped_networks_are_listed_and_small_and_say_how_they_were_made(recipe: str) -> None:
    name = f"mnist_{recipe}"
    assert name in available_models()
    model = load(name, device="cpu")
    assert model.input_size == (28, 28)
    assert model.channels == 1
    assert model.class_names == tuple("0123456789")
    folder = Path(__file__).parents[2] / "src/weakspot/models/mnist" / recipe
    assert (folder / "model.safetensors").stat().st_size < 1_000_000
    record = json.loads((folder / "training.json").read_text())
    assert record["finished"]
    assert record["settings"]["recipe"] == recipe
    from weakspot.models.identity import fingerprint

    assert fingerprint(model.network) == record["weights"]
