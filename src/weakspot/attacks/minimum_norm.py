"""The smallest change in L-infinity or L2 by walking along the decision boundary."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from weakspot._checks import check_choice
from weakspot.attacks.context import Problem, attack_context
from weakspot.attacks.gradient import Progress, check_counts, warn_of_zero_gradients
from weakspot.attacks.tradeoff import Smallest
from weakspot.pairs import AttackResult

GROWTH = (
    0.05,
    0.001,
)  # of the ball from one step to the next, at first and at last (arXiv 2102.12827, section 3)
STEPS = (0.5, 0.01)  # in units of the ball's radius, at first and at last


class _Norm(NamedTuple):
    """A norm's size, its dual's, the step of length one along a gradient, and the ball of radius (N, 1, 1, 1)."""

    size: Callable[[Tensor], Tensor]
    dual: Callable[[Tensor], Tensor]
    unit: Callable[[Tensor], Tensor]
    into: Callable[[Tensor, Tensor], Tensor]


def _length(rows: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(rows.flatten(1), dim=1)
    return length


def _safe_length(rows: Tensor) -> Tensor:
    """Of rows whose squares float32 may not hold."""
    peak = rows.abs().amax((1, 2, 3)).clamp(min=1e-30)
    return peak * _length(rows / _spread(peak))


def _unit_length(gradient: Tensor) -> Tensor:
    # Divided by the largest entry first: squares of a faded gradient would vanish in float32.
    scaled = gradient / gradient.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-30)
    return scaled / _spread(_length(scaled)).clamp(min=1e-30)


def _spread(values: Tensor) -> Tensor:
    return values[:, None, None, None]


NORMS = {
    "linf": _Norm(
        size=lambda change: change.abs().flatten(1).amax(1),
        dual=lambda gradient: gradient.abs().flatten(1).sum(1),
        unit=torch.sign,
        into=lambda change, radius: torch.minimum(torch.maximum(change, -radius), radius),
    ),
    "l2": _Norm(
        size=_length,
        dual=_safe_length,
        unit=_unit_length,
        into=lambda change, radius: (
            change * (radius / _spread(_length(change)).clamp(min=1e-30)).clamp(max=1)
        ),
    ),
}


def fmn(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    norm: str = "linf",
    region: Tensor | None = None,
    targets: Tensor | None = None,
    steps: int = 100,
    seed: int = 0,
    on_grid: bool = True,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> AttackResult:
    """The smallest L-infinity or L2 change that fools (fast minimum-norm, Pintor et al. 2021, arXiv 2102.12827).

    Steepest steps inside a ball that shrinks where the image fools and grows where it does not, ever more slowly, so
    that it settles on the decision boundary; the ball's first radius is the boundary's distance to first order. One
    descent finds for every image what `pgd` at many budgets would bracket. Unlike the paper's, steps are steepest in
    the norm itself and in units of the ball's radius, so that no step size depends on images or region.

    Args:
        model: as for `pgd`, like the other arguments that are not named here.
        images: likewise.
        labels: likewise.
        norm: "linf" or "l2".
        region: bool (N, 1, H, W) of the sites that may change.
        targets: (N,) classes to reach.
        steps: gradient steps.
        seed: kept in the result; nothing is random.
        on_grid: end on the 8-bit grid: round to nearest; if the image no longer fools, move values by one level along
            the gradient, as few as are needed, within ceil(255 size) levels of the clean image; or round away from
            it. The smallest of these that fools is returned. If none fools, or with False, the images are as found,
            and `success_8bit` says whether their files fool.
        batch_size: images at once.
        progress: called with the share done.

    Returns:
        An AttackResult; its images are the smallest change that was passed and fools, else the one nearest to that.

    Raises:
        ValueError: when an argument does not fit, naming it.

    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2)).eval()
    >>> images = torch.full((1, 3, 4, 4), 0.5)
    >>> labels = model(images).argmax(1)
    >>> from weakspot import Linf
    >>> from weakspot.attacks import pgd
    >>> small = fmn(model, images, labels, on_grid=False).perturbation.abs().max()
    >>> bool(pgd(model, images, labels, budget=Linf(0.99 * float(small))).success[0])
    False
    """
    check_counts(steps=steps)
    check_choice("norm", norm, NORMS)
    with attack_context(model, images, labels, region, targets, batch_size, seed) as problem:
        with problem.fused_model():
            found = Smallest(problem, NORMS[norm].size, 0.0)
            _walk(problem, NORMS[norm], found, steps, progress)
            smallest = found.settled() if on_grid else found.images
        return problem.result(smallest)


def _walk(problem: Problem, norm: _Norm, found: Smallest, steps: int, progress: Progress | None) -> None:
    """Pass points along the boundary, each handed to `found`."""
    clean = problem.clean
    largest = norm.size(torch.maximum(clean, 1 - clean))  # no image can be changed by more
    change, radius = torch.zeros_like(clean), torch.zeros_like(largest)
    for number in range(steps):
        point = problem.apply(change)
        margins, _, direction = problem.loss_and_gradient(point)
        if not number:
            left = margins >= 0
            warn_of_zero_gradients(problem.select(left), direction[left])
        found.keep(point, margins)
        growth, length = (_annealed(*ends, number / steps) for ends in (GROWTH, STEPS))
        ahead = norm.size(change) + margins.clamp(min=0) / norm.dual(direction).clamp(min=1e-30)
        # Beyond the border rather than on it, where rounding decides.
        outward = torch.where(found.size.isinf(), ahead, radius) * (1 + growth)
        inward = torch.minimum(radius * (1 - growth), found.size)
        radius = torch.minimum(torch.where(margins < 0, inward, outward), largest)
        ball = _spread(radius)
        change = norm.into(change + length * ball * norm.unit(direction), ball)
        change = (clean + change).clamp(0, 1) - clean
        if progress is not None:
            progress((number + 1) / steps)
    point = problem.apply(change)
    found.keep(point, problem.evaluate(point))


def _annealed(first: float, last: float, fraction: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * fraction)) / 2
