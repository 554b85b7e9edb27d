"""Real networks and images: the embedded ones, and those of the folder that WEAKSPOT_DATA names."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weakspot import load, sample_images
from weakspot.classifier import Classifier

FOLDER = Path(os.environ.get("WEAKSPOT_DATA", "../shared/data"))


def available() -> bool:
    """Whether there is such a folder; prints a note if there is none."""
    exists = (FOLDER / "networks.py").is_file()
    if not exists:
        print(f"\n(no real data at {FOLDER}; set WEAKSPOT_DATA)")
    return exists


def networks() -> Any:
    """The folder's module, which loads its networks and images."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module("networks")


def embedded(count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The embedded network in eval mode, photographs (count, 3, 224, 224), and the classes that it predicts.

    The photographs are ImageNet's if the folder exists, otherwise scikit-image's four and their mirror images.
    """
    model = load("efficientnet_lite0", device="cpu")
    if available():
        images = networks().imagenet(count)[0].contiguous()
    else:
        images = sample_images()[0]
        images = torch.cat([images, images.flip(3)])[:count]
    return model, images, predictions(model, images)


def correct(name: str, count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network of the folder and the first `count` test images that it classifies correctly."""
    real = networks()
    source = next(
        source
        for key, source in {"cifar10": real.cifar10, "mnist": real.mnist, "mobilenet": real.imagenet}.items()
        if name.startswith(key)
    )
    model = real.network(name)
    images, labels = source(count=2 * count + 20)
    right = (predictions(model, images) == labels).nonzero()[:count, 0]
    return model, images[right].contiguous(), labels[right]


def first(name: str, count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network of the folder and the first `count` test images."""
    real = networks()
    images, labels = (real.mnist if name.startswith("mnist") else real.cifar10)(count=count)
    return real.network(name), images.contiguous(), labels


def predictions(model: nn.Module, images: Tensor) -> Tensor:
    """(N,) classes, in small batches."""
    with torch.no_grad():
        return torch.cat([model(batch).argmax(1) for batch in images.split(16)])


def resnet20() -> nn.Module:
    """ResNet-20 for CIFAR-10, for the model spec "benchmarks.real:resnet20"."""
    model: nn.Module = networks().network("cifar10_resnet20")
    return Classifier(model.eval(), input_size=(32, 32), name="ResNet-20")
