"""Gradient attacks: FGSM, its iterations, and PGD inside any region and any budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from weakspot import _random
from weakspot._checks import ModelWarning, check_budget, is_number, warn
from weakspot.attacks.context import Problem, attack_context
from weakspot.attacks.losses import Loss, find_loss
from weakspot.budgets import Budget, Linf
from weakspot.pairs import AttackResult

DEFAULT_BUDGET = Linf(4 / 255)
Progress = Callable[[float], None]


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
    """One step of the whole budget along the gradient (Goodfellow et al. 2015, arXiv 1412.6572).

    Arguments, result, errors and warnings are those of `pgd`.
    """
    falling = find_loss(loss)
    check_budget(budget)
    with attack_context(model, images, labels, region, targets, batch_size) as problem:
        with problem.fused_model():
            direction = problem.loss_and_gradient(problem.clean, falling).direction
        warn_of_zero_gradients(problem, direction)
        step = budget.steepest_step(direction, torch.zeros_like(problem.clean), problem.clean)
        return problem.result(problem.apply(problem.project(budget, step)), budget)


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
    progress: Progress | None = None,
) -> AttackResult:
    """FGSM in steps of one size from the image itself (Kurakin et al. 2017, arXiv 1607.02533); nothing is random.

    Args:
        model: as for `pgd`, like the other arguments that are not named here.
        images: likewise.
        labels: likewise.
        budget: likewise.
        region: likewise.
        targets: (N,) classes to reach: the targeted iterative method.
        steps: each of budget / steps.
        momentum: share of the gradients so far, each scaled to mean size one, that is added to the next; 1 is
            MI-FGSM (Dong et al. 2018, arXiv 1710.06081).
        loss: what is driven down.
        stop_early: an image leaves the search as soon as it and its 8-bit file fool.
        batch_size: images at once.
        progress: called with the share done.
    """
    falling = find_loss(loss)
    check_counts(steps=steps)
    _check_momentum(momentum)
    check_budget(budget)
    with attack_context(model, images, labels, region, targets, batch_size) as problem:
        search = Search(problem, budget, falling, momentum, stop_early)
        with problem.fused_model():
            search.run(torch.zeros_like(problem.clean), _even_steps(budget, steps), progress)
        return problem.result(search.best, budget)


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
    progress: Progress | None = None,
) -> AttackResult:
    """Projected gradient descent from random starts (Madry et al. 2018, arXiv 1706.06083).

    By default the margin z_label - max other z (targeted: max other z - z_target) is driven down; its gradient does
    not fade where the network is certain. Of all iterates, the last included, the one with the lowest margin is
    kept. Steps shrink from twice the budget, its diameter, so that any start can reach the far side, to a small part
    of it; at equal cost this beats a fixed step (`benchmarks/steps.py`).

    Region and budget hold inside the search: the gradient is masked before it is normalized, the start is drawn in
    the region, and pixels outside it come back bit for bit. Each image draws by `seed` and its own content, so its
    result depends on no other image.

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
        momentum: share of the gradients so far that is added to the next, each scaled to mean size one; 0 for none.
        loss: what is driven down: "margin", "cross_entropy", "dlr" or a function (logits (N, K), labels (N,),
            targets (N,) or None) -> values (N,). Success and the best iterate are judged by the margin all the same.
        stop_early: an image leaves the search as soon as it and its 8-bit file fool: faster, with a margin just below
            zero instead of the lowest found.
        batch_size: images through the model at once; bounds its memory and changes no result beyond rounding.
        progress: called with the share done, 0 to 1.

    Returns:
        An AttackResult. Its targets are those asked for or, where none were, the adversarial classes.

    Raises:
        ValueError: when an argument does not fit, naming it.

    Warns:
        ModelWarning: of train mode, of probabilities in place of logits, of gradients that are zero.
        ImageWarning: of values outside [0, 1].

    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2)).eval()
    >>> images = torch.full((1, 3, 4, 4), 0.5)
    >>> result = pgd(model, images, model(images).argmax(1), budget=Linf(0.5), steps=5)
    >>> bool(result.success[0]), int(result.n_forward[0]), int(result.n_backward[0])
    (True, 8, 5)
    """
    falling = find_loss(loss)
    check_counts(steps=steps, restarts=restarts)
    _check_momentum(momentum)
    sizes = [2 * (1 - step / (steps + 1)) for step in range(steps)]
    check_budget(budget)
    with attack_context(model, images, labels, region, targets, batch_size, seed) as problem:
        search = Search(problem, budget, falling, momentum, stop_early)
        with problem.fused_model():
            for restart in range(restarts):
                start = random_start(problem, budget, restart)
                fraction = part_of(progress, restart, restarts)
                search.run(start, sizes, fraction)
        return problem.result(search.best, budget)


def _even_steps(budget: Budget, steps: int) -> list[float]:
    """Steps that together go the budget's whole length; where each is the way to the optimum, shares of the rest."""
    if getattr(budget, "steps_to_optimum", False):
        return [1 / (steps - step) for step in range(steps)]
    return [1 / steps] * steps


def random_start(problem: Problem, budget: Budget, stream: int) -> Tensor:
    """A perturbation drawn inside region and budget: uniform in the cube for Linf, within the ball for others."""
    shape = problem.clean.shape[1:]
    gaussian = _random.normal(problem.keys, 2 * stream, *shape).to(problem.clean)
    uniform = _random.uniform(problem.keys, 2 * stream + 1, *shape).to(problem.clean)
    still = torch.zeros_like(problem.clean)
    extreme = budget.steepest_step(gaussian * problem.region, still, problem.clean)
    return problem.project(budget, extreme * uniform)


class Search:
    """Descents on one problem, and the best point that any of them has passed.

    Attributes:
        best: (N, C, H, W) the images with the lowest margins so far.
        lowest: (N,) those margins.
    """

    def __init__(
        self, problem: Problem, budget: Budget, loss: Loss, momentum: float, stop_early: bool
    ) -> None:
        self.problem, self.budget, self.loss = problem, budget, loss
        self.momentum, self.stop_early = momentum, stop_early
        self.best = problem.clean.clone()
        self.lowest = torch.full_like(problem.clean[:, 0, 0, 0], torch.inf)
        self.warned = False

    def run(self, perturbation: Tensor, sizes: Sequence[float], progress: Progress | None) -> None:
        """Descend from a perturbation, in steps of these sizes in units of the budget."""
        here = torch.arange(len(self.problem), device=perturbation.device)
        if self.stop_early:
            here = here[self.lowest >= 0]
        part, perturbation = self.problem.select(here), perturbation[here]
        velocity = torch.zeros_like(perturbation)
        for number, size in enumerate(sizes):
            if not len(here):
                break
            point = part.apply(perturbation)
            margins, _, direction = part.loss_and_gradient(point, self.loss)
            if not self.warned:
                warn_of_zero_gradients(part, direction)
                self.warned = True
            if self.stop_early:
                margins = part.standing_margins(point, margins, self.budget)
            self._keep(here, point, margins)
            if self.stop_early and bool((margins < 0).any()):
                left = margins >= 0
                here, part, perturbation = here[left], part.select(left), perturbation[left]
                direction, velocity = direction[left], velocity[left]
            if self.momentum:
                scale = direction.abs().mean((1, 2, 3), keepdim=True)
                velocity = self.momentum * velocity + direction / scale.clamp(min=1e-30)
                direction = velocity
            step = self.budget.steepest_step(direction, perturbation, part.clean)
            perturbation = part.project(self.budget, perturbation + size * step)
            if progress is not None:
                progress((number + 1) / len(sizes))
        if len(here):
            point = part.apply(perturbation)
            margins = part.evaluate(point)
            if self.stop_early:
                margins = part.standing_margins(point, margins, self.budget)
            self._keep(here, point, margins)
        if progress is not None:
            progress(1.0)

    def _keep(self, rows: Tensor, images: Tensor, margins: Tensor) -> None:
        better = margins < self.lowest[rows]
        self.best[rows[better]] = images[better]
        self.lowest[rows[better]] = margins[better]


def warn_of_zero_gradients(problem: Problem, direction: Tensor) -> None:
    """Warn where a gradient attack can judge nothing."""
    flat = (direction == 0).flatten(1).all(1) & problem.region.flatten(1).any(1)
    if bool(flat.any()):
        warn(
            f"the gradient of {problem.classifier.name} is zero everywhere in the region for {int(flat.sum())} of "
            f"{len(flat)} images: a gradient attack cannot judge it (masked or saturated gradients)",
            ModelWarning,
        )


def part_of(progress: Progress | None, number: int, count: int) -> Progress | None:
    """Progress of one of several pieces as progress of the whole."""
    if progress is None:
        return None
    return lambda fraction: progress((number + fraction) / count)


def check_counts(*, least: int = 1, **counts: int) -> None:
    """Raises ValueError unless every argument is a whole number of at least `least`."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is {value}; accepted is a whole number of at least {least}")


def _check_momentum(momentum: float) -> None:
    if not is_number(momentum) or not 0 <= momentum <= 1:
        raise ValueError(f"momentum is {momentum}; accepted is a share from 0 to 1")
