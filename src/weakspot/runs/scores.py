"""Scores: the mean of every score of a run in every attack and region, and how far it lies from its null."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from weakspot.runs.cells import cell, corrected, numeric_columns, once
from weakspot.runs.locations import EVERYWHERE, location_findings
from weakspot.runs.run import Run
from weakspot.runs.tables import COLUMNS
from weakspot.statistics import mean_interval, mean_intervals, mean_test

if TYPE_CHECKING:
    import pandas as pd

SHIFT_NULL = "_shift_null"
OTHERS = "other images"
NULL_SUFFIXES = ("_null", "_null_low", "_null_high", "_p", "_p_less", "_q")
MEASURES = (
    "confidence_adversarial",
    "margin_adversarial",
    "ssim",
)  # of the attack itself, beside analyses' scores
SCORES = (
    "attack", "region", "score", "images", "mean", "low", "high",
    "null", "excess", "excess_low", "excess_high", "p", "compared", "alone", "against", "shifted", "q",
)  # fmt: skip


@once
def score_findings(run: Run) -> pd.DataFrame:
    """The mean of every score in every attack x region with its interval, and how far it lies from its null.

    Only attacks that were free to change any pixel are tested: what a score says of the place of an attack follows, in
    a confined one, from where it was confined to. Scores of the overlap analysis are tested against other images'
    importance maps (`location_findings`). The null of any other score is its column NAME_null, tested by
    `statistics.mean_test`.

    Returns:
        Columns attack, region, score; images; mean, low, high; where the score is tested, null, excess (mean over
        images of score - null) with excess_low and excess_high, p, compared (images of the test) and q, corrected over
        all rows; alone, how many images by themselves exceed other images' (NaN where that is not known); against,
        "other images", "its null", or "" where the score is not tested; shifted, the mean where the score's map is
        shifted within its image, which is no null.
    """
    import pandas as pd

    names, numeric = score_names(run), set(numeric_columns(run))
    nulls = [name for name in names if f"{name}_null" in numeric]
    shifted = [name for name in names if f"{name}{SHIFT_NULL}" in numeric]
    located: dict[Any, Any] = {(row.attack, row.score): row for row in location_findings(run).itertuples()}
    columns = [*names, *(f"{name}_null" for name in nulls), *(f"{name}{SHIFT_NULL}" for name in shifted)]
    rows = []
    for attack, region in run.plan.reported_cells if names else ():
        table = cell(run, attack.label, region, columns).astype("float64")
        found = dict(zip(names, mean_intervals(table[names].to_numpy(float)), strict=True))
        for name in names:
            beside: tuple[float, ...] = (np.nan,) * 7
            against, null = "", np.nan
            if region == EVERYWHERE and (attack.label, name) in located:
                one = located[attack.label, name]
                beside = (
                    one.null,
                    *mean_interval(np.array(one.excess, float)),
                    one.p,
                    one.compared,
                    one.alone,
                )
                against = OTHERS
            elif region == EVERYWHERE and name in nulls:
                beside = _against(table[name] - table[f"{name}_null"], table[f"{name}_null"])
                against = "its null"
            if region == EVERYWHERE and name in shifted:
                null = round(float(table[f"{name}{SHIFT_NULL}"].mean()), 12)
            rows.append(
                (
                    attack.label,
                    region,
                    name,
                    int(table[name].notna().sum()),
                    *found[name],
                    *beside,
                    against,
                    null,
                )
            )
    table = pd.DataFrame(rows, columns=list(SCORES[:-1]))
    table["q"] = corrected(table["p"])
    return table


def _against(excess: pd.Series[float], null: pd.Series[float]) -> tuple[float, ...]:
    """null, excess, low, high, p, compared, alone of a score that comes with its null."""
    values = excess.dropna().to_numpy(float)
    if not len(values):
        return (np.nan,) * 7
    return (round(float(null.mean()), 12), *mean_interval(values), mean_test(values), len(values), np.nan)


def score_names(run: Run) -> list[str]:
    """Columns of the records that are numbers worth a mean: of the attack, then of the analyses."""
    numeric = numeric_columns(run)
    own = [name for name in numeric if name not in COLUMNS and not name.endswith(NULL_SUFFIXES)]
    return [*(name for name in MEASURES if name in numeric), *own]
