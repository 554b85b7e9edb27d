"""Steady batches: an image's logits are the same to the last bit, whatever images it comes with.

The kernels of a convolution or a matrix product choose their order of summation by the number of images; an attack
then follows the last bit to another perturbation. So every pass goes in groups of one size. What is left is the place
in the group, which tells where rows of an odd number of features begin in memory; shards and lots keep it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weakspot.classifier import Classifier, default_batch

LARGEST_GROUP = 16  # on CPUs as fast as larger ones; more would fill up more of the last group of a batch


class SteadyClassifier(Classifier):
    """A classifier whose network is given exactly `group` images at a time, the last of them repeated to fill up.

    Attributes:
        group: how many; may be halved where memory runs out, at the price of the last bits.
        smallest_group: what it cannot be made smaller than.
    """

    def __init__(self, classifier: Classifier, group: int | None = None) -> None:
        super().__init__(
            classifier.network,
            mean=classifier.mean.flatten().tolist(),
            std=classifier.std.flatten().tolist(),
            input_size=classifier.input_size,
            class_names=classifier.class_names,
            name=classifier.name,
        )
        self.channels = classifier.channels
        self.to(classifier.mean.device)
        self.smallest_group = classifier.fixed_batch or 1
        self.group = classifier.fixed_batch or group or usual_group(classifier)

    @property
    def group(self) -> int:
        return self.fixed_batch or 1

    @group.setter
    def group(self, size: int) -> None:
        self.fixed_batch = size

    def forward(self, images: Tensor) -> Tensor:
        if len(images) == self.group:
            return super().forward(images)
        parts = [
            super(SteadyClassifier, self).forward(part) for part in self.filled(images).split(self.group)
        ]
        return torch.cat(parts)[: len(images)]


def usual_group(classifier: Classifier) -> int:
    """How many images of the classifier's size go through it at once, unless a plan says otherwise."""
    image = torch.empty(1, 1, *classifier.input_size, device="meta")
    return min(LARGEST_GROUP, default_batch(image))
