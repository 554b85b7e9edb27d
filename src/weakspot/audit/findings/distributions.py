"""Tallies: what a report says of a run, counted on the disk; only the columns that are asked for are read.

Extremes: the images of a run that were fooled most easily and those that held longest, with their pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from weakspot.audit.page.outcome_sections import overlaid, picture, pixelated
from weakspot.audit.page.sentences import heading
from weakspot.audit.plan.plan import bounded_attacks
from weakspot.audit.store.records import quoted
from weakspot.audit.store.run import Run
from weakspot.audit.work.cell_rows import COLUMNS
from weakspot.report.sections import Thumbnail
from weakspot.statistics import proportion_interval
from weakspot.statistics.number_format import counted, number

BINS = 30
TAIL = 0.005  # of the values at either end, which may lie so far out that they would hide the others
SCORES = (
    "margin_adversarial", "confidence_adversarial", "l2", "linf", "pixels", "ssim_windowed", "margin_clean",
    "confidence_clean",
)  # fmt: skip
BESIDE = ("_null", "_null_low", "_null_high", "_p", "_p_less", "_q")  # what stands beside a score
NUMBERS = ("DOUBLE", "FLOAT", "BIGINT", "INTEGER", "SMALLINT", "TINYINT")
GRID = 20  # names of classes up to which confusions are counted pair by pair
LISTED = 2_000  # classes of a table; of more those with most images


@dataclass(frozen=True, eq=False)
class Distributions:
    """How scores are distributed.

    Attributes:
        summaries: columns score, attack, region, images, missing, mean, median.
        bins: columns score, attack, region, outcome, low, high, count.
    """

    summaries: pd.DataFrame
    bins: pd.DataFrame


@dataclass(frozen=True, eq=False)
class Classes:
    """What became of each class.

    Attributes:
        classes: columns label, name, images, clean.
        cells: columns label, attack, region, images (0 where the attack has no robust accuracy), robust, low, high.
        landings: columns label, adversarial_class, fooled, of; of images that were read rightly before.
        confusions: columns attack, region, label, adversarial_class, fooled, by name; empty if there are many classes.
    """

    classes: pd.DataFrame
    cells: pd.DataFrame
    landings: pd.DataFrame
    confusions: pd.DataFrame


def scores_of(run: Run) -> list[str]:
    """Columns of numbers that are worth a histogram: the attack's first, then the analyses'."""
    described = run.sql("describe records").df()
    kinds = dict(zip(described["column_name"], described["column_type"], strict=True))
    own = [name for name in SCORES if name in kinds]
    return own + [
        name
        for name, kind in kinds.items()
        if name not in COLUMNS and kind in NUMBERS and not name.endswith(BESIDE)
    ]


def distributions(run: Run) -> Distributions:
    """Of every score, one after the other."""
    order = {(attack.label, region): place for place, (attack, region) in enumerate(run.plan.reported_cells)}
    summaries, bins = [], []
    for score in scores_of(run):
        column = '"' + score.replace('"', '""') + '"'
        values = (
            f"(select attack, region, fooled, case when isfinite({column}::double) then {column}::double end as x "
            f"from outcomes where {_reported(run)})"
        )
        found = run.sql(
            "select attack, region, count(x) as images, count(*) - count(x) as missing, avg(x) as mean, "
            "median(x) as median, min(x) as least, max(x) as most, "
            f"quantile_cont(x, {TAIL}) as lower, quantile_cont(x, {1 - TAIL}) as upper from {values} group by all"
        ).df()
        summaries.append(_ordered(found.assign(score=score), order))
        if not found["images"].sum():
            continue
        low, high = _limits(found)
        width = (high - low) / BINS
        counted = run.sql(
            "select attack, region, case when fooled then 'fooled' else 'held' end as outcome, "
            f"greatest(0, least({BINS - 1}, floor((x - {low!r}) / {width!r})))::integer as bin, count(*) as count "
            f"from {values} where x is not null and fooled is not null group by all"
        ).df()
        counted["low"] = low + counted["bin"] * width
        counted["high"] = low + (counted["bin"] + 1) * width
        bins.append(_ordered(counted.assign(score=score).sort_values("bin"), order))
    columns = ["score", "attack", "region"]
    return Distributions(
        _together(summaries, [*columns, "images", "missing", "mean", "median"]),
        _together(bins, [*columns, "outcome", "low", "high", "count"]),
    )


def _limits(found: pd.DataFrame) -> tuple[float, float]:
    """Of the axis: from the least to the greatest value, without the tails where they would take most of it."""
    low, high = float(found["least"].min()), float(found["most"].max())
    inner = float(found["lower"].min()), float(found["upper"].max())
    if inner[1] > inner[0] and high - low > 3 * (inner[1] - inner[0]):
        low, high = inner
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = abs(low) * 0.05 or 0.5
        low, high = low - pad, high + pad
    return low, high


def classes(run: Run) -> Classes:
    """Of every label that occurs."""
    attack, region = run.plan.reported_cells[0]
    first = f"attack = {quoted(attack.label)} and region = {quoted(region)}"
    listed = run.sql(
        "select label, any_value(label_name) as name, count(*) as images, avg(correct::double) as clean from records "
        f"where {first} and label is not null group by label order by images desc, label limit {LISTED}"
    ).df()
    listed["name"] = listed["name"].fillna(listed["label"].astype(str))
    listed = listed.sort_values("label", ignore_index=True)
    order = {(one.label, place): number for number, (one, place) in enumerate(run.plan.reported_cells)}
    cells = run.sql(
        "select label, attack, region, count(robust) as images, count(*) filter (where robust) as held "
        f"from outcomes where label is not null and {_reported(run)} group by all order by label"
    ).df()
    cells = _ordered(cells[cells["label"].isin(listed["label"])], order)
    ranges = [
        proportion_interval(np.arange(images) < held)
        for images, held in zip(cells["images"], cells["held"], strict=True)
    ]
    cells[["robust", "low", "high"]] = np.array(ranges, dtype=float).reshape(-1, 3)
    # What fools only once it is stored has no class that the records know.
    fooled = (
        "fooled and correct and label is not null and adversarial_class_name is not null "
        "and adversarial_class <> label and "
        f"{_reported(run)}"
    )
    landings = run.sql(
        "select label, arg_max(adversarial_class, n) as adversarial_class, "
        "max(n)::bigint as fooled, sum(n)::bigint as of from "
        f"(select label, adversarial_class_name as adversarial_class, count(*) as n "
        f"from outcomes where {fooled} group by all "
        "order by adversarial_class) group by label order by label"
    ).df()
    names = listed["name"].nunique()
    confusions = pd.DataFrame(columns=["attack", "region", "label", "adversarial_class", "fooled"])
    if names <= GRID:
        confusions = run.sql(
            "select attack, region, label_name as label, adversarial_class_name as adversarial_class, "
            "count(*) as fooled "
            "from outcomes "
            f"where {fooled} and label_name is not null group by all order by label, adversarial_class"
        ).df()
        confusions = _ordered(confusions, order)
    return Classes(listed, cells, landings, confusions)


def _reported(run: Run) -> str:
    """The condition that a record is not of a region made for another image, which is a control only."""
    regions = ", ".join(quoted(region) for region in run.plan.reported_regions)
    return f"region in ({regions})"


def _ordered(found: pd.DataFrame, order: dict[tuple[str, str], int]) -> pd.DataFrame:
    """Rows in the order of the plan's attacks and regions."""
    places = [order.get(cell, len(order)) for cell in zip(found["attack"], found["region"], strict=True)]
    return found.iloc[np.argsort(places, kind="stable")].reset_index(drop=True)


def _together(parts: list[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


SHOWN = 12  # at either end
COUNTED = ("few_pixel",)
ASIDE = ", attacks that look for the smallest change aside"
MARGIN = (
    "They are ranked by the least margin that any attack in any region has left them, before rounding to 8 bits; those "
    "that none fooled held longest."
)
SIZE = (
    "They are ranked by the smallest change (L2 norm) that fooled them in any region, of "
    "the attacks that look for the smallest; those that none fooled held longest."
)


@dataclass(frozen=True, eq=False)
class Extremes:
    """Images at both ends.

    Attributes:
        easiest: fooled most easily first.
        hardest: held longest first.
        told: how many held, and by what they were ranked.
    """

    easiest: list[Thumbnail]
    hardest: list[Thumbnail]
    told: list[str]


def extremes(run: Run, shown: int = SHOWN) -> Extremes:
    """A dozen at either end; of few images none is at both."""
    # What a budget bounds says nothing by its size, nor does the change of so many pixels by any amount.
    sized = not any(attack.takes_budget() or attack.name in COUNTED for attack in run.plan.attacks)
    reported, asked = "list_contains($regions, region)", "list_contains($attacks, attack)"
    # Each image by the attack and region that brought it furthest; ties by name, so that no page differs.
    if sized:
        kept, value = (
            f"correct and fooled is not null and {reported}",
            "case when fooled then l2 else 'inf'::double end",
        )
        better = "value, margin_adversarial, attack, region"
    else:
        kept, value = (
            f"correct and fooled is not null and isfinite(margin_adversarial) and {reported} and {asked}",
            "margin_adversarial",
        )
        better = "fooled desc, value, attack, region"
    bounded = bounded_attacks(run.plan)
    every = sized or len(bounded) == len(run.plan.attacks) or not bounded
    told: dict[str, Any] = {"regions": list(run.plan.reported_regions)}
    if not sized:
        told["attacks"] = bounded or [attack.label for attack in run.plan.attacks]
    ranked = (
        f'select * exclude (place) from (select *, row_number() over (partition by "index" order by {better}) as place '
        'from (select "index", image, label_name, adversarial_class_name, attack, region, success, fooled, '
        "margin_adversarial, "
        f"{value} as value from outcomes where {kept})) where place = 1"
    )
    count, fooled = run.sql(
        f"select count(*), count(*) filter (where fooled) from ({ranked})", **told
    ).fetchall()[0]
    half = min(shown, count - count // 2)
    easiest = run.sql(
        f'{ranked} order by fooled desc, value, margin_adversarial, "index" limit {half}', **told
    ).df()
    hardest = run.sql(
        f'{ranked} order by fooled, value desc, margin_adversarial desc, "index" desc '
        f"limit {min(shown, count - half)}",
        **told,
    ).df()
    drawer = _Drawer(run)
    return Extremes(
        [drawer.thumbnail(row, sized) for row in easiest.to_dict("records")],
        [drawer.thumbnail(row, sized) for row in hardest.to_dict("records")],
        [
            (
                f"Of {counted(count)} that were read rightly before, {fooled:,} were fooled in some way and "
                f"{count - fooled:,} held against everything{'' if every else ASIDE}."
            ),
            SIZE if sized else MARGIN,
        ],
    )


class _Drawer:
    """Reads the maps of an image, those that there are."""

    def __init__(self, run: Run) -> None:
        names = set(run.maps)
        self.maps = {name: run.maps[name] for name in ("clean", "adversarial", "importance") if name in names}
        self.cells = {(attack.label, region): place for place, (attack, region) in enumerate(run.plan.cells)}
        self.regions = len(run.plan.regions)

    def thumbnail(self, row: dict[str, Any], sized: bool) -> Thumbnail:
        pictures, small = [], False
        if {"clean", "adversarial"} <= set(self.maps):
            place = (int(row["index"]), *divmod(self.cells[row["attack"], row["region"]], self.regions))
            clean = self.maps["clean"][place[0]]
            small = pixelated(clean)
            pictures = [("clean", picture(clean)), ("adversarial", picture(self.maps["adversarial"][place]))]
            if "importance" in self.maps:
                pictures.append(("importance", overlaid(clean, self.maps["importance"][place])))
        return Thumbnail(str(row["image"]), _caption(row, sized), pictures, small)


def _caption(row: dict[str, Any], sized: bool) -> str:
    label, adversarial_class = (_name(row[key]) for key in ("label_name", "adversarial_class_name"))
    margin = f"margin {number(row['margin_adversarial'])}"
    if not row["fooled"]:
        rounded = " once rounded to 8 bits" if row["success"] else ""
        return f"{label} held under {heading(row)}{rounded}; {margin}"
    if not row["success"]:
        return f"{label} fooled under {heading(row)} once rounded to 8 bits; {margin}"
    measured = f"L2 {number(row['value'])}" if sized else margin
    return f"{label} → {adversarial_class} under {heading(row)}; {measured}"


def _name(text: object) -> str:
    return text if isinstance(text, str) and not pd.isna(text) else "no name"
