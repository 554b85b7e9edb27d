"""Held-out images: how a network does during training on images that it is not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from weakspot._checks import ModelWarning, quiet
from weakspot._state import EvalMode
from weakspot.attacks import pgd
from weakspot.classifier import Classifier, predict
from weakspot.datasets import LabeledImages
from weakspot.regions import matched
from weakspot.training.backgrounds import Backgrounds
from weakspot.training.config import ResolvedConfig, find_recipe

SPLIT_SEED = (
    0  # the split depends on the data only, so that all seeds and recipes are compared on the same images
)
STEPS = 10  # of the evaluating attack; many, because single-step training overfits to single steps
LARGEST_FALL = 0.2  # robust accuracy that fell by more than this, ...
REMAINING = 0.5  # ... to less than this fraction of its best, has collapsed


class HeldOut(NamedTuple):
    """Images (N, C, H, W), labels (N,), and the region (N, 1, H, W) of the attack (None: everywhere)."""

    images: Tensor
    labels: Tensor
    region: Tensor | None

    @property
    def constant(self) -> float:
        """Accuracy of a network that always predicts the most frequent class."""
        return float(self.labels.bincount().max()) / len(self.labels)

    def evaluate(self, classifier: Classifier, config: ResolvedConfig) -> dict[str, float]:
        """Fractions of correctly classified images: without attack ("clean") and under PGD ("robust")."""
        device = classifier.mean.device
        images, labels = self.images.to(device), self.labels.to(device)
        with EvalMode(classifier):
            clean = predict(classifier, images).argmax(1) == labels
            with quiet(ModelWarning):  # an untrained network may have zero gradients
                attacked = pgd(
                    classifier,
                    images,
                    labels,
                    budget=config.budget,
                    region=None if self.region is None else self.region.to(device),
                    steps=STEPS,
                    stop_early=True,
                )
            # From a fresh pass, and only images that are correct without attack.
            robust = predict(classifier, attacked.adversarial).argmax(1) == labels
        return {"clean": float(clean.double().mean()), "robust": float((clean & robust).double().mean())}


def split(count: int, held_out: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows held out, at most a tenth of all."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))
    held = min(held_out, count // 10)
    return order[held:].sort().values, order[:held].sort().values


def held_out_images(
    data: LabeledImages, rows: Tensor, backgrounds: Backgrounds | None, config: ResolvedConfig
) -> HeldOut | None:
    """The held-out rows, with the region that the recipe attacks. None if there are no rows."""
    if not len(rows):
        return None
    region = None if backgrounds is None else backgrounds.masks(rows)
    target = find_recipe(config.recipe).region
    if region is not None and target == "foreground":
        region = ~region
    if region is not None and target == "random":
        region = matched(region, kind="random", seed=config.seed)
    return HeldOut(data.images(rows), data.labels[rows], region)


def collapsed(robust: Sequence[float], constant: float) -> bool:
    """Whether the last of these robust accuracies shows catastrophic overfitting (Wong et al. 2020, arXiv 2001.03994).

    The network then withstands single steps only, and its accuracy under many steps falls to nothing from one epoch to
    the next.

    Args:
        robust: one accuracy per epoch.
        constant: accuracy of always predicting the most frequent class, which is no robustness.

    >>> collapsed([0.3, 0.41, 0.02], 0.1), collapsed([0.3, 0.41, 0.35], 0.1), collapsed([0.5, 0.1], 0.5)
    (True, False, False)
    """
    # Gains and losses are measured from the constant predictor, which no attack can fool.
    best, last = max(robust), robust[-1]
    gained = best - constant
    return gained > LARGEST_FALL / 2 and last < best - LARGEST_FALL and last - constant < REMAINING * gained
