"""The adversary finds what it should, inside its budget and region, and starts where its paper says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.networks import LinearNetwork, untouched
from tests.training.tiny import fresh, halves, quick_train, weights
from weakspot import L2, Linf, attacks
from weakspot.training import RECIPES
from weakspot.training.adversary import perturbed, scattered, uniform_noise
from weakspot.training.config import ResolvedConfig


def config(**changes: Any) -> ResolvedConfig:
    numbers: dict[str, Any] = {"recipe": "full", "budget": Linf(0.1), "steps": 8, "step_size": 0.03}
    return ResolvedConfig(**numbers | changes)


def noise_like(images: Tensor) -> Tensor:
    return torch.rand(images.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("inside", [False, True], ids=["everywhere", "in a region"])
@pytest.mark.parametrize("budget", [Linf(0.1), L2(0.7)], ids=str)
def test_it_reaches_the_optimum_of_a_linear_network_inside_its_region(
    budget: Linf | L2, inside: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 6, 5, generator=generator)
    images = torch.rand(6, 2, 6, 5, generator=generator) * 0.2 + 0.4
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    mask = torch.rand(6, 1, 6, 5, generator=generator) < (0.5 if inside else 2)
    numbers = config(budget=budget, steps=60, step_size=budget.eps / 6)
    with untouched(model := LinearNetwork(weight), images):
        result = perturbed(
            model, images, labels, noise_like(images), numbers, region=mask if inside else None
        )
    downhill = torch.where(labels[:, None, None, None] == 0, -1.0, 1.0) * weight * mask
    best = downhill.sign() * budget.eps
    if isinstance(budget, L2):
        best = budget.eps * downhill / downhill.flatten(1).norm(dim=1)[:, None, None, None]
    torch.testing.assert_close(result, images + best, rtol=0, atol=2e-3)
    assert torch.equal(result.where(~mask, images), images), "outside the region nothing changes, bit for bit"


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.search != "none"])
@pytest.mark.parametrize("budget", [Linf(0.1), L2(0.7)], ids=str)
def test_every_search_stays_inside_budget_range_and_region(name: str, budget: Linf | L2) -> None:
    model = fresh().eval()
    images, labels = halves(8)
    region = torch.zeros(8, 1, 16, 12, dtype=torch.bool)
    region[..., 3:9, 2:7] = True
    numbers = config(recipe=name, budget=budget)
    result = perturbed(model, images, labels, noise_like(images), numbers, region=region)
    assert bool((result != images).any())
    assert torch.equal(result.where(~region, images), images)
    assert float(result.min()) >= 0
    assert float(result.max()) <= 1
    assert float(budget.distance(result - images, images).max()) <= budget.eps * (1 + 1e-5)


def test_descent_finds_what_pgd_of_the_attacks_finds() -> None:
    images, labels = halves(60)
    model = quick_train(fresh(), (images, labels), recipe="standard").eval()
    numbers = config(budget=Linf(0.03), steps=40, step_size=0.003)
    result = perturbed(model, images, labels, noise_like(images), numbers)
    fooled = model(result).argmax(1) != labels
    other = attacks.pgd(model, images, labels, budget=Linf(0.03), steps=40).success
    assert 5 < int(other.sum()) < 60
    assert abs(int(fooled.sum()) - int(other.sum())) <= 2


def test_single_step_and_trades_start_where_their_papers_say() -> None:
    weight = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(0))
    images, labels = torch.full((4, 1, 6, 5), 0.5), torch.tensor([0, 1, 0, 1])
    noise = noise_like(images)
    uphill = torch.where(labels[:, None, None, None] == 0, -1.0, 1.0) * weight.sign()
    result = perturbed(LinearNetwork(weight), images, labels, noise, config(recipe="fast", steps=9))
    torch.testing.assert_close(result, images + (0.1 * noise + 1.25 * 0.1 * uphill).clamp(-0.1, 0.1))
    starts: list[Tensor] = []

    def network(given: Tensor) -> Tensor:
        starts.append(given.detach())
        logits: Tensor = LinearNetwork(weight)(given)
        return logits

    perturbed(network, images, labels, noise, config(recipe="trades", steps=1))
    torch.testing.assert_close(starts[1], images + 1e-3 * noise)


def test_noise_is_uniform_at_every_site_and_of_any_shape() -> None:
    noise = uniform_noise((512, 3, 5, 7), torch.Generator().manual_seed(0))
    assert noise.shape == (512, 3, 5, 7)
    assert bool(((noise >= -1) & (noise < 1)).all())
    flat = noise.flatten(1)
    deviation = 1 / 3**0.5 / 512**0.5
    assert bool((flat.mean(0).abs() < 5 * deviation).all())
    assert bool((flat.std(0) - 3**-0.5).abs().max() < 0.06)
    assert float(flat.unique().numel()) > 0.5 * 2**16  # all bits are drawn
    correlation = torch.corrcoef(flat.T) - torch.eye(flat.shape[1])
    assert float(correlation.abs().max()) < 0.25  # the 105 sites are independent
    assert torch.equal(noise, uniform_noise((512, 3, 5, 7), torch.Generator().manual_seed(0)))


def test_scattered_masks_have_the_area_of_the_region_and_belong_to_the_place_in_the_batch() -> None:
    region = torch.zeros(6, 1, 16, 12, dtype=torch.bool)
    region[..., :5, :] = True
    region[2, ..., :9, :] = True
    masks = scattered(region, torch.arange(6), 6, 0)
    assert torch.equal(masks.sum((1, 2, 3)), region.sum((1, 2, 3)))
    assert float((masks & region).float().sum() / masks.float().sum()) < 0.6
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 6
    some = torch.tensor([1, 4])
    assert torch.equal(scattered(region[some], some, 6, 0), masks[some])


class Stepped(nn.Module):
    """Passes no gradient to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 2)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head((images > 0.5).float().mean((1, 2, 3))[:, None])
        return logits


@pytest.mark.parametrize("recipe", ["full", "fast", "trades"])
def test_a_network_without_input_gradients_is_refused_in_one_sentence(recipe: str) -> None:
    with pytest.raises(
        ValueError, match="model must pass gradients to its input to be trained on attacked images"
    ):
        quick_train(Stepped(), halves(), recipe=recipe)


def test_a_network_without_input_gradients_can_be_trained_without_attacks() -> None:
    start = Stepped()
    trained = quick_train(start, halves(), recipe="noise")
    assert not torch.equal(weights(trained), weights(start))
