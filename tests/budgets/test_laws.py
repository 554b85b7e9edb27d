"""Laws that every budget keeps, whatever the region, the channels and the size of the images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.budgets.strategies import drawn, pictures
from weakspot.budgets import L1, L2, SSIM, Budget, Linf

BUDGETS: list[Budget] = [
    Linf(8 / 255),
    L2(0.4),
    L1(3.0),
    *(SSIM(0.02, patch=patch, mode=mode) for mode in ("global", "local") for patch in (2, 4, 8)),
]
NONE: list[Budget] = [Linf(0), L2(0), L1(0), SSIM(0), SSIM(0, patch=2, mode="local")]
SIZES = [(8, 8), (16, 8), (9, 9), (7, 13), (3, 2), (1, 5)]
REGIONS = ["everywhere", "scattered", "empty"]
WANTED = [1e-4, 0.02, 0.3, 100.0]

every_budget = pytest.mark.parametrize("budget", BUDGETS, ids=str)
every_size = pytest.mark.parametrize("size", SIZES, ids=str)
every_channels = pytest.mark.parametrize("channels", [1, 3])
every_region = pytest.mark.parametrize("kind", REGIONS)


def limit(budget: Budget) -> float:
    return float(getattr(budget, "eps"))  # noqa: B009 - Budget does not promise a limit's name


def region_of(kind: str, images: Tensor) -> Tensor | None:
    if kind == "everywhere":
        return None
    sites = torch.rand(len(images), 1, *images.shape[2:], generator=torch.Generator().manual_seed(2))
    return sites < (0.4 if kind == "scattered" else 0)


@every_budget
@every_size
@every_channels
@every_region
def test_a_projection_is_inside_budget_box_and_region_and_stays_where_it_is(
    budget: Budget, size: tuple[int, int], channels: int, kind: str
) -> None:
    images = pictures(channels, size)
    region = region_of(kind, images)
    for scale in WANTED:
        wanted = drawn(images, scale)
        before = wanted.clone(), images.clone(), None if region is None else region.clone()
        projected = budget.project(wanted, images, region=region)
        assert torch.equal(wanted, before[0])
        assert torch.equal(images, before[1])
        assert bool(projected.isfinite().all())
        assert float(budget.distance(projected, images).max()) <= limit(budget) * (1 + 1e-6)
        assert float((images + projected).min()) >= -1e-7
        assert float((images + projected).max()) <= 1 + 1e-7
        if region is not None:
            assert before[2] is not None
            assert torch.equal(region, before[2])
            assert not bool(torch.where(region, 0, projected).any())
        again = budget.project(projected, images, region=region)
        torch.testing.assert_close(again, projected, rtol=1e-5, atol=1e-6)


@every_budget
@every_region
@pytest.mark.parametrize("size", [(16, 8), (7, 13)], ids=str)
def test_projecting_a_batch_is_projecting_each_image(
    budget: Budget, kind: str, size: tuple[int, int]
) -> None:
    images = pictures(3, size)
    region = region_of(kind, images)
    for scale in WANTED:
        wanted = drawn(images, scale)
        together = budget.project(wanted, images, region=region)
        for row in range(len(images)):
            one = slice(row, row + 1)
            alone = budget.project(wanted[one], images[one], region=None if region is None else region[one])
            torch.testing.assert_close(together[one], alone, rtol=2e-5, atol=1e-6)


@every_budget
@pytest.mark.parametrize("size", [(16, 8), (7, 13)], ids=str)
def test_what_is_inside_comes_back_as_it_was(budget: Budget, size: tuple[int, int]) -> None:
    images = pictures(3, size)
    small = torch.where(images > 0.5, -1e-6, 1e-6) * drawn(images, 1.0).abs()
    found = budget.project(small, images)
    torch.testing.assert_close(found, small, rtol=0, atol=1.3e-7)  # rounding of an image plus and minus it


@pytest.mark.parametrize("budget", NONE, ids=str)
@every_size
@every_region
def test_a_budget_of_nothing_allows_nothing(budget: Budget, size: tuple[int, int], kind: str) -> None:
    images = pictures(3, size)
    for scale in (0.0, *WANTED):
        wanted = drawn(images, scale)
        assert not bool(budget.project(wanted, images, region=region_of(kind, images)).any())
        step = budget.steepest_step(wanted, torch.zeros_like(images), images)
        assert bool(step.isfinite().all())
        assert float(step.abs().max()) <= 1e-6


@every_budget
@every_size
@every_channels
def test_nothing_wanted_is_nothing_spent(budget: Budget, size: tuple[int, int], channels: int) -> None:
    images = pictures(channels, size)
    still = torch.zeros_like(images)
    assert not bool(budget.project(still, images).any())
    assert not bool(budget.distance(still, images).any())


@every_budget
@every_size
@every_channels
def test_a_zero_gradient_gives_a_zero_step_and_leaves_the_others_theirs(
    budget: Budget, size: tuple[int, int], channels: int
) -> None:
    images = pictures(channels, size)
    somewhere = budget.project(drawn(images, 0.02, seed=4), images)
    gradient = drawn(images, 1.0)
    full = budget.steepest_step(gradient, somewhere, images)
    gradient[::2] = 0
    step = budget.steepest_step(gradient, somewhere, images)
    assert not bool(step[::2].any())
    torch.testing.assert_close(step[1::2], full[1::2], rtol=1e-5, atol=1e-7)


@every_budget
@every_size
@every_channels
@pytest.mark.parametrize("factor", [1e-37, 1e-30, 1e-12, 1e12, 1e30])
def test_a_step_depends_on_the_direction_of_the_gradient_alone(
    budget: Budget, size: tuple[int, int], channels: int, factor: float
) -> None:
    images = pictures(channels, size)
    somewhere = budget.project(drawn(images, 0.02, seed=4), images)
    gradient, before = drawn(images, 1.0), images.clone()
    step = budget.steepest_step(factor * gradient, somewhere, images)
    assert bool(step.isfinite().all())
    torch.testing.assert_close(step, budget.steepest_step(gradient, somewhere, images), rtol=1e-3, atol=1e-5)
    assert torch.equal(images, before)
    assert torch.equal(gradient, drawn(images, 1.0))


@every_budget
@pytest.mark.parametrize("size", [(16, 8), (7, 13)], ids=str)
def test_a_projected_step_gains_on_a_linear_objective(budget: Budget, size: tuple[int, int]) -> None:
    images, gradient = pictures(3, size), drawn(pictures(3, size), 1.0)
    step = budget.steepest_step(gradient, torch.zeros_like(images), images)
    point = budget.project(step, images)
    assert bool(((gradient * point).flatten(1).sum(1) > 0).all())
