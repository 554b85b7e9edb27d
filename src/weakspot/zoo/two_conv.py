"""Two convolutions and two linear layers, for small grey pictures such as MNIST's."""

from __future__ import annotations

from torch import nn

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
