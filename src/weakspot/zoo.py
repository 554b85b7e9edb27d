"""Small networks to train: two convolutions for MNIST, ResNet-20 and pre-activation ResNet-18 for CIFAR."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weakspot._checks import check_choice, check_count, check_seed
from weakspot._state import seeded
from weakspot.classifier import Classifier


def two_conv(*, classes: int = 10, channels: int = 1, size: tuple[int, int] = (28, 28)) -> Classifier:
    """Two 4 x 4 convolutions of stride 2 with 16 and 32 channels, and linear layers to 100 and to the classes.

    The small network of Wong and Kolter 2018 (arXiv 1711.00851) for MNIST, with 166,406 weights.

    Args:
        classes: at least two.
        channels: of the images.
        size: (height, width) of the images, both at least 4.
    """
    # A 4 x 4 kernel with stride 2 and padding 1 halves a side, rounded down.
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
    """ResNet-20 of He et al. 2016 (arXiv 1512.03385, section 4.2), with parameter-free shortcuts, 0.27 million weights.

    Images are normalized with mean 0.5 and standard deviation 0.25.

    Args:
        classes: at least two.
        channels: of the images.
        size: (height, width) of the images.
    """
    # Three blocks for each width; the first block of each wider stage halves the sides.
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
    """Two convolutions and a shortcut that subsamples by 2 and pads new channels with zeros (option A)."""

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
            # F.pad counts axes from the last one: nothing around width and height, zeros around the channels.
            shortcut = F.pad(shortcut, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))
        hidden = torch.relu(self.first_norm(self.first(maps)))
        return torch.relu(self.second_norm(self.second(hidden)) + shortcut)


PREACT_WIDTHS = (64, 128, 256, 512)


def preact_resnet18(*, classes: int = 10, channels: int = 3, size: tuple[int, int] = (32, 32)) -> Classifier:
    """Pre-activation ResNet-18 (He et al. 2016, arXiv 1603.05027) with a 3 x 3 first convolution, 11.2 million weights.

    Images are normalized with mean 0.5 and standard deviation 0.25.

    Args:
        classes: at least two.
        channels: of the images.
        size: (height, width) of the images.
    """
    # Two blocks for each width; the first block of every stage but the first halves the sides.
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
    """Norm, ReLU and convolution, twice; if the shape changes, the shortcut is a convolution of the activated maps."""

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
        shortcut = maps if self.shortcut is None else self.shortcut(active)
        hidden: Tensor = self.second(torch.relu(self.second_norm(self.first(active))))
        return hidden + shortcut


NETWORKS: dict[str, Callable[..., Classifier]] = {
    "two_conv": two_conv,
    "resnet20": resnet20,
    "preact_resnet18": preact_resnet18,
}
ALIASES = {"resnet18": "preact_resnet18"}


def build(
    name: str, *, classes: int, channels: int = 3, size: tuple[int, int] = (32, 32), seed: int = 0
) -> Classifier:
    """Build a network with weights from a seed; global random generators are not changed.

    Args:
        name: one of `NETWORKS`; "resnet18" means "preact_resnet18".
        classes: at least two.
        channels: of the images.
        size: (height, width) of the images.
        seed: of the initial weights.

    Raises:
        ValueError: if an argument is not valid.

    >>> build("resnet20", classes=10)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    check_choice("model", name, [*NETWORKS, *ALIASES])
    check_count("classes", classes, least=2)
    if min(size) < 8:
        raise ValueError(f"size must be at least 8 x 8 pixels, got {size}")
    check_seed(seed)
    with seeded(seed):
        return NETWORKS[ALIASES.get(name, name)](classes=classes, channels=channels, size=size).eval()
