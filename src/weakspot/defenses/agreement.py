"""Agreement: whether a step along a lead's gradient changes the defended model's margin as the gradient predicts."""

from __future__ import annotations

import torch
from torch import Tensor

from weakspot.attacks.gradient import random_start
from weakspot.attacks.problem import attacking
from weakspot.budgets import Budget
from weakspot.classifier import Classifier, default_batch, evaluating, margin
from weakspot.defenses.randomness import one_draw

STEP = 1 / 50  # of the budget
LEAST, MOST = 0.5, 2.0  # times the predicted change, at a random point
LEADING = 0.25  # times the predicted change, where an attack ended: competing classes come near there
STREAM = 900  # of each image's random numbers; attacks use those below


def agreement(
    defended: Classifier, lead: Classifier, images: Tensor, labels: Tensor, *, budget: Budget, seed: int
) -> Tensor:
    """(N,) bool: a short step down the lead's gradient changes the defended margin by .5 to 2 times the prediction.

    The step is a fiftieth of the budget from a random point of the ball; a random defense plays one draw throughout.
    Masked gradients, which are zero or wrong, do not agree.

    Args:
        defended: whose margin is measured.
        lead: whose gradient predicts; `defended` itself for its own gradients.
        images: (N, C, H, W) in [0, 1].
        labels: (N,).
        budget: of the attacks that are to be judged.
        seed: of points and draws.
    """
    with attacking(defended, images, labels, None, None, None, seed) as problem:
        points = problem.apply(random_start(problem, budget, STREAM))
    ratio = _ratio(defended, lead, points, labels, budget, seed)
    return (ratio >= LEAST) & (ratio <= MOST)


def leads_on(
    defended: Classifier, lead: Classifier, points: Tensor, labels: Tensor, *, budget: Budget, seed: int
) -> Tensor:
    """(N,) bool: a short step from these points (N, C, H, W) lowers the margin by at least a quarter of the prediction.

    At the points where an attack ended, a model whose slope vanishes near its decision boundary does not lead on,
    though its gradients agree elsewhere. Kinks between competing classes are common there in any model, so less is
    asked than of `agreement`.
    """
    return _ratio(defended, lead, points, labels, budget, seed) >= LEADING


def _ratio(
    defended: Classifier, lead: Classifier, points: Tensor, labels: Tensor, budget: Budget, seed: int
) -> Tensor:
    """(N,) the change of the defended margin over the predicted one; NaN where no fall is predicted."""
    size = default_batch(points)
    with evaluating(defended), evaluating(lead):
        parts = zip(points.split(size), labels.split(size), strict=True)
        return torch.cat([_ratio_of_batch(defended, lead, *part, budget, seed) for part in parts])


def _ratio_of_batch(
    defended: Classifier, lead: Classifier, points: Tensor, labels: Tensor, budget: Budget, seed: int
) -> Tensor:
    start = points.detach().clone().requires_grad_()
    with one_draw(lead, seed):
        led = margin(lead(start), labels)
    if not led.requires_grad:
        return torch.full_like(led, torch.nan)
    (gradient,) = torch.autograd.grad(led.sum(), start, allow_unused=True, materialize_grads=True)
    step = STEP * budget.ascend(-gradient, torch.zeros_like(points), points)
    moved = (points + step).clamp(0, 1)
    predicted = (gradient * (moved - points)).flatten(1).sum(1)
    with torch.no_grad():
        with one_draw(defended, seed):
            before = margin(defended(points), labels)
        with one_draw(defended, seed):
            after = margin(defended(moved), labels)
    return torch.where(predicted < 0, (after - before) / predicted, torch.nan)
