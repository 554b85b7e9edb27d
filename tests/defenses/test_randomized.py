"""Randomness: draws that depend on the image, draws of the attacker, and averages over them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.networks import NETWORKS, LinearNetwork, PoolingNetwork, untouched
from weakspot import attacks
from weakspot.budgets import Linf
from weakspot.classifier import as_classifier
from weakspot.defenses import DrawnByImage, expectation, neutralize, neutralizing
from weakspot.defenses.neutralization import vulnerable_region
from weakspot.defenses.randomized import defender_model, is_random, one_draw


class Shaking(nn.Module):
    """A linear network plus a wave in a direction drawn for each batch: small in the logits, large in their slope."""

    def __init__(self, network: nn.Module, size: float, frequency: float) -> None:
        super().__init__()
        self.network, self.size, self.frequency = network, size, frequency

    def forward(self, images: Tensor) -> Tensor:
        along = torch.einsum("nchw,chw->n", images, torch.randn(images.shape[1:]))
        wave = self.size * torch.sin(self.frequency * along)
        logits: Tensor = self.network(images) + torch.stack([wave, -wave], 1)
        return logits


def linear(count: int = 20) -> tuple[LinearNetwork, Tensor, Tensor, Linf]:
    """A linear network, images that it scores 5, their labels, and a budget that suffices by a fifth."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 8, 8, generator=generator)
    images = 0.4 + 0.2 * torch.rand(count, 3, 8, 8, generator=generator)
    missing = 5 - (images * weight).sum((1, 2, 3))
    images = images + missing.view(-1, 1, 1, 1) * weight / weight.square().sum()
    labels = torch.zeros(count, dtype=torch.long)
    return LinearNetwork(weight).eval(), images, labels, Linf(1.2 * 5 / float(weight.abs().sum()))


@pytest.mark.parametrize("randomness", [0.3, 1.0])
def test_a_random_region_depends_on_the_image_and_not_on_its_batch_or_order(randomness: float) -> None:
    model, images = NETWORKS["pooling"]()
    classifier = as_classifier(model)

    def region(shown: Tensor, seed: int = 0, draw: int = 0) -> Tensor:
        return vulnerable_region(classifier, shown, fraction=0.3, randomness=randomness, seed=seed, draw=draw)

    with untouched(model, images):
        together = region(images)
    assert torch.equal(together, torch.cat([region(image[None]) for image in images]))
    assert torch.equal(together.flip(0), region(images.flip(0)))
    assert 0 < float(together.float().mean()) <= 0.3
    for other in (
        region(images, seed=1),
        region(images, draw=-1),
        vulnerable_region(classifier, images, fraction=0.3),
    ):
        assert not torch.equal(together, other)


def test_a_defense_that_is_random_by_the_image_repeats_its_output_and_leaves_generators_alone() -> None:
    model, images = NETWORKS["pooling"]()
    defended = neutralizing(model, fraction=0.3, randomness=0.5, seed=3)
    with untouched(model, images):
        first = defended(images)
    torch.rand(1)
    assert torch.equal(first, defended(images))
    torch.testing.assert_close(first[1:2], defended(images[1:2]))
    assert not torch.equal(first, neutralizing(model, fraction=0.3, randomness=0.5, seed=4)(images))
    assert torch.equal(
        neutralizing(model, fraction=0.3, randomness=0)(images),
        neutralizing(model, fraction=0.3, seed=9)(images),
    )


def test_the_attackers_draws_are_never_the_defenders() -> None:
    model, images = NETWORKS["pooling"]()
    classifier = as_classifier(model)
    defended = neutralizing(model, fraction=0.3, randomness=1.0)

    def by_hand(draw: int) -> Tensor:
        region = vulnerable_region(classifier, images, fraction=0.3, randomness=1.0, draw=draw)
        logits: Tensor = classifier(neutralize(images, region))
        return logits

    torch.testing.assert_close(expectation(defended, 2)(images), (by_hand(-1) + by_hand(-2)) / 2)
    torch.testing.assert_close(defender_model(defended)(images), by_hand(0))
    torch.testing.assert_close(defended(images), by_hand(0))


def test_gradients_are_the_mean_over_draws_and_a_deterministic_model_keeps_its_own() -> None:
    model, images = NETWORKS["pooling"]()
    assert torch.equal(expectation(model, 1)(images), model(images))

    def slope(network: nn.Module, point: Tensor) -> Tensor:
        point = point.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(network(point)[:, 0].sum(), point)
        return gradient

    torch.testing.assert_close(slope(expectation(model, 3), images), slope(model, images))
    defended = neutralizing(model, fraction=0.3, randomness=1.0)
    singly = []
    for draw in (-1, -2, -3):
        with one_draw(defended, 0, draw):
            singly.append(slope(defended, images))
    torch.testing.assert_close(slope(expectation(defended, 3), images), torch.stack(singly).mean(0))


def test_global_generators_are_seeded_for_a_draw_and_restored() -> None:
    class Everything(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            shift = torch.rand(2) + random.random() + float(np.random.rand())  # noqa: NPY002, S311
            return images.flatten(1)[:, :2] + shift

    images = torch.rand(2, 3, 4, 4)
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    first = expectation(Everything().eval(), 3)(images)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert str(np.random.get_state()) == states[2]  # noqa: NPY002
    torch.rand(3)
    assert torch.equal(first, expectation(Everything().eval(), 3)(images))
    assert not torch.equal(first, expectation(Everything().eval(), 3, seed=1)(images))
    # Other images, other draws: the steps of an attack do not all follow one draw.
    moved = expectation(Everything().eval(), 1)(images + 0.1) - expectation(Everything().eval(), 1)(images)
    assert not torch.allclose(moved, torch.full_like(moved, 0.1))
    assert is_random(Everything().eval(), images)
    assert not is_random(PoolingNetwork().eval(), images)


def test_the_draw_of_a_defense_that_raises_is_restored() -> None:
    class Failing(DrawnByImage):
        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("no")

    failing = Failing().eval()
    with pytest.raises(RuntimeError, match="no"), untouched(failing):
        expectation(failing, 2)(torch.zeros(1, 3, 4, 4))
    assert failing.draw == 0


def test_averaging_over_draws_breaks_a_defense_that_is_only_random() -> None:
    model, images, labels, budget = linear()
    defended = Shaking(model, 0.5, 8.0).eval()

    def standing(draws: int) -> float:
        made = attacks.pgd(expectation(defended, draws), images, labels, budget=budget, steps=10).adversarial
        with torch.no_grad():
            return float((defender_model(defended)(made).argmax(1) == labels).float().mean())

    assert standing(1) >= 0.6
    assert standing(64) <= 0.1


def test_gradients_through_the_defense_are_the_true_ones_where_the_region_stays() -> None:
    # A linear network's gradient, and so the region, is the same everywhere: nothing is held fixed that moves.
    model, images, _, _ = linear(2)
    images = images.double()
    defended = neutralizing(model.double(), fraction=0.3, fill="mean")
    point, direction = images.clone().requires_grad_(), torch.randn_like(images)
    (gradient,) = torch.autograd.grad(defended(point)[:, 0].sum(), point)
    with torch.no_grad():
        ahead, behind = (defended(images + sign * 1e-4 * direction)[:, 0] for sign in (1, -1))
    torch.testing.assert_close(
        (gradient * direction).sum((1, 2, 3)), ((ahead - behind) / 2e-4), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("randomness", [-0.1, 1.5, "half", True, float("nan")])
def test_randomness_outside_0_to_1_is_refused(randomness: float) -> None:
    with pytest.raises(ValueError, match="randomness must be between 0 and 1, got"):
        neutralizing(PoolingNetwork().eval(), randomness=randomness)


def test_a_number_of_draws_below_1_is_refused() -> None:
    with pytest.raises(ValueError, match="draws must be an integer of at least 1, got 0"):
        expectation(PoolingNetwork().eval(), 0)
