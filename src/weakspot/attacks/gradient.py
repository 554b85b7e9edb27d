"""Gradient attacks: FGSM and PGD inside any region and any budget."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from weakspot.attacks.problem import Problem, attacking
from weakspot.budgets import Budget, Linf
from weakspot.checks import ModelWarning, check_seed
from weakspot.pairs import AttackResult

DEFAULT_BUDGET = Linf(4 / 255)


def fgsm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    budget: Budget = DEFAULT_BUDGET,
    region: Tensor | None = None,
    targets: Tensor | None = None,
    batch_size: int | None = None,
) -> AttackResult:
    """One step of the whole budget along the gradient (Goodfellow et al. 2015, arXiv 1412.6572).

    The gradient is that of the margin; arguments, result, errors and warnings are those of `pgd`.
    """
    with attacking(model, images, labels, region, targets, batch_size) as problem:
        found = []
        for part in problem.batches():
            _, direction = part.descent(part.clean)
            _warn_of_zero_gradients(part, direction)
            still = torch.zeros_like(part.clean)
            found.append(part.apply(budget.project(budget.ascend(direction, still, part.clean), part.clean)))
        return problem.result(torch.cat(found), forwards=1, backwards=1)


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    budget: Budget = DEFAULT_BUDGET,
    region: Tensor | None = None,
    targets: Tensor | None = None,
    steps: int = 20,
    restarts: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> AttackResult:
    """Projected gradient descent on the margin, from random starts (Madry et al. 2018, arXiv 1706.06083).

    The margin z_label - max other z (targeted: max other z - z_target) is driven down; its gradient does not
    fade where the network is certain. Of all iterates, the last included, the one with the lowest margin is
    kept. Steps shrink from twice the budget, its diameter, so that any start can reach the far side, to a small part
    of it; at equal cost this beats a fixed step (`benchmarks/steps.py`).

    Region and budget hold inside the search: the gradient is masked before it is normalised, the start is drawn in
    the region, and pixels outside it come back bit for bit. Each image draws from a generator of its own, seeded by
    `seed` and its content, so its result depends on no other image.

    Args:
        model: any classifier of images in [0, 1]; left as it was.
        images: (N, C, H, W) in [0, 1].
        labels: (N,) classes to leave.
        budget: how much may change.
        region: bool (N, 1, H, W) of the sites that may change; all of them where not given.
        targets: (N,) classes to reach; leaving the label is enough where not given.
        steps: gradient steps per restart, shrinking evenly from twice the budget to 2 / (steps + 1) of it.
        restarts: random starts; each image keeps its best.
        seed: of the random starts.
        batch_size: images at once; bounds memory and changes no result.
        progress: called with the share done, 0 to 1.

    Returns:
        An AttackResult. Its targets are those asked for or, where none were, the classes landed in.

    Raises:
        ValueError: when an argument does not fit, naming it.

    Warns:
        ModelWarning: of train mode, of probabilities in place of logits, of gradients that are zero.
        ImageWarning: of values outside [0, 1].

    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2)).eval()
    >>> images = torch.full((1, 3, 4, 4), 0.5)
    >>> result = pgd(model, images, model(images).argmax(1), budget=Linf(0.5), steps=5)
    >>> bool(result.success[0]), int(result.forwards[0]), int(result.backwards[0])
    (True, 7, 5)
    """
    for name, value in (("steps", steps), ("restarts", restarts)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value}; accepted is a whole number of at least 1")
    check_seed(seed)
    with attacking(model, images, labels, region, targets, batch_size) as problem:
        parts = problem.batches()
        found = []
        for number, part in enumerate(parts):
            best, lowest = part.clean, torch.full_like(part.labels, torch.inf, dtype=part.clean.dtype)
            for restart in range(restarts):
                start = random_start(part, budget, seed, restart)
                for step, (point, margins) in enumerate(_descend(part, budget, start, steps)):
                    better = margins < lowest
                    best = torch.where(better[:, None, None, None], point, best)
                    lowest = torch.where(better, margins, lowest)
                    if progress is not None:
                        progress((number + (restart + step / steps) / restarts) / len(parts))
            found.append(best)
        cost = {"forwards": restarts * (steps + 1), "backwards": restarts * steps}
        return problem.result(torch.cat(found), **cost)


def random_start(problem: Problem, budget: Budget, seed: int, restart: int) -> Tensor:
    """A perturbation drawn inside region and budget: uniform in the cube for Linf, within the ball for others."""
    gaussian, uniform = problem.noise(seed, restart)
    still = torch.zeros_like(problem.clean)
    extreme = budget.ascend(gaussian * problem.region, still, problem.clean)
    return budget.project(extreme * uniform, problem.clean)


def _descend(problem: Problem, budget: Budget, start: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Every iterate and its margins (N,), the start first and the last step's end included."""
    perturbation = start
    for step in range(steps):
        point = problem.apply(perturbation)
        margins, direction = problem.descent(point)
        if step == 0:
            _warn_of_zero_gradients(problem, direction)
        yield point, margins
        ascent = budget.ascend(direction, perturbation, problem.clean)
        perturbation = budget.project(perturbation + 2 * (1 - step / (steps + 1)) * ascent, problem.clean)
    point = problem.apply(perturbation)
    with torch.no_grad():
        yield point, problem.margins(problem.classifier(point))


def _warn_of_zero_gradients(problem: Problem, direction: Tensor) -> None:
    flat = (direction == 0).flatten(1).all(1) & problem.region.flatten(1).any(1)
    if bool(flat.any()):
        warnings.warn(
            f"the gradient of {problem.classifier.name} is zero everywhere in the region for {int(flat.sum())} of "
            f"{len(flat)} images: a gradient attack cannot judge it (masked or saturated gradients)",
            ModelWarning,
            stacklevel=3,
        )
