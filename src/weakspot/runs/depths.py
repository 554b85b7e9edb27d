"""Depths: how changes travel through the layers, on the mean over images, successes beside failures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from weakspot.runs.maps import StoredMap
from weakspot.runs.run import Run
from weakspot.statistics import mean_intervals

MOST = 1000  # images of which curves are read; of more, these evenly spread over the list
BLOCK = 128  # images in memory at once before they are chosen
TOGETHER = 200  # columns of a bootstrap
RANDOM = "random edit"
OUTCOMES = ("fooled", "held")
COLUMNS = ["measure", "attack", "region", "outcome", "place", "layer", "mean", "low", "high", "images"]
FIRST = "spread"  # of the measures


def depths(run: Run) -> pd.DataFrame:
    """Columns measure, attack, region, outcome, place, layer, mean, low, high, images.

    Of images that are correctly classified without an attack, at most 1000. The outcome "random edit" is of all of
    these, under an edit of the attack's size. low and high are NaN where `statistics.mean_intervals` gives no interval.
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
    """The rows of one array (image, attack, region, layer)."""
    stored = run.maps[name]
    measure, _, random = str(stored.about["curve"]).partition(", ")
    chosen = np.flatnonzero((outcomes >= 0).any((1, 2)))
    if len(chosen) > MOST:
        chosen = chosen[np.linspace(0, len(chosen) - 1, MOST).round().astype(np.int64)]
    values = _read(stored, chosen)
    ended = outcomes[chosen]
    groups = {RANDOM: ended >= 0} if random else {what: ended == n for n, what in enumerate(OUTCOMES)}
    steps = stored.about["steps"]
    keys, columns = [], []
    places = {cell: place for place, cell in enumerate(run.plan.cells)}
    for attack, region in run.plan.reported_cells:
        cell = divmod(places[attack, region], len(run.plan.regions))
        for outcome, among in groups.items():
            columns.append(np.where(among[:, *cell, None], values[:, *cell], np.nan))
            keys += [(attack.label, region, outcome, layer + 1, step) for layer, step in enumerate(steps)]
    table = np.concatenate(columns, axis=1)
    found = [mean_intervals(part) for part in np.split(table, range(TOGETHER, table.shape[1], TOGETHER), 1)]
    counts = np.isfinite(table).sum(0)
    for key, interval, count in zip(keys, np.concatenate(found), counts, strict=True):
        yield dict(zip(COLUMNS, (measure, *key, *map(float, interval), int(count)), strict=True))


def _read(stored: StoredMap, chosen: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n, attacks, regions, layers) of these images, without infinities."""
    parts = [np.empty((0, *stored.shape[1:]))]
    for start in range(0, len(stored), BLOCK):
        mine = chosen[(chosen >= start) & (chosen < start + BLOCK)]
        if len(mine):
            parts.append(stored[start : start + BLOCK][mine - start].astype(np.float64))
    values = np.concatenate(parts)
    return np.where(np.isfinite(values), values, np.nan)


def _outcomes(run: Run, images: int) -> NDArray[np.int8]:
    """(images, attacks, regions): 0 fooled, 1 held, -1 not known or not read rightly before."""
    attacks = {attack.label: place for place, attack in enumerate(run.plan.attacks)}
    regions = {region: place for place, region in enumerate(run.plan.regions)}
    found = np.full((images, len(attacks), len(regions)), -1, np.int8)
    for attack, first in attacks.items():
        for region, second in regions.items():
            ended = (
                run.relation.filter(f"attack = {_quoted(attack)} and region = {_quoted(region)}")
                .filter("correct and success is not null")
                .project('"index", success')
                .df()
            )
            found[ended["index"].to_numpy(), first, second] = np.where(ended["success"].astype(bool), 0, 1)
    return found


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
