"""What a reproduction works on: a network, images that it classifies correctly, and their attacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from weakspot import attacks
from weakspot.budgets import Budget, Linf
from weakspot.classifier import as_classifier, predict
from weakspot.datasets import LabeledImages
from weakspot.pairs import AttackResult


@dataclass(frozen=True)
class Material:
    """A network and its data.

    Attributes:
        model: any classifier.
        images: (N, C, H, W), all classified as `labels`.
        labels: (N,).
        about: what the data are and which network it is, for the page.
        quick: whether fewer steps and images are used.
        seed: of every attack and test.
        train: labeled images to train on, if there are any.
        test: labeled images of the same kind that no network is trained on.
        make: a seed to a fresh network for `train`.
        log: called with what is being done.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    about: str
    quick: bool = True
    seed: int = 0
    train: LabeledImages | None = None
    test: LabeledImages | None = None
    make: Callable[[int], nn.Module] | None = None
    log: Callable[[str], object] = lambda _: None

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.images)

    @cached_property
    def budget(self) -> Budget:
        """4/255 at photographs, 2/255 at small color images, .2 at gray ones: most attacks succeed, without "
        "excess.
        """
        if self.images.shape[1] == 1:
            return Linf(0.2)
        return Linf((4 if min(self.images.shape[2:]) >= 96 else 2) / 255)

    @cached_property
    def pairs(self) -> AttackResult:
        """PGD on every image."""
        self.log("attacking")
        steps = 10 if self.quick else 40
        return attacks.pgd(
            self.model, self.images, self.labels, budget=self.budget, steps=steps, seed=self.seed
        )

    @property
    def successes(self) -> int:
        """How many attacks of `pairs` succeed."""
        return int(self.pairs.success.sum())

    @cached_property
    def fooled(self) -> AttackResult:
        """The successful attacks of `pairs`, of which there must be one."""
        return self.pairs[self.pairs.success]

    def correct(self, images: Tensor, labels: Tensor) -> Tensor:
        """(N,) bool, whether the network classifies images as labels."""
        return predict(as_classifier(self.model), images).argmax(1) == labels

    def others(self, maps: Tensor) -> Tensor:
        """Every image's map replaced by that of another image, none by its own."""
        order = torch.randperm(len(maps), generator=torch.Generator().manual_seed(self.seed))
        return maps[order.roll(1)[order.argsort()]]
