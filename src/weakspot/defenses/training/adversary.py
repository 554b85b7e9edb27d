"""The adversary inside a training: a perturbation of every attacked image, in few operations besides the passes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from weakspot.budgets import Budget, Linf
from weakspot.defenses.training.recipes import Recipe
from weakspot.defenses.training.settings import Settings

Network = Callable[[Tensor], Tensor]
FAST_STEP = 1.25  # of the budget (Wong et al. 2020, arXiv 2001.03994)
HALF_FACTOR = 1024.0
NEAR = 1e-3  # deviation of TRADES' start: at the image itself its gradient is zero


def perturbed(
    network: Network,
    images: Tensor,
    labels: Tensor,
    region: Tensor | None,
    noise: Tensor,
    recipe: Recipe,
    settings: Settings,
) -> Tensor:
    """The images as the adversary leaves them, (n, C, H, W).

    Args:
        network: images to logits, in eval mode: the adversary moves no running statistics and drops nothing out.
        images: (n, C, H, W) in [0, 1].
        labels: (n,).
        region: bool (n, 1, H, W) that may change; everything where None.
        noise: (n, C, H, W) uniform in (-1, 1): where the random start lies.
        recipe: what is sought.
        settings: its numbers.
    """
    budget = settings.budget
    if recipe.search == "noise":
        return images + _start(budget, images, region, noise)
    steps, size = settings.steps, settings.step_size / max(_limit(budget), 1e-12)
    if recipe.search == "step":
        steps, size = 1, FAST_STEP
    if recipe.trades:
        with torch.no_grad():
            wanted = F.log_softmax(network(images), 1)
        noise = noise * min(1.0, NEAR / max(_limit(budget), 1e-12))

    # Steps go by the gradient's direction alone, so any factor will do that keeps it out of half precision's zero.
    factor = HALF_FACTOR if settings.precision == "16-mixed" else 1.0

    def loss(point: Tensor) -> Tensor:
        logits = network(point)
        if recipe.trades:
            return factor * F.kl_div(F.log_softmax(logits, 1), wanted, reduction="sum", log_target=True)
        return factor * F.cross_entropy(logits, labels, reduction="sum")

    if type(budget) is Linf:
        return _descend_cube(loss, images, region, noise, steps, size * budget.eps, budget.eps)
    point = images + _start(budget, images, region, noise)
    for _ in range(steps):
        gradient = _gradient(loss, point)
        gradient = gradient if region is None else gradient * region
        step = budget.ascend(gradient, point - images, images)
        point = images + _project(budget, point - images + size * step, images, region)
    return point


def _descend_cube(
    loss: Callable[[Tensor], Tensor],
    images: Tensor,
    region: Tensor | None,
    noise: Tensor,
    steps: int,
    step: float,
    eps: float,
) -> Tensor:
    """Steps of the sign inside the cube. Budget, range and region are one pair of bounds, met in one operation."""
    room = eps if region is None else eps * region
    low, high = (images - room).clamp_(min=0), (images + room).clamp_(max=1)
    point = (images + room * noise).clamp_(0, 1)
    for _ in range(steps):
        gradient = _gradient(loss, point)
        point = point.add(gradient.sign_(), alpha=step).clamp_(low, high)
    return point


def _gradient(loss: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    with torch.enable_grad():
        tracked = point.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(tracked), tracked)
    return gradient


def _start(budget: Budget, images: Tensor, region: Tensor | None, noise: Tensor) -> Tensor:
    """For a cube uniform inside it; for others along a random admissible direction, as far as a number says."""
    if type(budget) is Linf:
        room = budget.eps if region is None else budget.eps * region
        return (images + room * noise).clamp_(0, 1) - images
    inside = noise if region is None else noise * region
    extreme = budget.ascend(inside, torch.zeros_like(images), images)
    return _project(budget, extreme * noise[:, :1, :1, :1].abs(), images, region)


def _project(budget: Budget, perturbation: Tensor, images: Tensor, region: Tensor | None) -> Tensor:
    return budget.project(perturbation, images, region=region)


def _limit(budget: Budget) -> float:
    """The size of a budget in its own unit."""
    return float(getattr(budget, "eps", 1.0))
