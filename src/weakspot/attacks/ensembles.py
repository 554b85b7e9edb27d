"""The ensemble: several attacks without parameters, each on the images that the earlier ones did not fool.

Its searches are Auto-PGD (Croce and Hein 2020, arXiv 2003.01690), projected gradient descent that sets its own step,
and square search (Andriushchenko et al. 2020, arXiv 1912.00049): random squares, accepted where they help.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from weakspot import _random
from weakspot._checks import ModelWarning, check_budget, warn
from weakspot._progress import Progress, ProgressOption, part
from weakspot.attacks.context import DEFAULT_BUDGET, AttackOptions, Problem, attack_context
from weakspot.attacks.gradient import random_start
from weakspot.attacks.losses import Loss, cross_entropy, dlr
from weakspot.budgets import Budget, Linf
from weakspot.pairs import AttackResult

# Half of AutoAttack's "standard" version; twice as much fooled no more in `benchmarks`.
STEPS, QUERIES, CLASSES = 50, 2000, 9
SUSPICIOUS = 0.05  # fraction of images that only a search without gradients fools
# Of Auto-PGD:
RHO = 0.75  # fraction of the steps since a checkpoint that must have lowered the loss, or the step is halved
ALPHA = 0.75  # weight of the new step against the previous one (algorithm 1)
# Of square search:
FIRST_FRACTION = 0.8  # of the image in the first squares, as the authors set it for L-infinity
HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries
BLOCK = 64  # queries whose random numbers are drawn at once

Stage = Callable[[Tensor, Progress | None], tuple[Tensor, Tensor]]


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
    progress: ProgressOption = None,
) -> AttackResult:
    """Judge robustness: the worst case of several attacks per image, with nothing to tune.

    After AutoAttack (Croce and Hein 2020, arXiv 2003.01690): Auto-PGD on cross-entropy and on the difference of logits
    ratio, then on the latter targeted at each of the nine most likely other classes, 50 steps each, then 2000 queries
    of square search, which needs no gradients. FAB is omitted; every attack here obeys the one region and any budget.
    An image is passed on only while nothing has fooled the model on both it and its 8-bit file.

    The arguments are described in `AttackOptions`. With targets, all attacks aim at these only.

    Returns:
        An AttackResult: for each image the first success, else the attempt with the lowest margin.

    Warns:
        ModelWarning: if gradients are zero, or if more than 5% of the images fall only to the search without gradients:
            the model then hides its gradients, and attacks that follow them overrate it.
    """
    check_budget(budget)  # also where every image is misclassified from the start, so that no stage runs
    options = AttackOptions(budget, region, targets, seed, batch_size, progress)
    with attack_context(model, images, labels, options) as problem:
        with problem.fused_model():
            best = problem.clean.clone()
            lowest, logits = problem.logits(best)
            lowest = problem.file_margins(best, lowest)
            # The label itself comes last in the order of classes.
            others = logits.scatter(1, problem.labels[:, None], -torch.inf)
            stages = _stages(problem, others.argsort(dim=1, descending=True, stable=True))
            for number, stage in enumerate(stages):
                active = (lowest >= 0).nonzero()[:, 0]
                if not len(active):
                    break
                before = len(active)
                points, margins = stage(active, part(problem.progress, number, number + 1, len(stages)))
                better = margins < lowest[active]
                best[active[better]], lowest[active[better]] = points[better], margins[better]
            else:  # only if the last stage, which needs no gradients, was run
                _warn_of_hidden_gradients(problem, before - int((lowest >= 0).sum()))
        return problem.result(best)


def _stages(problem: Problem, order: Tensor) -> list[Stage]:
    """The attacks in turn; each takes the numbers of the images that nothing has fooled.

    Args:
        problem: of all images.
        order: (N, K) other classes of each image, the most likely first.
    """
    count = order.shape[1]

    def descent(loss: Loss, stream: int, place: int | None = None) -> Stage:
        def stage(active: Tensor, progress: Progress | None) -> tuple[Tensor, Tensor]:
            part = problem.select(active)
            if place is not None:
                part = replace(part, loss_targets=order[active, place])
            return adaptive_descent(part, loss, steps=STEPS, stream=stream, progress=progress)

        return stage

    def squares(active: Tensor, progress: Progress | None) -> tuple[Tensor, Tensor]:
        # The descents' starts draw from streams below a thousand.
        return square_search(problem.select(active), queries=QUERIES, stream=1000, progress=progress)

    stages = [descent(cross_entropy, 0), descent(dlr, 1)]
    # With two classes, the untargeted descents aim at the only other one already.
    if problem.targets is None and count > 2:
        stages += [descent(dlr, 2 + place, place) for place in range(min(CLASSES, count - 1))]
    return [*stages, squares]


def _warn_of_hidden_gradients(problem: Problem, fallen: int) -> None:
    if fallen > SUSPICIOUS * len(problem):
        warn(
            f"{problem.classifier.name} hides its gradients: {fallen} of {len(problem)} images fall to a search "
            "without gradients though every attack that follows them failed; gradients alone overrate this model",
            ModelWarning,
        )


def checkpoints(steps: int) -> list[int]:
    """Steps after which each image's step size is judged: at .22, .41, .57, ... of all (equation 2)."""
    fractions = [0.0, 0.22]
    while fractions[-1] < 1:
        # p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)
        fractions.append(fractions[-1] + max(fractions[-1] - fractions[-2] - 0.03, 0.06))
    # Rounded before the ceiling, so that 11.000000000000002 steps are 11 and not 12.
    return sorted({math.ceil(round(fraction * steps, 6)) for fraction in fractions if 0 < fraction < 1})


def adaptive_descent(
    problem: Problem, loss: Loss, *, steps: int, stream: int, progress: Progress | None = None
) -> tuple[Tensor, Tensor]:
    """Descend from a random start with momentum; if an image stalls, halve its step and return to its best point.

    Images leave as soon as they and their 8-bit files fool.

    Args:
        problem: what to fool.
        loss: what is driven down.
        steps: at most; sizes are in units of the budget, the first is twice its size.
        stream: which of each image's random starts.
        progress: called with the fraction done.

    Returns:
        Images (N, C, H, W) of lowest margin and those margins (N,), as from `Problem.file_margins`.
    """
    best, lowest = problem.clean.clone(), torch.full_like(problem.clean[:, 0, 0, 0], torch.inf)
    active = torch.arange(len(problem), device=best.device)
    part, state = problem, _State(random_start(problem, stream))
    judged, last = checkpoints(steps), 0
    for step in range(steps + 1):
        point = part.apply(state.perturbation)
        # The last point is only judged: no step follows it.
        descent = part.loss_and_gradient(point, loss) if step < steps else None
        margins = part.evaluate(point) if descent is None else descent.margins
        margins = part.file_margins(point, margins)
        better = margins < lowest[active]
        best[active[better]], lowest[active[better]] = point[better], margins[better]
        if descent is None:
            break
        if step == 0:
            part.warn_of_zero_gradients(descent.direction)
        state.note(descent.values, descent.direction)
        unfooled = margins >= 0
        if not bool(unfooled.all()):
            active, part = active[unfooled], part.select(unfooled)
            state.select(unfooled)
            if not len(active):
                break
        if step in judged:
            state.judge(step - last)
            last = step
        state.move(part)
        if progress is not None:
            progress((step + 1) / steps)
    return best, lowest


class _State:
    """Where every image is, its best point and its step size. All tensors have one row per image."""

    def __init__(self, perturbation: Tensor) -> None:
        column = torch.zeros_like(perturbation[:, :1, :1, :1])
        self.perturbation, self.before = perturbation, perturbation
        self.direction = torch.zeros_like(perturbation)
        self.best, self.best_direction = perturbation, self.direction
        # The starting point is no gain over anything.
        self.lowest, self.latest = column + torch.inf, column - torch.inf
        self.lowest_at_checkpoint = column + torch.inf
        self.size, self.size_at_checkpoint = column + 2, column + 2
        self.gains = column

    def select(self, rows: Tensor) -> None:
        for name, tensor in vars(self).items():
            setattr(self, name, tensor[rows])

    def note(self, values: Tensor, direction: Tensor) -> None:
        """Take in the loss and its descent direction at the present point."""
        values = values.view(-1, 1, 1, 1)
        self.direction = direction
        self.gains = self.gains + (values < self.latest)
        self.latest = values
        better = values < self.lowest
        self.best = torch.where(better, self.perturbation, self.best)
        self.best_direction = torch.where(better, direction, self.best_direction)
        self.lowest = torch.where(better, values, self.lowest)

    def judge(self, steps: int) -> None:
        """Halve the step and return to the best point, if one of the paper's two conditions holds."""
        # Condition 1: too few steps gained. Condition 2: neither step size nor best loss changed since the last time.
        same = (self.size == self.size_at_checkpoint) & (self.lowest == self.lowest_at_checkpoint)
        stalled = (self.gains < RHO * steps) | same
        self.size_at_checkpoint, self.lowest_at_checkpoint = self.size, self.lowest
        self.size = torch.where(stalled, self.size / 2, self.size)
        self.perturbation = torch.where(stalled, self.best, self.perturbation)
        self.direction = torch.where(stalled, self.best_direction, self.direction)
        # From the best point on, momentum starts anew.
        self.before = torch.where(stalled, self.best, self.before)
        self.latest = torch.where(stalled, self.lowest, self.latest)
        self.gains = torch.zeros_like(self.gains)

    def move(self, problem: Problem) -> None:
        """One step along the direction, with momentum (algorithm 1)."""
        step = self.size * problem.ball.steepest_step(self.direction, self.perturbation)
        # Projected twice, as in the paper: the plain step, and what momentum makes of it.
        plain = problem.project(self.perturbation + step)
        moved = (
            self.perturbation
            + ALPHA * (plain - self.perturbation)
            + (1 - ALPHA) * (self.perturbation - self.before)
        )
        self.before, self.perturbation = self.perturbation, problem.project(moved)


def square_search(
    problem: Problem, *, queries: int, stream: int, progress: Progress | None = None
) -> tuple[Tensor, Tensor]:
    """Change one random square at a time to a random color at the budget's end, and accept it if the margin falls.

    The start is vertical stripes, as for L-infinity in the paper. For other budgets the budget's whole step on that
    square is added twice and the sum projected: the same for L-infinity, our own choice for others.

    Args:
        problem: what to fool.
        queries: forward passes of each image, at most.
        stream: which of each image's random numbers.
        progress: called with the fraction done.

    Returns:
        Images (N, C, H, W) of lowest margin and those margins (N,), as from `Problem.file_margins`.
    """
    channels, height, width = problem.clean.shape[1:]
    # One sign for each channel of each column: vertical stripes.
    signs = _random.uniform(problem.keys, stream, channels, 1, width).sub(0.5).sign().to(problem.clean)
    everywhere = torch.ones_like(problem.region)
    perturbation = _paint(problem, everywhere, signs, torch.zeros_like(problem.clean))
    best = problem.apply(perturbation)
    reached = problem.evaluate(best)  # by which squares are accepted
    lowest = problem.file_margins(best, reached)
    active = (lowest >= 0).nonzero()[:, 0]
    part, perturbation = problem.select(active), perturbation[active]
    rows = torch.arange(height, device=best.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=best.device).view(1, 1, 1, -1)
    for query in range(1, queries):
        if not len(active):
            break
        if query % BLOCK == 1:  # images that have left need no numbers
            block = _random.uniform(part.keys, stream + 1 + query // BLOCK, BLOCK, channels + 2).to(best)
        numbers = block[:, (query - 1) % BLOCK]
        side = _side(query / queries, height, width)
        # Numbers 0 and 1 are the place, the others the signs of the channels.
        top = (numbers[:, 0] * (height - side + 1)).long().view(-1, 1, 1, 1)
        left = (numbers[:, 1] * (width - side + 1)).long().view(-1, 1, 1, 1)
        inside = ((rows >= top) & (rows < top + side)) & ((columns >= left) & (columns < left + side))
        colors = numbers[:, 2 : 2 + channels].sub(0.5).sign().view(-1, channels, 1, 1)
        candidate = _paint(part, inside, colors, perturbation)
        images = part.apply(candidate)
        margins = part.evaluate(images)
        better = margins < reached[active]
        if bool(better.any()):
            perturbation = torch.where(better[:, None, None, None], candidate, perturbation)
            best[active[better]], reached[active[better]] = images[better], margins[better]
            # Squares are accepted by `reached`; an image leaves only if its file fools as well.
            lowest[active[better]] = part.select(better).file_margins(images[better], margins[better])
            unfooled = lowest[active] >= 0
            active, part = active[unfooled], part.select(unfooled)
            perturbation, block = perturbation[unfooled], block[unfooled]
        if progress is not None:
            progress(query / queries)
    return best, lowest


def _paint(problem: Problem, inside: Tensor, signs: Tensor, perturbation: Tensor) -> Tensor:
    """The perturbation with each image's square moved to the budget's end on the side of `signs`."""
    if isinstance(problem.budget, Linf):
        # What the lines below amount to; `Problem.apply` does box and region.
        return torch.where(inside, problem.budget.eps * signs, perturbation)
    step = problem.ball.steepest_step(signs * (inside & problem.region), torch.zeros_like(perturbation))
    return problem.project(perturbation + 2 * step)  # twice: from one end of the budget to the other


def _side(fraction: float, height: int, width: int) -> int:
    """The side of squares after a fraction of all queries: their area halves again and again."""
    halvings = sum(fraction * 10_000 > mark for mark in HALVED_AT)
    side = round(math.sqrt(FIRST_FRACTION / 2**halvings * height * width))
    # At most one pixel less than the image's sides, so that a square has several places.
    return max(1, min(side, height - 1 or 1, width - 1 or 1))
