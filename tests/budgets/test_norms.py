"""Norms: projections are the nearest admissible point, steps the steepest admissible one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from tests.budgets.strategies import EPSILONS, LAW, LENGTHS, Case, cases, limit
from weakspot.budgets import L1, L2, Budget, Linf, prepare

norms = EPSILONS.map(Linf) | LENGTHS.map(L2) | LENGTHS.map(L1)


def masked(case: Case) -> Tensor:
    return case.wanted if case.region is None else torch.where(case.region, case.wanted, 0)


def scaled_and_clipped(direction: Tensor, image: Tensor, eps: float, largest: float) -> Tensor:
    """clip(s * direction), one image in float64, with the largest s up to `largest` whose length is within eps.

    With `largest` = 1 these are the Karush-Kuhn-Tucker conditions of the projection on ball and box; with no
    bound on s they are those of the linear objective <direction, perturbation>.
    """
    direction, image = direction.double(), image.double()

    def clipped(scale: float) -> Tensor:
        return (scale * direction).clamp(-image, 1 - image)

    low, high = 0.0, largest
    if float(clipped(high).norm()) <= eps:
        return clipped(high)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float(clipped(middle).norm()) <= eps else (low, middle)
    return clipped(low)


def shrunk_and_clipped(wanted: Tensor, image: Tensor, eps: float) -> Tensor:
    """Every entry shrunk by one amount and clipped, one image in float64, with the least amount within eps.

    By the Karush-Kuhn-Tucker conditions the nearest point of cross-polytope and box.
    """
    wanted, image = wanted.double(), image.double()

    def clipped(amount: float) -> Tensor:
        shrunk = wanted.sign() * (wanted.abs() - amount).clamp(min=0)
        return torch.minimum(torch.maximum(shrunk, -image), 1 - image)

    low, high = 0.0, float(wanted.abs().max())
    if float(clipped(low).abs().sum()) <= eps:
        return clipped(low)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if float(clipped(middle).abs().sum()) <= eps else (middle, high)
    return clipped(high)


def filled_greedily(gradient: Tensor, image: Tensor, eps: float) -> list[float]:
    """The steepest perturbation in the cross-polytope and the box, entry by entry in plain Python."""
    slopes, pixels = gradient.flatten().tolist(), image.flatten().tolist()
    left, moved = eps, [0.0] * len(slopes)
    for place in sorted(range(len(slopes)), key=lambda place: -abs(slopes[place])):
        if slopes[place] != 0:
            amount = min(left, 1 - pixels[place] if slopes[place] > 0 else pixels[place])
            moved[place] = amount if slopes[place] > 0 else -amount
            left -= amount
    return moved


@LAW
@given(EPSILONS, cases())
def test_linf_projection_is_the_nearest_point_of_cube_and_box(eps: float, case: Case) -> None:
    wanted, images = masked(case).double(), case.images.double()
    # Both sets are products of intervals, so the nearest point is found entry by entry.
    low, high = (-images).clamp(min=-eps), (1 - images).clamp(max=eps)
    expected = torch.minimum(torch.maximum(wanted, low), high)
    found = Linf(eps).project(case.wanted, case.images, region=case.region)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-7)


@LAW
@given(LENGTHS, cases())
def test_l2_projection_is_the_nearest_point_of_ball_and_box(eps: float, case: Case) -> None:
    found = L2(eps).project(case.wanted, case.images, region=case.region)
    for point, wanted, image in zip(found.double(), masked(case), case.images, strict=True):
        expected = scaled_and_clipped(wanted, image, eps, largest=1.0)
        nearest = float((expected - wanted.double()).norm())
        assert float((point - wanted.double()).norm()) <= nearest * (1 + 1e-5) + 1e-6
        torch.testing.assert_close(point, expected, rtol=1e-3, atol=1e-3 * eps + 1e-6)


@LAW
@given(LENGTHS, cases())
def test_l1_projection_is_the_nearest_point_of_cross_polytope_and_box(eps: float, case: Case) -> None:
    found = L1(eps).project(case.wanted, case.images, region=case.region)
    for point, wanted, image in zip(found.double(), masked(case), case.images, strict=True):
        expected = shrunk_and_clipped(wanted, image, eps)
        nearest = float((expected - wanted.double()).norm())
        assert float((point - wanted.double()).norm()) <= nearest * (1 + 1e-5) + 1e-6
        # Amounts below float32's resolution of the largest wanted entry cannot be shrunk to.
        resolution = 1e-6 * float(wanted.abs().max())
        torch.testing.assert_close(point, expected, rtol=1e-3, atol=1e-4 * eps + 1e-6 + resolution)


@pytest.mark.parametrize("eps", [0.2, 0.7, 1.2])
def test_alternating_projections_on_ball_and_box_end_where_l2_projection_does(eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(20, 1, 2, 3, generator=generator)
    wanted = 2 * torch.randn(images.shape, generator=generator)
    # Dykstra's algorithm: it knows how to project on each set alone and converges to the nearest common point.
    point, low, high = wanted.double().flatten(1), -images.double().flatten(1), 1 - images.double().flatten(1)
    for_ball, for_box = torch.zeros_like(point), torch.zeros_like(point)
    for _ in range(3000):
        moved = point + for_ball
        in_ball = moved * (eps / moved.norm(dim=1, keepdim=True)).clamp(max=1)
        for_ball = moved - in_ball
        moved = in_ball + for_box
        point = torch.minimum(torch.maximum(moved, low), high)
        for_box = moved - point
    found = L2(eps).project(wanted, images).flatten(1)
    assert bool(((point == low) | (point == high)).any())
    torch.testing.assert_close(found.double(), point, rtol=0, atol=1e-5)


@pytest.mark.parametrize("eps", [0.2, 1.0, 3.0])
@pytest.mark.peers
def test_a_convex_solver_projects_on_cross_polytope_and_box_to_the_same_point(eps: float) -> None:
    cvxpy = pytest.importorskip("cvxpy")
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 2, 3, 4, generator=generator)
    wanted = torch.randn(images.shape, generator=generator)
    found = L1(eps).project(wanted, images)
    for point, goal, image in zip(found, wanted.double().numpy(), images.double().numpy(), strict=True):
        unknown = cvxpy.Variable(24)
        inside = [
            cvxpy.norm1(unknown) <= eps,
            unknown >= -image.ravel(),
            unknown <= 1 - image.ravel(),
        ]
        nearest = cvxpy.Minimize(cvxpy.sum_squares(unknown - goal.ravel()))
        cvxpy.Problem(nearest, inside).solve(solver=cvxpy.CLARABEL)
        np.testing.assert_allclose(point.flatten().numpy(), unknown.value, atol=1e-5)


def test_l2_projection_spends_what_clipping_saves() -> None:
    # A large entry has no room; the true projection gives its share of the length to the others.
    images = torch.tensor([0.95, 0.5, 0.5]).view(1, 1, 1, 3)
    wanted = torch.tensor([3.0, 0.3, 0.4]).view(1, 1, 1, 3)
    found = L2(0.4).project(wanted, images).flatten()
    left = (0.4**2 - 0.05**2) ** 0.5
    torch.testing.assert_close(found, torch.tensor([0.05, 0.6 * left, 0.8 * left]), rtol=0, atol=1e-5)


def test_l1_projection_spends_what_clipping_saves() -> None:
    images = torch.tensor([0.95, 0.5, 0.5]).view(1, 1, 1, 3)
    wanted = torch.tensor([3.0, 0.3, -0.4]).view(1, 1, 1, 3)
    found = L1(0.4).project(wanted, images).flatten()
    # 0.05 of the first; the others give up 0.175 each, to 0.35 together.
    torch.testing.assert_close(found, torch.tensor([0.05, 0.125, -0.225]), rtol=0, atol=1e-6)


@LAW
@given(norms, cases(), st.integers(0, 2**32))
def test_projection_brings_no_two_points_further_apart(budget: Budget, case: Case, seed: int) -> None:
    first, images, region = case
    second = first + first.std(unbiased=False) * torch.randn(
        first.shape, generator=torch.Generator().manual_seed(seed)
    )
    before = (first - second).flatten(1).norm(dim=1)
    projected = (prepare(budget, images).project(wanted, region) for wanted in (first, second))
    after = (next(projected) - next(projected)).flatten(1).norm(dim=1)
    assert bool((after <= before * (1 + 1e-4) + 1e-5).all())


@pytest.mark.parametrize(("budget", "dual"), [(Linf(0.3), 1), (L2(0.7), 2), (L1(0.4), np.inf)], ids=str)
def test_ascend_is_the_steepest_step_of_the_norms_ball(budget: Budget, dual: float) -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(4, 3, 5, 4, generator=generator)
    images = torch.full_like(gradient, 0.5)
    step = budget.steepest_step(gradient, torch.zeros_like(gradient), images)
    gained = (gradient * step).flatten(1).sum(1)
    eps = limit(budget)
    # The largest value of a linear objective over a norm's ball is eps times the dual norm of its gradient.
    torch.testing.assert_close(gained, eps * torch.linalg.vector_norm(gradient.flatten(1), dual, dim=1))
    assert bool((budget.distance(step, images) <= eps * (1 + 1e-6)).all())
    for _ in range(100):
        other = gradient + 0.3 * torch.randn(gradient.shape, generator=generator)
        other = other * (eps / budget.distance(other, images))[:, None, None, None]
        assert bool(((gradient * other).flatten(1).sum(1) <= gained * (1 + 1e-6)).all())


@LAW
@given(LENGTHS, cases())
def test_l1_ascend_fills_the_steepest_entries_up_to_the_end_of_the_box(eps: float, case: Case) -> None:
    gradient = masked(case)
    step = L1(eps).steepest_step(gradient, torch.zeros_like(gradient), case.images)
    changed = case.images + step
    assert 0 <= float(changed.min()) <= float(changed.max()) <= 1
    for found, slope, image in zip(step, gradient, case.images, strict=True):
        expected = torch.tensor(filled_greedily(slope, image, eps)).view_as(found)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("eps", [0.3, 2.0, 9.0, 100.0])
@pytest.mark.peers
def test_a_linear_program_finds_nothing_steeper_in_the_cross_polytope_and_the_box(eps: float) -> None:
    optimize: Any = pytest.importorskip("scipy.optimize")
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(3, 3, 6, 5, generator=generator)
    images = torch.rand(gradient.shape, generator=generator)
    step = L1(eps).steepest_step(gradient, torch.zeros_like(gradient), images)
    for found, slope, image in zip(step.double(), gradient.double(), images.double(), strict=True):
        slopes: NDArray[np.float64] = slope.flatten().numpy()
        room = image.flatten().numpy()
        # Up and down are two unknowns each, so that their sum is the absolute change.
        bounds = [(0.0, 1 - value) for value in room] + [(0.0, value) for value in room]
        best = optimize.linprog(
            np.concatenate([-slopes, slopes]), np.ones((1, 2 * len(slopes))), [eps], bounds=bounds
        )
        assert float((slope * found).sum()) == pytest.approx(-best.fun, rel=1e-5)
        assert float(found.abs().sum()) <= eps * (1 + 1e-6)


def test_the_first_guess_of_how_many_entries_l1_moves_may_be_far_too_low() -> None:
    # Rooms of a thousandth: 3000 entries are filled where 64 are looked at first.
    images = torch.full((1, 3, 40, 40), 0.999)
    gradient = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) + 1
    step = L1(3.0).steepest_step(gradient, torch.zeros_like(images), images)
    expected = torch.tensor(filled_greedily(gradient, images, 3.0)).view_as(step)
    torch.testing.assert_close(step, expected, rtol=0, atol=1e-4)
    assert int((step > 0).sum()) == pytest.approx(3000, abs=2)


@pytest.mark.parametrize("eps", [-0.1, 1.5, 8, float("nan"), float("inf")])
def test_linf_refuses_sizes_outside_the_image_range(eps: float) -> None:
    with pytest.raises(ValueError, match=r"eps must be between 0 and 1, got"):
        Linf(eps)


@pytest.mark.parametrize("kind", [L2, L1])
@pytest.mark.parametrize("eps", [-0.1, float("nan"), float("inf"), 1e300, 10**400])
def test_l2_and_l1_refuse_sizes_that_are_not_finite_or_negative(kind: type[L2 | L1], eps: float) -> None:
    with pytest.raises(ValueError, match=r"eps must be a length between 0 and 1e12 .*, got"):
        kind(eps)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Linf(8 / 255), "8/255 L-infinity"),
        (Linf(0.03), "0.03 L-infinity"),
        (L2(0.5), "0.5 L2"),
        (L1(12), "12 L1"),
    ],
)
def test_budgets_are_named_as_people_write_them(budget: Budget, words: str) -> None:
    assert str(budget) == words
