"""Laws that every budget obeys, whatever the region, the channels, the size of the images and the gradient."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.budgets.strategies import LAW, Case, budgets, cases, limit
from weakspot.attacks import pgd
from weakspot.budgets import L1, L2, SSIM, Budget, Linf, prepare

BUDGETS: list[Budget] = [
    Linf(0.3),
    L2(0.7),
    L1(9.0),
    SSIM(0.01),
    SSIM(0.3, patch=4),
    SSIM(0.01, mode="local"),
    SSIM(0.3, patch=4, mode="local"),
]
every_budget = pytest.mark.parametrize("budget", BUDGETS, ids=str)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def projected(budget: Budget, case: Case, scale: float = 1.0) -> Tensor:
    return prepare(budget, case.images).project(scale * case.wanted, case.region)


@LAW
@given(budgets, cases())
def test_a_projection_is_inside_budget_box_and_region(budget: Budget, case: Case) -> None:
    before = [None if tensor is None else tensor.clone() for tensor in case]
    inside = projected(budget, case)
    assert bool(inside.isfinite().all())
    # Images are float32: a change of 1e-4 to a pixel of 0.9 is only stored to 3e-8.
    slack = 2e-7 * (inside[0].numel() if isinstance(budget, L1) else 1)
    assert bool((budget.distance(inside, case.images) <= limit(budget) * (1 + 1e-6) + slack).all())
    changed = case.images + inside
    assert 0 <= float(changed.min()) <= float(changed.max()) <= 1
    if case.region is not None:
        assert not bool(inside[~case.region.expand_as(inside)].any())
    for tensor, own in zip(case, before, strict=True):
        assert tensor is None or (own is not None and torch.equal(tensor, own))


@LAW
@given(budgets, cases(), st.just(1.0) | st.floats(0.01, 1))
def test_what_a_budget_allows_it_and_a_larger_one_leave_as_it_is(
    budget: Budget, case: Case, fraction: float
) -> None:
    smaller = dataclasses.replace(budget, eps=fraction * limit(budget))  # type: ignore[type-var]
    inside = projected(smaller, case)
    again = projected(budget, case._replace(wanted=inside))
    torch.testing.assert_close(again, inside, rtol=1e-4, atol=2e-6)


@LAW
@given(budgets, cases())
def test_an_images_projection_and_step_do_not_depend_on_its_neighbors(budget: Budget, case: Case) -> None:
    together, inside = projected(budget, case), projected(budget, case, 0.1)
    steps = budget.steepest_step(case.wanted, inside, case.images)
    for index in range(len(case.images)):
        row = slice(index, index + 1)
        one = Case(case.wanted[row], case.images[row], None if case.region is None else case.region[row])
        torch.testing.assert_close(together[row], projected(budget, one), rtol=2e-5, atol=1e-6)
        alone = budget.steepest_step(one.wanted, inside[row], one.images)
        torch.testing.assert_close(steps[row], alone, rtol=3e-6, atol=3e-7)


@LAW
@given(budgets, cases())
def test_a_step_never_goes_downhill_from_inside_the_budget(budget: Budget, case: Case) -> None:
    inside = budget.project(case.wanted.roll(1, 3), case.images)
    gradient = case.wanted / case.wanted.abs().amax().clamp(min=1e-20)
    step = budget.steepest_step(gradient, inside, case.images)
    gained = (gradient.double() * step.double()).flatten(1)
    assert bool((gained.sum(1) >= -1e-5 * gained.abs().sum(1) - 1e-6).all())


@LAW
@given(budgets.filter(lambda budget: limit(budget) > 0), cases())
def test_a_zero_gradient_gives_a_zero_step_and_leaves_the_others_theirs(budget: Budget, case: Case) -> None:
    inside, gradient = projected(budget, case, 0.1), case.wanted.clone()
    full = budget.steepest_step(gradient, inside, case.images)
    gradient[::2] = 0
    step = budget.steepest_step(gradient, inside, case.images)
    assert not bool(step[::2].any())
    torch.testing.assert_close(step[1::2], full[1::2], rtol=1e-5, atol=1e-7)


@LAW
@given(budgets, cases(), st.sampled_from([1e-37, 1e-30, 1e-12, 1e12, 1e30]))
def test_a_step_depends_only_on_the_direction_of_the_gradient(
    budget: Budget, case: Case, factor: float
) -> None:
    # Entries of one order of magnitude: the smallest must survive the factor in float32.
    gradient = normal(*case.images.shape)
    gradient = gradient.sign() * (0.1 + gradient.abs())
    inside = projected(budget, case, 0.1)
    step = budget.steepest_step(factor * gradient, inside, case.images)
    expected = budget.steepest_step(gradient, inside, case.images)
    assert bool(step.isfinite().all())
    torch.testing.assert_close(step, expected, rtol=1e-3, atol=1e-5)


@LAW
@given(st.sampled_from([Linf(0), L2(0), L1(0), SSIM(0), SSIM(0, patch=2, mode="local")]), cases())
def test_a_budget_of_nothing_allows_nothing(budget: Budget, case: Case) -> None:
    assert not bool(projected(budget, case).any())
    step = budget.steepest_step(case.wanted, torch.zeros_like(case.images), case.images)
    assert bool(step.isfinite().all())
    assert float(step.abs().max()) <= 1e-6


@LAW
@given(budgets, cases())
def test_no_change_spends_nothing(budget: Budget, case: Case) -> None:
    assert not bool(projected(budget, case, 0.0).any())
    assert not bool(budget.distance(torch.zeros_like(case.images), case.images).any())


@every_budget
def test_a_tiny_change_is_returned_as_it_is_and_a_projected_step_gains(budget: Budget) -> None:
    images, gradient = noise(6, 3, 7, 13), normal(6, 3, 7, 13)
    small = torch.where(images > 0.5, -1e-6, 1e-6) * gradient.abs()
    # 1.3e-7 is the rounding of an image plus and minus the change.
    torch.testing.assert_close(budget.project(small, images), small, rtol=0, atol=1.3e-7)
    step = budget.steepest_step(gradient, torch.zeros_like(images), images)
    assert bool(((gradient * budget.project(step, images)).flatten(1).sum(1) > 0).all())


@every_budget
def test_an_image_with_a_tiny_gradient_beside_one_with_a_huge_gradient_gets_its_own_step(
    budget: Budget,
) -> None:
    gradient, images = normal(2, 3, 9, 7), noise(2, 3, 9, 7)
    still = torch.zeros_like(images)
    apart = torch.stack([1e-32 * gradient[0], 1e20 * gradient[1]])
    step = budget.steepest_step(apart, still, images)
    torch.testing.assert_close(step, budget.steepest_step(gradient, still, images), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ties", ["one value", "few values"])
@every_budget
def test_ties_between_gradients_are_not_broken_by_the_neighbors(budget: Budget, ties: str) -> None:
    # The gradients of counts, of signs and of flat models: many entries are equally steep.
    gradient = torch.ones(2, 3, 16, 16) if ties == "one value" else normal(2, 3, 16, 16).round()
    images = torch.full((2, 3, 16, 16), 0.5)
    images[1] = 0.5 + 0.499 * gradient[1].sign()  # almost no room: far more of its entries have to move
    still = torch.zeros_like(images)
    alone = budget.steepest_step(gradient[:1], still[:1], images[:1])
    together = budget.steepest_step(gradient, still, images)[:1]
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_budget
def test_precision_and_memory_layout_change_nothing(budget: Budget, dtype: torch.dtype) -> None:
    wanted, images = normal(2, 3, 9, 7).to(dtype), noise(2, 3, 9, 7).to(dtype)
    expected = budget.project(wanted.float(), images.float())
    step = budget.steepest_step(wanted.float(), 0.1 * expected, images.float())

    def strided(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last)

    inside = budget.project(strided(wanted), strided(images))
    assert inside.dtype == dtype
    torch.testing.assert_close(inside, expected.to(dtype), rtol=1e-4, atol=1e-5)
    moved = budget.steepest_step(strided(wanted), strided(0.1 * expected.to(dtype)), strided(images))
    torch.testing.assert_close(moved, step.to(dtype), rtol=1e-4, atol=1e-5)


@every_budget
def test_a_prepared_budget_is_the_budget(budget: Budget) -> None:
    wanted, images = 0.1 * normal(3, 3, 9, 7), noise(3, 3, 9, 7)
    prepared = prepare(budget, images)
    for _ in range(2):  # the second call uses what the first one computed
        inside = prepared.project(wanted)
        assert torch.equal(inside, budget.project(wanted, images))
        assert torch.equal(
            prepared.steepest_step(wanted, inside), budget.steepest_step(wanted, inside, images)
        )
        assert torch.equal(prepared.distance(inside), budget.distance(inside, images))


class ThreeMethods:
    """A budget that a user may write: L-infinity with the three methods of the contract and nothing else."""

    def project(self, perturbation: Tensor, images: Tensor) -> Tensor:
        return (images + perturbation.clamp(-0.1, 0.1)).clamp(0, 1) - images

    def steepest_step(self, gradient: Tensor, perturbation: Tensor, images: Tensor) -> Tensor:
        return 0.1 * gradient.sign()

    def distance(self, perturbation: Tensor, images: Tensor) -> Tensor:
        return perturbation.abs().amax((1, 2, 3))


def test_a_budget_with_three_methods_is_enough_for_an_attack_in_a_region() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 6 * 6, 4)).eval()
    images, region = noise(5, 3, 6, 6), noise(5, 1, 6, 6, seed=2) < 0.5
    labels = model(images).argmax(1)
    for stop_early in (False, True):
        own, ours = (
            pgd(model, images, labels, budget=budget, region=region, steps=4, stop_early=stop_early)
            for budget in (ThreeMethods(), Linf(0.1))
        )
        torch.testing.assert_close(own.adversarial, ours.adversarial, rtol=0, atol=1e-6)
        assert not bool((own.perturbation * ~region).any())
