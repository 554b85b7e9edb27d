"""Chattopadhyay et al., "Spatially Correlated Patterns in Adversarial Images", arXiv 2011.10794.

The abstract defines no formula for the regions; ours are those of `overlap`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from weakspot.classifier import evaluating
from weakspot.defenses import evaluate_defense, neutralize, neutralizing, verdict
from weakspot.defenses.neutralization import vulnerable_region
from weakspot.explanations import Overlap, overlap
from weakspot.reproduction.claim_panels import Numbers, Panel, Series, map_panel, rounded
from weakspot.reproduction.claims import (
    CAUTION,
    CONFIRMED,
    LEVEL,
    NOT_CONFIRMED,
    SMALLEST,
    Claim,
    Difference,
    Measurement,
    too_few,
    untested,
)
from weakspot.reproduction.material import Material
from weakspot.statistics import LEAST_RUN, mean_interval, proportion_interval, run_test
from weakspot.statistics.number_format import counted, p_value, percent, with_interval

TITLE = "Spatially Correlated Patterns in Adversarial Images"
CITATION = "Chattopadhyay, Yip, Tan and Chattopadhyay, arXiv 2011.10794"
FRACTION = 0.2  # of the image in each region
METHOD = (
    "Every image is attacked by PGD. Its region of importance is the 20% of the image with the largest class "
    "activation of its label; its region of attack is the 20% where the attack takes most of the margin, by integrated "
    "gradients along the straight path from the clean to the attacked image. The first claim compares how much of an "
    "attack's effect falls on the region of importance of its own image and on those of the other images. The second "
    "keeps only the part of the perturbation inside a region, or covers a region of the clean image, and does the same "
    "with the region of another image. The third covers, in the attacked image, what looks vulnerable and is not "
    "important there, and then lets an attacker who knows this defense attack it."
)
LIMITS = (
    "The abstract defines no formula for the regions, so these are ours. A region of attack is made of one "
    "attack's gradients, which follow the network everywhere a little. Attacks and importance may both favor the "
    "middle of an image: only other images of the same source show what is special to an image."
)
DENSITY = "times as much as on average"
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
QUOTES: Mapping[str, str] = {
    "regions correlate": LOOKS,
    "regions matter": REGIONS,
    "neutralizing helps": NEUTRALIZING,
}


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
        pairs = self.material.pairs
        self.material.log("computing regions of importance and attack")
        result = overlap(self.material.model, pairs, fraction=FRACTION, seed=self.material.seed)
        return replace(
            result,
            importance=result.importance.cpu(),
            vulnerability=result.vulnerability.cpu(),
            roi=result.roi.cpu(),
            roa=result.roa.cpu(),
        )

    def looks(self) -> Claim:
        """Whether attacks act where the network looks: against other images' importance, by permutation."""
        name = "regions correlate"
        count = self.material.count
        if count < LEAST_RUN:
            return untested(name, LOOKS, f"Only {counted(count)} can be used; {LEAST_RUN} are needed.")
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
                name,
                LOOKS,
                f"Only {counted(test.images)} lost a margin in a way that can be located; {LEAST_RUN} are needed.",
            )
        measured = (
            f"{with_interval(test.value, low, high)} of an attack's effect falls on the {percent(FRACTION)} of the "
            f"image that matters most to the network, on average over {test.images} images."
        )
        shifted = float(self.overlap.scores["effect_in_roi_shift_null"].mean())
        control = (
            f"With the importance maps of other images it is {percent(test.null)} ({p_value(test.p)}, permutation "
            f"test); shifted within the same image, {percent(shifted)}, which is no null because attacks and "
            "importance may both favor the middle."
        )
        table = (
            Measurement("effect on the own region of importance", test.value, low, high, test.images),
            Measurement("effect on other images' regions", test.null, images=test.images),
            Measurement("effect on the own region, shifted", shifted, images=test.images),
            Measurement("p, own against other images", test.p, images=test.images, kind="p"),
        )
        outcome = CONFIRMED
        if not test.p <= LEVEL or test.value <= test.null:
            outcome = NOT_CONFIRMED
        elif test.value - test.null < SMALLEST:
            outcome = NOT_CONFIRMED
            control += f" A difference under {100 * SMALLEST:.0f} points counts as none."
        elif test.null - FRACTION > test.value - test.null:
            outcome = CAUTION
            control += " Most of the excess over the area is shared by any two images of this network."
        return Claim(name, LOOKS, measured, control, outcome, table, self._maps(table))

    def _maps(self, table: Sequence[Measurement]) -> tuple[Panel, ...]:
        """Where the network looks, where attacks act, and whether that is more than for any two images."""
        means = [one for one in table if one.kind == "fraction"]
        values = Series(
            "", rounded([one.value or 0 for one in means]), low=_ends(means, "low"), high=_ends(means, "high")
        )
        rates = Panel(
            "rates", "An attack's effect on 20% of the image", "fraction of the effect", series=(values,),
            categories=("own region of importance", "region of another image", "own region, shifted"),
            guide=FRACTION, guide_label="its area",
        )  # fmt: skip
        return (
            map_panel("Where the network looks", self.overlap.importance.clamp(min=0), DENSITY),
            map_panel("Where attacks act", self.overlap.vulnerability.clamp(min=0), DENSITY),
            rates,
        )

    def regions(self) -> Claim:
        """Whether each region is critical for what it is named after: more than the same region of another image."""
        name, material = "regions matter", self.material
        if material.successes < LEAST_RUN:
            return untested(name, REGIONS, too_few(material.successes, "attack", "succeed", LEAST_RUN))
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
            f"How often the perturbation alone inside the region of attack ({percent(FRACTION)} of the image) fools "
            f"the network, and inside another image's: {attack}. How often covering the region of importance changes "
            f"the class of the clean image, and covering another image's: {evidence}."
        )
        table = (
            *attack.table("fools, own region of attack", "fools, other image's region"),
            *evidence.table("hides, own region of importance", "hides, other image's region of importance"),
        )
        control = "The same region of another image, which has the same area and the habits of this network."
        outcome = NOT_CONFIRMED
        if evidence.beyond_zero and attack.beyond_zero:
            # Of four networks with random weights, all did (64 CIFAR-10 images, classes of balanced scale).
            outcome = CAUTION
            control += (
                " Each region is chosen by what it is then tested for, so that networks that have learned nothing can "
                "pass this test as well."
            )
        elif evidence.beyond_zero or attack.beyond_zero:
            only = "importance" if evidence.beyond_zero else "attack"
            least = f"{100 * SMALLEST:.0f} points"
            control += f" Only the region of {only} exceeds it beyond doubt and by at least {least}."
        return Claim(name, REGIONS, measured, control, outcome, table)

    def helps(self) -> Claim:
        """Whether neutralization is a defense: against the old attack, and against one that knows it."""
        name, material = "neutralizing helps", self.material
        if material.successes < LEAST_RUN:
            return untested(name, NEUTRALIZING, too_few(material.successes, "attack", "succeed", LEAST_RUN))
        pairs = material.fooled
        # What a defender can compute: from the attacked image alone.
        with evaluating(material.model) as classifier:
            attacked = pairs.adversarial.to(classifier.mean.device)
            seen = vulnerable_region(classifier, attacked, fraction=FRACTION).cpu()
        oracle = (self.overlap.roa & ~self.overlap.roi)[material.pairs.success]

        def restored(region: torch.Tensor) -> np.ndarray:
            return material.correct(neutralize(pairs.adversarial, region), pairs.labels).numpy()

        naive = Difference.of(restored(seen), restored(material.others(seen)))
        known, known_low, known_high = proportion_interval(restored(oracle))
        material.log("attacking the neutralized network")
        count = min(material.count, 12 if material.quick else 48)
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
        judged, worst = verdict(table), table.iloc[-1]
        measured = (
            f"How often covering what looks vulnerable and not important in the attacked image brings the decision "
            f"back, and covering another image's such region: {naive}. With the clean image at hand, which no "
            f"defender has, it is {percent(known)}."
        )
        control = f"As a defense, against an attacker who knows it ({counted(count)}): {judged.sentence}"
        measurements = (
            *naive.table("brought back, own region", "brought back, other image's region"),
            Measurement(
                "brought back, region found with the clean image", known, known_low, known_high, naive.images
            ),
            *(
                Measurement(
                    f"correct after all attacks, {side}",
                    float(worst[side]),
                    float(worst[f"{side}_low"]),
                    float(worst[f"{side}_high"]),
                    count,
                )
                for side in ("undefended", "defended")
            ),
        )
        outcome = NOT_CONFIRMED
        if judged.status == "protects":
            outcome = CONFIRMED
        elif naive.beyond_zero and judged.status == "no protection":
            outcome = CAUTION
            control += " It is shown to help only against an attacker who does not know it."
        return Claim(name, NEUTRALIZING, measured, control, outcome, measurements)


def _ends(measurements: Sequence[Measurement], end: str) -> Numbers:
    """One end of each interval; the value itself where there is none."""
    ends = [getattr(one, end) for one in measurements]
    return rounded(
        [one.value or 0 if given is None else given for one, given in zip(measurements, ends, strict=True)]
    )
