"""Neutralization: fills by hand, gradients, and regions that come from the given image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.networks import NETWORKS, PoolingNetwork, untouched
from weakspot import Classifier, attacks, defenses
from weakspot.budgets import Linf
from weakspot.classifier import as_classifier
from weakspot.defenses import neutralize, neutralizing
from weakspot.defenses.neutralization import FILLS, vulnerable_region

each_fill = pytest.mark.parametrize("fill", FILLS)


def photographs(channels: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, channels, 12, 10, generator=generator)
    return images, torch.rand(3, 1, 12, 10, generator=generator) > 0.7


@each_fill
@pytest.mark.parametrize("channels", [1, 3])
def test_images_change_inside_the_region_only(fill: str, channels: int) -> None:
    images, region = photographs(channels)
    before = images.clone()
    filled = neutralize(images, region, fill=fill)
    outside = (~region).expand_as(images)
    assert torch.equal(filled[outside], images[outside])
    assert not torch.equal(filled[~outside], images[~outside])
    assert float(filled.min()) >= 0
    assert float(filled.max()) <= 1
    assert torch.equal(images, before)
    assert torch.equal(neutralize(images, torch.zeros_like(region), fill=fill), images)


def test_fills_by_hand() -> None:
    images, region = photographs()
    inside = region.expand_as(images)
    mean = neutralize(images, region, fill="mean")
    for image in range(3):
        for channel in range(3):
            expected = images[image, channel][~region[image, 0]].mean()
            assert mean[image, channel][region[image, 0]].tolist() == pytest.approx(
                [float(expected)] * int(region[image].sum())
            )
    assert not neutralize(images, region, fill="zero")[inside].any()
    blurred = neutralize(images, region, fill="blur")
    row, column = (int(place) for place in region[0, 0, 1:-1, 1:-1].nonzero()[0] + 1)
    window = images[0, :, row - 1 : row + 2, column - 1 : column + 2].mean((1, 2))
    torch.testing.assert_close(blurred[0, :, row, column], window)
    flat = torch.full((1, 3, 12, 10), 0.4)
    for fill in ("mean", "blur", "inpaint", "svd"):
        torch.testing.assert_close(neutralize(flat, region[:1], fill=fill), flat, atol=0.01, rtol=0)


@pytest.mark.parametrize("fill", ["mean", "zero", "blur"])
def test_gradients_of_differentiable_fills_are_the_true_ones(fill: str) -> None:
    images, region = photographs()
    assert torch.autograd.gradcheck(
        lambda point: neutralize(point, region, fill=fill), images.double().requires_grad_(), fast_mode=True
    )


@pytest.mark.parametrize("fill", ["inpaint", "svd"])
def test_gradients_of_the_other_fills_go_straight_through(fill: str) -> None:
    images, region = photographs()
    point, weights = images.clone().requires_grad_(), torch.rand_like(images)
    (neutralize(point, region, fill=fill) * weights).sum().backward()
    assert point.grad is not None
    assert torch.equal(point.grad, weights)


@pytest.mark.parametrize("kind", ["pooling", "tokens, not square", "normalized"])
@each_fill
def test_any_network_can_be_defended_and_is_not_changed(kind: str, fill: str) -> None:
    model, images = NETWORKS[kind]()
    with untouched(model, images):
        defended = neutralizing(model, fill=fill)
        logits = defended(images)
    classifier = as_classifier(model)
    region = vulnerable_region(classifier, images, fraction=0.2)
    torch.testing.assert_close(logits, classifier(neutralize(images, region, fill=fill)))
    assert 0 < float(region.float().mean()) <= 0.2
    with torch.inference_mode():
        torch.testing.assert_close(defended(images), logits, rtol=1e-4, atol=1e-5)


def test_the_region_comes_from_the_given_image() -> None:
    model, images = NETWORKS["pooling"]()
    classifier = as_classifier(model)
    alone = torch.cat([vulnerable_region(classifier, image[None], fraction=0.2) for image in images])
    assert torch.equal(alone, vulnerable_region(classifier, images, fraction=0.2))
    assert not torch.equal(alone, vulnerable_region(classifier, images.flip(3), fraction=0.2))


def fragile() -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, images = PoolingNetwork().eval(), torch.rand(12, 3, 20, 20)
    with torch.no_grad():
        model.head.bias.sub_(model(images).mean(0))
    return model, images, model(images).argmax(1)


def test_attacks_see_through_the_defense() -> None:
    model, images, labels = fragile()
    defended = neutralizing(model, fraction=0.1)
    labels = defended(images).argmax(1)
    transferred = attacks.pgd(model, images, labels, budget=Linf(0.05), steps=10).adversarial
    aware = attacks.pgd(defended, images, labels, budget=Linf(0.05), steps=10)
    assert bool(aware.success.any())
    with torch.no_grad():
        assert int(aware.success.sum()) >= int((defended(transferred).argmax(1) != labels).sum()) - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"fill": "meen"}, "did you mean 'mean'"), ({"fraction": 2}, "fraction must be between 0 and 1, got 2")],
)
def test_arguments_that_do_not_fit_are_named(arguments: dict[str, Any], message: str) -> None:
    model, images = NETWORKS["pooling"]()
    with pytest.raises(ValueError, match=message):
        neutralizing(model, **arguments)
    with pytest.raises(ValueError, match="region must"):
        defenses.neutralize(images, torch.ones(1, 1, 2, 2, dtype=torch.bool))
    defended = neutralizing(model)
    assert isinstance(defended, Classifier)
    with pytest.raises(ValueError, match="images must hold at least one pixel, got shape"):
        defended(images[:0])
    with pytest.raises(ValueError, match=r"images must be floats in \[0, 1\], got torch.uint8"):
        defended((images * 255).byte())


def test_the_mean_of_a_large_image_in_half_precision_is_its_mean() -> None:
    images = torch.full((1, 1, 300, 300), 0.5, dtype=torch.float16)
    region = torch.zeros(1, 1, 300, 300, dtype=torch.bool)
    region[..., :9, :9] = True
    filled = neutralize(images, region)
    assert filled.dtype == torch.float16
    assert torch.equal(filled, images)
