"""Budgets that are norms: L-infinity, L2 and L1."""

from dataclasses import dataclass

import torch
from torch import Tensor

from weakspot._checks import is_number, with_plain_numbers


@dataclass(frozen=True)
class Linf:
    """Every channel of every pixel changes by at most `eps` (images are in [0, 1])."""

    eps: float

    def __post_init__(self) -> None:
        with_plain_numbers(self)
        if not is_number(self.eps) or not 0 <= self.eps <= 1:
            hint = f" (did you mean {self.eps:g}/255?)" if is_number(self.eps) and 1 < self.eps <= 255 else ""
            raise ValueError(f"eps must be between 0 and 1, got {self.eps!r}{hint}")

    def project(self, perturbation: Tensor, images: Tensor, *, region: Tensor | None = None) -> Tensor:
        """Return the nearest point of the intersection of cube and box."""
        bounded = _inside(perturbation, region).clamp(-self.eps, self.eps)
        return (images + bounded).clamp(0, 1) - images

    def steepest_step(self, gradient: Tensor, perturbation: Tensor, images: Tensor) -> Tensor:  # noqa: ARG002
        return self.eps * gradient.sign()

    def distance(self, perturbation: Tensor, images: Tensor) -> Tensor:  # noqa: ARG002
        return perturbation.abs().flatten(1).amax(1)

    def __str__(self) -> str:
        return f"{_in_255ths(self.eps)} L-infinity"


@dataclass(frozen=True)
class L2:
    """The Euclidean length of the whole perturbation is at most `eps` (images are in [0, 1])."""

    eps: float

    def __post_init__(self) -> None:
        with_plain_numbers(self)
        _check_length(self.eps)

    def project(self, perturbation: Tensor, images: Tensor, *, region: Tensor | None = None) -> Tensor:
        """Project exactly on the intersection of ball and box, not on one after the other.

        The projection is clip(s * perturbation) with the one scale s that meets the budget. The first scale is that
        of the ball without the box; each round adds the length that clipping saved. s only grows, and the set of
        clipped entries with it, so a few rounds suffice.
        """
        wanted = _inside(perturbation, region).flatten(1)
        low, high = -images.flatten(1), 1 - images.flatten(1)
        square = self.eps**2
        scale = (self.eps / _length(wanted)).clamp(max=1)
        for _ in range(50):
            scaled = scale * wanted
            clipped = (scaled < low) | (scaled > high)
            # Clipped entries spend a fixed part of the squared length; the others share the rest.
            spent = torch.where(clipped, scaled.clamp(low, high), 0).square().sum(1, keepdim=True)
            free = torch.where(clipped, 0, wanted).square().sum(1, keepdim=True)
            grown = ((square - spent).clamp(min=0) / free.clamp(min=1e-20)).sqrt().clamp(max=1)
            grown = torch.maximum(grown, scale)
            if torch.allclose(grown, scale, rtol=1e-6, atol=0):
                break
            scale = grown
        inside = (scale * wanted).clamp(low, high)
        # Rounding and the tolerance above may leave the length a little over the budget.
        return (inside * (self.eps / _length(inside)).clamp(max=1)).view_as(perturbation)

    def steepest_step(self, gradient: Tensor, perturbation: Tensor, images: Tensor) -> Tensor:  # noqa: ARG002
        # Divided by the largest entry first: the squares of a tiny gradient would underflow in float32.
        rows = gradient.flatten(1)
        rows = rows / rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        step: Tensor = self.eps * rows / _length(rows)
        return step.view_as(gradient)

    def distance(self, perturbation: Tensor, images: Tensor) -> Tensor:  # noqa: ARG002
        length: Tensor = torch.linalg.vector_norm(perturbation.flatten(1), dim=1)
        return length

    def __str__(self) -> str:
        return f"{self.eps:g} L2"


@dataclass(frozen=True)
class L1:
    """The absolute changes of all channels of all pixels sum to at most `eps` (images are in [0, 1])."""

    eps: float

    def __post_init__(self) -> None:
        with_plain_numbers(self)
        _check_length(self.eps)

    def project(self, perturbation: Tensor, images: Tensor, *, region: Tensor | None = None) -> Tensor:
        """Project exactly on the intersection of cross-polytope and box.

        Each entry is shrunk by one amount and cut to its room in the box (Croce and Hein 2021, arXiv 2103.01208,
        proposition 2.1). The amount solves a decreasing, piecewise linear equation: Newton's steps, bracketed by
        bisection, end on the piece that contains the solution.
        """
        wanted = _inside(perturbation, region).flatten(1)
        flat = images.flatten(1)
        # How far each entry may move in its own direction before it leaves the box.
        room, size = torch.where(wanted < 0, flat, 1 - flat), wanted.abs()
        low = torch.zeros_like(size[:, :1])
        high = size.amax(1, keepdim=True)
        shrink = low
        for _ in range(100):
            left = size - shrink
            cut = torch.minimum(left.clamp(min=0), room)
            over = cut.sum(1, keepdim=True) - self.eps
            # Solved as well where the perturbation is inside the budget without any shrinking.
            solved = (over.abs() <= 1e-6 * self.eps).logical_or((over <= 0) & (shrink <= 0))
            if bool(solved.all()):
                break
            low, high = torch.where(over > 0, shrink, low), torch.where(over > 0, high, shrink)
            # The slope is minus the number of entries that are neither zero nor at the end of their room.
            slope = ((left > 0) & (left < room)).sum(1, keepdim=True)
            newton = shrink + over / slope.clamp(min=1)
            # Where Newton's step has no slope or leaves the bracket, the bracket is halved.
            bracketed = (slope > 0) & (newton > low) & (newton < high)
            step = torch.where(bracketed, newton, (low + high) / 2)
            shrink = torch.where(solved, shrink, step)
        inside = torch.minimum((size - shrink).clamp(min=0), room)
        # Rounding and the tolerance above may leave the sum a little over the budget.
        total = inside.sum(1, keepdim=True).clamp(min=1e-20)
        return (inside * (self.eps / total).clamp(max=1) * wanted.sign()).view_as(perturbation)

    def steepest_step(self, gradient: Tensor, perturbation: Tensor, images: Tensor) -> Tensor:  # noqa: ARG002
        """Move the entries of largest gradient to their ends of the box until the budget is spent."""
        rows, flat = gradient.flatten(1), images.flatten(1)
        room = torch.where(rows < 0, flat, torch.where(rows > 0, 1 - flat, 0))
        # Few entries spend the budget as a rule: sorting all of them would be waste.
        count = min(rows.shape[1], max(64, int(4 * self.eps)))
        # Ties are broken by position: which of equal entries topk returns depends on how many it is asked for.
        order = torch.arange(rows.shape[1], device=rows.device) * 1e-14
        precise = rows.abs() if rows.device.type == "mps" else rows.abs().double()
        strength = precise - order * precise.amax(1, keepdim=True)
        while True:
            largest = strength.topk(count, 1).indices
            taken = room.gather(1, largest)
            # What the entries of larger gradients have spent.
            before = taken.cumsum(1) - taken
            if count == rows.shape[1] or bool((before[:, -1] >= self.eps).all()):
                break
            count = min(rows.shape[1], 4 * count)
        # The last entry that still fits takes what is left of the budget.
        moved = torch.minimum(taken, (self.eps - before).clamp(min=0)) * rows.gather(1, largest).sign()
        return torch.zeros_like(rows).scatter_(1, largest, moved).view_as(gradient)

    def distance(self, perturbation: Tensor, images: Tensor) -> Tensor:  # noqa: ARG002
        return perturbation.abs().flatten(1).sum(1)

    def __str__(self) -> str:
        return f"{self.eps:g} L1"


def _check_length(eps: float) -> None:
    # Squares of longer ones overflow float32; no perturbation of an image in [0, 1] is nearly as long.
    if not is_number(eps) or not 0 <= eps <= 1e12:
        raise ValueError(f"eps must be a length between 0 and 1e12 (images are in [0, 1]), got {eps!r}")


def _inside(perturbation: Tensor, region: Tensor | None) -> Tensor:
    return perturbation if region is None else torch.where(region, perturbation, 0)


def _length(rows: Tensor) -> Tensor:
    """(N, 1) Euclidean lengths, tiny instead of zero because they are divisors."""
    length: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return length.clamp(min=1e-20)


def _in_255ths(eps: float) -> str:
    """The size in 255ths where that is a whole number, or shorter than the decimal fraction."""
    levels = eps * 255
    whole, short = (abs(value - round(value)) < 1e-6 for value in (levels, 100 * eps))
    return f"{levels:g}/255" if whole or (abs(levels - round(levels, 2)) < 1e-6 and not short) else f"{eps:g}"
