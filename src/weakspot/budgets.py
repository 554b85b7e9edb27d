"""Budgets: how much an image may change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Budget(Protocol):
    """A closed set of admissible perturbations around each image; shapes are (N, C, H, W)."""

    def project(self, perturbation: Tensor, images: Tensor) -> Tensor:
        """The nearest perturbation that is inside and keeps the image in [0, 1]."""
        ...

    def ascend(self, gradient: Tensor, perturbation: Tensor, images: Tensor) -> Tensor:
        """The steepest admissible step for a linear objective; zero where the gradient is zero."""
        ...

    def size(self, perturbation: Tensor, images: Tensor) -> Tensor:
        """(N,) how much of the budget's own measure is spent; at most the limit after `project`."""
        ...


@dataclass(frozen=True)
class Linf:
    """Every channel of every pixel moves by at most `eps` (image range [0, 1])."""

    eps: float

    def __post_init__(self) -> None:
        if not 0 <= self.eps <= 1:
            raise ValueError(
                f"Linf eps is {self.eps}; accepted is 0 to 1, the range of images (write 8/255, not 8)"
            )

    def project(self, perturbation: Tensor, images: Tensor) -> Tensor:
        bounded = perturbation.clamp(-self.eps, self.eps)
        return (images + bounded).clamp(0, 1) - images

    def ascend(self, gradient: Tensor, perturbation: Tensor, images: Tensor) -> Tensor:  # noqa: ARG002
        return self.eps * gradient.sign()

    def size(self, perturbation: Tensor, images: Tensor) -> Tensor:  # noqa: ARG002
        return perturbation.abs().flatten(1).amax(1)

    def __str__(self) -> str:
        return f"{_in_255ths(self.eps)} L-infinity"


@dataclass(frozen=True)
class L2:
    """The Euclidean length of the whole perturbation is at most `eps` (image range [0, 1])."""

    eps: float

    def __post_init__(self) -> None:
        if not 0 <= self.eps < float("inf"):
            raise ValueError(
                f"L2 eps is {self.eps}; accepted is a finite length of at least 0, images being in [0, 1]"
            )

    def project(self, perturbation: Tensor, images: Tensor) -> Tensor:
        """Exact projection on the intersection of ball and box, not one after the other.

        It is clip(s * perturbation) with the one scale s that meets the budget. Starting from the scale of the
        unclipped ball, each round frees the length that clipping saved; s only grows and the clipped set with
        it, so few rounds suffice.
        """
        wanted, low, high = perturbation.flatten(1), -images.flatten(1), 1 - images.flatten(1)
        square = self.eps**2
        scale = (self.eps / _length(wanted)).clamp(max=1)
        for _ in range(50):
            scaled = scale * wanted
            clipped = (scaled < low) | (scaled > high)
            spent = torch.where(clipped, scaled.clamp(low, high), 0).square().sum(1, keepdim=True)
            free = torch.where(clipped, 0, wanted).square().sum(1, keepdim=True)
            grown = ((square - spent).clamp(min=0) / free.clamp(min=1e-20)).sqrt().clamp(max=1)
            grown = torch.maximum(grown, scale)
            if torch.allclose(grown, scale, rtol=1e-6, atol=0):
                break
            scale = grown
        inside = (scale * wanted).clamp(low, high)
        return (inside * (self.eps / _length(inside)).clamp(max=1)).view_as(perturbation)

    def ascend(self, gradient: Tensor, perturbation: Tensor, images: Tensor) -> Tensor:  # noqa: ARG002
        # Divided by the largest entry first: squares of a faded gradient would vanish in float32.
        rows = gradient.flatten(1)
        rows = rows / rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        step: Tensor = self.eps * rows / _length(rows)
        return step.view_as(gradient)

    def size(self, perturbation: Tensor, images: Tensor) -> Tensor:  # noqa: ARG002
        length: Tensor = torch.linalg.vector_norm(perturbation.flatten(1), dim=1)
        return length

    def __str__(self) -> str:
        return f"{self.eps:g} L2"


def _length(rows: Tensor) -> Tensor:
    """(N, 1) Euclidean lengths, tiny instead of zero so that they can divide."""
    length: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return length.clamp(min=1e-20)


def _in_255ths(eps: float) -> str:
    levels = eps * 255
    return f"{levels:g}/255" if abs(levels - round(levels, 2)) < 1e-6 else f"{eps:g}"
