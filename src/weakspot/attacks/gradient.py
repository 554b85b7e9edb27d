"""Gradient attacks: FGSM, its iterations, and PGD inside any region and any budget."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from weakspot import _random
from weakspot._checks import check_count, is_number
from weakspot._progress import Progress, ProgressOption, part
from weakspot.attacks.context import DEFAULT_BUDGET, AttackOptions, Problem, attack_context
from weakspot.attacks.losses import Loss, find_loss
from weakspot.budgets import Budget
from weakspot.pairs import AttackResult


def fgsm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    budget: Budget = DEFAULT_BUDGET,
    region: Tensor | None = None,
    targets: Tensor | None = None,
    loss: str | Loss = "margin",
    batch_size: int | None = None,
) -> AttackResult:
    """Take one step of the whole budget along the gradient (Goodfellow et al. 2015, arXiv 1412.6572).

    Shared arguments are described in `AttackOptions`.

    Args:
        loss: what is driven down, as in `pgd`.
    """
    lowered = find_loss(loss)
    options = AttackOptions(budget, region, targets, batch_size=batch_size)
    with attack_context(model, images, labels, options) as problem:
        with problem.fused_model():
            direction = problem.loss_and_gradient(problem.clean, lowered).direction
        problem.warn_of_zero_gradients(direction)
        step = problem.ball.steepest_step(direction, torch.zeros_like(problem.clean))
        return problem.result(problem.apply(problem.project(step)))


def bim(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    budget: Budget = DEFAULT_BUDGET,
    region: Tensor | None = None,
    targets: Tensor | None = None,
    steps: int = 10,
    momentum: float = 0.0,
    loss: str | Loss = "cross_entropy",
    stop_early: bool = False,
    batch_size: int | None = None,
    progress: ProgressOption = None,
) -> AttackResult:
    """Take steps of one size from the image itself (Kurakin et al. 2017, arXiv 1607.02533); nothing is random.

    Shared arguments are described in `AttackOptions`; with targets, this is the targeted iterative method.

    Args:
        steps: each of budget / steps.
        momentum: fraction of the previous gradients, each scaled to mean size one, that is added to the next; 1 is
            MI-FGSM (Dong et al. 2018, arXiv 1710.06081, equation 6).
        loss: what is driven down, as in `pgd`.
        stop_early: whether an image leaves the search as soon as it and its 8-bit file fool.
    """
    lowered = find_loss(loss)
    check_count("steps", steps)
    _check_momentum(momentum)
    options = AttackOptions(budget, region, targets, batch_size=batch_size, progress=progress)
    with attack_context(model, images, labels, options) as problem:
        search = Search(problem, lowered, momentum=momentum, stop_early=stop_early)
        with problem.fused_model():
            search.run(torch.zeros_like(problem.clean), _even_steps(problem, steps), problem.progress)
        return problem.result(search.best)


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
    momentum: float = 0.0,
    loss: str | Loss = "margin",
    stop_early: bool = False,
    batch_size: int | None = None,
    progress: ProgressOption = None,
) -> AttackResult:
    """Projected gradient descent from random starts (Madry et al. 2018, arXiv 1706.06083, section 2.1).

    By default it drives down the margin z_label - max other z (targeted: max other z - z_target), whose gradient does
    not vanish where the network is certain. Of all iterates, including the last, the one with the lowest margin is
    returned. Steps shrink from twice the budget, its diameter, so that any start can reach the far side, to a small
    part of it; at equal cost this beats a fixed step (`benchmarks/steps.py`).

    Region and budget hold inside the search: the gradient is masked before it is normalized, and the start is drawn in
    the region. Shared arguments are described in `AttackOptions`.

    Args:
        steps: gradient steps per restart, shrinking evenly from twice the budget to 4 / (steps + 1) of it.
        restarts: random starts; the best result of each image is returned.
        momentum: fraction of the previous gradients, each scaled to mean size one, that is added to the next.
        loss: what is driven down: "margin", "cross_entropy", "dlr" or a function (logits (N, K), labels (N,), targets
            (N,) or None) -> values (N,). Success and the best iterate are judged by the margin all the same.
        stop_early: whether an image leaves the search as soon as it and its 8-bit file fool. This is faster, with a
            margin just below zero instead of the lowest one.

    Returns:
        An AttackResult. Its targets are those given or, without targets, the adversarial classes.

    >>> from weakspot import Linf
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2)).eval()
    >>> images = torch.full((1, 3, 4, 4), 0.5)
    >>> result = pgd(model, images, model(images).argmax(1), budget=Linf(0.5), steps=5)
    >>> bool(result.success[0]), int(result.n_forward[0]), int(result.n_backward[0])
    (True, 8, 5)
    """
    lowered = find_loss(loss)
    check_count("steps", steps)
    check_count("restarts", restarts)
    _check_momentum(momentum)
    sizes = shrinking_steps(steps)
    options = AttackOptions(budget, region, targets, seed, batch_size, progress)
    with attack_context(model, images, labels, options) as problem:
        search = Search(problem, lowered, momentum=momentum, stop_early=stop_early)
        with problem.fused_model():
            for restart in range(restarts):
                start = random_start(problem, restart)
                search.run(start, sizes, part(problem.progress, restart, restart + 1, restarts))
        return problem.result(search.best)


def shrinking_steps(steps: int) -> list[float]:
    """The step sizes of `pgd`, in units of the budget.

    >>> shrinking_steps(3)
    [2.0, 1.5, 1.0]
    """
    return [2 * (1 - step / (steps + 1)) for step in range(steps)]


def _even_steps(problem: Problem, steps: int) -> list[float]:
    """Steps that together cover the budget; if each leads to the optimum, fractions of the way that is left."""
    if problem.ball.steps_to_optimum:
        return [1 / (steps - step) for step in range(steps)]
    return [1 / steps] * steps


def random_start(problem: Problem, stream: int) -> Tensor:
    """A perturbation drawn inside region and budget: uniform in the cube for Linf, within the ball for others."""
    shape = problem.clean.shape[1:]
    gaussian = _random.normal(problem.keys, 2 * stream, *shape).to(problem.clean)
    uniform = _random.uniform(problem.keys, 2 * stream + 1, *shape).to(problem.clean)
    # The steepest step along a Gaussian is a random point of the ball's surface; for Linf a corner of the cube.
    surface = problem.ball.steepest_step(gaussian * problem.region, torch.zeros_like(problem.clean))
    return problem.project(surface * uniform)


class Search:
    """Descents on one problem, and the best point that any of them has passed.

    Attributes:
        best: (N, C, H, W) the images with the lowest margins so far.
        lowest: (N,) those margins.
        warned: whether zero gradients have been looked for.
    """

    def __init__(
        self, problem: Problem, loss: Loss, *, momentum: float = 0.0, stop_early: bool = False
    ) -> None:
        self.problem, self.loss = problem, loss
        self.momentum, self.stop_early = momentum, stop_early
        self.best = problem.clean.clone()
        self.lowest = torch.full_like(problem.clean[:, 0, 0, 0], torch.inf)
        self.warned = False

    def run(self, perturbation: Tensor, sizes: Sequence[float], progress: Progress | None = None) -> None:
        """Descend from a perturbation (N, C, H, W), in steps of these sizes in units of the budget."""
        # The images still in the search; everything else in the loop has one row for each of them.
        active = torch.arange(len(self.problem), device=perturbation.device)
        if self.stop_early:
            active = active[self.lowest >= 0]
        part, perturbation = self.problem.select(active), perturbation[active]
        velocity = torch.zeros_like(perturbation)
        for number, size in enumerate(sizes):
            if not len(active):
                break
            point = part.apply(perturbation)
            margins, _, direction = part.loss_and_gradient(point, self.loss)
            if not self.warned:
                part.warn_of_zero_gradients(direction)
                self.warned = True
            unfooled = self._note(active, part, point, margins)
            if not bool(unfooled.all()):
                active, part, perturbation = active[unfooled], part.select(unfooled), perturbation[unfooled]
                direction, velocity = direction[unfooled], velocity[unfooled]
            if self.momentum:
                # Gradients of mean size one, so that their magnitudes over the steps do not matter.
                scale = direction.abs().mean((1, 2, 3), keepdim=True)
                velocity = self.momentum * velocity + direction / scale.clamp(min=1e-30)
                direction = velocity
            step = part.ball.steepest_step(direction, perturbation)
            perturbation = part.project(perturbation + size * step)
            if progress is not None:
                progress((number + 1) / len(sizes))
        if len(active):
            point = part.apply(perturbation)
            self._note(active, part, point, part.evaluate(point))
        if progress is not None:
            progress(1.0)

    def _note(self, rows: Tensor, part: Problem, points: Tensor, margins: Tensor) -> Tensor:
        """Remember the points of lower margin; returns which images (n,) go on with the search."""
        if self.stop_early:
            margins = part.file_margins(points, margins)
        better = margins < self.lowest[rows]
        self.best[rows[better]] = points[better]
        self.lowest[rows[better]] = margins[better]
        return margins >= 0 if self.stop_early else torch.ones_like(better)


def _check_momentum(momentum: float) -> None:
    if not is_number(momentum) or not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be between 0 and 1, got {momentum!r}")
