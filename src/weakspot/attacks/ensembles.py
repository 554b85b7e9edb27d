"""The ensemble: several attacks without parameters, each on the images that the ones before it left standing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from weakspot._checks import ModelWarning, check_budget, warn
from weakspot.attacks.auto_pgd import adaptive_descent
from weakspot.attacks.context import Problem, attack_context
from weakspot.attacks.gradient import DEFAULT_BUDGET, Progress, part_of
from weakspot.attacks.losses import Loss, cross_entropy, dlr
from weakspot.attacks.square_search import square_search
from weakspot.budgets import Budget
from weakspot.pairs import AttackResult

STEPS, QUERIES, TARGETS = (
    50,
    2000,
    9,
)  # half of AutoAttack's "standard" version, which fooled no more in `benchmarks`
SUSPICIOUS = 0.05  # share of images that only a search without gradients fools


def ensemble(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    budget: Budget = DEFAULT_BUDGET,
    region: Tensor | None = None,
    targets: Tensor | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> AttackResult:
    """Judge robustness: the worst case of several attacks per image, with nothing to tune.

    After AutoAttack (Croce and Hein 2020, arXiv 2003.01690): Auto-PGD on cross-entropy and on the difference of logits
    ratio, then on the latter targeted at each of the likeliest nine other classes, 50 steps each, then 2000 queries of
    square search, which needs no gradients. FAB is left out; every attack here keeps the one region and any budget.
    An image is passed on only while nothing has fooled the model on it and on its 8-bit file.

    Args:
        model: as for `pgd`, like the other arguments that are not named here.
        images: likewise.
        labels: likewise.
        budget: likewise.
        region: likewise.
        targets: (N,) classes to reach; the attacks then aim at these only.
        seed: of starts and squares.
        batch_size: images at once.
        progress: called with the share done.

    Returns:
        An AttackResult: per image the first success, else the attempt with the lowest margin.

    Raises:
        ValueError: when an argument does not fit, naming it.

    Warns:
        ModelWarning: where gradients are zero, and where more than 5% of the images fall to the search without
            gradients alone: the model hides its gradients, and attacks that follow them overrate it.
    """
    check_budget(budget)
    with attack_context(model, images, labels, region, targets, batch_size, seed) as problem:
        with problem.fused_model():
            best = problem.clean.clone()
            lowest, logits = problem.logits(best)
            lowest = problem.standing_margins(best, lowest, budget)
            order = logits.scatter(1, problem.labels[:, None], -torch.inf).argsort(
                dim=1, descending=True, stable=True
            )
            stages = _stages(problem, order, budget)
            for number, stage in enumerate(stages):
                here = (lowest >= 0).nonzero()[:, 0]
                if not len(here):
                    break
                before = len(here)
                found, reached = stage(here, part_of(progress, number, len(stages)))
                better = reached < lowest[here]
                best[here[better]], lowest[here[better]] = found[better], reached[better]
            else:
                fallen = before - int((lowest >= 0).sum())
                _warn_of_hidden_gradients(problem, fallen)
        return problem.result(best, budget)


Stage = Callable[[Tensor, Progress | None], tuple[Tensor, Tensor]]


def _stages(problem: Problem, order: Tensor, budget: Budget) -> list[Stage]:
    """The attacks in turn; each takes the numbers of the images that still stand."""
    count = order.shape[1]

    def descent(loss: Loss, stream: int, place: int | None = None) -> Stage:
        def stage(here: Tensor, progress: Progress | None) -> tuple[Tensor, Tensor]:
            part = problem.select(here)
            aimed = part if place is None else part.aiming(order[here, place])
            found, reached = adaptive_descent(
                aimed, budget, loss, steps=STEPS, stream=stream, progress=progress
            )
            return found, reached

        return stage

    def squares(here: Tensor, progress: Progress | None) -> tuple[Tensor, Tensor]:
        # Random numbers of the descents' starts are in streams below a thousand.
        return square_search(problem.select(here), budget, queries=QUERIES, stream=1000, progress=progress)

    stages = [descent(cross_entropy, 0), descent(dlr, 1)]
    if problem.targets is None and count > 2:
        stages += [descent(dlr, 2 + place, place) for place in range(min(TARGETS, count - 1))]
    return [*stages, squares]


def _warn_of_hidden_gradients(problem: Problem, fallen: int) -> None:
    if fallen > SUSPICIOUS * len(problem):
        warn(
            f"{problem.classifier.name} hides its gradients: {fallen} of {len(problem)} images fall to a search "
            "without gradients though every attack that follows them failed; gradients alone overrate this model",
            ModelWarning,
        )
