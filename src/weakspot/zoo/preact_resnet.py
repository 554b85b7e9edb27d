"""Pre-activation ResNet-18 for small colour pictures."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weakspot.classifier import Classifier

WIDTHS = (64, 128, 256, 512)


def preact_resnet18(*, classes: int = 10, channels: int = 3, size: tuple[int, int] = (32, 32)) -> Classifier:
    """Pre-activation ResNet-18 (He et al. 2016, arXiv 1603.05027), first convolution 3 x 3: 11.2 million weights.

    Images are normalised by mean 0.5 and deviation 0.25.

    Args:
        classes: at least two.
        channels: of the images.
        size: (height, width) of the images.
    """
    blocks = [
        _Block(before, after, 1 if number or after == WIDTHS[0] else 2)
        for start, after in zip((WIDTHS[0], *WIDTHS), WIDTHS, strict=False)
        for number, before in enumerate((start, after))
    ]
    network = nn.Sequential(
        nn.Conv2d(channels, WIDTHS[0], 3, padding=1, bias=False),
        *blocks,
        nn.BatchNorm2d(WIDTHS[-1]),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(WIDTHS[-1], classes),
    )
    return Classifier(
        network, mean=[0.5] * channels, std=[0.25] * channels, input_size=size, name="preact_resnet18"
    )


class _Block(nn.Module):
    """Norm, ReLU, convolution, twice; where the shape changes, the shortcut is a convolution of the activated maps."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first_norm = nn.BatchNorm2d(before)
        self.first = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(after)
        self.second = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        changed = before != after or stride != 1
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False) if changed else None

    def forward(self, maps: Tensor) -> Tensor:
        active = torch.relu(self.first_norm(maps))
        beside = maps if self.shortcut is None else self.shortcut(active)
        hidden: Tensor = self.second(torch.relu(self.second_norm(self.first(active))))
        return hidden + beside
