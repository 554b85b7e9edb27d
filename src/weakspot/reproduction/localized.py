"""Rothberg et al., "Localized Adversarial Training for Increased Accuracy and Robustness in Image Classification".

arXiv 1909.04779.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from weakspot import attacks, regions
from weakspot.pairs import AttackResult
from weakspot.reproduction.claims import CAUTION, CONFIRMED, NOT_CONFIRMED, Claim, Difference, untested
from weakspot.reproduction.material import Material
from weakspot.statistics import LEAST_RUN, proportion_interval
from weakspot.statistics.number_format import percent
from weakspot.training import Matrix, TrainConfig, robustness_matrix

CITATION = "Rothberg, Chen, Luo and Ji, arXiv 1909.04779"
BACKGROUND = (
    "We first use this attack to highlight the unnecessary sensitivity of neural networks to changes in the "
    "background of an image"
)
TRAINING = (
    "By including locally adversarial images in the training set, we are able to create a classifier that "
    "suffers less loss than "
    "a non-adversarially trained counterpart model on both natural and adversarial inputs"
)
SENSITIVE = 0.1  # lower bound of the rate above which the network counts as sensitive to the background
LEARNED = 0.8  # accuracy of the standard network below which a training shows nothing
QUICK_RECIPES = ("standard", "localized", "full")
FULL_RECIPES = ("standard", "localized", "foreground", "random_mask", "full")


class Localized:
    """Both claims."""

    def __init__(self, material: Material, out: Path) -> None:
        self.material, self.out = material, out
        self.attack = f"PGD, {material.budget}"
        self.claims = {"the background is enough": self.background, "localized training helps": self.training}

    def background(self) -> Claim:
        """Attacks confined to the background, beside attacks on as many pixels anywhere."""
        name, material = "the background is enough", self.material
        masks = regions.background(material.images)
        usable = masks.flatten(1).any(1) & ~masks.flatten(1).all(1)
        if int(usable.sum()) < LEAST_RUN:
            return untested(
                name,
                BACKGROUND,
                f"Only {int(usable.sum())} images have a background that can be found; {LEAST_RUN} are needed.",
            )
        masks, images, labels = masks[usable], material.images[usable], material.labels[usable]
        area = masks.double().mean((1, 2, 3))
        other = regions.matched(masks, kind="random", seed=material.seed)

        def confined(region: Tensor) -> AttackResult:
            return attacks.pgd(
                material.model,
                images,
                labels,
                budget=material.budget,
                region=region,
                steps=10 if material.quick else 40,
                seed=material.seed,
            )

        material.log("attacking the background")
        own, control = confined(masks).success.numpy(), confined(other).success.numpy()
        rate, low, high = proportion_interval(own)
        difference = Difference.of(own, control)
        measured = (
            f"Attacks that change the background alone ({percent(float(area.mean()))} of the image on average) "
            f"fool the network on "
            f"{percent(rate)} [{percent(low)}, {percent(high)}] of the images."
        )
        sentence = f"On as many pixels drawn at random over the whole image: {difference}."
        outcome = CONFIRMED if low >= SENSITIVE else NOT_CONFIRMED
        if outcome == CONFIRMED and difference.high < 0:
            outcome = CAUTION
            sentence += " The background is less sensitive than the rest of the image, but sensitive."
        return Claim(
            name,
            BACKGROUND,
            measured,
            sentence,
            outcome,
            {"rate": rate, "low": low, "high": high, "random": difference.second},
        )

    @cached_property
    def matrix(self) -> Matrix | None:
        """Networks trained by each recipe at equal cost; None without training data."""
        material = self.material
        if material.train is None or material.test is None or material.make is None:
            return None
        material.log("training")

        def log(network: str) -> None:
            material.log(f"training {network}")

        config = TrainConfig(
            budget=material.budget,
            epochs=6 if material.quick else 20,
            steps=3 if material.quick else None,
            seed=material.seed,
        )
        data = (
            material.train.subset(torch.arange(min(4000, len(material.train.labels))))
            if material.quick
            else material.train
        )
        return robustness_matrix(
            material.make,
            data,
            material.test,
            config,
            out=self.out / "networks",
            recipes=self._recipes,
            limit=100 if material.quick else None,
            strongest=10 if material.quick else 500,
            on_epoch=lambda network, _: log(network),
        )

    @property
    def _recipes(self) -> Sequence[str]:
        return QUICK_RECIPES if self.material.quick else FULL_RECIPES

    def training(self) -> Claim:
        """Localized training against standard training, on clean images and in the background, beside full "
        "training.
        """
        name = "localized training helps"
        if self.matrix is None:
            return untested(
                name, TRAINING, "Training needs a data set with training and test images (--data)."
            )
        matrix = self.matrix
        clean, robust, everywhere = (
            _difference(matrix, test, "standard") for test in ("clean", "localized", "full")
        )
        images = int(matrix.accuracy["images"].iloc[0])
        learned = _rate(matrix, "standard", "clean")
        if learned < LEARNED:
            why = f"Standard training reaches only {percent(learned)} without attack; {percent(LEARNED)} are needed."
            return untested(name, TRAINING, why)
        measured = (
            f"Localized against standard training: without attack {_points(clean)}, attacked in the background "
            f"{_points(robust)}, attacked "
            f"everywhere {_points(everywhere)} ({images} test images)."
        )
        rows = [
            f"{recipe}: {percent(_rate(matrix, recipe, 'clean'))} clean, "
            f"{percent(_rate(matrix, recipe, 'localized'))} "
            f"attacked in the background, {percent(_rate(matrix, recipe, 'full'))} everywhere"
            for recipe in self._recipes
        ]
        control = f"At equal cost, {'; '.join(rows)}."
        outcome = NOT_CONFIRMED
        if robust["low"] > 0:
            outcome = CONFIRMED if clean["low"] > 0 else CAUTION
            if outcome == CAUTION:
                control += " Accuracy without attack is not shown to rise."
        full = _difference(matrix, "localized", "full")
        if robust["low"] > 0 and full["high"] < 0:
            outcome = CAUTION
            control += " Training against attacks everywhere withstands attacks in the background better."
        numbers = {
            f"{test} {key}": float(row[key])
            for test, row in (("clean", clean), ("background", robust), ("everywhere", everywhere))
            for key in ("difference", "low", "high")
        }
        return Claim(name, TRAINING, measured, control, outcome, numbers)


def _difference(matrix: Matrix, test: str, against: str) -> pd.Series:
    """Localized training minus another recipe, in one test."""
    table = matrix.differences
    rows = table[(table["test"] == test) & (table["recipe"] == "localized") & (table["against"] == against)]
    return rows.iloc[0]


def _rate(matrix: Matrix, recipe: str, test: str) -> float:
    table = matrix.accuracy
    return float(table[(table["recipe"] == recipe) & (table["test"] == test)]["accuracy"].iloc[0])


def _points(row: pd.Series) -> str:
    difference, low, high = (100 * float(row[key]) for key in ("difference", "low", "high"))
    interval = "" if np.isnan(low) else f" [{low:+.1f}, {high:+.1f}]"
    return f"{difference:+.1f} points{interval}"
