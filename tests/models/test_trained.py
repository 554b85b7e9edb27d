"""Folders that a training wrote are models; what is unfinished or damaged is told, and nothing foreign is run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from weakspot import defenses, load, zoo
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
    defenses.train(
        model, (images, labels), recipe="full", epochs=1, steps=1, batch_size=20, held_out=0, out=folder,
        about={"network": network},
    )  # fmt: skip
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


def test_what_is_no_finished_network_of_the_zoo_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained(tmp_path / "run")
    record = json.loads((folder / "training.json").read_text())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "harmful.py").write_text("open('pwned', 'w')\ndef make(): pass\n")

    def said(text: str, match: str) -> None:
        (folder / "training.json").write_text(text)
        with pytest.raises(ValueError, match=match):
            load(str(folder), device="cpu")

    for network in ({"spec": "harmful:make"}, {"zoo": "harmful:make"}, {}):
        said(
            json.dumps({**record, "network": network}),
            "not hold a network of the zoo; name the network with --model",
        )
    assert not (tmp_path / "pwned").exists()
    said("{", r"training.json is damaged")
    said("[]", r"training.json is damaged")
    said(json.dumps({**record, "network": {"zoo": "two_conv"}}), "is damaged")
    said(json.dumps({**record, "network": {**record["network"], "classes": 4}}), "is damaged")
    (folder / "model.safetensors").write_bytes(b"no")
    said(json.dumps(record), "is damaged")
    (folder / "model.safetensors").unlink()
    said(json.dumps(record), "not finished")


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
    from weakspot.models.fingerprint import fingerprint

    assert fingerprint(model.network) == record["weights"]
