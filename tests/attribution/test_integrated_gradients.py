"""Margin drops: sites sum to the whole, exactly if the model is linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.networks import NETWORKS, LinearNetwork, Made, untouched
from weakspot._checks import ImageWarning
from weakspot.attacks import pgd
from weakspot.attribution import margin_drop
from weakspot.budgets import L2, Linf


def noise(images: Tensor, size: float) -> Tensor:
    return size * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))


def blackened_patch(images: Tensor) -> Tensor:
    changed = images.clone()
    changed[:, :, 1:6, 2:6] = 0
    return changed


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "faint noise": lambda images: (images + noise(images, 0.003)).clamp(0, 1),
    "noise": lambda images: (images + noise(images, 0.1)).clamp(0, 1),
    "another image": lambda images: images.roll(1, 0),
    "black": torch.zeros_like,
    "negative": lambda images: 1 - images,
    "a patch": blackened_patch,
}


def classes_of(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The best and the second class of each image."""
    with torch.no_grad():
        order = model(images).argsort(1, descending=True)
    return order[:, 0], order[:, 1]


def margins(model: nn.Module, images: Tensor, labels: Tensor, competing: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(images)
    rows = torch.arange(len(images))
    difference: Tensor = logits[rows, labels] - logits[rows, competing]
    return difference


@pytest.mark.parametrize("change", CHANGES)
def test_sites_sum_to_the_margin_drop(any_model: Made, change: str) -> None:
    model, images = any_model
    labels, competing = classes_of(model, images)
    adversarial = CHANGES[change](images)
    with untouched(model, images, adversarial, labels, competing):
        drop = margin_drop(model, images, adversarial, labels, competing)
    expected = margins(model, images, labels, competing) - margins(model, adversarial, labels, competing)
    torch.testing.assert_close(drop.total, expected, rtol=1e-4, atol=1e-6)
    missed = (drop.sites.flatten(1).sum(1) - expected).abs()
    # One percent of the whole; where gains and losses nearly cancel, next to nothing of what was gained and lost.
    assert bool((missed <= 0.01 * expected.abs() + 1e-3 * drop.sites.abs().flatten(1).sum(1)).all())
    torch.testing.assert_close(drop.gap, missed / expected.abs(), rtol=0.05, atol=2e-3)
    assert drop.sites.shape == (3, 1, *images.shape[2:])
    assert not drop.sites.requires_grad


@pytest.mark.parametrize("budget", [Linf(8 / 255), L2(1.0)], ids=str)
def test_the_drop_of_an_attack_lies_in_its_region(any_model: Made, budget: Linf | L2) -> None:
    model, images = any_model
    labels, _ = classes_of(model, images)
    region = torch.zeros(3, 1, *images.shape[2:], dtype=torch.bool)
    region[..., 2:6, 3:] = True
    result = pgd(model, images, labels, budget=budget, region=region, steps=5)
    _, competing = classes_of(model, images)
    competing = torch.where(result.targets == labels, competing, result.targets)
    drop = margin_drop(model, images, result.adversarial, labels, competing)
    assert float(drop.gap.max()) <= 0.01
    assert not bool(drop.sites[~region].any())
    assert bool(drop.sites[region].any())


@pytest.mark.parametrize("change", CHANGES)
def test_on_a_linear_model_each_site_is_its_change_times_its_weight(change: str) -> None:
    generator = torch.Generator().manual_seed(0)
    model = LinearNetwork(torch.randn(3, 8, 6, generator=generator)).eval()
    images = torch.rand(3, 3, 8, 6, generator=generator)
    adversarial = CHANGES[change](images)
    labels = torch.tensor([0, 1, 0])
    drop = margin_drop(model, images, adversarial, labels, 1 - labels)
    sign = torch.tensor([2.0, -2.0, 2.0])[:, None, None, None]
    expected = -(sign * model.weight.detach() * (adversarial - images)).sum(1, keepdim=True)
    torch.testing.assert_close(drop.sites, expected, rtol=1e-4, atol=1e-5)


def test_nothing_changed_costs_nothing(any_model: Made) -> None:
    model, images = any_model
    drop = margin_drop(model, images, images.clone(), *classes_of(model, images))
    assert not bool(drop.sites.any())
    assert not bool(drop.total.any())
    assert not bool(drop.gap.any())


def test_swapping_label_and_competing_class_or_the_two_images_turns_the_sign(any_model: Made) -> None:
    model, images = any_model
    labels, competing = classes_of(model, images)
    other = CHANGES["noise"](images)
    drop = margin_drop(model, images, other, labels, competing)
    torch.testing.assert_close(margin_drop(model, images, other, competing, labels).sites, -drop.sites)
    back = margin_drop(model, other, images, labels, competing)
    torch.testing.assert_close(back.sites, -drop.sites, rtol=1e-3, atol=1e-4)


def test_a_drop_depends_on_no_neighbor(any_model: Made) -> None:
    model, images = any_model
    labels, competing = classes_of(model, images)
    adversarial = images.clone()
    adversarial[0] = 0  # needs more points on its path than the others
    adversarial[1:] = CHANGES["faint noise"](images)[1:]
    together = margin_drop(model, images, adversarial, labels, competing)
    for index in range(3):
        one = slice(index, index + 1)
        alone = margin_drop(model, images[one], adversarial[one], labels[one], competing[one])
        torch.testing.assert_close(together.sites[one], alone.sites, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(together.total[one], alone.total, rtol=1e-3, atol=1e-6)


def test_a_path_that_cannot_be_followed_is_reported_as_a_gap(pooling: Made) -> None:
    network, images = pooling

    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.network((images * 15).round() / 15)
            return logits

    model = Rounded().eval()
    drop = margin_drop(model, images, CHANGES["negative"](images), *classes_of(model, images))
    assert not bool(drop.sites.any())
    torch.testing.assert_close(drop.gap, torch.ones(3))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("clean", torch.rand(3, 20, 20)),
        ("clean", torch.rand(3, 3, 20, 18)),
        ("adversarial", torch.rand(3, 3, 18, 20)),
        ("adversarial", torch.rand(1, 3, 20, 20)),
        ("adversarial", torch.full((3, 3, 20, 20), float("nan"))),
        ("labels", torch.tensor([0, 1])),
        ("labels", torch.tensor([0, 1, 4])),
        ("labels", torch.tensor([0, -1, 2])),
        ("competing", torch.tensor([0.0, 1.0, 2.0])),
        ("competing", torch.tensor([4, 1, 2])),
        ("model", None),
    ],
)
def test_a_wrong_argument_is_refused_by_name(pooling: Made, argument: str, value: Any) -> None:
    model, images = pooling
    arguments = {
        "model": model,
        "clean": images,
        "adversarial": images / 2,
        "labels": torch.tensor([0, 1, 2]),
        "competing": torch.tensor([1, 2, 3]),
        argument: value,
    }
    with untouched(model), pytest.raises(ValueError, match=rf"{argument}.*must"):
        margin_drop(**arguments)


def test_values_outside_the_range_trip_a_warning(pooling: Made) -> None:
    model, images = pooling
    with pytest.warns(ImageWarning, match="adversarial span"):
        margin_drop(model, images, 2 * images, *classes_of(model, images))


@pytest.mark.parametrize("made_inside", [False, True], ids=["tensors from outside", "tensors made inside"])
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_grad_switches_outside_change_nothing(without: Callable[[], Any], made_inside: bool) -> None:
    model, images = NETWORKS["pooling"]()
    given = (images, images / 2, *classes_of(model, images))
    expected = margin_drop(model, *given)
    with without():
        if made_inside:  # as in a user's evaluation loop
            clean, adversarial, labels, competing = (tensor.clone() for tensor in given)
            given = (clean, adversarial, labels, competing)
        found = margin_drop(model, *given)
    assert torch.equal(found.sites, expected.sites)


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_a_model_that_fails_midway_is_left_as_it_was(pooling: Made, allowed: int) -> None:
    network, images = pooling

    class Raising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.left = allowed

        def forward(self, images: Tensor) -> Tensor:
            if self.left == 0:
                raise RuntimeError("out of memory, say")
            self.left -= 1
            logits: Tensor = self.network(images)
            return logits

    model = Raising().eval()
    classes = classes_of(network, images)
    with untouched(model, images), pytest.raises(RuntimeError, match="out of memory, say"):
        margin_drop(model, images, 1 - images, *classes)
