"""Cells of a run, one attack in one region each: their outcomes and their robust accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from weakspot.audit.plan.plan import counted_budget
from weakspot.audit.store.records import quoted
from weakspot.audit.store.run import Run
from weakspot.statistics import false_discovery, proportion_interval
from weakspot.statistics.number_format import percent

WHOLE_IMAGE = "none"  # the region of an attack that may change every pixel


@dataclass(frozen=True)
class CellSummary:
    """The robust accuracy of one cell.

    Attributes:
        attack: the attack's label.
        budget: the budget at which robust accuracy is counted: the attack's own, or the stated one for a minimal-norm
            attack; None if there is none.
        region: the region's text in the plan.
        region_fraction: mean fraction of the image, over the images with a known outcome; NaN if there are none.
        images: images with a known outcome.
        robust_accuracy: fraction of these images that the attack did not fool within the budget; NaN for a
            minimal-norm attack without a stated budget (see `weakspot.audit.plan.plan`).
        low: lower end of the exact 95% interval over images; NaN if robust_accuracy is.
        high: upper end.
        errors: images on which the model or an analysis failed.
    """

    attack: str
    budget: str | None
    region: str
    region_fraction: float
    images: int
    robust_accuracy: float
    low: float
    high: float
    errors: int

    @property
    def name(self) -> str:
        """The attack with its budget: "fmn at linf:4/255"."""
        return attack_name(self.attack, self.budget)


def attack_name(label: str, budget: str | None) -> str:
    """The label and, unless it already contains it, the budget: "pgd at linf:4/255"."""
    return f"{label} at {budget}" if budget and budget not in label else label


def attack_in_region(attack: str, region: str) -> str:
    """Name a cell in a sentence: "pgd confined to cam", "pgd on the whole image"."""
    return f"{attack} on the whole image" if region == WHOLE_IMAGE else f"{attack} confined to {region}"


def with_interval(value: float, low: float, high: float) -> str:
    """A fraction with its interval: "61% [40%, 80%]"."""
    return percent(value) + ("" if np.isnan(low) else f" [{percent(low)}, {percent(high)}]")


def cell_summaries(run: Run) -> list[CellSummary]:
    """One summary per attack and reported region, in the order of the plan."""
    outcomes = run.sql(
        "select attack, region, index, fooled, robust, region_fraction, error is not null as failed from outcomes"
    ).df()
    summaries = []
    for attack, region in run.plan.reported_cells:
        rows = outcomes[(outcomes["attack"] == attack.label) & (outcomes["region"] == region)]
        # The outcome is unknown where the model or the attack failed on the image.
        known = rows[rows["fooled"].notna()].sort_values("index")
        robust = known["robust"].dropna().to_numpy(dtype=bool)
        interval = proportion_interval(robust) if len(robust) else (np.nan,) * 3
        summaries.append(
            CellSummary(
                attack=attack.label,
                budget=counted_budget(run.plan, attack),
                region=region,
                region_fraction=float(known["region_fraction"].mean()),
                images=len(known),
                robust_accuracy=interval[0],
                low=interval[1],
                high=interval[2],
                errors=int(rows["failed"].sum()),
            )
        )
    return summaries


def quoted_name(name: str) -> str:
    """A column name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def read_cell(run: Run, attack: str, region: str, columns: Sequence[str]) -> pd.DataFrame:
    """These columns of one cell, among them fooled and robust if asked for, in the order of images."""
    names = ", ".join(quoted_name(name) for name in columns)
    query = f"select {names} from outcomes where attack = $attack and region = $region order by index"  # noqa: S608
    frame: pd.DataFrame = run.sql(query, attack=attack, region=region).df()
    return frame


def in_reported_regions(run: Run) -> str:
    """SQL condition that leaves out regions made for other images, which serve only as controls."""
    return f"region in ({', '.join(quoted(region) for region in run.plan.reported_regions)})"


def numeric_columns(run: Run) -> list[str]:
    """Names of the columns of the records that hold numbers or booleans."""
    relation = run.sql("select * from records limit 0")
    kinds = zip(relation.columns, relation.types, strict=True)
    return [name for name, kind in kinds if str(kind) in {"DOUBLE", "FLOAT", "BIGINT", "INTEGER", "BOOLEAN"}]


def adjusted(p: pd.Series[float]) -> NDArray[np.float64]:
    """p values corrected for their number (Benjamini and Hochberg); NaN stays NaN and does not count."""
    q = np.full(len(p), np.nan)
    known = p.notna().to_numpy()
    q[known] = false_discovery(p[known].to_numpy(float))
    return q


def once_per_run(compute: Callable[[Run], pd.DataFrame]) -> Callable[[Run], pd.DataFrame]:
    """Cache the result for each complete `Run`: the summary, the page and a gate all ask for it."""
    # Weak keys, so that results disappear together with their run.
    cache: WeakKeyDictionary[Run, pd.DataFrame] = WeakKeyDictionary()

    @wraps(compute)
    def cached(run: Run) -> pd.DataFrame:
        if not run.complete:  # more records may arrive
            return compute(run)
        if run not in cache:
            cache[run] = compute(run)
        return cache[run].copy()

    return cached
