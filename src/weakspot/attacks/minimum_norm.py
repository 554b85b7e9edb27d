"""The smallest change in L-infinity or L2, by walking along the decision boundary."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from weakspot._checks import check_choice, check_count
from weakspot._progress import Progress, ProgressOption
from weakspot.attacks.best_so_far import BestSoFar
from weakspot.attacks.context import AttackOptions, attack_context
from weakspot.attacks.losses import minimizes
from weakspot.pairs import AttackResult

# By how much the ball grows or shrinks per step, at first and at last (arXiv 2102.12827, section 3).
GROWTH = (0.05, 0.001)
STEPS = (0.5, 0.01)  # in units of the ball's radius, at first and at last
SMOOTH_STEPS = (0.018, 0.00018)  # root mean squares of a step's values: 1 and .01 long in 3 x 32 x 32 values


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
    """The length of rows whose squares may underflow in float32."""
    peak = rows.abs().amax((1, 2, 3)).clamp(min=1e-30)
    return peak * _length(rows / spread(peak))


def _unit_length(gradient: Tensor) -> Tensor:
    # Divided by the largest entry first: the squares of a tiny gradient would underflow in float32.
    scaled = gradient / gradient.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-30)
    return scaled / spread(_length(scaled)).clamp(min=1e-30)


def _into_l2_ball(change: Tensor, radius: Tensor) -> Tensor:
    return change * (radius / spread(_length(change)).clamp(min=1e-30)).clamp(max=1)


def spread(values: Tensor) -> Tensor:
    """Values (N,) as (N, 1, 1, 1), one for each image."""
    return values[:, None, None, None]


NORMS = {
    "linf": _Norm(
        size=lambda change: change.abs().flatten(1).amax(1),
        dual=lambda gradient: gradient.abs().flatten(1).sum(1),
        unit=torch.sign,
        into=lambda change, radius: torch.minimum(torch.maximum(change, -radius), radius),
    ),
    "l2": _Norm(size=_length, dual=_safe_length, unit=_unit_length, into=_into_l2_ball),
}


@minimizes("linf", argument="norm")
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
    progress: ProgressOption = None,
) -> AttackResult:
    """Find the smallest L-infinity or L2 change that fools (fast minimum-norm, Pintor et al. 2021, arXiv 2102.12827).

    Steepest steps inside a ball that shrinks where the image fools and grows where it does not, ever more slowly, so
    that it settles on the decision boundary; its first radius is the boundary's distance to first order. One descent
    finds for every image what `pgd` at many budgets would bracket. Unlike in the paper, steps are steepest in the norm
    itself and in units of the ball's radius, so that no step size depends on images or region. Nothing is random.
    Shared arguments are described in `AttackOptions`.

    In small regions it may end far too high. Its radius shrinks by a few percent per step, which is too little where
    the first radius is far off, and it aims at whichever class is next, which may change from step to step: in a cell
    of 2% of a photograph, 300 steps ended at 143/255 where 1.3/255 is enough. `minimal_pgd` has
    a radius that adapts faster and keeps its class within a round.

    Args:
        norm: "linf" or "l2".
        steps: gradient steps.
        on_grid: whether to end on the 8-bit grid. Values are rounded to the nearest level; if the image then no longer
            fools, they move by one level along the gradient, as few of them as are needed, within ceil(255 size) levels
            of the clean image; or all changes are rounded away from it. The smallest of these that fools is returned.
            If none does, or with False, the images are as the search left them, and `success_8bit` says whether their
            files fool.

    Returns:
        An AttackResult whose images are the smallest change found that fools, else the one nearest to fooling.

    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2)).eval()
    >>> images = torch.full((1, 3, 4, 4), 0.5)
    >>> labels = model(images).argmax(1)
    >>> from weakspot import Linf
    >>> from weakspot.attacks import pgd
    >>> small = fmn(model, images, labels, on_grid=False).perturbation.abs().max()
    >>> bool(pgd(model, images, labels, budget=Linf(0.99 * float(small))).success[0])
    False
    """
    check_count("steps", steps)
    check_choice("norm", norm, NORMS)
    with attack_context(
        model, images, labels, AttackOptions(None, region, targets, seed, batch_size, progress)
    ) as problem:
        with problem.fused_model():
            best = BestSoFar(problem, NORMS[norm].size, 0.0)
            walk(NORMS[norm], best, steps, problem.progress)
            adversarial = best.on_8bit_grid() if on_grid else best.images
        return problem.result(adversarial)


def walk(
    norm: _Norm,
    best: BestSoFar,
    steps: int,
    progress: Progress | None,
    *,
    largest: Tensor | None = None,
    smooth: bool = False,
) -> None:
    """Pass points along the boundary, and record each in `best` (algorithm 1 of the paper).

    Args:
        norm: of the ball.
        best: what was found so far, on the problem to search.
        steps: how many.
        progress: called with the fraction done.
        largest: (N,) the largest radius; what the range of values allows if None.
        smooth: whether steps follow the gradient itself, as in the paper, instead of being steepest in the norm. They
            are then as long for each value, on average, as the paper's are in an image of 32 x 32 pixels.
    """
    problem = best.problem
    clean = problem.clean
    if largest is None:
        largest = norm.size(torch.maximum(clean, 1 - clean))  # no image can be changed by more
    change, radius = torch.zeros_like(clean), torch.zeros_like(largest)
    values = problem.region.expand_as(clean).flatten(1).sum(1).to(clean)
    for number in range(steps):
        point = problem.apply(change)
        margins, _, direction = problem.loss_and_gradient(point)
        if not number and not smooth:
            correct = margins >= 0
            problem.select(correct).warn_of_zero_gradients(direction[correct])
        best.record(point, margins)
        growth, length, share = (annealed(*ends, number / steps) for ends in (GROWTH, STEPS, SMOOTH_STEPS))
        # The boundary's distance to first order is the margin over the gradient's dual norm.
        ahead = norm.size(change) + margins.clamp(min=0) / norm.dual(direction).clamp(min=1e-30)
        # Beyond the boundary rather than on it, where rounding decides.
        outward = torch.where(best.size.isinf(), ahead, radius) * (1 + growth)
        inward = torch.minimum(radius * (1 - growth), best.size)
        radius = torch.minimum(torch.where(margins < 0, inward, outward), largest)
        ball = spread(radius)
        step = length * ball * norm.unit(direction)
        if smooth:
            step = share * spread(values.sqrt()) * _unit_length(direction)
        change = norm.into(change + step, ball)
        change = (clean + change).clamp(0, 1) - clean
        if progress is not None:
            progress((number + 1) / steps)
    point = problem.apply(change)
    best.record(point, problem.evaluate(point))


def annealed(first: float, last: float, fraction: float) -> float:
    """Cosine annealing, as in the paper."""
    return last + (first - last) * (1 + math.cos(math.pi * fraction)) / 2
