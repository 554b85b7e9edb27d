"""What a search for the smallest change has found, and the bisection of the weight of its penalty."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weakspot._progress import Progress, part
from weakspot.attacks.context import Problem
from weakspot.attacks.gray_levels import settle

SEARCHES = 5  # weights tried for each image
FIRST_WEIGHT = 1.0
Size = Callable[[Tensor], Tensor]  # perturbations (N, C, H, W) to sizes (N,)
InnerSearch = Callable[["BestSoFar", Tensor, Progress | None], None]
"""One descent with fixed weights (N,), which records every point that it visits."""


class BestSoFar:
    """Each image's smallest point so far that fools by `confidence`, or else the one nearest to fooling.

    Attributes:
        confidence: the margin by which images should fool, in logits.
        images: (N, C, H, W).
        lowest: (N,) the lowest margin seen.
        size: (N,) of the points that fool; infinite where none does.
        warned: whether zero gradients have been looked for, which descents from the clean images need once.
    """

    def __init__(self, problem: Problem, size: Size, confidence: float) -> None:
        self.problem, self.measure, self.confidence, self.warned = problem, size, confidence, False
        self.images = problem.clean.clone()
        self.lowest = problem.evaluate(problem.clean)
        self.fooled = self.lowest < -confidence
        self.size = torch.where(self.fooled, 0, torch.inf).to(self.lowest)

    def record(self, points: Tensor, margins: Tensor, rows: Tensor | None = None) -> None:
        """Update the best points with these points (n, C, H, W) and their margins (n,), of all images or of `rows`."""
        rows = torch.arange(len(points), device=points.device) if rows is None else rows
        size, smallest = self.measure(points - self.problem.clean[rows]), self.size[rows]
        fools = margins < -self.confidence
        better = torch.where(fools, size < smallest, smallest.isinf() & (margins < self.lowest[rows]))
        self.images[rows[better]] = points[better]
        self.lowest[rows] = torch.minimum(margins, self.lowest[rows])
        self.size[rows[better & fools]] = size[better & fools]
        self.fooled[rows[fools]] = True

    def warn_of_zero_gradients(self, margins: Tensor, direction: Tensor) -> None:
        """Warn once of images whose clean margin (N,) must fall and whose direction (N, C, H, W) there is zero."""
        if not self.warned:
            correct = margins > 0
            self.problem.select(correct).warn_of_zero_gradients(direction[correct])
        self.warned = True

    def active_weights(self, margins: Tensor, weights: Tensor) -> Tensor:
        """(N, 1, 1, 1) weights, zero where max(margin + confidence, 0) is zero and has no gradient."""
        return torch.where(margins + self.confidence > 0, weights, 0)[:, None, None, None]

    def on_8bit_grid(self) -> Tensor:
        """The images (N, C, H, W), moved to the smallest point on the 8-bit grid that still fools, if there is one.

        It must fool by `confidence` if the image does so now.
        """
        needed = torch.where(self.size.isinf(), 0, -self.confidence).to(self.lowest)
        return settle(self.problem, self.images, self.measure, fools=self.lowest < 0, needed=needed)

    def search(self, descend: InnerSearch, progress: Progress | None) -> None:
        """Bisect each image's weight on a logarithmic scale.

        Multiply by ten until an inner search fools (as in arXiv 1608.04644), and divide by ten until one does not: with
        a weight that is far too large, the change that fools is far too large.
        """
        low, high = torch.zeros_like(self.lowest), torch.full_like(self.lowest, torch.inf)
        weights = torch.full_like(self.lowest, FIRST_WEIGHT)
        for number in range(SEARCHES):
            # Whether this weight fools, whatever earlier ones did.
            self.fooled = torch.zeros_like(self.fooled)
            descend(self, weights, part(progress, number, number + 1, SEARCHES))
            # A weight that fools is an upper end of the bracket, one that does not a lower end.
            high = torch.where(self.fooled, weights, high)
            low = torch.where(self.fooled, low, weights)
            bracketed = torch.where(low == 0, weights / 10, (low * high).sqrt())
            weights = torch.where(high.isinf(), 10 * weights, bracketed)
