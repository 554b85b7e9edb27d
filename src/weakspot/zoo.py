"""The zoo's networks by name.

Two convolutions and two linear layers, for small gray pictures such as MNIST's.

ResNet-20 for small color pictures.

Pre-activation ResNet-18 for small color pictures.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weakspot._checks import check_seed, unknown_choice
from weakspot._state import seeded
from weakspot.classifier import Classifier


def two_conv(*, classes: int = 10, channels: int = 1, size: tuple[int, int] = (28, 28)) -> Classifier:
    """Convolutions 4 x 4 with stride 2 to 16 and 32 channels, linear to 100, linear to the classes.

    The shape of the small networks that Wong and Kolter 2018 (arXiv 1711.00851) train on MNIST: 166,406 weights there.

    Args:
        classes: at least two.
        channels: of the images.
        size: (height, width) of the images, both at least 4.
    """
    height, width = (side // 2 // 2 for side in size)
    network = nn.Sequential(
        nn.Conv2d(channels, 16, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * height * width, 100),
        nn.ReLU(),
        nn.Linear(100, classes),
    )
    return Classifier(network, input_size=size, name="two_conv")


WIDTHS = (16, 32, 64)


def resnet20(*, classes: int = 10, channels: int = 3, size: tuple[int, int] = (32, 32)) -> Classifier:
    """ResNet-20 of He et al. 2016 (arXiv 1512.03385, section 4.2), shortcuts without weights: 0.27 million weights.

    Images are normalized by mean 0.5 and deviation 0.25.

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


PREACT_WIDTHS = (64, 128, 256, 512)


def preact_resnet18(*, classes: int = 10, channels: int = 3, size: tuple[int, int] = (32, 32)) -> Classifier:
    """Pre-activation ResNet-18 (He et al. 2016, arXiv 1603.05027), first convolution 3 x 3: 11.2 million weights.

    Images are normalized by mean 0.5 and deviation 0.25.

    Args:
        classes: at least two.
        channels: of the images.
        size: (height, width) of the images.
    """
    blocks = [
        _PreactBlock(before, after, 1 if number or after == PREACT_WIDTHS[0] else 2)
        for start, after in zip((PREACT_WIDTHS[0], *PREACT_WIDTHS), PREACT_WIDTHS, strict=False)
        for number, before in enumerate((start, after))
    ]
    network = nn.Sequential(
        nn.Conv2d(channels, PREACT_WIDTHS[0], 3, padding=1, bias=False),
        *blocks,
        nn.BatchNorm2d(PREACT_WIDTHS[-1]),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(PREACT_WIDTHS[-1], classes),
    )
    return Classifier(
        network, mean=[0.5] * channels, std=[0.25] * channels, input_size=size, name="preact_resnet18"
    )


class _PreactBlock(nn.Module):
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


NETWORKS: dict[str, Callable[..., Classifier]] = {
    "two_conv": two_conv,
    "resnet20": resnet20,
    "preact_resnet18": preact_resnet18,
}
ALIASES = {"resnet18": "preact_resnet18"}


def build(
    name: str, *, classes: int, channels: int = 3, size: tuple[int, int] = (32, 32), seed: int = 0
) -> Classifier:
    """The network of that name with weights drawn by `seed`; the global random numbers stay as they were.

    Args:
        name: one of `NETWORKS`; "resnet18" is "preact_resnet18".
        classes: at least two.
        channels: of the images.
        size: (height, width) of the images.
        seed: of the weights.

    Raises:
        ValueError: when an argument does not fit, naming it.

    >>> build("resnet20", classes=10)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    maker = NETWORKS.get(ALIASES.get(name, name))
    if maker is None:
        raise ValueError(unknown_choice("model", name, [*NETWORKS, *ALIASES]))
    if classes < 2:
        raise ValueError(f"classes is {classes}; accepted are two and more")
    if min(size) < 8:
        raise ValueError(f"size is {size}; accepted are images of at least 8 x 8 pixels")
    check_seed(seed)
    with seeded(seed):
        return maker(classes=classes, channels=channels, size=size).eval()
