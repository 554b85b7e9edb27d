"""Square search: random squares, kept where they help (Andriushchenko et al. 2020, arXiv 1912.00049)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weakspot import _random
from weakspot.attacks.context import Problem
from weakspot.attacks.gradient import Progress
from weakspot.budgets import Budget, Linf

FIRST_SHARE = 0.8  # of the image in the first squares, as the authors set it for L-infinity
HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries
BLOCK = 64  # random numbers of so many queries are drawn at once


def square_search(
    problem: Problem, budget: Budget, *, queries: int, stream: int, progress: Progress | None = None
) -> tuple[Tensor, Tensor]:
    """Change one random square at a time to a random color at the budget's end; keep it where the margin falls.

    The start is vertical stripes, as for L-infinity in the paper. For other budgets a square is the budget's whole
    step on that square added twice, then projected: for L-infinity the same, for others ours.

    Args:
        problem: what to fool.
        budget: how much may change.
        queries: forward passes of each image, at most.
        stream: which of each image's random numbers.
        progress: called with the share done.

    Returns:
        Images (N, C, H, W) of lowest margin and those margins (N,), as of `Problem.standing_margins`.
    """
    channels, height, width = problem.clean.shape[1:]
    signs = _random.uniform(problem.keys, stream, channels, 1, width).sub(0.5).sign().to(problem.clean)
    everywhere = torch.ones_like(problem.region)
    perturbation = _painted(problem, budget, everywhere, signs, torch.zeros_like(problem.clean))
    found = problem.apply(perturbation)
    reached = problem.evaluate(found)  # what the search goes by
    lowest = problem.standing_margins(found, reached, budget)
    here = (lowest >= 0).nonzero()[:, 0]
    part, perturbation = problem.select(here), perturbation[here]
    rows = torch.arange(height, device=found.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=found.device).view(1, 1, 1, -1)
    for query in range(1, queries):
        if not len(here):
            break
        if query % BLOCK == 1:
            random = _random.uniform(part.keys, stream + 1 + query // BLOCK, BLOCK, channels + 2).to(found)
        drawn = random[:, (query - 1) % BLOCK]
        side = _side(query / queries, height, width)
        top = (drawn[:, 0] * (height - side + 1)).long().view(-1, 1, 1, 1)
        left = (drawn[:, 1] * (width - side + 1)).long().view(-1, 1, 1, 1)
        inside = ((rows >= top) & (rows < top + side)) & ((columns >= left) & (columns < left + side))
        colors = drawn[:, 2 : 2 + channels].sub(0.5).sign().view(-1, channels, 1, 1)
        tried = _painted(part, budget, inside, colors, perturbation)
        images = part.apply(tried)
        margins = part.evaluate(images)
        better = margins < reached[here]
        if bool(better.any()):
            perturbation = torch.where(better[:, None, None, None], tried, perturbation)
            found[here[better]], reached[here[better]] = images[better], margins[better]
            standing = part.select(better).standing_margins(images[better], margins[better], budget)
            lowest[here[better]] = standing
            left_standing = lowest[here] >= 0
            here, part = here[left_standing], part.select(left_standing)
            perturbation, random = perturbation[left_standing], random[left_standing]
        if progress is not None:
            progress(query / queries)
    return found, lowest


def _painted(problem: Problem, budget: Budget, inside: Tensor, signs: Tensor, perturbation: Tensor) -> Tensor:
    """The perturbation with each image's square moved to the budget's end on the side of `signs`."""
    if isinstance(budget, Linf):  # what the lines below come to; box and region are `Problem.apply`'s
        return torch.where(inside, budget.eps * signs, perturbation)
    step = budget.steepest_step(
        signs * (inside & problem.region), torch.zeros_like(perturbation), problem.clean
    )
    return problem.project(budget, perturbation + 2 * step)


def _side(fraction: float, height: int, width: int) -> int:
    """Of the squares after a share of all queries: they cover less and less."""
    halvings = sum(fraction * 10_000 > mark for mark in HALVED_AT)
    side = round(math.sqrt(FIRST_SHARE / 2**halvings * height * width))
    return max(1, min(side, height - 1 or 1, width - 1 or 1))
