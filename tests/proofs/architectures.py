"""Small networks with every layer that bounds cover."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.networks import FlatNetwork, Made, PoolingNetwork, seeded
from weakspot.classifier import Classifier


class Inception(nn.Module):
    """Branches of max pooling with padding, average pooling and a dilated convolution, concatenated; tuple output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.wide = nn.Conv2d(6, 4, 3, padding=2, dilation=2)
        self.head = nn.Linear(16, 3)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = F.relu6(self.norm(self.stem(images)))
        branches = [F.max_pool2d(maps, 3, 2, 1), F.avg_pool2d(maps, 2, 2), self.wide(maps)[:, :, ::2, ::2]]
        joined = torch.cat(branches, 1).clamp(-0.4, 0.6)
        return self.head(F.adaptive_avg_pool2d(joined, 1).flatten(1)), maps


class Grouped(nn.Module):
    """Grouped convolutions with uneven padding, a residual sum of parts of unequal windows, hardtanh."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=0, groups=8)
        self.mix = nn.Conv2d(8, 8, 1, groups=2)
        self.head = nn.Conv2d(8, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(2 * images - 1).relu_()
        inner = self.mix(self.depthwise(F.pad(maps, (1, 1, 2, 0))))
        maps = F.hardtanh(maps - 0.5 * inner, -0.3, 0.8)
        logits: Tensor = self.head(maps).mean((2, 3))
        return logits


class Deep(nn.Module):
    """Two max poolings between convolutions, then two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2, 1),
        )  # fmt: skip
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(8 * 3 * 5, 12), nn.ReLU6(), nn.Dropout(), nn.Linear(12, 2)
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images))
        return logits


def plain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 4, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 10),
        nn.ReLU(), nn.Linear(10, 5),
    )  # fmt: skip


ARCHITECTURES: dict[str, Callable[[], Made]] = {
    "convolutions and linear layers, normalized": lambda: seeded(
        lambda: Classifier.wrap(plain(), mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.25]), 3, 12, 12
    ),
    "residual, batch norm, in-place ReLU": lambda: seeded(PoolingNetwork, 3, 10, 10),
    "gray, two classes, not square": lambda: seeded(FlatNetwork, 1, 16, 12),
    "branches, pooling, ReLU6, tuple": lambda: seeded(Inception, 3, 10, 8),
    "groups, pads, hardtanh, no linear layer": lambda: seeded(Grouped, 3, 11, 9),
    "max pooling, linear layers": lambda: seeded(Deep, 1, 12, 16),
}
