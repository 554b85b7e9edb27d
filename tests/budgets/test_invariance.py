"""What no budget may depend on: neighbors, the gradient's size, ties, precision, memory layout; and nested budgets."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.budgets.strategies import LAW, Case, budgets, cases, limit
from weakspot.budgets import L1, L2, SSIM, Budget, Linf

BUDGETS: list[Budget] = [
    Linf(0.3),
    L2(0.7),
    L1(9.0),
    SSIM(0.01),
    SSIM(0.3, patch=4),
    SSIM(0.01, mode="local"),
    SSIM(0.3, patch=4, mode="local"),
]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@LAW
@given(budgets, cases())
def test_a_projection_is_inside_budget_box_and_region(budget: Budget, case: Case) -> None:
    wanted, images, region = case
    projected = budget.project(wanted, images, region=region)
    # Images are float32: a change of 1e-4 to a pixel of 0.9 is only kept to 3e-8.
    slack = 2e-7 * (wanted[0].numel() if isinstance(budget, L1) else 1)
    assert bool((budget.distance(projected, images) <= limit(budget) * (1 + 1e-6) + slack).all())
    changed = images + projected
    assert 0 <= float(changed.min()) <= float(changed.max()) <= 1
    if region is not None:
        assert not bool(projected[~region.expand_as(projected)].any())


@LAW
@given(budgets, cases(), st.floats(0.01, 1))
def test_what_a_budget_allows_a_larger_one_allows_too(budget: Budget, case: Case, fraction: float) -> None:
    wanted, images, region = case
    smaller = dataclasses.replace(budget, eps=fraction * limit(budget))  # type: ignore[type-var]
    inside = smaller.project(wanted, images, region=region)
    torch.testing.assert_close(budget.project(inside, images, region=region), inside, rtol=1e-4, atol=2e-6)


@LAW
@given(budgets, cases())
def test_an_images_projection_and_step_depend_on_no_neighbor(budget: Budget, case: Case) -> None:
    wanted, images, region = case
    together = budget.project(wanted, images, region=region)
    inside = budget.project(0.1 * wanted, images, region=region)
    steps = budget.steepest_step(wanted, inside, images)
    for index in range(len(images)):
        row = slice(index, index + 1)
        alone = budget.project(wanted[row], images[row], region=None if region is None else region[row])
        torch.testing.assert_close(together[row], alone, rtol=3e-6, atol=3e-7)
        alone = budget.steepest_step(wanted[row], inside[row], images[row])
        torch.testing.assert_close(steps[row], alone, rtol=3e-6, atol=3e-7)


@LAW
@given(budgets, cases())
def test_a_step_never_goes_downhill_from_inside_the_budget(budget: Budget, case: Case) -> None:
    wanted, images, _ = case
    inside = budget.project(wanted.roll(1, 3), images)
    gradient = wanted / wanted.abs().amax().clamp(min=1e-20)
    step = budget.steepest_step(gradient, inside, images)
    gained = (gradient.double() * step.double()).flatten(1).sum(1)
    size = (gradient.double() * step.double()).flatten(1).abs().sum(1)
    assert bool((gained >= -1e-5 * size - 1e-6).all())


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_a_faded_image_beside_one_with_an_enormous_gradient_gets_its_own_step(budget: Budget) -> None:
    gradient, images = drawn(2, 3, 9, 7), pictures(2, 3, 9, 7)
    still = torch.zeros_like(images)
    apart = torch.stack([1e-32 * gradient[0], 1e20 * gradient[1]])
    step = budget.steepest_step(apart, still, images)
    torch.testing.assert_close(step, budget.steepest_step(gradient, still, images), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ties", ["one value", "few values"])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_equal_gradients_are_not_settled_by_the_neighbors(budget: Budget, ties: str) -> None:
    # The gradients of counts, of signs and of flat models: many entries are equally steep.
    gradient = torch.ones(2, 3, 16, 16) if ties == "one value" else drawn(2, 3, 16, 16).round()
    images = torch.full((2, 3, 16, 16), 0.5)
    images[1] = 0.5 + 0.499 * gradient[1].sign()  # almost no room: far more of its entries have to move
    still = torch.zeros_like(images)
    alone = budget.steepest_step(gradient[:1], still[:1], images[:1])
    together = budget.steepest_step(gradient, still, images)[:1]
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_precision_and_memory_layout_change_nothing(budget: Budget, dtype: torch.dtype) -> None:
    wanted, images = drawn(2, 3, 9, 7).to(dtype), pictures(2, 3, 9, 7).to(dtype)
    expected = budget.project(wanted.float(), images.float())
    step = budget.steepest_step(wanted.float(), 0.1 * expected, images.float())

    def strided(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last)

    found = budget.project(strided(wanted), strided(images))
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype), rtol=1e-4, atol=1e-5)
    found = budget.steepest_step(strided(wanted), strided(0.1 * expected.to(dtype)), strided(images))
    torch.testing.assert_close(found, step.to(dtype), rtol=1e-4, atol=1e-5)
