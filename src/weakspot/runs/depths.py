"""Depths: how changes travel through the layers, on the mean over images, successes beside failures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from weakspot.runs.robustness import quoted
from weakspot.runs.run import Run

BLOCK = 2_048  # images in memory at once
FEW = 5  # images, for an interval
NORMAL = 1.959964
RANDOM = "random edit"
OUTCOMES = ("fooled", "held")
COLUMNS = ["measure", "attack", "region", "outcome", "place", "layer", "mean", "low", "high", "images"]
FIRST = "spread"  # of the measures


def depths(run: Run) -> pd.DataFrame:
    """Columns measure, attack, region, outcome, place, layer, mean, low, high, images.

    Of images that were read rightly before. The outcome "random edit" is of all of these, under an edit of the attack's
    size.
    """
    known = [name for name in run.maps if "curve" in run.maps[name].about]
    if not known:
        return pd.DataFrame(columns=COLUMNS)
    outcomes = _outcomes(run, len(run.maps[known[0]]))
    rows: list[dict[str, Any]] = []
    for name in sorted(known, key=lambda name: (FIRST not in name, name)):
        rows += _curve(run, name, outcomes)
    return pd.DataFrame(rows, columns=COLUMNS)


def _curve(run: Run, name: str, outcomes: NDArray[np.int8]) -> Iterator[dict[str, Any]]:
    """The rows of one array (image, attack, region, layer), read block by block."""
    stored = run.maps[name]
    measure, _, random = str(stored.about["curve"]).partition(", ")
    sums: NDArray[np.float64] = np.zeros((3, len(OUTCOMES), *stored.shape[1:]))  # of ones, values and squares
    least, most = np.full(sums.shape[1:], np.inf), np.full(sums.shape[1:], -np.inf)
    for start in range(0, len(stored), BLOCK):
        values = stored[start : start + BLOCK].astype(np.float64)
        for number in range(len(OUTCOMES)):
            mine = (outcomes[start : start + BLOCK] == number)[..., None] & np.isfinite(values)
            kept = np.where(mine, values, 0)
            least[number] = np.minimum(least[number], np.where(mine, values, np.inf).min(0))
            most[number] = np.maximum(most[number], np.where(mine, values, -np.inf).max(0))
            sums[:, number] += np.stack([mine.sum(0), kept.sum(0), (kept**2).sum(0)])
    if random:
        groups = {RANDOM: (*sums.sum(1), least.min(0), most.max(0))}
    else:
        groups = {what: (*sums[:, n], least[n], most[n]) for n, what in enumerate(OUTCOMES)}
    for place, (attack, region) in enumerate(run.plan.cells):
        cell = divmod(place, len(run.plan.regions))
        for outcome, (ones, total, squares, lowest, highest) in groups.items():
            for layer, step in enumerate(stored.about["steps"]):
                count = int(ones[*cell, layer])
                mean, half = _interval(count, float(total[*cell, layer]), float(squares[*cell, layer]))
                # As a bootstrap's, an interval of values between two bounds does not leave them.
                low = np.maximum(mean - half, lowest[*cell, layer])
                high = np.minimum(mean + half, highest[*cell, layer])
                told = (measure, attack.label, region, outcome, layer + 1, step, mean, low, high, count)
                yield dict(zip(COLUMNS, told, strict=True))


def _interval(count: int, total: float, squares: float) -> tuple[float, float]:
    """The mean and half its 95% interval; NaN where there are too few images."""
    if not count:
        return np.nan, np.nan
    mean = total / count
    if count < FEW:
        return mean, np.nan
    variance = max(0.0, squares - count * mean**2) / (count - 1)
    return mean, NORMAL * float(np.sqrt(variance / count))


def _outcomes(run: Run, images: int) -> NDArray[np.int8]:
    """(images, attacks, regions): 0 fooled, 1 held, -1 not known or not read rightly before."""
    attacks = {attack.label: place for place, attack in enumerate(run.plan.attacks)}
    regions = {region: place for place, region in enumerate(run.plan.regions)}
    found = np.full((images, len(attacks), len(regions)), -1, np.int8)
    for attack, first in attacks.items():
        for region, second in regions.items():
            ended = (
                run.sql("select * from outcomes")
                .filter(f"attack = {quoted(attack)} and region = {quoted(region)}")
                .filter("correct and fooled is not null")
                .project('"index", fooled')
                .df()
            )
            found[ended["index"].to_numpy(), first, second] = np.where(ended["fooled"].astype(bool), 0, 1)
    return found
