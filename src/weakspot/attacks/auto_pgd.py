"""Auto-PGD: projected gradient descent that sets its own step (Croce and Hein 2020, arXiv 2003.01690)."""

import math

import torch
from torch import Tensor

from weakspot._progress import Progress
from weakspot.attacks.context import Problem
from weakspot.attacks.gradient import random_start
from weakspot.attacks.losses import Loss

RHO = 0.75  # fraction of the steps since a checkpoint that must have lowered the loss, or the step is halved
ALPHA = 0.75  # weight of the new step against the previous one (algorithm 1)


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
