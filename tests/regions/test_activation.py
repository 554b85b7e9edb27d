"""Regions of activation: the highest sites of the aligned map, for one class and for two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.networks import Made, untouched
from weakspot import regions
from weakspot.attribution import class_activation
from weakspot.classifier import as_classifier, predict
from weakspot.regions import activation
from weakspot.regions.activation import STEPS


@pytest.mark.parametrize("layer", [None, "stem", "branch"])
def test_cam_is_the_top_of_the_registered_class_activation(
    pooling: tuple[nn.Module, Tensor], layer: str | None
) -> None:
    model, images = pooling
    classes = torch.tensor([0, 3, 1])
    maps = class_activation(model, images, classes, layer=layer, alignment="effective")
    for fraction in (0.0, 0.1, 0.3, 1.0):
        region = regions.cam(model, images, classes, fraction=fraction, layer=layer)
        assert region.flatten(1).sum(1).tolist() == [round(fraction * 400)] * 3
        # Scores within a step of each other count as equal.
        step = maps.abs().amax((1, 2, 3)) / STEPS
        lowest = maps.masked_fill(~region, torch.inf).amin((1, 2, 3))
        assert bool((lowest >= maps.masked_fill(region, -torch.inf).amax((1, 2, 3)) - step).all())


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_support_is_the_union_of_both_classes_and_no_larger_than_both(
    any_model: Made, fraction: float
) -> None:
    model, images = any_model
    count = predict(as_classifier(model), images).shape[1]
    labels = torch.tensor([0, 1, 0])
    targets = torch.tensor([1, 1, count - 1])
    with untouched(model, images, labels, targets):
        region = regions.support(model, images, labels, targets, fraction=fraction)
    of_labels, of_targets = (
        regions.cam(model, images, each, fraction=fraction) for each in (labels, targets)
    )
    assert torch.equal(region, of_labels | of_targets)
    assert torch.equal(region[1], of_labels[1])  # label and target are one class
    assert torch.equal(region, regions.support(model, images, targets, labels, fraction=fraction))


def test_support_follows_the_layer_and_is_the_same_alone(pooling: Made) -> None:
    model, images = pooling
    labels, targets = torch.tensor([0, 1, 2]), torch.tensor([3, 2, 0])
    region = regions.support(model, images, labels, targets, layer="stem")
    classes = [regions.cam(model, images, each, layer="stem") for each in (labels, targets)]
    assert torch.equal(region, classes[0] | classes[1])
    one = regions.support(model, images[1:2], labels[1:2], targets[1:2], layer="stem")
    assert torch.equal(region[1:2], one)


def test_support_finds_the_two_patches_that_two_classes_read() -> None:
    class Patches(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.stack([images[..., :4, :4].sum((1, 2, 3)), images[..., -4:, -4:].sum((1, 2, 3))], 1)

    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 12, 16, generator=generator) + 0.1
    planted = torch.zeros(12, 16, dtype=torch.bool)
    planted[:4, :4] = planted[-4:, -4:] = True
    region = regions.support(
        Patches().eval(), images.clamp(max=1), torch.tensor([0, 1]), torch.tensor([1, 0]), fraction=16 / 192
    )
    assert torch.equal(region, planted.expand(2, 1, -1, -1))


@pytest.mark.parametrize("fraction", [-0.01, 1.01, float("nan")])
def test_a_fraction_outside_its_range_is_refused(pooling: Made, fraction: float) -> None:
    model, images = pooling
    classes = torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="fraction must"):
        regions.cam(model, images, classes, fraction=fraction)
    with pytest.raises(ValueError, match="fraction must"):
        regions.support(model, images, classes, classes, fraction=fraction)


def test_support_says_which_classes_are_wrong(pooling: Made) -> None:
    model, images = pooling
    good = torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"labels must .* got \(2,\)"):
        regions.support(model, images, good[:2], good)
    with pytest.raises(ValueError, match=r"targets must .*float"):
        regions.support(model, images, good, good.float())
    with pytest.raises(ValueError, match="must be classes between 0 and 3, got 4"):
        regions.support(model, images, good, good + 2)


@pytest.mark.parametrize(
    "region",
    ["cam", "superpixels:20", "support", "matched:cam", "~cam"],
)
def test_a_region_does_not_depend_on_the_other_images(region: str) -> None:
    # On a black background activations are equal, and rounding differs between batch sizes.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
        ).eval()  # fmt: skip
        images = torch.zeros(16, 1, 28, 28)
        images[:, :, 10:18, 12:16] = torch.rand(16, 1, 8, 4)
    labels = model(images).argmax(1)
    together = regions.read_region(region, model, images, labels, targets=(labels + 1) % 3)
    for row in range(16):
        own, label = images[row : row + 1], labels[row : row + 1]
        alone = regions.read_region(region, model, own, label, targets=(label + 1) % 3)
        assert torch.equal(alone[0], together[row]), row


LABEL = torch.tensor([0])
WRONG: Any = [[1.0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda images: regions.top(WRONG, 0.5), r"scores must have shape \(N, 1, H, W\), got list"),
        (lambda images: regions.matched(WRONG), r"region must be bool \(N, 1, H, W\), got list"),
        (
            lambda images: regions.read_region(images > 0.5, nn.Flatten(), images, LABEL),
            "region must be the text of a region, such as cam, got",
        ),
        (
            lambda images: regions.read_region("cam", nn.Flatten(), images.numpy(), LABEL),
            "images must be a float tensor .*, got ndarray",
        ),
    ],
)
def test_other_types_are_refused_in_a_sentence(call: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        call(torch.rand(1, 3, 8, 8))


def test_evidence_in_half_precision_is_ranked_as_finely() -> None:
    # Steps of such small values would be zero in half precision.
    maps = torch.linspace(0, 1e-4, 64).view(1, 1, 8, 8)
    ranks = activation._without_rounding(maps.half())
    assert bool(ranks.isfinite().all())
    assert int(ranks.max()) == STEPS
    assert torch.equal(regions.top(ranks, 0.25), regions.top(maps, 0.25))
