"""Attacks that look for the smallest change: the weight of fooling against size is searched for each image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from weakspot._checks import is_number
from weakspot.attacks.context import Problem, attack_context
from weakspot.attacks.gradient import Progress, check_counts, part_of
from weakspot.attacks.gray_levels import settle
from weakspot.pairs import AttackResult

SEARCHES = 5  # weights tried for each image
FIRST_WEIGHT = 1.0
Size = Callable[[Tensor], Tensor]  # perturbations (N, C, H, W) to sizes (N,)


class Round(Protocol):
    """One descent under fixed weights (N,), which hands every point it passes to `keep`."""

    def __call__(
        self, weights: Tensor, keep: Callable[[Tensor, Tensor], None], progress: Progress | None
    ) -> None: ...


class Smallest:
    """Of all points passed, each image's smallest that fools by `confidence`, else the one nearest to that.

    Attributes:
        images: (N, C, H, W).
        size: (N,) of what fools; infinite where nothing does.
    """

    def __init__(self, problem: Problem, size: Size, confidence: float) -> None:
        self.problem, self.measure, self.confidence = problem, size, confidence
        self.images = problem.clean.clone()
        self.lowest = problem.evaluate(problem.clean)
        self.fooled = self.lowest < -confidence
        self.size = torch.where(self.fooled, 0, torch.inf)

    def keep(self, points: Tensor, margins: Tensor) -> None:
        """Take up points (N, C, H, W) and their margins (N,)."""
        size = self.measure(points - self.problem.clean)
        fools = margins < -self.confidence
        better = torch.where(fools, size < self.size, self.size.isinf() & (margins < self.lowest))
        self.images = torch.where(better[:, None, None, None], points, self.images)
        self.lowest = torch.minimum(margins, self.lowest)
        self.size = torch.where(better & fools, size, self.size)
        self.fooled = self.fooled | fools

    def settled(self) -> Tensor:
        """The images (N, C, H, W) ended on the 8-bit grid: the smallest found there that fools, by `confidence` where
        the image does so now.
        """
        needed = torch.where(self.size.isinf(), 0, -self.confidence).to(self.lowest)
        return settle(self.problem, self.images, self.measure, self.lowest < 0, needed)

    def search(self, loss_and_gradient: Round, progress: Progress | None, searches: int = SEARCHES) -> None:
        """Bisect each image's weight on a logarithmic scale.

        Up tenfold until a round fools (arXiv 1608.04644), and down tenfold until one does not: a weight that is far
        too large fools and leaves a change that is far too large.
        """
        low, high = torch.zeros_like(self.lowest), torch.full_like(self.lowest, torch.inf)
        weights = torch.full_like(self.lowest, FIRST_WEIGHT)
        for number in range(searches):
            self.fooled = torch.zeros_like(self.fooled)
            loss_and_gradient(weights, self.keep, part_of(progress, number, searches))
            high = torch.where(self.fooled, weights, high)
            low = torch.where(self.fooled, low, weights)
            weights = torch.where(
                high.isinf(), 10 * weights, torch.where(low == 0, weights / 10, (low * high).sqrt())
            )


def carlini_wagner(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    region: Tensor | None = None,
    targets: Tensor | None = None,
    steps: int = 1000,
    seed: int = 0,
    learning_rate: float = 0.01,
    confidence: float = 0.0,
    on_grid: bool = True,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> AttackResult:
    """The smallest L2 change that fools (Carlini and Wagner 2017, arXiv 1608.04644, section V).

    Minimizes |d|^2 + c max(margin + confidence, 0) by Adam over w, where the image is (tanh(w) + 1) / 2, so that it
    stays in [0, 1]. The weight c is bisected for each image over five rounds that share `steps`.

    Args:
        model: as for `pgd`, like the other arguments that are not named here.
        images: likewise.
        labels: likewise.
        region: bool (N, 1, H, W) of the sites that may change.
        targets: (N,) classes to reach.
        steps: gradient steps in all.
        seed: kept in the result; nothing is random.
        learning_rate: of Adam.
        confidence: margin by which the image should fool, in logits.
        on_grid: end on the 8-bit grid, so that a picture file of the image fools too (see `attacks.fmn`).
        batch_size: images at once.
        progress: called with the share done.

    Raises:
        ValueError: when an argument does not fit, naming it.
    """
    check_counts(least=SEARCHES, steps=steps)
    check_rates(learning_rate, confidence)
    with attack_context(model, images, labels, region, targets, batch_size, seed) as problem:
        with problem.fused_model():
            found = Smallest(problem, squared, confidence)
            found.search(adam_round(problem, steps // SEARCHES, learning_rate, confidence), progress)
            images = found.settled() if on_grid else found.images
        return problem.result(images)


def adam_round(problem: Problem, steps: int, learning_rate: float, confidence: float) -> Round:
    """Carlini and Wagner's descent."""
    start = torch.atanh((2 * problem.clean - 1).clamp(-1 + 1e-6, 1 - 1e-6))

    def loss_and_gradient(
        weights: Tensor, keep: Callable[[Tensor, Tensor], None], progress: Progress | None
    ) -> None:
        variable, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
        for step in range(1, steps + 1):
            bent = torch.tanh(variable)
            point = torch.where(problem.region, (bent + 1) / 2, problem.clean)
            margins, _, falling = problem.loss_and_gradient(point)
            keep(point, margins)
            active = torch.where(margins + confidence > 0, weights, 0)[:, None, None, None]
            gradient = (2 * (point - problem.clean) - active * falling) * (1 - bent.square()) / 2
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient.square()
            rate = learning_rate / (1 - 0.9**step)
            variable = variable - rate * mean / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
            if progress is not None:
                progress(step / steps)
        point = torch.where(problem.region, (torch.tanh(variable) + 1) / 2, problem.clean)
        keep(point, problem.evaluate(point))

    return loss_and_gradient


def check_rates(learning_rate: float, confidence: float) -> None:
    """Raises ValueError unless both are numbers that a descent can use."""
    if not (is_number(learning_rate) and 0 < learning_rate < float("inf")):
        raise ValueError(f"learning_rate is {learning_rate}; accepted is a finite number above 0")
    if not (is_number(confidence) and 0 <= confidence < float("inf")):
        raise ValueError(f"confidence is {confidence}; accepted is a finite margin of at least 0, in logits")


def squared(perturbation: Tensor) -> Tensor:
    """(N,) squared L2 length."""
    return perturbation.square().flatten(1).sum(1)
