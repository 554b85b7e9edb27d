"""Xu et al., "Interpreting Adversarial Examples by Activation Promotion and Suppression", arXiv 1904.02057."""

from __future__ import annotations

import tempfile
from functools import cached_property
from pathlib import Path

import numpy as np

from weakspot import attacks
from weakspot.attribution.hooks import spatial_layers
from weakspot.budgets import L2
from weakspot.classifier import as_classifier, evaluating
from weakspot.dissection import associate, demo_concepts, dissect, join, unit_sensitivity
from weakspot.explanations import interpretability_test, promotion_suppression
from weakspot.pairs import AttackResult
from weakspot.reproduction.claims import CAUTION, CONFIRMED, NOT_CONFIRMED, Claim, untested
from weakspot.reproduction.material import Material
from weakspot.statistics import LEAST_OTHERS, mean_interval, mean_test, proportion_interval
from weakspot.statistics.number_format import counted, p_value, percent

CITATION = "Xu, Liu, et al., arXiv 1904.02057"
TYPES = (
    "adversaries have a promotion-suppression effect (PSE) on neurons' activations and can be primarily "
    "categorized into three "
    "types: i) suppression-dominated perturbations [...], ii) promotion-dominated perturbations [...], and iii) "
    "balanced "
    "perturbations"
)
CAM = (
    "This links PSE of pixel-level perturbations to class-specific discriminative image regions localized by "
    "class activation "
    "mapping"
)
UNITS = (
    "there exists a tight connection between the units' sensitivity to adversarial attacks and their "
    "interpretability on "
    "semantic concepts"
)
FEWEST_UNITS = 10  # units of a correlation; also images of a table
KINDS = ("promotion-dominated", "suppression-dominated", "balanced")
LARGE_GAP = 0.5  # additivity gap above which effects of single cells do not explain the whole
TIGHT = 0.3  # partial rank correlation that counts as tight


class Promotion:
    """The three claims, on untargeted attacks bounded in L2, whose size differs from pixel to pixel."""

    def __init__(self, material: Material) -> None:
        self.material = material
        # As long as a perturbation of 1/255 (gray: .05) at every value.
        size = 0.05 if material.images.shape[1] == 1 else 1 / 255
        self.budget = L2(size * material.images[0].numel() ** 0.5)
        self.attack = f"PGD, {self.budget}"
        self.claims = {
            "three types": self.types,
            "perturbations follow the class activation": self.cam,
            "sensitive units are interpretable": self.units,
        }

    @cached_property
    def pairs(self) -> AttackResult | None:
        """Successful attacks; None if there are none."""
        material = self.material
        material.log("attacking")
        result = attacks.pgd(
            material.model,
            material.images,
            material.labels,
            budget=self.budget,
            steps=10 if material.quick else 40,
            seed=material.seed,
        )
        return result[result.success] if result.success.any() else None

    @property
    def successes(self) -> int:
        """Number of `pairs`."""
        return 0 if self.pairs is None else len(self.pairs)

    def types(self) -> Claim:
        """How the successful perturbations divide into the three types, and whether effects of cells add up."""
        name = "three types"
        if self.pairs is None or len(self.pairs) < FEWEST_UNITS:
            return untested(
                name, TYPES, f"Only {counted(self.successes)} can be fooled; {FEWEST_UNITS} are needed."
            )
        self.material.log("restoring cell by cell")
        scores = promotion_suppression(
            self.material.model, self.pairs, cell=max(1, min(self.pairs.clean.shape[2:]) // 8)
        ).scores
        kinds = scores["perturbation_type"]
        rates = {kind: proportion_interval((kinds == kind).to_numpy()) for kind in KINDS}
        parts = ", ".join(
            f"{percent(rate)} [{percent(low)}, {percent(high)}] {kind}"
            for kind, (rate, low, high) in rates.items()
        )
        measured = f"Of {counted(len(kinds), 'perturbation')}: {parts}."
        gap = float(scores["additivity_gap"].abs().mean())
        control = (
            "The type is that of the whole perturbation. The effects of single cells, left out one at a time, add up "
            f"to something else: the sum differs from the whole effect by {percent(gap)} of it on average."
        )
        present = sum(rate > 0 for rate, _, _ in rates.values())
        outcome = NOT_CONFIRMED if present < 2 else CONFIRMED
        if outcome == CONFIRMED and (present < len(KINDS) or gap > LARGE_GAP):
            outcome = CAUTION
            control += f" {present} of the three types occur." if present < len(KINDS) else ""
        return Claim(
            name,
            TYPES,
            measured,
            control,
            outcome,
            {**{kind: rate for kind, (rate, _, _) in rates.items()}, "gap": gap},
        )

    def cam(self) -> Claim:
        """Whether perturbations are stronger in their own label's class activation than in other images'."""
        name = "perturbations follow the class activation"
        count = self.successes
        if self.pairs is None or count <= LEAST_OTHERS:
            return untested(name, CAM, f"Only {counted(count)} can be fooled; {LEAST_OTHERS + 1} are needed.")
        table = interpretability_test(self.material.model, self.pairs)
        own, null = table["interpretability_label"], table["interpretability_label_null"]
        difference = (own - null).to_numpy(float)
        mean, low, high = mean_interval(difference, self.material.seed)
        p = mean_test(difference, self.material.seed)
        measured = (
            f"{percent(float(own.mean()))} of a perturbation's length lies in the 30% of the image with the "
            f"largest class activation of "
            f"the label ({counted(count)})."
        )
        generic = float(null.mean()) - 0.3**0.5
        control = (
            f"With the class activation of other images it is {percent(float(null.mean()))}: {mean:+.3f} "
            f"[{low:+.3f}, {high:+.3f}] "
            f"({p_value(p)}). An even perturbation has {percent(0.3**0.5)} by area."
        )
        outcome = NOT_CONFIRMED if not low > 0 else CAUTION if generic > mean else CONFIRMED
        if outcome == CAUTION:
            control += " Most of the excess over the area is shared by other images of this network."
        return Claim(
            name,
            CAM,
            measured,
            control,
            outcome,
            {"value": float(own.mean()), "null": float(null.mean()), "p": p},
        )

    def units(self) -> Claim:
        """Whether sensitive units detect concepts, at equal activation."""
        name, material = "sensitive units are interpretable", self.material
        if material.images.shape[1] == 1:
            return untested(
                name, UNITS, "The drawn concepts are colors and textures, and these images are gray."
            )
        if self.pairs is None or len(self.pairs) < FEWEST_UNITS:
            return untested(
                name, UNITS, f"Only {counted(self.successes)} can be fooled; {FEWEST_UNITS} are needed."
            )
        material.log("dissecting the last layer")
        classifier = as_classifier(material.model)
        with evaluating(classifier):
            places = spatial_layers(classifier, material.images[:1])
        layers = [key for key, place in places.items() if place.module is not None and place.calls == 1]
        if not layers:
            return untested(name, UNITS, "The network has no layer of its own that is called once.")
        layer = layers[-1]
        with tempfile.TemporaryDirectory() as folder:
            concepts = demo_concepts(
                Path(folder) / "concepts",
                count=48 if material.quick else 192,
                size=min(material.images.shape[2:]),
                seed=material.seed,
            )
            table = join(
                unit_sensitivity(classifier, layer, self.pairs, seed=material.seed),
                dissect(classifier, layer, concepts),
            )
        finite = np.isfinite(table[["sensitivity", "iou", "mean_activation"]].to_numpy(float)).all(1)
        if finite.sum() < 2 * FEWEST_UNITS:
            return untested(name, UNITS, f"Only {int(finite.sum())} units of {layer} vary over the images.")
        own = associate(table, seed=material.seed)
        noise = associate(table.assign(sensitivity=table["noise"]), seed=material.seed)
        control = (
            f"Busy units move more and overlap more: at equal mean activation the correlation is "
            f"{own.partial:.2f} [{own.low:.2f}, "
            f"{own.high:.2f}]. For noise of the same size instead of the attack, {noise.partial:.2f}. Concepts "
            f"are drawn colors and "
            "textures, not objects."
        )
        measured = (
            f"The rank correlation of sensitivity and interpretability (IoU) is {own.correlation:.2f} over "
            f"{own.units} units of {layer}."
        )
        outcome = NOT_CONFIRMED
        if own.low > 0:
            outcome = CONFIRMED if own.partial >= TIGHT and noise.partial < own.low else CAUTION
        numbers = {
            "correlation": own.correlation,
            "partial": own.partial,
            "low": own.low,
            "high": own.high,
            "noise": noise.partial,
        }
        return Claim(name, UNITS, measured, control, outcome, numbers)
