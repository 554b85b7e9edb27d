"""Where do the cells of a class activation map belong? Evidence from occlusion. Run: python -m benchmarks.map_alignment

Each photograph is occluded in a grid of gray squares, and the loss of the class's logit is laid out over the image. The
class activation map under each alignment is then correlated with it. An alignment that puts cells where the
network really looks correlates more. Photographs are ImageNet samples from the folder that WEAKSPOT_DATA names.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from weakspot import Classifier, class_activation, load
from weakspot.attribution.alignment import effective_grid, receptive_grid
from weakspot.attribution.cam import ALIGNMENTS
from weakspot.attribution.layers import find_layer
from weakspot.classifier import evaluating, predict

SQUARE, STRIDE = 32, 16


def occlusion(model: Classifier, image: Tensor, label: Tensor) -> Tensor:
    """(H, W) mean loss of the label's logit over the squares that cover each site."""
    height, width = image.shape[1:]
    places = [
        (y, x) for y in range(0, height - SQUARE + 1, STRIDE) for x in range(0, width - SQUARE + 1, STRIDE)
    ]
    covered = torch.zeros(len(places), 1, height, width)
    for square, (y, x) in zip(covered, places, strict=True):
        square[:, y : y + SQUARE, x : x + SQUARE] = 1
    mean = image.mean((1, 2))[:, None, None]
    occluded = torch.where(covered > 0, mean, image)
    lost = predict(model, image[None])[0, label] - predict(model, occluded)[:, label]
    return (lost.view(-1, 1, 1, 1) * covered).sum(0)[0] / covered.sum(0)[0].clamp(min=1)


def shifts(name: str, model: nn.Module) -> None:
    """Print how far from resizing arithmetic and gradients put the cells of the last map at 224 pixels."""
    image = torch.zeros(1, 3, 224, 224)
    with evaluating(model) as classifier:
        layer = find_layer(classifier, image)
        if layer is None:
            return
        tile = 224 / layer.layout.height
        found = [grid(classifier, image, layer) for grid in (receptive_grid, effective_grid)]
    reported = [", ".join(f"{axis.offset - (tile - 1) / 2:+.1f}" for axis in grid) for grid in found if grid]
    print(f"| {name} | {' | '.join(reported)} |")


def untrained_resnet18() -> nn.Module:
    """ResNet-18 with random weights."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512])
    network: nn.Module = ResNetForImageClassification(config)
    return network.eval()


def standard_error(values: np.ndarray) -> float:
    """Of the mean."""
    return float(values.std(ddof=1) / len(values) ** 0.5)


def main() -> None:
    """Print mean correlations and paired differences from plain resizing."""
    folder = Path(os.environ.get("WEAKSPOT_DATA", "../shared/data"))
    if not (folder / "networks.py").is_file():
        sys.exit(f"no real data at {folder}; set WEAKSPOT_DATA")
    sys.path.insert(0, str(folder))
    import networks  # type: ignore[import-not-found]

    every: Tensor = networks.imagenet(count=500)[0][:: int(sys.argv[1]) if len(sys.argv) > 1 else 16]
    mobilenet: nn.Module = networks.network("mobilenet_v2_1.0_224")
    models = {
        "EfficientNet-Lite0": load("efficientnet_lite0", device="cpu"),
        "MobileNetV2": Classifier.wrap(mobilenet),
    }
    print("| network | arithmetic, px down and across | measured by gradients |\n|---|---|---|")
    for name, model in {**models, "ResNet-18, untrained": untrained_resnet18()}.items():
        shifts(name, model)
    print()
    others = " | ".join(f"{name} less resize, paired" for name in ALIGNMENTS[1:])
    print(f"| network | photographs | correlation, resize | {others} |\n|---|---|---|---|---|")
    for name, model in models.items():
        labels = predict(model, every).argmax(1)
        lost = [occlusion(model, image, label).flatten() for image, label in zip(every, labels, strict=True)]
        found = {}
        for alignment in ALIGNMENTS:
            maps = class_activation(model, every, labels, alignment=alignment).flatten(1)
            found[alignment] = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(maps, lost, strict=True)])
        plain = found[ALIGNMENTS[0]]
        cells = [f"{plain.mean():.3f} ± {standard_error(plain):.3f}"]
        cells += [
            f"{(found[other] - plain).mean():+.3f} ± {standard_error(found[other] - plain):.3f}"
            for other in ALIGNMENTS[1:]
        ]
        print(f"| {name} | {len(every)} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
