"""Xu et al., "Interpreting Adversarial Examples by Activation Promotion and Suppression", arXiv 1904.02057."""

import copy
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from weakspot.attribution.hooks import spatial_layers
from weakspot.budgets import L2
from weakspot.classifier import as_classifier, evaluating
from weakspot.dissection import associate, demo_concepts, dissect, join, unit_sensitivity
from weakspot.explanations import interpretability_test, promotion_suppression
from weakspot.explanations.visible_change import with_shuffled_weights
from weakspot.pairs import AttackResult
from weakspot.reproduction.claim_panels import Panel, Series, rounded
from weakspot.reproduction.claims import CAUTION, CONFIRMED, NOT_CONFIRMED, Claim, Measurement, untested
from weakspot.reproduction.material import Material
from weakspot.statistics import LEAST_OTHERS, mean_interval, mean_test, proportion_interval
from weakspot.statistics.number_format import counted, number, p_value, percent, with_interval

TITLE = "Interpreting Adversarial Examples by Activation Promotion and Suppression"
CITATION = "Xu, Liu, et al., arXiv 1904.02057"
TYPES = (
    "adversaries have a promotion-suppression effect (PSE) on neurons' activations and can be primarily categorized "
    "into three types: i) suppression-dominated perturbations [...], ii) promotion-dominated perturbations [...], and "
    "iii) balanced perturbations"
)
CAM = (
    "This links PSE of pixel-level perturbations to class-specific discriminative image regions localized by class "
    "activation mapping"
)
UNITS = (
    "there exists a tight connection between the units' sensitivity to adversarial attacks and their interpretability "
    "on semantic concepts"
)
METHOD = (
    "Every image is attacked by untargeted PGD under L2, and successful attacks are kept. A perturbation is "
    "promotion-dominated if it raises the logit of the class it reaches by more than twice as much as it lowers the "
    "logit of the label, suppression-dominated if the other way round, and balanced otherwise. For the second claim, "
    "the fraction of a perturbation's length in the 30% of the image with the largest class activation of the label is "
    "compared with the class activations of the other images. For the third, the units of the last layer of maps are "
    "ranked by how much the attack moves their mean activation, relative to its spread over images, and by how well "
    "they detect a drawn concept (IoU), at equal mean activation. Noise of the same size takes the place of the attack "
    "as its control, and the network with permuted weights that of the network for the second claim."
)
LIMITS = (
    "The paper attacks ImageNet networks with a target, by four attacks; this is one attack without a target, "
    "which may shift the three types. The effects of single cells do not add up to that of the whole "
    "perturbation. The concepts are drawn colors and textures, not the labeled objects of network dissection: "
    "use `weakspot dissect` for those."
)
QUOTES: Mapping[str, str] = {
    "three types": TYPES,
    "perturbations follow the class activation": CAM,
    "sensitive units are interpretable": UNITS,
}
FEWEST_UNITS = 10  # units of a correlation; also images of a table
KINDS = ("promotion-dominated", "suppression-dominated", "balanced")
LEAST_EXCESS = 0.02  # of a perturbation's length: random networks reach .014
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
        result = material.pgd("attacking in L2", self.budget)
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
            f"{with_interval(rate, low, high)} {kind}" for kind, (rate, low, high) in rates.items()
        )
        measured = f"Of {counted(len(kinds), 'perturbation')}: {parts}."
        gap = float(scores["additivity_gap"].abs().mean())
        control = (
            "The type is that of the whole perturbation. The effects of single cells, left out one at a time, add up "
            f"to something else: the sum differs from the whole effect by {percent(gap)} of it on average."
        )
        missing = [kind for kind, (rate, _, _) in rates.items() if rate == 0]
        # The three types exhaust all cases by definition, so that each occurs is all that can be found.
        outcome = NOT_CONFIRMED if missing else CAUTION
        control += (
            f" No perturbation is {' or '.join(missing)}."
            if missing
            else " The three types exhaust all cases by definition; the test is only whether each of them occurs."
        )
        count = len(kinds)
        table = (
            *(Measurement(kind, rate, low, high, count) for kind, (rate, low, high) in rates.items()),
            Measurement("mean additivity gap of single cells", gap, images=count),
        )
        return Claim(name, TYPES, measured, control, outcome, table, (_plane(scores),))

    def cam(self) -> Claim:
        """Whether perturbations are stronger in their own label's class activation than in other images'."""
        name = "perturbations follow the class activation"
        if self.pairs is None or self.successes <= LEAST_OTHERS:
            return untested(
                name, CAM, f"Only {counted(self.successes)} can be fooled; {LEAST_OTHERS + 1} are needed."
            )
        table = interpretability_test(self.material.model, self.pairs)
        # An image is compared only with others that have its label's class activation.
        table = table[["interpretability_label", "interpretability_label_null"]].dropna()
        count = len(table)
        if count <= LEAST_OTHERS:
            why = f"Only {counted(count)} can be compared with other images; {LEAST_OTHERS + 1} are needed."
            return untested(name, CAM, why)
        own, null = table["interpretability_label"], table["interpretability_label_null"]
        difference = (own - null).to_numpy(float)
        mean, low, high = mean_interval(difference, self.material.seed)
        p = mean_test(difference, self.material.seed)
        measured = (
            f"{percent(float(own.mean()))} of a perturbation's length lies in the 30% of the image with the largest "
            f"class activation of the label ({counted(count)})."
        )
        # Lengths go by the square root of areas: an even perturbation has sqrt(.3) of its length in 30% of the image.
        generic = float(null.mean()) - 0.3**0.5
        unlearned, unlearned_low, unlearned_high = self._without_learning()
        control = (
            f"With the class activation of other images it is {percent(float(null.mean()))}: {mean:+.3f} "
            f"[{low:+.3f}, {high:+.3f}] "
            f"({p_value(p)}). An even perturbation has {percent(0.3**0.5)} by area. With the weights permuted and "
            f"the same attack, the difference is {'not defined' if np.isnan(unlearned) else f'{unlearned:+.3f}'}."
        )
        outcome = NOT_CONFIRMED
        if low > 0 and low <= unlearned:
            control += " It does not clearly exceed that of the network with permuted weights."
        elif low > 0 and mean < LEAST_EXCESS:
            control += f" A difference under {LEAST_EXCESS} counts as none."
        elif low > 0:
            outcome = CAUTION if generic > mean else CONFIRMED
        if outcome == CAUTION:
            control += " Most of the excess over the area is shared by other images of this network."
        measurements = (
            Measurement("length in the own class activation", float(own.mean()), images=count),
            Measurement("length in other images'", float(null.mean()), images=count),
            Measurement("difference", mean, low, high, count, "number"),
            Measurement("p", p, images=count, kind="p"),
            Measurement(
                "difference, permuted weights", unlearned, unlearned_low, unlearned_high, count, "number"
            ),
        )
        return Claim(name, CAM, measured, control, outcome, measurements)

    def _without_learning(self) -> tuple[float, float, float]:
        """The difference of `cam` for the network with permuted weights, under the same attack, with its interval."""
        material = self.material
        with evaluating(material.model) as classifier:
            shuffled = with_shuffled_weights(classifier, material.seed)
        pairs = material.pgd("attacking the network with permuted weights", self.budget, shuffled)
        table = interpretability_test(shuffled, pairs)
        difference = table["interpretability_label"] - table["interpretability_label_null"]
        values = difference.dropna().to_numpy(float)
        if len(values) < 2:
            return np.nan, np.nan, np.nan
        return mean_interval(values, material.seed)

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
        # A module that does not state its input size is dissected at the size of the images.
        # The copy is shallow: it shares the weights, and the user's classifier keeps its own size.
        classifier = copy.copy(as_classifier(material.model))
        classifier.input_size = (material.images.shape[2], material.images.shape[3])
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
            units = f"unit of {layer}" if finite.sum() == 1 else f"units of {layer}"
            why = f"Only {int(finite.sum())} {units} can be compared; {2 * FEWEST_UNITS} are needed."
            return untested(name, UNITS, why)
        own = associate(table, seed=material.seed)
        noise = associate(table.assign(sensitivity=table["noise"]), seed=material.seed)
        control = (
            f"Busy units may move more and overlap more. At equal mean activation, the correlation is "
            f"{number(own.partial)} [{number(own.low)}, {number(own.high)}]; for noise of the same size instead of the "
            f"attack, it is {number(noise.partial)}. Concepts are drawn colors and textures, not objects."
        )
        measured = (
            f"The rank correlation of sensitivity and interpretability (IoU) is {number(own.correlation)} over "
            f"{own.units} units of {layer}."
        )
        outcome = NOT_CONFIRMED
        if own.low > max(0.0, noise.partial):
            outcome = CONFIRMED if own.partial >= TIGHT else CAUTION
        elif own.low > 0:
            control += (
                " The noise does not differ from it clearly, so this is not shown to be special to attacks."
            )
        measurements = (
            Measurement("rank correlation", own.correlation, images=None, kind="number"),
            Measurement(
                "rank correlation at equal activation", own.partial, own.low, own.high, kind="number"
            ),
            Measurement(
                "the same for noise of equal size", noise.partial, noise.low, noise.high, kind="number"
            ),
        )
        return Claim(name, UNITS, measured, control, outcome, measurements)


def _plane(scores: pd.DataFrame) -> Panel:
    """Every perturbation by what it lowers and what it raises, and the borders of the three types."""
    series = []
    for kind in KINDS:
        rows = scores[scores["perturbation_type"] == kind]
        if len(rows):
            lowered, raised = rows["whole_suppression"].tolist(), rows["whole_promotion"].tolist()
            series.append(Series(f"{kind} ({len(rows)})", rounded(lowered), rounded(raised)))
    return Panel(
        "points", "What each perturbation does to the two logits; the lines are the borders of the types",
        "suppression: fall of the label's logit", "promotion: rise of the reached class's logit", tuple(series),
        slopes=(0.5, 2.0),
    )  # fmt: skip
