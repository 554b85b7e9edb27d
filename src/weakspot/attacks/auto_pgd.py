"""Auto-PGD: projected gradient descent that sets its own step (Croce and Hein 2020, arXiv 2003.01690)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weakspot.attacks.context import Problem
from weakspot.attacks.gradient import Progress, random_start, warn_of_zero_gradients
from weakspot.attacks.losses import Loss
from weakspot.budgets import Budget

SHARE = 0.75  # of the steps since a checkpoint that must have lowered the objective, or the step is halved
INERTIA = 0.75  # weight of the new step against the one before


def checkpoints(steps: int) -> list[int]:
    """Steps after which each image's step size is judged: at .22, .41, .57, ... of all (equation 2 of the paper)."""
    fractions = [0.0, 0.22]
    while fractions[-1] < 1:
        fractions.append(fractions[-1] + max(fractions[-1] - fractions[-2] - 0.03, 0.06))
    return sorted({math.ceil(round(fraction * steps, 6)) for fraction in fractions if 0 < fraction < 1})


def adaptive_descent(
    problem: Problem,
    budget: Budget,
    loss: Loss,
    *,
    steps: int,
    stream: int,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Descend from a random start with momentum; halve an image's step where it stalls and go back to its best point.

    Images leave as soon as they and their 8-bit files fool.

    Args:
        problem: what to fool.
        budget: how much may change; steps are in units of it, the first twice its size.
        loss: what is driven down.
        steps: at most.
        stream: which of each image's random starts.
        progress: called with the share done.

    Returns:
        Images (N, C, H, W) of lowest margin and those margins (N,), as of `Problem.standing_margins`.
    """
    found, lowest = problem.clean.clone(), torch.full_like(problem.clean[:, 0, 0, 0], torch.inf)
    here = torch.arange(len(problem), device=found.device)
    part, state = problem, _State.start(random_start(problem, budget, stream))
    judged, last = checkpoints(steps), 0
    for step in range(steps + 1):
        point = part.apply(state.perturbation)
        descent = part.loss_and_gradient(point, loss) if step < steps else None
        margins = part.evaluate(point) if descent is None else descent.margins
        margins = part.standing_margins(point, margins, budget)
        better = margins < lowest[here]
        found[here[better]], lowest[here[better]] = point[better], margins[better]
        if descent is None:
            break
        if step == 0:
            warn_of_zero_gradients(part, descent.direction)
        state.note(descent.values, descent.direction)
        left = margins >= 0
        if not bool(left.all()):
            here, part = here[left], part.select(left)
            state.keep(left)
            if not len(here):
                break
        if step in judged:
            state.judge(step - last)
            last = step
        state.move(part, budget)
        if progress is not None:
            progress((step + 1) / steps)
    return found, lowest


class _State:
    """Where every image is, its best point, its step size and how it has fared. All tensors have one row per image."""

    def __init__(self, perturbation: Tensor) -> None:
        column = torch.zeros_like(perturbation[:, :1, :1, :1])
        self.perturbation, self.before = perturbation, perturbation
        self.direction = torch.zeros_like(perturbation)
        self.best, self.best_direction = perturbation, self.direction
        self.lowest, self.latest = column + torch.inf, column + torch.inf
        self.lowest_then = column + torch.inf
        self.size, self.size_then = column + 2, column + 2
        self.gains = column

    @classmethod
    def start(cls, perturbation: Tensor) -> _State:
        return cls(perturbation)

    def keep(self, rows: Tensor) -> None:
        for name, tensor in vars(self).items():
            setattr(self, name, tensor[rows])

    def note(self, values: Tensor, direction: Tensor) -> None:
        """Take up what was found at the present point."""
        values = values.view(-1, 1, 1, 1)
        self.direction = direction
        self.gains = self.gains + (values < self.latest)
        self.latest = values
        better = values < self.lowest
        self.best = torch.where(better, self.perturbation, self.best)
        self.best_direction = torch.where(better, direction, self.best_direction)
        self.lowest = torch.where(better, values, self.lowest)

    def judge(self, steps: int) -> None:
        """Halve the step and return to the best point where too few steps gained, or nothing was gained at all."""
        stalled = (self.gains < SHARE * steps) | (
            (self.size == self.size_then) & (self.lowest == self.lowest_then)
        )
        self.size_then, self.lowest_then = self.size, self.lowest
        self.size = torch.where(stalled, self.size / 2, self.size)
        self.perturbation = torch.where(stalled, self.best, self.perturbation)
        self.direction = torch.where(stalled, self.best_direction, self.direction)
        self.before = torch.where(stalled, self.best, self.before)
        self.latest = torch.where(stalled, self.lowest, self.latest)
        self.gains = torch.zeros_like(self.gains)

    def move(self, problem: Problem, budget: Budget) -> None:
        """One step along the direction, with inertia."""
        ascent = budget.steepest_step(self.direction, self.perturbation, problem.clean)
        plain = problem.project(budget, self.perturbation + self.size * ascent)
        inert = (
            self.perturbation
            + INERTIA * (plain - self.perturbation)
            + (1 - INERTIA) * (self.perturbation - self.before)
        )
        self.before, self.perturbation = self.perturbation, problem.project(budget, inert)
