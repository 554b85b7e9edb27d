"""Sensitivity joined with dissection: are the units that stand for a concept more sensitive, and which concepts move?

After Xu et al. 2019 (arXiv 1904.02057). The control for mean activation and layer, and the intervals, are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from weakspot._checks import check_seed

if TYPE_CHECKING:
    import pandas as pd

DRAWS = 2000  # bootstrap samples of units
BLOCKS = 10  # in which they are drawn
FEWEST = 10  # units, for a correlation
ENOUGH = 20  # units, for an interval
COLUMNS = ("sensitivity", "iou", "mean_activation")


@dataclass(frozen=True)
class Association:
    """Whether units with a larger IoU are more sensitive.

    Attributes:
        correlation: Spearman's, of sensitivity and IoU over units.
        partial: the same with ranks of mean activation, and the layer, taken out of both; NaN if nothing is left.
        low: 2.5% quantile of the partial correlation over bootstrap samples of units; NaN of fewer than 20 units.
        high: the 97.5% quantile.
        units: how many units it is of.
        layers: of how many layers they are.
    """

    correlation: float
    partial: float
    low: float
    high: float
    units: int
    layers: int = 1

    @property
    def sentence(self) -> str:
        """What is left of the correlation at equal mean activation; a claim only if the interval excludes zero."""
        held = "mean activation" + (" in the same layer" if self.layers > 1 else "")
        raw = f"the rank correlation of sensitivity and IoU over {self.units} units is {self.correlation:.2f}"
        if np.isnan(self.correlation):
            return (
                f"Whether sensitivity goes with IoU cannot be said: one of them is the same in all {self.units} "
                "units."
            )
        if np.isnan(self.partial):
            return f"{raw[0].upper()}{raw[1:]}; at equal {held} nothing is left that could be measured."
        left = f"{self.partial:.2f} is left at equal {held}"
        if np.isnan(self.low):
            return f"{raw[0].upper()}{raw[1:]}; {left}; fewer than {ENOUGH} units give no interval, and no claim."
        interval = f"[{self.low:.2f}, {self.high:.2f}]"
        if self.low <= 0 <= self.high:
            return (
                "It is not shown that units that agree better with a concept are more or less sensitive: "
                f"{raw}; {left} {interval}, an interval that includes zero."
            )
        more = "more" if self.partial > 0 else "less"
        return f"Units that agree better with a concept are {more} sensitive: {raw}; {left} {interval}."


def associate(joined: pd.DataFrame, *, seed: int = 0) -> Association:
    """Sensitivity against IoU, controlling for mean activation and layer: busy units move more and overlap more.

    Args:
        joined: one row per unit with sensitivity, iou, mean_activation and, if of several layers, layer; `join` makes
            it.
        seed: of the bootstrap.

    Raises:
        ValueError: if a column is missing, or there are fewer than ten units.
    """
    check_seed(seed)
    missing = [name for name in COLUMNS if name not in joined]
    if missing:
        raise ValueError(
            f"joined must have the columns that join(sensitivity, dissection) returns, got none named {missing[0]!r}"
        )
    finite = joined[np.isfinite(joined[list(COLUMNS)].to_numpy(float)).all(1)]
    if len(finite) < FEWEST:
        raise ValueError(f"joined must have at least {FEWEST} units, for a correlation, got {len(finite)}")
    layers = finite["layer"].to_numpy() if "layer" in finite else np.zeros(len(finite))
    values = finite[list(COLUMNS)].to_numpy(float).T[:, None]
    correlation = _correlations(*_ranks(values[:2]))[0]
    partial = _partials(values, layers[None])[0]
    low, high = np.nan, np.nan
    if len(finite) >= ENOUGH and not np.isnan(partial):
        rng = np.random.default_rng(seed)
        samples = (rng.integers(0, len(finite), (DRAWS // BLOCKS, len(finite))) for _ in range(BLOCKS))
        partials = [_partials(values[:, 0, rows], layers[rows]) for rows in samples]
        low, high = np.nanquantile(np.concatenate(partials), [0.025, 0.975])
    return Association(
        float(correlation),
        float(partial),
        float(low),
        float(high),
        len(finite),
        len(np.unique(layers)),
    )


def join(sensitivity: pd.DataFrame, units: pd.DataFrame) -> pd.DataFrame:
    """One row per unit: the columns of `unit_sensitivity` and of `dissect`.

    Raises:
        ValueError: if they are not of the same units.
    """
    if set(sensitivity["unit"]) != set(units["unit"]):
        raise ValueError(
            f"sensitivity and units must be of one layer, got {len(sensitivity)} and {len(units)} units"
        )
    return sensitivity.merge(units, on="unit", validate="one_to_one")


def moved_concepts(joined: pd.DataFrame, *, level: float = 0.05) -> pd.DataFrame:
    """The concepts whose detectors an attack moves more than noise of the same size does.

    Args:
        joined: from `join`.
        level: of the corrected p values.

    Returns:
        One row per concept with detectors, the most moved first: concept, category, units, moved (how many move more
        than under noise), promoted and suppressed (how many of these also move up, or down, more than under noise),
        sensitivity and noise (medians over its detectors).
    """
    import pandas as pd

    columns = ["concept", "category", "units", "moved", "promoted", "suppressed", "sensitivity", "noise"]
    rows = []
    for (concept, category), group in joined[joined["concept"].notna()].groupby(
        ["concept", "category"], sort=True
    ):
        moved = group["p_value"] <= level
        # In one direction: further than noise alone would take it, and to the side on which the unit ends.
        directed = moved & (group["direction_p"] <= level)
        up = directed & (group["change"] > 0) & (group["excess"] > 0)
        down = directed & (group["change"] < 0) & (group["excess"] < 0)
        counts = [len(group), *(int(rows.sum()) for rows in (moved, up, down))]
        rows.append([concept, category, *counts, group["sensitivity"].median(), group["noise"].median()])
    table = pd.DataFrame(rows, columns=columns)
    return table.sort_values(["moved", "sensitivity"], ascending=False, ignore_index=True)


def in_words(concepts: pd.DataFrame, most: int = 3) -> str:
    """One sentence: the concepts whose detectors an attack moves more than noise does, and in which direction."""
    if concepts.empty:
        return "No unit stands for a concept."
    up, down = concepts["promoted"] > 0, concepts["suppressed"] > 0
    groups = {
        "promotes": (concepts[up & ~down], "promoted"),
        "suppresses": (concepts[down & ~up], "suppressed"),
        "moves": (concepts[(concepts["moved"] > 0) & (up == down)], "moved"),
    }
    parts = []
    for verb, (rows, column) in groups.items():
        named = [
            f"{row['concept']} ({row[column]} of {row['units']} detectors)"
            for row in rows.sort_values(column, ascending=False, kind="stable").head(most).to_dict("records")
        ]
        more = f" and {len(rows) - most} more" if len(rows) > most else ""
        if named:
            parts.append(
                f"{verb} {', '.join(named)}{more}"
                + (" without a common direction" if verb == "moves" else "")
            )
    if not parts:
        return "No detector is shown to move more than under noise of the same size."
    return f"More than noise of the same size does, the attack {'; it '.join(parts)}."


def by_category(joined: pd.DataFrame) -> pd.DataFrame:
    """Mean sensitivity of the detectors of each category, and of units that stand for nothing."""
    kinds = joined["category"].fillna("none")
    table = joined.groupby(kinds)["sensitivity"].agg(["size", "mean"])
    return table.set_axis(["units", "sensitivity"], axis=1).rename_axis("category").reset_index()


def _partials(values: NDArray[np.floating], layers: NDArray[np.generic]) -> NDArray[np.float64]:
    """(B,) Spearman's partial correlations of B samples; NaN where the controls explain everything.

    Args:
        values: (3, B, n) of which the first two are correlated and the third is controlled for.
        layers: (B, n) the layer of each unit, which is controlled for.
    """
    ranked = _ranks(values)
    # Within its layer each rank counts from the layer's mean, which takes out the layer's own effect.
    rest = np.zeros_like(ranked)
    for level in np.unique(layers):
        inside = layers == level
        mean = (ranked * inside).sum(2, keepdims=True) / np.maximum(inside.sum(1), 1)[:, None]
        rest += (ranked - mean) * inside
    first, second, control = rest
    weight = np.where((control**2).sum(1) > 0, (control**2).sum(1), 1.0)
    rests = [one - ((one * control).sum(1) / weight)[:, None] * control for one in (first, second)]
    found = _correlations(*rests)
    for one, ranks in zip(rests, ranked, strict=False):
        found[np.abs(one).max(1) <= 1e-9 * np.abs(ranks).max(1)] = np.nan
    return found


def _correlations(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.float64]:
    """(B,) Pearson's of the rows of (B, n), NaN of constant ones."""
    first, second = (one - one.mean(1, keepdims=True) for one in (first, second))
    size = np.sqrt((first**2).sum(1) * (second**2).sum(1))
    return np.asarray((first * second).sum(1) / np.where(size > 0, size, np.nan), dtype=np.float64)


def _ranks(values: NDArray[np.floating]) -> NDArray[np.float64]:
    from scipy.stats import rankdata

    return np.asarray(rankdata(values, axis=-1), dtype=np.float64)
