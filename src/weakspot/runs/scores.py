"""Scores: the mean of every score of a run in every attack and region, and how far it lies from its null."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from weakspot.runs.cells import cell, corrected, numeric_columns, once
from weakspot.runs.run import Run
from weakspot.runs.tables import COLUMNS
from weakspot.statistics import mean_intervals, mean_test

if TYPE_CHECKING:
    import pandas as pd

NULL_SUFFIXES = ("_null", "_null_low", "_null_high", "_p", "_p_less")
MEASURES = (
    "confidence_adversarial",
    "margin_adversarial",
    "ssim_windowed",
)  # of the attack itself, beside analyses' scores
SCORES = (
    "attack", "region", "score", "images", "mean", "low", "high",
    "null", "excess", "excess_low", "excess_high", "p", "q",
)  # fmt: skip


@once
def score_findings(run: Run) -> pd.DataFrame:
    """The mean of every score in every attack x region with its interval, and how far it lies from its null.

    Returns:
        Columns attack, region, score; images; mean, low, high; and where the score has a null: null, excess (mean over
        images of score - null) with excess_low and excess_high, p by flipping signs, q corrected over all rows.
    """
    import pandas as pd

    names, numeric = score_names(run), numeric_columns(run)
    columns = [*names, *(f"{name}_null" for name in names if f"{name}_null" in numeric)]
    rows = []
    for attack, region in run.plan.cells if names else ():
        table = cell(run, attack.label, region, columns).astype("float64")
        excess = {
            name: table[name] - table[f"{name}_null"] for name in names if f"{name}_null" in table.columns
        }
        wide = pd.concat([table[names], pd.DataFrame(excess).add_suffix("_excess")], axis=1)
        found = dict(zip(wide.columns, mean_intervals(wide.to_numpy(float)), strict=True))
        for name in names:
            own = (int(table[name].notna().sum()), *found[name])
            beside: tuple[float, ...] = (np.nan,) * 5
            if name in excess:
                null = round(float(table[f"{name}_null"].mean()), 12) if own[0] else np.nan
                p = mean_test(excess[name].to_numpy(float)) if excess[name].notna().any() else np.nan
                beside = (null, *found[f"{name}_excess"], p)
            rows.append((attack.label, region, name, *own, *beside))
    table = pd.DataFrame(rows, columns=list(SCORES[:-1]))
    table["q"] = corrected(table["p"])
    return table


def score_names(run: Run) -> list[str]:
    """Columns of the records that are numbers worth a mean: of the attack, then of the analyses."""
    numeric = numeric_columns(run)
    own = [name for name in numeric if name not in COLUMNS and not name.endswith(NULL_SUFFIXES)]
    return [*(name for name in MEASURES if name in numeric), *own]
