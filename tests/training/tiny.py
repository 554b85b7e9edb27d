"""Small data, small networks and short trainings, for the tests of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.networks import FlatNetwork
from weakspot.training import TrainConfig, train

QUICK = TrainConfig(recipe="full", epochs=2, steps=3, batch_size=20, learning_rate=0.05, held_out=20)
FIELDS = {field.name for field in fields(TrainConfig)}


def halves(count: int = 200, channels: int = 1, size: tuple[int, int] = (16, 12)) -> tuple[Tensor, Tensor]:
    """Noise, brighter in the upper half (class 1) or the lower half."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, channels, *size, generator=generator) * 0.6
    labels = torch.arange(count) % 2
    rows = torch.arange(size[0]) < size[0] // 2
    images += 0.3 * (rows[:, None] == (labels == 1)[:, None, None, None])
    return images, labels


def fresh(build: Callable[[], nn.Module] = FlatNetwork, seed: int = 0) -> nn.Module:
    """A network with the weights of the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def quick_train(model: nn.Module, data: Any, **changes: Any) -> nn.Module:
    """`train` with `QUICK`; fields of `TrainConfig` and arguments of `train` may be changed."""
    config = replace(QUICK, **{name: value for name, value in changes.items() if name in FIELDS})
    return train(
        model, data, config, **{name: value for name, value in changes.items() if name not in FIELDS}
    )


def weights(model: nn.Module) -> Tensor:
    """All weights and buffers as one vector."""
    return torch.cat([tensor.double().flatten() for tensor in model.state_dict().values()])


class Dropping(nn.Module):
    """Batch-norm and dropout, whose state a resumed training must restore; returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(0.3)
        )
        self.head = nn.Linear(8 * 8 * 6, 2)

    def forward(self, images: Tensor) -> tuple[Tensor, int]:
        return self.head(self.body(images)), 0
