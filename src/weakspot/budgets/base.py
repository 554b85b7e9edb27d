"""The contract of a budget, which says how much of an image may change."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


class Budget(Protocol):
    """A set of admissible perturbations around each image that contains zero. Shapes are (N, C, H, W).

    These three methods are all that attacks need. A budget may also have a method `prepare` (see `Preparable`).
    """

    def project(self, perturbation: Tensor, images: Tensor) -> Tensor:
        """Return an admissible perturbation near the given one that keeps the image in [0, 1].

        Zeros must stay zeros: an attack confined to a region projects a perturbation that is zero outside it, and
        sets what the projection adds there back to zero.
        """
        ...

    def steepest_step(self, gradient: Tensor, perturbation: Tensor, images: Tensor) -> Tensor:
        """Return the steepest admissible step for a linear objective; zero where the gradient is zero."""
        ...

    def distance(self, perturbation: Tensor, images: Tensor) -> Tensor:
        """Return (N,) how much of the budget is spent, in its own measure; at most the limit after `project`."""
        ...


class PreparedBudget(Protocol):
    """A budget around images that no longer change; what it computes from them it may compute once.

    Attributes:
        steps_to_optimum: whether `steepest_step` leads from the perturbation to the best admissible one. Otherwise
            the step is as long as the whole budget, wherever the perturbation is.
    """

    @property
    def steps_to_optimum(self) -> bool: ...

    def project(self, perturbation: Tensor, region: Tensor | None = None) -> Tensor:
        """`Budget.project`; zero outside the region, bool (N, 1, H, W), which is everywhere if None."""
        ...

    def steepest_step(self, gradient: Tensor, perturbation: Tensor) -> Tensor:
        """`Budget.steepest_step`."""
        ...

    def distance(self, perturbation: Tensor) -> Tensor:
        """`Budget.distance`."""
        ...


@runtime_checkable
class Preparable(Protocol):
    """A budget that computes something from the images, or projects differently inside a region."""

    def prepare(self, images: Tensor) -> PreparedBudget:
        """Bind the budget to images (N, C, H, W) in [0, 1]."""
        ...


def prepare(budget: Budget, images: Tensor) -> PreparedBudget:
    """Bind any budget to images (N, C, H, W), by its own method `prepare` if it has one."""
    return budget.prepare(images) if isinstance(budget, Preparable) else _Bound(budget, images)


class _Bound:
    """A budget without `prepare`, and the images."""

    steps_to_optimum = False

    def __init__(self, budget: Budget, images: Tensor) -> None:
        self.budget, self.images = budget, images

    def project(self, perturbation: Tensor, region: Tensor | None = None) -> Tensor:
        if region is None:
            return self.budget.project(perturbation, self.images)
        # Before, so that nothing outside spends the budget; after, since projections may add something there.
        wanted = torch.where(region, perturbation, 0)
        return torch.where(region, self.budget.project(wanted, self.images), 0)

    def steepest_step(self, gradient: Tensor, perturbation: Tensor) -> Tensor:
        return self.budget.steepest_step(gradient, perturbation, self.images)

    def distance(self, perturbation: Tensor) -> Tensor:
        return self.budget.distance(perturbation, self.images)
