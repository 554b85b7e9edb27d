"""The zoo's networks by name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from weakspot.checks import check_seed, closest
from weakspot.classifier import Classifier
from weakspot.zoo.preact_resnet import preact_resnet18
from weakspot.zoo.resnet import resnet20
from weakspot.zoo.two_conv import two_conv

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
        raise ValueError(f"model is {name!r}; {closest(name, [*NETWORKS, *ALIASES])}")
    if classes < 2:
        raise ValueError(f"classes is {classes}; accepted are two and more")
    if min(size) < 8:
        raise ValueError(f"size is {size}; accepted are images of at least 8 x 8 pixels")
    check_seed(seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return maker(classes=classes, channels=channels, size=size).eval()
