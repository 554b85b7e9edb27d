"""Distributions: scores, classes and extreme images of a run, counted by DuckDB on disk."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from weakspot.audit.findings.outcomes import in_reported_regions, quoted_name, score_names
from weakspot.audit.store.records import quoted
from weakspot.audit.store.run import Run
from weakspot.statistics import proportion_interval
from weakspot.statistics.number_format import counted

BINS = 30
TAIL = 0.005  # fraction of the values at either end that may lie far outside and would squeeze the others
ATTACK_SCORES = (
    "margin_adversarial", "confidence_adversarial", "l2", "linf", "pixels", "ssim_windowed", "margin_clean",
    "confidence_clean",
)  # fmt: skip
MAX_GRID = 20  # class names up to which confusions are counted pair by pair
MAX_CLASSES = 2_000  # in the table; of more classes, those with the most images
MISCLASSIFIED = "misclassified without an attack"  # neither fooled nor withstood
EXTREMES = 12  # images at either end


@dataclass(frozen=True, eq=False)
class Distributions:
    """How the scores of a run are distributed.

    Attributes:
        summaries: columns score, attack, region, images, missing, mean, median.
        bins: columns score, attack, region, outcome ("fooled", "withstood", or `MISCLASSIFIED`), low, high, count.
    """

    summaries: pd.DataFrame
    bins: pd.DataFrame

    def __repr__(self) -> str:
        return (
            f"Distributions({self.summaries['score'].nunique()} scores, {len(self.summaries)} distributions)"
        )


@dataclass(frozen=True, eq=False)
class Classes:
    """Robust accuracy by class, and the classes that fooled images end in.

    Attributes:
        classes: columns label, name, images, clean (accuracy).
        cells: columns label, attack, region, images (0 if the attack has no robust accuracy), robust, low, high.
        adversarial: columns label, adversarial_class (the most frequent one), fooled (into that class), of (all); of
            images that were correctly classified without an attack.
        confusions: columns attack, region, label, adversarial_class, fooled, by name; empty if there are many classes.
    """

    classes: pd.DataFrame
    cells: pd.DataFrame
    adversarial: pd.DataFrame
    confusions: pd.DataFrame

    def __repr__(self) -> str:
        return f"Classes({counted(len(self.classes), 'class')})"


@dataclass(frozen=True, eq=False)
class Extremes:
    """The images that were fooled most easily and those that withstood longest.

    Attributes:
        easiest: most easily fooled first; columns index, image, label_name, adversarial_class_name, attack, region,
            success, fooled, margin_adversarial, value (what the images are ranked by). If some images were fooled and
            some were not, only those that were.
        hardest: the same columns, hardest first. If some images were fooled and some were not, only those that were
            not. No image is in both.
        images: correctly classified images with a known outcome.
        fooled: how many of them some attack fooled.
        by_size: ranked by the smallest change that fooled them; if False, by the smallest margin left.
        left_out: labels of the attacks that are not counted, because they succeed nearly always.
        unknown: images that withstood, but have an attack of unknown outcome among those counted.
    """

    easiest: pd.DataFrame
    hardest: pd.DataFrame
    images: int
    fooled: int
    by_size: bool
    left_out: tuple[str, ...] = ()
    unknown: int = 0

    def __repr__(self) -> str:
        return f"Extremes({counted(self.images)}, {self.fooled} fooled)"


def distributions(run: Run) -> Distributions:
    """Summaries and histograms of every score, read one score at a time."""
    summaries, bins = [], []
    for score in score_names(run, ATTACK_SCORES, booleans=False):
        name = quoted_name(score)
        values = (
            # Infinite values, for example of log ratios, count as missing.
            f"(select attack, region, fooled, correct, case when isfinite({name}::double) then {name}::double end as x "
            f"from outcomes where {in_reported_regions(run)})"
        )
        summary = run.sql(
            "select attack, region, count(x) as images, count(*) - count(x) as missing, avg(x) as mean, "
            "median(x) as median, min(x) as least, max(x) as most, "
            f"quantile_cont(x, {TAIL}) as lower, quantile_cont(x, {1 - TAIL}) as upper from {values} group by all"
        ).df()
        summaries.append(_in_plan_order(run, summary.assign(score=score)))
        if not summary["images"].sum():
            continue
        low, high = axis_limits(summary)
        width = (high - low) / BINS
        counts = run.sql(
            f"select attack, region, case when not correct then '{MISCLASSIFIED}' when fooled then 'fooled' "
            "else 'withstood' end as outcome, "
            # Values beyond the axis go into the outermost bins.
            f"greatest(0, least({BINS - 1}, floor((x - {low!r}) / {width!r})))::integer as bin, count(*) as count "
            f"from {values} where x is not null and fooled is not null group by all"
        ).df()
        counts = counts.assign(
            score=score, low=low + counts["bin"] * width, high=low + (counts["bin"] + 1) * width
        )
        bins.append(_in_plan_order(run, counts.sort_values("bin")))
    keys = ["score", "attack", "region"]
    return Distributions(
        _concatenated(summaries, [*keys, "images", "missing", "mean", "median"]),
        _concatenated(bins, [*keys, "outcome", "low", "high", "count"]),
    )


def axis_limits(summary: pd.DataFrame) -> tuple[float, float]:
    """The limits of an axis: all values, or all but the tails if these would take up most of it.

    Args:
        summary: columns least, most, and the quantiles `TAIL` and 1 - `TAIL` as lower and upper; one row per cell.
    """
    low, high = float(summary["least"].min()), float(summary["most"].max())
    # The widest range that leaves out only the tails of every cell.
    inner = float(summary["lower"].min()), float(summary["upper"].max())
    if inner[1] > inner[0] and high - low > 3 * (inner[1] - inner[0]):
        low, high = inner
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = abs(low) * 0.05 or 0.5
        low, high = low - pad, high + pad
    return low, high


def class_distributions(run: Run) -> Classes:
    """Robust accuracy and adversarial classes of every label in the records."""
    attack, region = run.plan.reported_cells[0]
    one_cell = f"attack = {quoted(attack.label)} and region = {quoted(region)}"  # every image once
    classes = run.sql(
        "select label, any_value(label_name) as name, count(*) as images, avg(correct::double) as clean from outcomes "
        f"where {one_cell} and label is not null group by label order by images desc, label limit {MAX_CLASSES}"
    ).df()
    classes["name"] = classes["name"].fillna(classes["label"].astype(str))
    classes = classes.sort_values("label", ignore_index=True)
    cells = run.sql(
        "select label, attack, region, count(robust) as images, count(*) filter (where robust) as withstood "
        f"from outcomes where label is not null and {in_reported_regions(run)} group by all order by label"
    ).df()
    cells = _in_plan_order(run, cells[cells["label"].isin(classes["label"])])
    intervals = [
        # The interval takes outcomes and not counts, so as many are made.
        proportion_interval(np.arange(images) < withstood)
        for images, withstood in zip(cells["images"], cells["withstood"], strict=True)
    ]
    cells[["robust", "low", "high"]] = np.array(intervals, dtype=float).reshape(-1, 3)
    # The records hold the class before rounding: an image that is fooled only after rounding has none to count here.
    fooled = (
        "fooled and correct and label is not null and adversarial_class_name is not null and "
        f"adversarial_class <> label and {in_reported_regions(run)}"
    )
    adversarial = run.sql(
        "select label, arg_max(adversarial_class, n) as adversarial_class, max(n)::bigint as fooled, "
        "sum(n)::bigint as of from (select label, adversarial_class_name as adversarial_class, count(*) as n "
        f"from outcomes where {fooled} group by all order by adversarial_class) group by label order by label"
    ).df()
    confusions = pd.DataFrame(columns=["attack", "region", "label", "adversarial_class", "fooled"])
    if classes["name"].nunique() <= MAX_GRID:
        counts = run.sql(
            "select attack, region, label_name as label, adversarial_class_name as adversarial_class, "
            f"count(*) as fooled from outcomes where {fooled} and label_name is not null "
            "group by all order by label, adversarial_class"
        ).df()
        confusions = _in_plan_order(run, counts)
    return Classes(classes, cells, adversarial, confusions)


def _in_plan_order(run: Run, rows: pd.DataFrame) -> pd.DataFrame:
    """Sort rows by the plan's attacks and regions, otherwise leaving their order."""
    order = {(attack.label, region): place for place, (attack, region) in enumerate(run.plan.reported_cells)}
    places = [order.get(cell, len(order)) for cell in zip(rows["attack"], rows["region"], strict=True)]
    return rows.iloc[np.argsort(places, kind="stable")].reset_index(drop=True)


def _concatenated(parts: list[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def extremes(run: Run, count: int = EXTREMES) -> Extremes:
    """Up to `count` images at either end."""
    # Sizes rank images only if every attack minimizes them: a budget, or a number of pixels, fixes the size.
    by_size = all(attack.is_minimal and not attack.takes_budget() for attack in run.plan.attacks)
    labels = [attack.label for attack in run.plan.attacks]
    # Minimal-norm attacks end just across the boundary, so that their margins say nothing.
    attacks = labels if by_size else run.plan.bounded_attacks or labels
    if by_size:
        value, order = (
            # Images that withstood rank behind all that were fooled.
            "case when fooled then l2 else 'inf'::double end",
            "value, margin_adversarial, attack, region",
        )
    else:
        value, order = "margin_adversarial", "fooled desc, value, attack, region"
    counted_rows = "correct and list_contains($regions, region) and list_contains($attacks, attack)"
    # One row per image: the cell that came closest to fooling it; ties are broken by name so that pages are equal.
    ranked = (
        'select * exclude (place) from (select *, row_number() over (partition by "index" order by '
        f'{order}) as place from (select "index", image, label_name, adversarial_class_name, attack, region, success, '
        f"fooled, margin_adversarial, {value} as value from outcomes where fooled is not null and {counted_rows})) "
        "where place = 1"
    )
    chosen = {"regions": list(run.plan.reported_regions), "attacks": attacks}
    open_images = f'select "index" from outcomes where fooled is null and {counted_rows}'
    images, fooled, unknown = run.sql(
        "select count(*), count(*) filter (where fooled), "
        f'count(*) filter (where not fooled and "index" in ({open_images})) from ({ranked})',
        **chosen,
    ).fetchall()[0]
    # If some images were fooled and some withstood, these are the two ends; otherwise, disjoint halves of all.
    mixed = 0 < fooled < images
    first, last = (fooled, images - fooled) if mixed else (images - images // 2, images // 2)
    easiest = f'{ranked} order by fooled desc, value, margin_adversarial, "index" limit {min(count, first)}'
    hardest = f'{ranked} order by fooled, value desc, margin_adversarial desc, "index" desc limit {min(count, last)}'
    return Extremes(
        easiest=run.sql(easiest, **chosen).df(),
        hardest=run.sql(hardest, **chosen).df(),
        images=images,
        fooled=fooled,
        by_size=by_size,
        left_out=tuple(label for label in labels if label not in attacks),
        unknown=unknown,
    )
