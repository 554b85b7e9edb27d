"""Held-out images: how a network in training does on pictures that it is not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from weakspot.attacks import pgd
from weakspot.checks import ModelWarning, quiet
from weakspot.classifier import Classifier, predict
from weakspot.defenses.training.settings import Settings
from weakspot.threads import EvalMode

STEPS = 10  # of the attack that judges; many-step, so that it sees what single-step training overfits to
FALL, PART = 0.2, 0.5  # robust accuracy that lost more than this, and this part of its best, has collapsed


class HeldOut(NamedTuple):
    """Images (N, C, H, W), labels (N,), and the region (N, 1, H, W) of the attack, None for everywhere."""

    images: Tensor
    labels: Tensor
    region: Tensor | None

    @property
    def constant(self) -> float:
        """The share that the commonest class has."""
        return float(self.labels.bincount().max()) / len(self.labels)

    def judge(self, classifier: Classifier, settings: Settings) -> dict[str, float]:
        """Shares of the images that are read rightly: as they are ("clean"), and attacked ("robust")."""
        device = classifier.mean.device
        images, labels = self.images.to(device), self.labels.to(device)
        with EvalMode(classifier):
            clean = predict(classifier, images).argmax(1) == labels
            with quiet(ModelWarning):  # an untrained network may well have no gradient
                attacked = pgd(
                    classifier,
                    images,
                    labels,
                    budget=settings.budget,
                    region=None if self.region is None else self.region.to(device),
                    steps=STEPS,
                    stop_early=True,
                )
            robust = predict(classifier, attacked.adversarial).argmax(1) == labels
        return {"clean": float(clean.double().mean()), "robust": float((clean & robust).double().mean())}


def collapsed(robust: Sequence[float], constant: float) -> bool:
    """Whether the last of these accuracies says that robustness was there and is lost.

    What a network had that always names the commonest class, right for the share `constant`, was no robustness.

    Catastrophic overfitting (Wong et al. 2020, arXiv 2001.03994): a network learns to stand single steps alone, and
    its accuracy under many steps falls to nothing from one epoch to the next.

    >>> collapsed([0.3, 0.41, 0.02], 0.1), collapsed([0.3, 0.41, 0.35], 0.1), collapsed([0.5, 0.1], 0.5)
    (True, False, False)
    """
    best = max(robust)
    gained = best - constant
    return gained > FALL / 2 and robust[-1] < best - FALL and robust[-1] - constant < PART * gained
