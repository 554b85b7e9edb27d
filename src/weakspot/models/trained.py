"""Trained folders: what `weakspot train` wrote, and the three networks of that kind that come with the package."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from weakspot.classifier import Classifier
from weakspot.zoo import NETWORKS, build

RECORD, WEIGHTS = "training.json", "model.safetensors"


def is_trained(folder: Path) -> bool:
    """Whether a training wrote into this folder."""
    return (folder / RECORD).is_file()


def from_training(folder: Path) -> Classifier:
    """The network of the zoo that a training left there, in eval mode.

    Raises:
        ValueError: when the training is not finished, or it trained a network that is not of the zoo: naming that would
            run whatever code the folder names.
    """
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
        made = record.get("network", {})
        name = str(made.get("zoo", ""))
    except (ValueError, AttributeError):
        raise ValueError(f"{folder / RECORD} is damaged") from None
    if not (folder / WEIGHTS).is_file():
        raise ValueError(
            f"{folder} holds a training that is not finished; the same `weakspot train` goes on with it"
        )
    if name not in NETWORKS:
        raise ValueError(
            f"{folder} does not hold a network of the zoo; name the network with --model and give "
            f"{folder / WEIGHTS} as --weights"
        )
    try:
        model = build(
            name, classes=int(made["classes"]), channels=int(made["channels"]), size=tuple(made["size"])
        )
        model.network.load_state_dict(load_file(folder / WEIGHTS))
    except (KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} is damaged: {str(error).partition(chr(10))[0]}") from None
    model.class_names = tuple(map(str, made.get("class_names", ())))
    model.name = f"{name} trained {record['settings']['recipe']}"
    for module in model.modules():
        module.training = False
    return model


def mnist_standard() -> Classifier:
    """Two convolutions trained on MNIST's clean digits."""
    return _shipped("standard")


def mnist_localized() -> Classifier:
    """Two convolutions trained on MNIST, half of every batch attacked in the background."""
    return _shipped("localized")


def mnist_full() -> Classifier:
    """Two convolutions trained on MNIST, half of every batch attacked everywhere."""
    return _shipped("full")


def _shipped(recipe: str) -> Classifier:
    return from_training(Path(str(files("weakspot.models") / "mnist" / recipe)))
