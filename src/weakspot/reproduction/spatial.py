"""Chattopadhyay et al., "Spatially Correlated Patterns in Adversarial Images", arXiv 2011.10794.

The abstract defines no formula for the regions; ours are those of `overlap`.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from weakspot.defenses import evaluate_defense, neutralize, neutralizing, verdict
from weakspot.explanations import Overlap, overlap
from weakspot.reproduction.claims import CAUTION, CONFIRMED, LEVEL, NOT_CONFIRMED, Claim, Difference, untested
from weakspot.reproduction.material import Material
from weakspot.statistics import LEAST_RUN, mean_interval, run_test
from weakspot.statistics.number_format import counted, p_value, percent

CITATION = "Chattopadhyay, Yip, Tan and Chattopadhyay, arXiv 2011.10794"
FRACTION = 0.2  # of the image in each region
LOOKS = (
    "during inference, the trained model looks at a specific region in the image, which we call Region of Importance "
    "(RoI); and the attacker looks at a region to alter/modify, which we call Region of Attack (RoA)"
)
REGIONS = (
    "segregating and isolating regions within an input image which are particularly critical towards either "
    "classification (during inference), or adversarial vulnerability or both"
)
NEUTRALIZING = (
    "The success of this approach could also be used to design a post-hoc adversarial defence method"
)


class Spatial:
    """The three claims, on one set of attacks."""

    def __init__(self, material: Material) -> None:
        self.material = material
        self.attack = f"PGD, {material.budget}"
        self.claims = {
            "regions correlate": self.looks,
            "regions matter": self.regions,
            "neutralizing helps": self.helps,
        }

    @cached_property
    def overlap(self) -> Overlap:
        """Regions of importance and attack of every pair."""
        self.material.log("computing regions of importance and attack")
        return overlap(self.material.model, self.material.pairs, fraction=FRACTION, seed=self.material.seed)

    def looks(self) -> Claim:
        """Whether attacks act where the network looks: against other images' importance, by permutation."""
        name = "regions correlate"
        count = self.material.count
        if count < LEAST_RUN:
            return untested(
                name, LOOKS, f"The test needs {LEAST_RUN} correctly classified images, and there are {count}."
            )
        # Row j, column i: how much of attack j's effect falls on the region of importance of image i.
        effect = self.overlap.vulnerability.double().flatten(1)
        matrix = effect @ self.overlap.roi.double().flatten(1).T / effect.sum(1, keepdim=True)
        # Where no margin was lost, no fraction of it was lost anywhere.
        undefined = self.overlap.scores["effect_in_roi"].isna().to_numpy(copy=True)
        matrix[torch.from_numpy(undefined)] = torch.nan
        test = run_test(matrix, seed=self.material.seed)
        _, low, high = mean_interval(matrix.diagonal().numpy(), self.material.seed)
        if test.images < LEAST_RUN:
            return untested(
                name, LOOKS, f"Only {counted(test.images)} lost a margin; {LEAST_RUN} are needed."
            )
        interval = "" if np.isnan(low) else f" [{percent(low)}, {percent(high)}]"
        measured = (
            f"{percent(test.value)}{interval} of an attack's effect falls on the {percent(FRACTION)} of the image "
            f"that matters "
            f"most to the network, on average over {test.images} images."
        )
        shifted = float(self.overlap.scores["effect_in_roi_shift_null"].mean())
        control = (
            f"With the importance maps of other images it is {percent(test.null)} ({p_value(test.p)}, permutation "
            f"test); shifted "
            f"within the same image, {percent(shifted)}, which is no null because attacks and importance both "
            f"favor the middle."
        )
        numbers = {
            "value": test.value,
            "other_images": test.null,
            "p": test.p,
            "shifted": shifted,
            "images": count,
        }
        if test.p > LEVEL or test.value <= test.null:
            return Claim(name, LOOKS, measured, control, NOT_CONFIRMED, numbers)
        if test.null - FRACTION > test.value - test.null:
            control += " Most of the excess over the area is shared by any two images of this network."
            return Claim(name, LOOKS, measured, control, CAUTION, numbers)
        return Claim(name, LOOKS, measured, control, CONFIRMED, numbers)

    def regions(self) -> Claim:
        """Whether each region is critical for what it is named after: more than the same region of another image."""
        name, material = "regions matter", self.material
        if material.successes < LEAST_RUN:
            return untested(
                name, REGIONS, f"Only {material.successes} attacks succeed; {LEAST_RUN} are needed."
            )
        pairs = material.fooled
        roi, roa = (region[material.pairs.success] for region in (self.overlap.roi, self.overlap.roa))

        def fools_alone(region: torch.Tensor) -> np.ndarray:
            images = torch.where(region, pairs.adversarial, pairs.clean)
            return (~material.correct(images, pairs.labels)).numpy()

        def hides(region: torch.Tensor) -> np.ndarray:
            return (~material.correct(neutralize(pairs.clean, region), pairs.labels)).numpy()

        attack = Difference.of(fools_alone(roa), fools_alone(material.others(roa)))
        evidence = Difference.of(hides(roi), hides(material.others(roi)))
        measured = (
            f"How often the perturbation alone inside the region of attack ({percent(FRACTION)} of the image) "
            f"fools the network, "
            f"and inside another image's: {attack}. How often covering the region of importance changes the class "
            f"of the clean "
            f"image, and covering another image's: {evidence}."
        )
        numbers = {
            "attack": attack.first,
            "attack_other": attack.second,
            "attack_low": attack.low,
            "evidence": evidence.first,
            "evidence_other": evidence.second,
            "evidence_low": evidence.low,
            "images": attack.images,
        }
        passed = attack.beyond_zero + evidence.beyond_zero
        outcome = {2: CONFIRMED, 1: CAUTION, 0: NOT_CONFIRMED}[passed]
        control = "The same region of another image, which has the same area and the habits of this network."
        if passed == 1:
            only = "attack" if attack.beyond_zero else "importance"
            control += f" Only the region of {only} exceeds it beyond doubt."
        return Claim(name, REGIONS, measured, control, outcome, numbers)

    def helps(self) -> Claim:
        """Whether neutralization is a defense: against the old attack, and against one that knows it."""
        name, material = "neutralizing helps", self.material
        if material.successes < LEAST_RUN:
            return untested(
                name, NEUTRALIZING, f"Only {material.successes} attacks succeed; {LEAST_RUN} are needed."
            )
        pairs = material.fooled
        success = material.pairs.success
        blocked = (self.overlap.roa & ~self.overlap.roi)[success]

        def restored(region: torch.Tensor) -> np.ndarray:
            return material.correct(neutralize(pairs.adversarial, region), pairs.labels).numpy()

        oracle = Difference.of(restored(blocked), restored(material.others(blocked)))
        material.log("attacking the neutralized network")
        count = min(material.count, 24 if material.quick else 200)
        table = evaluate_defense(
            material.model,
            neutralizing(material.model, fraction=FRACTION),
            material.images[:count],
            material.labels[:count],
            budget=material.budget,
            steps=10 if material.quick else 30,
            queries=1000 if material.quick else 4000,
            seed=material.seed,
        )
        judged = verdict(table)
        measured = (
            f"How often covering what is attacked and not important, computed with the clean image at hand, "
            f"brings the decision "
            f"back, and covering another image's such region: {oracle}."
        )
        control = f"As a defense, against an attacker who knows it ({count} images): {judged.sentence}"
        numbers = {"restored": oracle.first, "restored_other": oracle.second, "restored_low": oracle.low}
        outcome = CAUTION if oracle.beyond_zero else NOT_CONFIRMED
        if judged.status == "protects":
            outcome = CONFIRMED
        return Claim(name, NEUTRALIZING, measured, control, outcome, numbers)
