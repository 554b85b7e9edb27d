"""Budgets: projections are the nearest admissible point, steps the steepest admissible one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weakspot.budgets import L2, Budget, Linf

LAW = settings(deadline=None, derandomize=True)  # the same cases in every run

EPSILONS = st.sampled_from([0.0, 1e-4, 4 / 255, 0.3, 1.0])
LENGTHS = st.sampled_from([0.0, 1e-4, 0.1, 1.0, 3.0, 50.0])
budgets = EPSILONS.map(Linf) | LENGTHS.map(L2)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Perturbations of every scale and images of which some pixels are black or white, (N, C, H, W) each."""
    shape = tuple(draw(st.integers(1, most)) for most in (3, 3, 6, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    contrast = draw(st.sampled_from([0.5, 1.0, 3.0]))
    images = (0.5 + contrast * (torch.rand(shape, generator=generator) - 0.5)).clamp(0, 1)
    scale = draw(st.sampled_from([0.0, 1e-6, 1e-2, 0.3, 2.0, 1e3]))
    spread = draw(st.sampled_from([0.0, 4.0]))  # of magnitudes: entries differ by orders where it is not zero
    powers = spread * (torch.rand(shape, generator=generator) - 0.5)
    return scale * torch.randn(shape, generator=generator) * 10**powers, images


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


@LAW
@given(budgets, problems())
def test_projection_is_idempotent_inside_the_budget_and_inside_the_box(
    budget: Budget, problem: tuple[Tensor, Tensor]
) -> None:
    perturbation, images = problem
    before = perturbation.clone(), images.clone()
    projected = budget.project(perturbation, images)
    limit = float(getattr(budget, "eps"))  # noqa: B009 - Budget does not promise a limit's name
    assert bool((budget.size(projected, images) <= limit * (1 + 1e-6) + 1e-7).all())
    assert float((images + projected).min()) >= -1e-6
    assert float((images + projected).max()) <= 1 + 1e-6
    torch.testing.assert_close(budget.project(projected, images), projected, rtol=2e-6, atol=2e-7)
    assert torch.equal(perturbation, before[0])
    assert torch.equal(images, before[1])


@LAW
@given(EPSILONS, problems())
def test_linf_projection_is_the_nearest_point_of_cube_and_box(
    eps: float, problem: tuple[Tensor, Tensor]
) -> None:
    perturbation, images = (tensor.double() for tensor in problem)
    # Both sets are products of intervals, so the nearest point is found entry by entry.
    low, high = (-images).clamp(min=-eps), (1 - images).clamp(max=eps)
    expected = torch.minimum(torch.maximum(perturbation, low), high)
    found = Linf(eps).project(*problem)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-7)


@LAW
@given(LENGTHS, problems())
def test_l2_projection_is_the_nearest_point_of_ball_and_box(
    eps: float, problem: tuple[Tensor, Tensor]
) -> None:
    found = L2(eps).project(*problem)
    for point, wanted, image in zip(found.double(), *problem, strict=True):
        expected = scaled_and_clipped(wanted, image, eps, largest=1.0)
        nearest = float((expected - wanted.double()).norm())
        assert float((point - wanted.double()).norm()) <= nearest * (1 + 1e-5) + 1e-6
        torch.testing.assert_close(point, expected, rtol=1e-3, atol=1e-3 * eps + 1e-6)


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


def test_l2_projection_spends_what_clipping_saves() -> None:
    # A large entry has no room; the true projection gives its share of the length to the others.
    images = torch.tensor([0.95, 0.5, 0.5]).view(1, 1, 1, 3)
    wanted = torch.tensor([3.0, 0.3, 0.4]).view(1, 1, 1, 3)
    found = L2(0.4).project(wanted, images).flatten()
    left = (0.4**2 - 0.05**2) ** 0.5
    torch.testing.assert_close(found, torch.tensor([0.05, 0.6 * left, 0.8 * left]), rtol=0, atol=1e-5)


@LAW
@given(budgets, problems(), st.integers(0, 2**32))
def test_projection_brings_no_two_points_further_apart(
    budget: Budget, problem: tuple[Tensor, Tensor], seed: int
) -> None:
    first, images = problem
    second = first + first.std(unbiased=False) * torch.randn(
        first.shape, generator=torch.Generator().manual_seed(seed)
    )
    before = (first - second).flatten(1).norm(dim=1)
    after = (budget.project(first, images) - budget.project(second, images)).flatten(1).norm(dim=1)
    assert bool((after <= before * (1 + 1e-4) + 1e-5).all())


@pytest.mark.parametrize(("budget", "dual"), [(Linf(0.3), 1), (L2(0.7), 2)], ids=str)
def test_ascend_is_the_steepest_admissible_step(budget: Budget, dual: int) -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(4, 3, 5, 4, generator=generator)
    images = torch.full_like(gradient, 0.5)
    step = budget.ascend(gradient, torch.zeros_like(gradient), images)
    gained = (gradient * step).flatten(1).sum(1)
    eps = float(getattr(budget, "eps"))  # noqa: B009 - Budget does not promise a limit's name
    # The largest value of a linear objective over a norm's ball is eps times the dual norm of its gradient.
    torch.testing.assert_close(gained, eps * torch.linalg.vector_norm(gradient.flatten(1), dual, dim=1))
    assert bool((budget.size(step, images) <= eps * (1 + 1e-6)).all())
    for _ in range(100):
        other = gradient + 0.3 * torch.randn(gradient.shape, generator=generator)
        other = other * (eps / budget.size(other, images))[:, None, None, None]
        assert bool(((gradient * other).flatten(1).sum(1) <= gained * (1 + 1e-6)).all())


@pytest.mark.parametrize("budget", [Linf(0.3), L2(0.7)], ids=str)
def test_a_zero_gradient_gives_a_zero_step_and_leaves_its_neighbours_their_own(budget: Budget) -> None:
    gradient = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    gradient[1] = 0
    step = budget.ascend(gradient, torch.zeros_like(gradient), gradient)
    assert not bool(step[1].any())
    for index in (0, 2):
        alone = budget.ascend(gradient[index : index + 1], torch.zeros(1, 1, 4, 4), gradient)
        assert torch.equal(step[index : index + 1], alone)
        assert bool(alone.all())


@pytest.mark.parametrize("faded", [1e-10, 1e-25, 1e-30, 1e-37])
@pytest.mark.parametrize("budget", [Linf(0.3), L2(0.7)], ids=str)
def test_a_faded_gradient_still_gives_the_full_step(budget: Budget, faded: float) -> None:
    gradient = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    still = torch.zeros_like(gradient)
    step = budget.ascend(faded * gradient, still, gradient)
    torch.testing.assert_close(step, budget.ascend(gradient, still, gradient))


@pytest.mark.parametrize("eps", [-0.1, 1.5, 8, float("nan"), float("inf")])
def test_linf_refuses_what_is_no_share_of_the_image_range(eps: float) -> None:
    with pytest.raises(ValueError, match=r"Linf eps is .*accepted is 0 to 1"):
        Linf(eps)


@pytest.mark.parametrize("eps", [-0.1, float("nan"), float("inf")])
def test_l2_refuses_what_is_no_finite_length(eps: float) -> None:
    with pytest.raises(ValueError, match=r"L2 eps is .*accepted is a finite length"):
        L2(eps)


@pytest.mark.parametrize(
    ("budget", "words"),
    [(Linf(8 / 255), "8/255 L-infinity"), (Linf(0.03), "7.65/255 L-infinity"), (L2(0.5), "0.5 L2")],
)
def test_budgets_are_named_as_people_write_them(budget: Budget, words: str) -> None:
    assert str(budget) == words
