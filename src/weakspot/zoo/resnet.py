"""ResNet-20 for small colour pictures."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weakspot.classifier import Classifier

WIDTHS = (16, 32, 64)


def resnet20(*, classes: int = 10, channels: int = 3, size: tuple[int, int] = (32, 32)) -> Classifier:
    """ResNet-20 of He et al. 2016 (arXiv 1512.03385, section 4.2), shortcuts without weights: 0.27 million weights.

    Images are normalised by mean 0.5 and deviation 0.25.

    Args:
        classes: at least two.
        channels: of the images.
        size: (height, width) of the images.
    """
    stages = [
        _Block(before, after, 2 if number == 0 and before != after else 1)
        for start, after in zip((WIDTHS[0], *WIDTHS), WIDTHS, strict=False)
        for number, before in enumerate((start, after, after))
    ]
    network = nn.Sequential(
        nn.Conv2d(channels, WIDTHS[0], 3, padding=1, bias=False),
        nn.BatchNorm2d(WIDTHS[0]),
        nn.ReLU(),
        *stages,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(WIDTHS[-1], classes),
    )
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return Classifier(network, mean=[0.5] * channels, std=[0.25] * channels, input_size=size, name="resnet20")


class _Block(nn.Module):
    """Two convolutions beside a shortcut, which takes every other pixel and fills new channels with zeros."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(after)
        self.second = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(after)
        self.stride, self.added = stride, after - before

    def forward(self, maps: Tensor) -> Tensor:
        shortcut = maps[:, :, :: self.stride, :: self.stride] if self.stride > 1 else maps
        if self.added:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))
        hidden = torch.relu(self.first_norm(self.first(maps)))
        return torch.relu(self.second_norm(self.second(hidden)) + shortcut)
