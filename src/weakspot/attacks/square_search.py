"""Square search: random squares, accepted where they help (Andriushchenko et al. 2020, arXiv 1912.00049)."""

import math

import torch
from torch import Tensor

from weakspot import _random
from weakspot._progress import Progress
from weakspot.attacks.context import Problem
from weakspot.budgets import Linf

FIRST_FRACTION = 0.8  # of the image in the first squares, as the authors set it for L-infinity
HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries
BLOCK = 64  # queries whose random numbers are drawn at once


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
