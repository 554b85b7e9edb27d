"""Accuracy under attack: of a network on held-out images during its training, and on test images after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from weakspot._checks import ModelWarning, check_classes, check_count, quiet
from weakspot._progress import Progress, part
from weakspot._state import EvalMode
from weakspot.attacks import ensemble, pgd
from weakspot.budgets import Budget
from weakspot.classifier import Classifier, evaluating, predict
from weakspot.datasets import LabeledImages
from weakspot.regions import matched
from weakspot.training.config import ResolvedConfig, find_recipe
from weakspot.training.data import Backgrounds, find_backgrounds

TESTS = {
    "clean": "no attack",
    "localized": "PGD in the background",
    "full": "PGD everywhere",
    "strongest": "PGD and the ensemble `attacks.ensemble` everywhere, on the first images",
    "swapped": "the background of another image behind the object",
}
GRAY_STEPS, COLOR_STEPS = 40, 20  # of PGD: MNIST and CIFAR-10 as Madry et al. 2018 (arXiv 1706.06083) test
# The split depends on the data only, so that all seeds and recipes are compared on the same images.
SPLIT_SEED = 0
HELD_OUT_STEPS = 10  # of the evaluating attack; many, because single-step training overfits to single steps
LARGEST_FALL = 0.2  # robust accuracy that fell by more than this, ...
REMAINING = 0.5  # ... to less than this fraction of its best, has collapsed


@dataclass(frozen=True, eq=False, repr=False)
class Judged:
    """Images to test on.

    Attributes:
        images: (N, C, H, W) in [0, 1].
        labels: (N,).
        backgrounds: bool (N, 1, H, W).
    """

    images: Tensor
    labels: Tensor
    backgrounds: Tensor

    def __repr__(self) -> str:
        background = float(self.backgrounds.float().mean())
        return f"Judged({len(self.images)} images of {tuple(self.images.shape[1:])}, {background:.0%} background)"


@dataclass(frozen=True)
class TestConfig:
    """How networks are tested.

    Attributes:
        budget: of all attacks.
        steps: of PGD.
        strongest: images for the ensemble, which costs a hundred times as much as the other tests.
        seed: of the attacks and of swapping backgrounds.

    Raises:
        ValueError: if a number does not fit.
    """

    __test__ = False  # not a test case of pytest

    budget: Budget
    steps: int
    strongest: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_count("strongest", self.strongest)

    @classmethod
    def usual(cls, budget: Budget, channels: int, *, strongest: int = 500) -> TestConfig:
        """40 steps for gray images, 20 for color."""
        return cls(budget, GRAY_STEPS if channels == 1 else COLOR_STEPS, strongest)


def judged_images(
    data: LabeledImages,
    *,
    limit: int | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Judged:
    """The first `limit` images of the data with their backgrounds, which `cache` stores.

    Raises:
        ValueError: if these are fewer than two images.
    """
    if limit is not None:
        check_count("limit", limit, least=2)
    if len(data) < 2:
        raise ValueError(f"test must have at least two images, to swap backgrounds, got {len(data)}")
    rows = torch.arange(len(data) if limit is None else min(limit, len(data)))
    first = data.subset(rows)
    backgrounds = find_backgrounds(first, cache=cache, progress=progress)
    return Judged(first.images(rows), first.labels, backgrounds.masks(rows))


def outcomes(
    model: nn.Module, test: Judged, config: TestConfig, *, progress: Progress | None = None
) -> dict[str, Tensor]:
    """For each of `TESTS`, which images the model classifies correctly: bool (N,), for "strongest" (strongest,).

    An attacked image counts as correct only if the clean one is.

    Args:
        model: a classifier of these images.
        test: N images.
        config: budget and effort of the attacks.
        progress: called with the fraction done.
    """
    images, labels, masks = test.images, test.labels, test.backgrounds
    with evaluating(model) as classifier:
        device = classifier.mean.device
        images, labels, masks = images.to(device), labels.to(device), masks.to(device)
        logits = predict(classifier, images)
        check_classes(labels, len(images), logits.shape[1])
        clean = logits.argmax(1) == labels
        swapped = predict(classifier, swap_backgrounds(images, masks, config.seed)).argmax(1) == labels

    def after_pgd(region: Tensor | None, start: float, end: float) -> Tensor:
        # Images that are misclassified without attack are not attacked.
        rows = clean.nonzero()[:, 0]
        right = clean.clone()
        if len(rows):
            result = pgd(
                model,
                images[rows],
                labels[rows],
                budget=config.budget,
                region=None if region is None else region[rows],
                steps=config.steps,
                seed=config.seed,
                stop_early=True,
                progress=part(progress, start, end),
            )
            right[rows] = ~result.fooled
        return right

    localized = after_pgd(masks, 0.0, 0.3)
    full = after_pgd(None, 0.3, 0.6)
    # Worst case over PGD and the ensemble, on the first images.
    strongest = (full & localized)[: config.strongest]
    rows = strongest.nonzero()[:, 0]  # images that PGD fooled need no stronger attack
    if len(rows):
        result = ensemble(
            model,
            images[rows],
            labels[rows],
            budget=config.budget,
            seed=config.seed,
            progress=part(progress, 0.6, 1.0),
        )
        strongest[rows] = ~result.fooled
    results = (clean, localized, full, strongest, swapped)
    return {name: right.cpu() for name, right in zip(TESTS, results, strict=True)}


def swap_backgrounds(images: Tensor, backgrounds: Tensor, seed: int = 0) -> Tensor:
    """The object of each image before the background of another one, (N, C, H, W).

    Where the other image has its object, the mean color of its background is used.

    Args:
        images: (N, C, H, W), at least two.
        backgrounds: bool (N, 1, H, W).
        seed: of the pairs.

    Raises:
        ValueError: if there are fewer than two images.
    """
    count = len(images)
    if count < 2:
        raise ValueError(f"images must be at least two, to swap backgrounds, got {count}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    source = torch.empty_like(order)
    source[order] = order.roll(1)  # one cycle through all images, so that none keeps its own background
    source = source.to(images.device)
    behind, visible = images[source], backgrounds[source]
    # The mean color of the other image's background fills the place of its object.
    area = visible.sum((2, 3), keepdim=True).clamp(min=1)
    mean = (behind * visible).sum((2, 3), keepdim=True) / area
    swapped: Tensor = torch.where(backgrounds, torch.where(visible, behind, mean), images)
    return swapped


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
                    steps=HELD_OUT_STEPS,
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
