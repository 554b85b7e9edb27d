"""The contract of a budget."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

MEMO = "_weakspot_memo"
"""Attribute that an attack gives to images that it will not change; what is computed of them may be kept there."""


class Budget(Protocol):
    """A set of admissible perturbations around each image, zero among them; shapes are (N, C, H, W)."""

    def project(self, perturbation: Tensor, images: Tensor, *, region: Tensor | None = None) -> Tensor:
        """A perturbation near the given one that is inside, keeps the image in [0, 1] and the rest of it untouched.

        Args:
            perturbation: what is wanted.
            images: what is perturbed, in [0, 1].
            region: bool (N, 1, H, W); the result is zero where it is false. A budget of one's own may leave this
                argument out if any part of an admissible perturbation is admissible.
        """
        ...

    def steepest_step(self, gradient: Tensor, perturbation: Tensor, images: Tensor) -> Tensor:
        """The steepest admissible step for a linear objective; zero where the gradient is zero."""
        ...

    def distance(self, perturbation: Tensor, images: Tensor) -> Tensor:
        """(N,) how much of the budget's own measure is spent; at most the limit after `project`."""
        ...
