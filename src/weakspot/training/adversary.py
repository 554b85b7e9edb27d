"""The adversary inside a training: it perturbs the attacked images of a batch, in little more than its passes."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from weakspot._random import float32_noise
from weakspot.budgets import Budget, Linf, prepare
from weakspot.training.config import ResolvedConfig, find_recipe, limit_of

FAST_STEP = 1.25  # of the budget: alpha of Wong et al. 2020 (arXiv 2001.03994, algorithm 3)
HALF_FACTOR = 1024.0
TRADES_START = 1e-3  # standard deviation of Zhang et al. 2019; at the image itself the gradient is zero


def perturbed(
    network: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    noise: Tensor,
    config: ResolvedConfig,
    *,
    region: Tensor | None = None,
) -> Tensor:
    """The adversarial images (n, C, H, W) of a recipe.

    Args:
        network: images to logits, in eval mode: the adversary must not change batch-norm statistics or draw dropout.
        images: (n, C, H, W) in [0, 1].
        labels: (n,).
        noise: (n, C, H, W) uniform in (-1, 1), which determines the random start.
        config: recipe, budget, steps and step size.
        region: bool (n, 1, H, W) that may change. Default: everywhere.
    """
    recipe, budget = find_recipe(config.recipe), config.budget
    if recipe.search == "noise":
        return images + _start(budget, images, region, noise)

    # In fractions of the budget, because a step of the protocol spends the whole budget.
    steps, size = config.steps, config.step_size / max(limit_of(budget), 1e-12)
    if recipe.search == "step":
        steps, size = 1, FAST_STEP
    if recipe.trades:
        with torch.no_grad():
            clean = F.log_softmax(network(images), 1)
        noise = noise * min(1.0, TRADES_START / max(limit_of(budget), 1e-12))

    # Steps depend on the direction of the gradient only. In half precision the factor keeps it above zero.
    factor = HALF_FACTOR if config.precision == "16-mixed" else 1.0

    def loss(point: Tensor) -> Tensor:
        logits = network(point)
        if recipe.trades:  # KL(f(x) || f(x')), the inner maximization of equation 3 of arXiv 1901.08573
            return factor * F.kl_div(F.log_softmax(logits, 1), clean, reduction="sum", log_target=True)
        return factor * F.cross_entropy(logits, labels, reduction="sum")

    if type(budget) is Linf:
        return _sign_descent(loss, images, region, noise, steps=steps, size=size * budget.eps, eps=budget.eps)
    point, ball = images + _start(budget, images, region, noise), prepare(budget, images)
    for _ in range(steps):
        # Mask before the step: a budget other than L-infinity shares its length among all sites.
        gradient = _gradient(loss, point)
        gradient = gradient if region is None else gradient * region
        step = ball.steepest_step(gradient, point - images)
        point = images + ball.project(point - images + size * step, region)
    return point


def _sign_descent(
    loss: Callable[[Tensor], Tensor],
    images: Tensor,
    region: Tensor | None,
    noise: Tensor,
    *,
    steps: int,
    size: float,
    eps: float,
) -> Tensor:
    """PGD in an L-infinity cube.

    The budget, the range [0, 1] and the region are one pair of bounds, so that one clamp is the whole projection.
    """
    reach = eps if region is None else eps * region
    low, high = (images - reach).clamp_(min=0), (images + reach).clamp_(max=1)
    point = (images + reach * noise).clamp_(0, 1)
    for _ in range(steps):
        point = point.add(_gradient(loss, point).sign_(), alpha=size).clamp_(low, high)
    return point


def _gradient(loss: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    with torch.enable_grad():
        tracked = point.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(tracked), tracked, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "model must pass gradients to its input to be trained on attacked images, got none (the recipes standard "
            "and noise need none)"
        )
    return gradient


def _start(budget: Budget, images: Tensor, region: Tensor | None, noise: Tensor) -> Tensor:
    """A random perturbation: uniform in an L-infinity cube, else a random length along a random direction."""
    if type(budget) is Linf:
        reach = budget.eps if region is None else budget.eps * region
        return (images + reach * noise).clamp_(0, 1) - images
    # A random direction at a random fraction of the budget, from one number of the noise.
    inside = noise if region is None else noise * region
    extreme = budget.steepest_step(inside, torch.zeros_like(images), images)
    length = noise[:, :1, :1, :1].abs()
    return prepare(budget, images).project(extreme * length, region)


def trades_loss(clean: Tensor, attacked: Tensor, labels: Tensor, beta: float) -> Tensor:
    """CE(f(x), y) + beta KL(f(x) || f(x')), equation 5 of Zhang et al. 2019 (arXiv 1901.08573).

    Args:
        clean: (N, K) logits.
        attacked: (n, K) logits of the first n images under attack.
        labels: (N,).
        beta: weight of the divergence.
    """
    loss = F.cross_entropy(clean, labels)
    if not len(attacked):
        return loss
    divergence = F.kl_div(
        F.log_softmax(attacked, 1), F.log_softmax(clean[: len(attacked)], 1), reduction="sum", log_target=True
    )
    return loss + beta * divergence / len(clean)


def uniform_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """(n, C, H, W) uniform in [-1, 1) in steps of 2**-15, in channels_last layout.

    Every 64-bit integer that is drawn gives four values, which takes a fraction of the time of `torch.rand`.
    """
    count, channels, height, width = shape
    size = count * channels * height * width
    # None means no upper end, so that all 64 bits are random.
    drawn = torch.empty(-(-size // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    # 16 bits per value; stored channels last, as the images are.
    levels = drawn.view(torch.int16)[:size].view(count, height, width, channels)
    return levels.permute(0, 3, 1, 2).to(torch.float32).div_(2**15)


def scattered(region: Tensor, places: Tensor, count: int, seed: int) -> Tensor:
    """Masks with as many sites as each mask of `region` has, at random sites.

    Args:
        region: bool (n, 1, H, W).
        places: (n,) place of each image among the attacked images of the whole batch, so that a process which has
            only a part of the batch draws the same masks.
        count: attacked images of the whole batch.
        seed: of the masks.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = float32_noise(generator, count, *region.shape[1:])[places].flatten(1)
    # The sites of the lowest random scores, as many as the region has: exact area, uniform sites.
    ranks = scores.argsort(1).argsort(1)
    return (ranks < region.flatten(1).sum(1, keepdim=True)).view_as(region)
