"""Weak regions of classes: every class of a run beside the other classes, and beside controls of equal area.

Two questions, each with its own comparison. Is a class fooled more often than the others, under one attack in one
region? And is the region weak for this class: is it fooled more often there than in controls of equal area on the same
images? A class of few images gets its numbers and no verdict.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from weakspot.audit.findings.contrasts import (
    MAX_Q,
    MIN_POINTS,
    ROUNDING,
    WEAK,
    Contrast,
    by_place,
    comparisons,
    contrast,
    contrast_sentence,
    read_compared,
    verdict,
)
from weakspot.audit.findings.outcomes import attack_name, in_region, in_reported_regions
from weakspot.audit.store.run import Run
from weakspot.statistics import LEAST_REGION, false_discovery
from weakspot.statistics.intervals import LEVEL
from weakspot.statistics.number_format import counted, p_value, with_interval

COLUMNS = (
    "label", "name", "attack", "region", "images", "fooled", "low", "high", "rest_images", "rest", "rest_low",
    "rest_high", "p", "q", "weak_class", "weak_region",
)  # fmt: skip
UNCONTROLLED = (
    "The run has no controls, so no region can be called weak for a class (audit with --controls to compare each "
    "region with places of equal area)."
)


@dataclass(frozen=True, eq=False)
class ClassContrasts:
    """What a run says about single classes, on images that are correctly classified without an attack.

    Attributes:
        table: one row per class, attack and region, weakest first: images; the fraction that is fooled with its exact
            95% interval low, high; the same for all other classes; p of equal chances (Fisher's exact test, two-sided)
            and q, corrected over all classes that have at least 40 images (NaN for the others); weak_class, whether the
            class is fooled more often than the others; weak_region, whether the region is weak for it.
        contrasts: label -> contrasts of this class with every kind of control; empty without controls.
        sentences: what was found, or why nothing was.
    """

    table: pd.DataFrame
    contrasts: dict[int, list[Contrast]]
    sentences: tuple[str, ...]

    def __repr__(self) -> str:
        classes = counted(self.table["label"].nunique(), "class")
        weak, regions = (int(self.table[name].sum()) for name in ("weak_class", "weak_region"))
        return f"ClassContrasts({classes}, {weak} weaker than others, {regions} with a weak region)"


def class_contrasts(run: Run, watch: Callable[[float], None] | None = None) -> ClassContrasts:
    """Compare every class with the others and with its controls.

    Attacks without a robust accuracy (minimal-norm attacks without a stated budget) are only compared with controls.

    Args:
        run: of an audit.
        watch: called with the fraction that is done.
    """
    # count(robust) counts known outcomes only: attacks without a robust accuracy have none and are left out.
    counts = run.sql(
        "select label, coalesce(any_value(label_name), label::varchar) as name, attack, region, "
        "count(robust) as images, count(*) filter (where not robust) as hits from outcomes "
        f"where correct and label is not null and {in_reported_regions(run)} "
        "group by label, attack, region having count(robust) > 0 order by label, attack, region"
    ).df()
    table = compare_classes(counts)
    contrasts = _class_contrasts(run, watch)
    weak = [
        (label, group)
        for label, every in contrasts.items()
        for group in by_place(every)
        if verdict(group) == WEAK
    ]
    weak_places = {(label, group[0].attack, group[0].region) for label, group in weak}
    places = zip(table["label"], table["attack"], table["region"], strict=True)
    table["weak_region"] = [(int(label), attack, region) in weak_places for label, attack, region in places]
    # By how much the class is at least more often fooled than the others, as far as both intervals tell.
    table["gap"] = table["low"] - table["rest_high"]
    order = ["weak_region", "weak_class", "gap", "fooled", "label", "attack", "region"]
    table = table.sort_values(order, ascending=[False] * 4 + [True] * 3, kind="stable", na_position="last")
    names = dict(zip(table["label"], table["name"], strict=True))
    spelled = {one.label: attack_name(one.label, run.plan.counted_budget(one)) for one in run.plan.attacks}
    sentences = _sentences_on_classes(table, spelled)
    if not any(spec.is_control for spec in run.plan.specs.values()):
        sentences.append(UNCONTROLLED)
    else:
        sentences += _sentences_on_regions(weak, len(contrasts), names)
    return ClassContrasts(table[list(COLUMNS)].reset_index(drop=True), contrasts, tuple(sentences))


def compare_classes(counts: pd.DataFrame) -> pd.DataFrame:
    """Every class beside all others of the same attack and region.

    A class is called weak if q <= .05, its interval lies above that of the others, and the difference is at least 5
    points, with at least 40 images. Two 95% intervals that do not overlap are a stricter condition than an interval of
    the difference without zero.

    Args:
        counts: columns label, name, attack, region, images and hits, the number of images fooled.

    Returns:
        The columns of `ClassContrasts.table` but weak_region.
    """
    from scipy.stats import hypergeom

    cell = counts.groupby(["attack", "region"])[["images", "hits"]].transform("sum")
    images, hits = counts["images"].to_numpy(int), counts["hits"].to_numpy(int)
    all_images, all_hits = cell["images"].to_numpy(int), cell["hits"].to_numpy(int)
    own, rest = _exact(hits, images), _exact(all_hits - hits, all_images - images)
    table = counts.drop(columns="hits")
    for prefix, values in (("", own), ("rest_", rest)):
        table[[prefix.rstrip("_") or "fooled", f"{prefix}low", f"{prefix}high"]] = values
    table["rest_images"] = all_images - images
    # Under equal chances, the class's part of all fooled images follows the hypergeometric distribution.
    law = hypergeom(all_images, all_hits, images)
    both = np.minimum(law.sf(hits - 1), law.cdf(hits))
    enough = (images >= LEAST_REGION) & (all_images - images >= LEAST_REGION)
    table["p"] = np.where(enough, np.minimum(1.0, 2 * both), np.nan)
    table["q"] = false_discovery(table["p"].to_numpy(float))
    gap = own[:, 0] - rest[:, 0]
    with np.errstate(invalid="ignore"):
        clear = (table["q"].to_numpy(float) <= MAX_Q) & (own[:, 1] > rest[:, 2])
        table["weak_class"] = enough & clear & (gap >= MIN_POINTS - ROUNDING)
    return table


def _exact(hits: np.ndarray, images: np.ndarray) -> np.ndarray:
    """(n, 3): the proportions with their exact 95% intervals (Clopper and Pearson); NaN without images."""
    from scipy.stats import beta

    tail = (1 - LEVEL) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        # Both choices are computed for every row, and the undefined ones are not chosen.
        low = np.where(hits > 0, beta.ppf(tail, hits, images - hits + 1), 0.0)
        high = np.where(hits < images, beta.ppf(1 - tail, hits + 1, images - hits), 1.0)
        exact = np.column_stack([hits / images, low, high])
    return np.where((images > 0)[:, None], exact, np.nan)


def _class_contrasts(run: Run, watch: Callable[[float], None] | None) -> dict[int, list[Contrast]]:
    """Label -> contrasts, of the classes with enough images for a verdict; q over all of them."""
    asked = list(comparisons(run.plan))
    rows: list[tuple[int, Contrast]] = []
    for number, compared in enumerate(asked):
        outcomes, largest = read_compared(run, compared)
        labels, sizes = np.unique(outcomes.labels[outcomes.labels >= 0], return_counts=True)
        chosen = labels[sizes >= LEAST_REGION]
        for place, label in enumerate(chosen.tolist()):
            rows.append((label, contrast(compared, outcomes.of_class(label), largest)))
            if watch is not None:
                watch((number + (place + 1) / len(chosen)) / len(asked))
    corrected = false_discovery(np.array([one.p for _, one in rows], dtype=float))
    result: dict[int, list[Contrast]] = {}
    for (label, one), q in zip(rows, corrected.tolist(), strict=True):
        result.setdefault(label, []).append(one._replace(q=q))
    return result


def _sentences_on_classes(table: pd.DataFrame, spelled: dict[str, str]) -> list[str]:
    tested, weak = table[table["q"].notna()], table[table["weak_class"]]
    if tested.empty:
        sentence = (
            f"No class was compared with the others: that needs {LEAST_REGION} correctly classified images of the "
            "class, and as many of others, with a known outcome."
        )
        return [sentence]
    if weak.empty:
        classes = counted(tested["label"].nunique(), "class")
        sentence = (
            f"No class was shown to be fooled more often than the others ({classes} with at least {LEAST_REGION} "
            "correctly classified images)."
        )
        return [sentence]
    return [
        f"Images of {row['name']} are fooled more often than those of other classes: {spelled[row['attack']]} "
        f"{in_region(row['region'])} fools {with_interval(row['fooled'], row['low'], row['high'])} of "
        f"{counted(row['images'])}, and {with_interval(row['rest'], row['rest_low'], row['rest_high'])} of "
        f"{counted(row['rest_images'])} of other classes ({p_value(row['q'], 'q')})."
        for row in weak.to_dict("records")
    ]


def _sentences_on_regions(
    weak: Sequence[tuple[int, Sequence[Contrast]]], classes: int, names: dict[int, str]
) -> list[str]:
    """On the weak regions of single classes, of which so many were compared with their controls."""
    if not classes:
        sentence = (
            f"No class has {LEAST_REGION} images that were attacked both in a region and in its controls, which a "
            "verdict on the regions of a class needs."
        )
        return [sentence]
    found = [f"Images of {names.get(label, label)}: {contrast_sentence(group)}" for label, group in weak]
    compared = counted(classes, "class")
    return found or [f"No region was shown to be weak for a single class ({compared} compared)."]
