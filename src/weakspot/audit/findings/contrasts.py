"""Contrasts: every region of a run beside controls of equal area on the same images, and the verdict they allow.

A region is weak if an attack confined to it achieves more than the same attack confined to its controls: the region
shifted within the image, and the regions of other images. The shifted region alone is no evidence: regions made from an
image tend to lie in the middle, where subjects and attacks gather, and shifting moves them away from there.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from weakspot.audit.findings.outcomes import Outcomes, once_per_run, read_outcomes
from weakspot.audit.plan.plan import Plan
from weakspot.audit.store.run import Run
from weakspot.regions.spec import RegionSpec
from weakspot.statistics import (
    LEAST_REGION,
    false_discovery,
    mean_interval,
    paired_proportion_interval,
    region_test,
)
from weakspot.statistics.number_format import counted, p_value, percent, points, size_of_change

MAX_Q = 0.05
MIN_POINTS = 0.05  # difference of the fractions of images fooled, for a verdict
MIN_RATIO = 1.1  # of the smallest sizes, for a verdict
ROUNDING = 1e-9
WEAK, STRONG = "a weak region", "stronger than its controls"
UNCLEAR = "not shown to be weaker or stronger than all of its controls"
OTHERS, SHIFTED = "other images", "shifted"  # kinds of controls
FOOLED, SMALLEST = "fooled", "smallest size"  # measures
NOTHING = (0, (np.nan, np.nan, 0.0, 0.0, np.nan, np.nan, np.nan, np.nan))
# Attack, its norm if it is a minimal-norm attack, region, kind of control, and the controls of that kind.
Compared = tuple[str, str | None, str, str, Sequence[str]]


class Contrast(NamedTuple):
    """One attack in one region, beside one kind of control.

    Attributes:
        attack: the attack's label.
        region: the region's text.
        control: "other images" or "shifted".
        draws: controls of this kind per image, at most.
        region_fraction: mean area of the region, as a fraction of the image.
        control_fraction: the same for the controls.
        images: images that were compared.
        measure: "fooled" (fraction of images) or "smallest size" (geometric mean over images).
        norm: the norm of the sizes; "" for fractions.
        region_value: the measure in the region.
        control_value: the measure in the controls.
        region_censored: fraction of sizes that stand for "at least the largest size that this attack needed".
        control_censored: the same in the controls.
        difference: above zero if the region is weaker than its controls: region - control for fractions, log2(control /
            region) for sizes.
        low: lower end of the 95% interval of the difference over images; NaN if there is none.
        high: upper end.
        p: two-sided, from exchanging the outcomes of region and controls within each image
            (`statistics.region_test`).
        q: p corrected over all contrasts of the run (Benjamini and Hochberg); NaN until all are known.
    """

    attack: str
    region: str
    control: str
    draws: int
    region_fraction: float
    control_fraction: float
    images: int
    measure: str
    norm: str
    region_value: float
    control_value: float
    region_censored: float
    control_censored: float
    difference: float
    low: float
    high: float
    p: float
    q: float = np.nan

    @property
    def direction(self) -> int:
        """1 if the region is clearly weaker than its controls, -1 if it is clearly stronger, else 0."""
        clear = self.q <= MAX_Q and (self.low > 0 or self.high < 0)
        return int(np.sign(self.difference)) if clear else 0

    @property
    def is_large(self) -> bool:
        """Whether the difference is large enough for a verdict."""
        least = MIN_POINTS if self.measure == FOOLED else np.log2(MIN_RATIO)
        return bool(abs(self.difference) >= least - ROUNDING)


@once_per_run
def region_contrasts(run: Run) -> pd.DataFrame:
    """Compare every region with its controls, on the images that are correctly classified without an attack.

    The measure is the fraction of images that the attack fools or, for minimal-norm attacks, the geometric mean over
    images of the smallest size that does. If an attack fools an image in only some of the places, the other places
    count with the largest size that the attack needed anywhere in the run: differences come out too small, never too
    large.

    Returns:
        One row per attack, region, and kind of control in the plan, with the columns of `Contrast`.
    """
    rows = [contrast(compared, *read_compared(run, compared)) for compared in comparisons(run.plan)]
    table = pd.DataFrame(rows, columns=list(Contrast._fields))
    table["q"] = false_discovery(table["p"].to_numpy(float))
    return table


def comparisons(plan: Plan) -> Iterator[Compared]:
    """What is compared in a run of this plan."""
    for attack in plan.attacks:
        for region, spec in plan.specs.items():
            controls = [one for one in plan.specs.values() if one.control_of == spec]
            drawn = [control.text for control in controls if control.donor is not None]
            shifted = [control.text for control in controls if control.donor is None]
            for kind, texts in ((OTHERS, drawn), (SHIFTED, shifted)):
                if texts and not spec.is_control:
                    yield attack.label, attack.recorded_norm, region, kind, texts


def read_compared(run: Run, compared: Compared) -> tuple[Outcomes, float | None]:
    """The outcomes and, if there is a norm, the largest size that the attack needed anywhere in the run.

    That size is NaN if the attack fooled no image.
    """
    attack, norm, region, _, texts = compared
    outcomes = read_outcomes(run, attack, region, texts, norm)
    if norm is None:
        return outcomes, None
    query = f"select max({norm}) from outcomes where fooled and attack = $attack"  # noqa: S608 - linf, l1 or l2
    (largest,) = run.sql(query, attack=attack).fetchall()[0]
    return outcomes, largest or np.nan


def contrast(compared: Compared, outcomes: Outcomes, largest: float | None) -> Contrast:
    """The contrast of outcomes as `read_compared` returns them, or of those of one class."""
    attack, norm, region, control, _ = compared
    images, values = _fooled(outcomes) if largest is None else _smallest_sizes(outcomes, largest)
    fractions = _mean(outcomes.fractions), _mean(_row_means(outcomes.control_fractions))
    measure = FOOLED if norm is None else SMALLEST
    # There may be fewer other images than the plan wants.
    draws = int(np.isfinite(outcomes.control_fooled).sum(1).max(initial=0))
    return Contrast(attack, region, control, draws, *fractions, images, measure, norm or "", *values)


def _fooled(outcomes: Outcomes) -> tuple[int, tuple[float, ...]]:
    """Number of images, and region_value to p of `Contrast`, for fractions of images fooled."""
    region, controls = outcomes.fooled, outcomes.control_fooled
    if not len(region):
        return NOTHING
    differences = region - _row_means(controls)
    mean, low, high = mean_interval(differences)
    if np.isin(differences, (-1, 0, 1)).all() or np.isnan(low):
        # With one control per image this is a paired difference of proportions, whose interval exists even if hardly
        # any image differs. It also stands in for the mean over several controls that (nearly) always agree.
        first_known = np.isnan(controls).argmin(1)[:, None]
        first = np.take_along_axis(controls, first_known, 1)[:, 0]
        _, low, high = paired_proportion_interval(region == 1, first == 1)
        low, high = (low, high) if low <= mean <= high else (np.nan, np.nan)
    values = (_mean(region), _mean(_row_means(controls)), 0.0, 0.0, mean, low, high)
    return len(region), (*values, region_test(region, controls))


def _smallest_sizes(outcomes: Outcomes, largest: float) -> tuple[int, tuple[float, ...]]:
    """The same for smallest sizes, over the images that were fooled in at least one of the places."""
    fooled, control_fooled = outcomes.fooled == 1, outcomes.control_fooled == 1
    region = np.where(fooled, outcomes.sizes, largest)
    controls = np.where(control_fooled, outcomes.control_sizes, largest)
    # A size of zero has no logarithm: such an image was misclassified before the change.
    controls = np.where(np.isfinite(outcomes.control_fooled) & (controls > 0), controls, np.nan)
    used = (fooled | control_fooled.any(1)) & (region > 0) & np.isfinite(controls).any(1)
    if not used.any():
        return NOTHING
    # Minus log2: larger values mean a weaker region, as with fractions.
    own, others = -np.log2(region[used]), -np.log2(controls[used])
    censored = np.where(np.isfinite(others), ~control_fooled[used], np.nan)
    return int(used.sum()), (
        float(2 ** -own.mean()),
        float(2 ** -_row_means(others).mean()),
        _mean((~fooled[used]).astype(float)),
        _mean(_row_means(censored)),
        *mean_interval(own - _row_means(others)),
        region_test(own, others),
    )


def _row_means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) means over the finite values in each row of (n, K); NaN for a row without any."""
    known = np.isfinite(values)
    means: NDArray[np.float64] = np.where(known, values, 0.0).sum(1) / np.maximum(known.sum(1), 1)
    return np.where(known.any(1), means, np.nan)


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else np.nan


def verdict(contrasts: Sequence[Contrast]) -> str:
    """The verdict on one attack in one region, in a few words.

    "a weak region" and "stronger than its controls" need q <= .05, an interval without zero, and a difference of at
    least 5 points (a factor of 1.1 for sizes), in the same direction against other images' regions and against the
    shifted region, each on at least 40 images. A region that is the same in every image cannot be compared with other
    images' regions: only its position is judged.
    """
    by_control = {contrast.control: contrast for contrast in contrasts}
    region = contrasts[0].region
    if SHIFTED not in by_control or (RegionSpec.parse(region).depends_on_image and OTHERS not in by_control):
        missing = "shifted regions" if SHIFTED not in by_control else "other images' regions"
        return f"none (the run has no {missing} as controls)"
    images = min(contrast.images for contrast in contrasts)
    if images < LEAST_REGION:
        verb = "is" if images == 1 else "are"
        return f"none (at least {LEAST_REGION} images are needed, {images} {verb} available)"
    directions = {contrast.direction for contrast in contrasts}
    if len(directions) > 1 or 0 in directions:
        return UNCLEAR
    weaker = directions == {1}
    if not all(contrast.is_large for contrast in contrasts):
        points = contrasts[0].measure == FOOLED
        least = f"{100 * MIN_POINTS:.0f} points" if points else f"factor of {MIN_RATIO}"
        return f"{'weaker' if weaker else 'stronger'} than its controls, but not by the {least} that a verdict needs"
    if OTHERS in by_control:
        return WEAK if weaker else STRONG
    comparison = "weaker" if weaker else "stronger"
    return (
        f"{comparison} than the same region shifted within the image; this says nothing about image content"
    )


def contrast_sentences(contrasts: pd.DataFrame) -> list[str]:
    """One sentence per attack and region, starting with the largest difference from other images' regions."""
    rows = contrasts[list(Contrast._fields)].itertuples(index=False, name=None)

    def difference(group: list[Contrast]) -> float:
        return -np.inf if np.isnan(group[0].difference) else group[0].difference

    groups = by_place(Contrast(*row) for row in rows)
    return [contrast_sentence(group) for group in sorted(groups, key=difference, reverse=True)]


def by_place(contrasts: Iterable[Contrast]) -> list[list[Contrast]]:
    """The contrasts of each attack in each region, with every kind of control."""
    groups: dict[tuple[str, str], list[Contrast]] = {}
    for one in contrasts:
        groups.setdefault((one.attack, one.region), []).append(one)
    return list(groups.values())


def contrast_sentence(group: Sequence[Contrast]) -> str:
    """The sentence on one attack in one region, from its contrasts with every kind of control."""
    first = group[0]
    confined = f"{first.attack} confined to {first.region}"
    fractions = [contrast.region_fraction for contrast in group]
    if np.isnan(fractions).all():
        return (
            f"{confined}: no correctly classified image was attacked both in this region and in its controls."
        )
    confined += f" ({percent(np.nanmax(fractions))} of the image)"
    # Comparisons of sizes count fooled images alone, so none was fooled in any of the places.
    if not any(contrast.images for contrast in group):
        region = f"{first.region} ({percent(np.nanmax(fractions))} of the image)"
        return f"{first.attack} fooled no correctly classified image, either in {region} or in its controls."
    if not first.images:
        effect = "has no image to compare"
    elif first.measure == FOOLED:
        effect = f"fools {percent(first.region_value)} of {counted(first.images)}"
    else:
        size = _size(first.region_value, first.region_censored, first.norm)
        effect = f"needs {size} (geometric mean over {counted(first.images)})"
    return "; ".join([f"{confined} {effect}", *(_beside(contrast, first) for contrast in group)]) + (
        f". Verdict: {verdict(group)}."
    )


def _beside(contrast: Contrast, first: Contrast) -> str:
    """One kind of control: the measure there and the difference."""
    if contrast.control == SHIFTED:
        control = "the region shifted within the image"
    else:
        many = contrast.draws > 1
        control = f"{contrast.draws} other images' regions" if many else "another image's region"
    if abs(contrast.control_fraction - contrast.region_fraction) >= 0.005:
        control += f" ({percent(contrast.control_fraction)} of the image)"
    if not contrast.images:
        return f"confined to {control}: no image to compare"
    if contrast.images != first.images:
        control += f", on {counted(contrast.images)}"
    if contrast.measure == FOOLED:
        value = percent(contrast.control_value)
        change = points(contrast.difference, contrast.low, contrast.high)
    else:
        # The difference is log2(control / region), so its power of two is the ratio of sizes.
        value = _size(contrast.control_value, contrast.control_censored, contrast.norm)
        change = f"{2**contrast.difference:.2f} times as much"
        if np.isfinite(contrast.low):
            change += f" [{2**contrast.low:.2f}, {2**contrast.high:.2f}]"
    # Too few images, or too much alike, for a test of sizes.
    tested = "" if np.isnan(contrast.q) else f", {p_value(contrast.q, 'q')}"
    return f"confined to {control}, {value} ({change}{tested})"


def _size(size: float, censored: float, norm: str) -> str:
    return ("at least " if censored else "") + size_of_change(size, norm)
