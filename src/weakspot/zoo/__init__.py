"""Reference networks, small enough to train on a laptop; each function makes one with fresh weights."""

from weakspot.zoo.networks import NETWORKS, build
from weakspot.zoo.preact_resnet import preact_resnet18
from weakspot.zoo.resnet import resnet20
from weakspot.zoo.two_conv import two_conv

__all__ = ["NETWORKS", "build", "preact_resnet18", "resnet20", "two_conv"]
