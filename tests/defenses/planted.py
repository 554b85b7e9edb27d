"""Linear networks with planted weaknesses: which of them can be fooled within the budget is known in advance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.networks import LinearNetwork
from weakspot.budgets import Linf

BUDGET = Linf(0.1)
ROBUST, FRAGILE = 0.3, 0.03  # change of every pixel that flips a network whose pixels have this contrast


Function = Callable[[Tensor], Any]


def _same(images: Tensor) -> Tensor:
    return images


class Inline(nn.Module):
    """A linear network inside the defense itself, so that there is no inner network to go straight through to."""

    def __init__(self, network: LinearNetwork, before: Function = _same, after: Function = _same) -> None:
        super().__init__()
        self.weight, self.before, self.after = nn.Parameter(network.weight.detach()), before, after

    def forward(self, images: Tensor) -> Tensor:
        score = torch.einsum("nchw,chw->n", self.before(images), self.weight)
        logits: Tensor = self.after(torch.stack([score, -score], 1))
        return logits


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, images: Tensor) -> Tensor:
        return images.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return -gradient


def reversed_gradient(images: Tensor) -> Tensor:
    same: Tensor = _Reversed.apply(images)  # type: ignore[no-untyped-call]
    return same


def one_hot(logits: Tensor) -> Tensor:
    """The class only. Three instead of one, so that it is not taken for a probability."""
    return 3 * F.one_hot(logits.argmax(1), logits.shape[1]).float()


def planted(count: int = 24) -> tuple[LinearNetwork, LinearNetwork, LinearNetwork, Tensor, Tensor]:
    """Two fragile networks and a robust one, each with its own pixels; images of two classes and labels."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(256, generator=generator)
    labels = torch.arange(count) % 2
    images = 0.5 + 0.02 * (torch.rand(count, 256, generator=generator) - 0.5)
    networks = []
    for pixels, contrast in ((order[:120], FRAGILE), (order[120:240], FRAGILE), (order[240:], ROBUST)):
        weight = torch.zeros(256)
        weight[pixels] = torch.tensor([1.0, -1.0]).repeat(len(pixels) // 2)
        images = images + (1 - 2 * labels)[:, None] * contrast * weight
        networks.append(LinearNetwork(weight.view(1, 16, 16)).eval())
    first, second, robust = networks
    return first, second, robust, ((images.view(-1, 1, 16, 16) * 255).round() / 255), labels
