"""Association: are the units that detect a concept more sensitive, and which concepts does an attack move?

Joins unit sensitivity with dissection, after Xu et al. 2019 (arXiv 1904.02057). Busy units move more and overlap more,
so the control is mean activation (and the layer); it and the intervals are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from weakspot._checks import check_fraction, check_seed
from weakspot._random import numpy_generator
from weakspot.statistics.number_format import counted

if TYPE_CHECKING:
    import pandas as pd

DRAWS = 2000  # bootstrap samples of units
BLOCKS = 10  # in which the samples are drawn, to bound memory
FEWEST = 10  # units, for a correlation
ENOUGH = 20  # units, for an interval
COLUMNS = ("sensitivity", "iou", "mean_activation")


@dataclass(frozen=True)
class Association:
    """Whether units with a larger IoU are more sensitive.

    Attributes:
        correlation: Spearman's rank correlation of sensitivity and IoU over units.
        partial: the same at equal mean activation and layer: the ranks of both are replaced by what a regression on
            the ranks of mean activation leaves. NaN if nothing is left.
        low: 2.5% quantile of the partial correlation over bootstrap samples of units; NaN with fewer than 20 units.
        high: the 97.5% quantile.
        units: number of units.
        layers: number of layers.
    """

    correlation: float
    partial: float
    low: float
    high: float
    units: int
    layers: int = 1

    @property
    def sentence(self) -> str:
        """The partial correlation in words; a claim only if its interval excludes zero."""
        control = "mean activation" + (" in the same layer" if self.layers > 1 else "")
        if np.isnan(self.correlation):
            return (
                "Whether sensitivity goes with IoU cannot be determined, because one of them is the same in all "
                f"{self.units} units."
            )
        raw = f"the rank correlation of sensitivity and IoU over {self.units} units is {self.correlation:.2f}"
        if np.isnan(self.partial):
            return f"{_capitalized(raw)}; at equal {control}, nothing is left to correlate."
        partial = f"at equal {control} it is {self.partial:.2f}"
        if np.isnan(self.low):
            return f"{_capitalized(raw)}, and {partial}. Fewer than {ENOUGH} units give no interval and no claim."
        interval = f"[{self.low:.2f}, {self.high:.2f}]"
        if self.low <= 0 <= self.high:
            return (
                "There is not enough evidence that units that agree better with a concept are more or less sensitive: "
                f"{raw}, and {partial} {interval}, an interval that includes zero."
            )
        more = "more" if self.partial > 0 else "less"
        return (
            f"Units that agree better with a concept are {more} sensitive: {raw}, and {partial} {interval}."
        )


def associate(joined: pd.DataFrame, *, seed: int = 0) -> Association:
    """Correlate sensitivity with IoU, controlling for mean activation and layer.

    Args:
        joined: from `join`: one row per unit with sensitivity, iou, mean_activation and, if there are several layers,
            layer.
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
    # (3, B, n) as the functions below take it, with a single sample: B = 1.
    values = finite[list(COLUMNS)].to_numpy(float).T[:, None]
    correlation = _correlations(*_ranks(values[:2]))[0]
    partial = _partials(values, layers[None])[0]
    low, high = np.nan, np.nan
    if len(finite) >= ENOUGH and not np.isnan(partial):
        rng = numpy_generator(seed)
        samples = (rng.integers(0, len(finite), (DRAWS // BLOCKS, len(finite))) for _ in range(BLOCKS))
        # Numbers of units (B, n) as an index turn the columns (3, n) into samples (3, B, n).
        partials = [_partials(values[:, 0, rows], layers[rows]) for rows in samples]
        # Percentile interval over bootstrap samples of units.
        low, high = np.nanquantile(np.concatenate(partials), [0.025, 0.975])
    return Association(
        float(correlation), float(partial), float(low), float(high), len(finite), len(np.unique(layers))
    )


def join(sensitivity: pd.DataFrame, units: pd.DataFrame) -> pd.DataFrame:
    """One row per unit: the columns of `unit_sensitivity` and of `dissect`.

    Raises:
        ValueError: if they are not of the same units.
    """
    for name, table in (("sensitivity", sensitivity), ("units", units)):
        if "unit" not in table:
            raise ValueError(f"{name} must have a column unit, as unit_sensitivity and dissect return")
    same = set(sensitivity["unit"]) == set(units["unit"])
    if not same or sensitivity["unit"].duplicated().any() or units["unit"].duplicated().any():
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

    check_fraction(level, name="level")
    if "concept" not in joined:
        raise ValueError(
            "joined must have the columns that join(sensitivity, dissection) returns, got no concept"
        )
    columns = ["concept", "category", "units", "moved", "promoted", "suppressed", "sensitivity", "noise"]
    rows = []
    detectors = joined[joined["concept"].notna()]
    for (concept, category), group in detectors.groupby(["concept", "category"], sort=True):
        moved = group["p_value"] <= level
        # A direction needs more than noise moves the unit on average, to the side on which the unit ends.
        directed = moved & (group["direction_p"] <= level)
        up = directed & (group["change"] > 0) & (group["excess"] > 0)
        down = directed & (group["change"] < 0) & (group["excess"] < 0)
        counts = [len(group), *(int(units.sum()) for units in (moved, up, down))]
        rows.append([concept, category, *counts, group["sensitivity"].median(), group["noise"].median()])
    table = pd.DataFrame(rows, columns=columns)
    return table.sort_values(["moved", "sensitivity"], ascending=False, ignore_index=True)


def concept_sentence(concepts: pd.DataFrame, most: int = 3) -> str:
    """One sentence: the concepts whose detectors an attack moves more than noise does, and in which direction.

    Args:
        concepts: from `moved_concepts`.
        most: concepts named for each direction.
    """
    if concepts.empty:
        return "No unit detects a concept."
    up, down = concepts["promoted"] > 0, concepts["suppressed"] > 0
    groups = (
        ("promotes", concepts[up & ~down], "promoted", ""),
        ("suppresses", concepts[down & ~up], "suppressed", ""),
        ("moves", concepts[up & down], "moved", " in both directions"),
        ("moves", concepts[(concepts["moved"] > 0) & ~up & ~down], "moved", " (direction not shown)"),
    )
    parts = []
    for verb, rows, column, end in groups:
        names = [
            f"{row['concept']} ({row[column]} of {counted(row['units'], 'detector')})"
            for row in rows.sort_values(column, ascending=False, kind="stable").head(most).to_dict("records")
        ]
        more = f" and {len(rows) - most} more" if len(rows) > most else ""
        if names:
            parts.append(f"{verb} {', '.join(names)}{more}{end}")
    if not parts:
        return "No detector clearly moves more than under noise of the same size."
    return f"The attack moves detectors more than noise of the same size does: it {'; it '.join(parts)}."


def by_category(joined: pd.DataFrame) -> pd.DataFrame:
    """Mean sensitivity of the detectors of each category, and of units that detect nothing ("none")."""
    categories = joined["category"].fillna("none")
    table = joined.groupby(categories)["sensitivity"].agg(["size", "mean"])
    return table.set_axis(["units", "sensitivity"], axis=1).rename_axis("category").reset_index()


def _partials(values: NDArray[np.floating], layers: NDArray[np.generic]) -> NDArray[np.float64]:
    """(B,) Spearman's partial correlations of B samples; NaN if the controls explain everything.

    Args:
        values: (3, B, n): the first two are correlated and the third is controlled for.
        layers: (B, n) the layer of each unit, which is also controlled for.
    """
    ranked = _ranks(values)
    # Subtracting each layer's mean rank removes the effect of the layer.
    centered = np.zeros_like(ranked)
    for layer in np.unique(layers):
        inside = layers == layer
        mean = (ranked * inside).sum(2, keepdims=True) / np.maximum(inside.sum(1), 1)[:, None]
        centered += (ranked - mean) * inside
    first, second, control = centered
    # Residuals of the regression on the control: x - c <x, c> / <c, c>.
    weight = np.where((control**2).sum(1) > 0, (control**2).sum(1), 1.0)
    residuals = [one - ((one * control).sum(1) / weight)[:, None] * control for one in (first, second)]
    partials = _correlations(*residuals)
    for residual, ranks in zip(residuals, ranked, strict=False):
        partials[np.abs(residual).max(1) <= 1e-9 * np.abs(ranks).max(1)] = np.nan  # only rounding is left
    return partials


def _correlations(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.float64]:
    """(B,) Pearson's correlations of the rows of (B, n); NaN for constant rows."""
    first, second = (one - one.mean(1, keepdims=True) for one in (first, second))
    size = np.sqrt((first**2).sum(1) * (second**2).sum(1))
    return np.asarray((first * second).sum(1) / np.where(size > 0, size, np.nan), dtype=np.float64)


def _ranks(values: NDArray[np.floating]) -> NDArray[np.float64]:
    from scipy.stats import rankdata

    return np.asarray(rankdata(values, axis=-1), dtype=np.float64)


def _capitalized(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
