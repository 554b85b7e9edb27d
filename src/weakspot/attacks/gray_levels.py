"""Minimal-norm attacks that end on the 8-bit grid, so that a picture file of the image fools too."""

from collections.abc import Callable

import torch
from torch import Tensor

from weakspot.attacks.context import Problem
from weakspot.attacks.eight_bit import NEAR, TOP

STEPS, MOMENTUM = 40, 0.75  # of the final descent, which few images need
TIE = 1e-6  # sizes this near to each other are equal; the smaller L2 length then decides


def settle(
    problem: Problem, images: Tensor, measure: Callable[[Tensor], Tensor], *, fools: Tensor, needed: Tensor
) -> Tensor:
    """End a minimal-norm attack on the 8-bit grid, at the smallest change found there that still fools.

    Every changed value is rounded to the nearest level. If the image then no longer fools, two more points are tried:
    the values with the largest gradient move one level along it, as few of those that the attack changed as bisection
    finds; and every change is rounded away from the clean image. If none of these fools, as for one image in a hundred,
    signed gradient steps through the rounding follow, which may change any value in the region. Values stay within
    ceil(255 size) levels of the clean image, where size is the L-infinity size of the attack's own change. A value that
    is not changed keeps its bits, on the grid or not. An image counts as fooling only if its file does, in which all
    values are rounded.

    Args:
        problem: whose passes are counted.
        images: (N, C, H, W), confined to the region and [0, 1].
        measure: perturbations (n, C, H, W) to sizes (n,), in the norm that the attack minimizes.
        fools: bool (N,), images that fool; the others are only rounded.
        needed: (N,) the margin below which an image must get.

    Returns:
        (N, C, H, W); an image that fools is returned as it was if no point on the grid fools.
    """
    grid = _Grid(problem, images, measure, needed)
    nearest = grid.place((TOP * images).round(), grid.changed)
    otherwise = torch.where(fools[:, None, None, None], images, nearest)
    # The nearest levels first, on images that fool and were changed.
    left = _numbers(fools & grid.changed.flatten(1).any(1))
    grid.take(left, nearest[left])
    left = left[grid.size[left].isinf()]
    if len(left):
        # Where those do not fool: changes rounded outward, then a few values moved along the gradient.
        away = grid.place(_away(images, problem.clean), grid.changed)
        grid.take(left, away[left])
        point = grid.move_few(left, nearest[left], grid.changed[left])
        still = grid.size[left].isinf()
        if bool(still.any()):
            grid.descend(left[still], point[still])
    return torch.where(grid.size.isfinite()[:, None, None, None], grid.images, otherwise)


class _Grid:
    """The points on the grid within reach of each image, and the smallest so far that fools.

    Attributes:
        changed: bool (N, C, H, W), the values that the attack changed.
        images: (N, C, H, W), the smallest that fools; meaningless if none does.
        size: (N,) of these; infinite if none does.
    """

    def __init__(
        self, problem: Problem, images: Tensor, measure: Callable[[Tensor], Tensor], needed: Tensor
    ) -> None:
        self.problem, self.measure, self.needed = problem, measure, needed
        change = images - problem.clean
        self.changed = change != 0
        value = TOP * problem.clean
        # At least one level, so that there is a level on either side of a clean value between two of them.
        reach = (TOP * change.abs().amax((1, 2, 3), keepdim=True) - NEAR).ceil().clamp(min=1)
        # The levels within reach; NEAR keeps those at its ends in spite of rounding.
        self.low = (value - reach - NEAR).ceil().clamp(min=0)
        self.high = (value + reach + NEAR).floor().clamp(max=TOP)
        self.images = images
        self.size = torch.full_like(needed, torch.inf)
        self.length = torch.full_like(needed, torch.inf)

    def place(self, levels: Tensor, moved: Tensor) -> Tensor:
        """Images (N, C, H, W) with the moved values at these levels, brought within reach; all others are clean."""
        levels = torch.minimum(torch.maximum(levels, self.low), self.high)
        return _at(levels, moved, self.problem.clean)

    def take(self, rows: Tensor, points: Tensor) -> Tensor:
        """Evaluate points (n, C, H, W) of these images (n,), and store those that fool and are smaller.

        Returns:
            (n,) margins less what is needed, below zero where the points fool.
        """
        if not len(rows):
            return points.new_zeros(0)
        part = self.problem.select(rows)
        file = (TOP * points).round() / TOP
        margins = part.evaluate(file)
        # If the clean image lies between levels, the point and its file are two images: both must fool.
        apart = _numbers(TOP * (file - points).abs().flatten(1).amax(1) > NEAR)
        if len(apart):
            own = part.select(apart).evaluate(points[apart])
            margins[apart] = torch.maximum(margins[apart], own)
        margins = margins - self.needed[rows]
        change = points - part.clean
        size, length = self.measure(change), torch.linalg.vector_norm(change.flatten(1), dim=1)
        best, shortest = self.size[rows], self.length[rows]
        smaller = (size < best - TIE) | ((size < best + TIE) & (length < shortest))
        better = (margins < 0) & smaller
        chosen = rows[better]
        self.images = self.images.index_copy(0, chosen, points[better])
        self.size[chosen], self.length[chosen] = size[better], length[better]
        return margins

    def move_few(self, rows: Tensor, points: Tensor, allowed: Tensor) -> Tensor:
        """Move as few of the allowed values as needed by one level along the gradient, the largest gradients first.

        Args:
            rows: (n,) images of which no point fools yet.
            points: (n, C, H, W) where they are.
            allowed: bool (n, C, H, W) of the values that may move.

        Returns:
            (n, C, H, W) the points of lowest margin among those tried.
        """
        part = self.problem.select(rows)
        descent = part.loss_and_gradient(points)
        direction = descent.direction
        value = TOP * points
        # The next level along the descent direction; values between levels go to the nearer one on that side.
        level = torch.where(direction > 0, (value + NEAR).floor() + 1, (value - NEAR).ceil() - 1)
        placed = _at(level, torch.ones_like(allowed), part.clean)
        movable = allowed & (direction != 0) & (level >= self.low[rows]) & (level <= self.high[rows])
        strength = torch.where(movable, direction.abs(), -1).flatten(1)
        # The place of each value in the order of its gradient.
        rank = strength.argsort(dim=1, descending=True, stable=True).argsort(dim=1).view_as(direction)

        def moved(some: Tensor, count: Tensor) -> Tensor:
            first = movable[some] & (rank[some] < count[:, None, None, None])
            return torch.where(first, placed[some], points[some])

        best, lowest = points.clone(), descent.margins - self.needed[rows]
        # Bisect between a number of moved values that does not fool and one that does, or is too large.
        fewer = torch.zeros_like(rows)
        enough = movable.flatten(1).sum(1) + 1
        while len(some := _numbers(enough - fewer > 1)):
            middle = (fewer[some] + enough[some]) // 2
            tried = moved(some, middle)
            margins = self.take(rows[some], tried)
            fools, lower = margins < 0, margins < lowest[some]
            enough[some[fools]], fewer[some[~fools]] = middle[fools], middle[~fools]
            best[some[lower]], lowest[some[lower]] = tried[lower], margins[lower]
        return best

    def descend(self, rows: Tensor, points: Tensor) -> None:
        """Take ever shorter signed gradient steps, with gradients at the rounded point, anywhere in the region."""
        value, velocity = TOP * points, torch.zeros_like(points)
        for step in range(STEPS):
            left = _numbers(self.size[rows].isinf())
            if not len(left):
                return
            rows, value, velocity = rows[left], value[left], velocity[left]
            part, low, high = self.problem.select(rows), self.low[rows], self.high[rows]
            point = _at(value.round(), part.region.expand_as(value), part.clean)
            # From the reach, half of the distance between the ends, evenly down to 1 / STEPS of it.
            length = (1 - step / STEPS) * (high - low).amax((1, 2, 3), keepdim=True) / 2
            direction = part.loss_and_gradient(point).direction
            scale = direction.abs().mean((1, 2, 3), keepdim=True)
            velocity = MOMENTUM * velocity + direction / scale.clamp(min=1e-30)
            stepped = value + length * velocity.sign()
            value = torch.minimum(torch.maximum(stepped, low), high)
            self.take(rows, _at(value.round(), part.region.expand_as(value), part.clean))


def _at(levels: Tensor, moved: Tensor, clean: Tensor) -> Tensor:
    """The clean images with the moved values at these levels; a value that is at its level already keeps its bits."""
    return torch.where(moved & ((levels - TOP * clean).abs() > NEAR), levels / TOP, clean)


def _away(images: Tensor, clean: Tensor) -> Tensor:
    """(N, C, H, W) levels: every change rounded away from the clean image."""
    value = TOP * images
    return torch.where(images > clean, (value - NEAR).ceil(), (value + NEAR).floor())


def _numbers(chosen: Tensor) -> Tensor:
    return chosen.nonzero()[:, 0]
