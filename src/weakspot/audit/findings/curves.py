"""Curves: how many images of a run fall to changes up to a size, in every region.

Depths: how changes travel through the layers, on the mean over images, successes beside failures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from weakspot.audit.findings.robustness import cell, once
from weakspot.audit.plan.attack_plan import AttackPlan
from weakspot.audit.plan.plan import Plan, control_of, norm_of
from weakspot.audit.store.maps import StoredMap
from weakspot.audit.store.records import quoted
from weakspot.audit.store.run import Run
from weakspot.statistics import mean_intervals, proportion_interval

if TYPE_CHECKING:
    import pandas as pd


CURVES = ("attack", "region", "control", "norm", "size", "fooled", "low", "high", "images")
POINTS = 40  # of a curve


@once
def budget_curves(run: Run) -> pd.DataFrame:
    """How many images fall to changes up to a size, in every region; of those that the model reads rightly.

    Of attacks that look for the smallest change the curve is the distribution of what they found, of one that the plan
    has at several budgets a point for each of them: an image falls at a size when it fell at that or a smaller one.

    Returns:
        Columns attack, region; control, whether the region is another one's control; norm, "linf", "l1" or "l2"; size;
        fooled, a share, with low and high, its 95% interval over images; images.
    """
    import pandas as pd

    plan = run.plan
    regions = plan.reported_regions
    controls = {control_of(region) for region in regions}
    rows: list[tuple[Any, ...]] = []
    for name, norm, attacks in _families(plan):
        found = {region: _falls(run, attacks, region, norm) for region in regions}
        largest = max((falls[np.isfinite(falls)].max(initial=0) for falls in found.values()), default=0)
        for region, falls in found.items():
            if not len(falls):
                continue
            if len(attacks) > 1:
                sizes = [_amount(attack) for attack in attacks]
            else:
                sizes = _grid(falls) or ([float(largest)] if largest else [])
            rows += [
                (
                    name,
                    region,
                    region in controls,
                    norm,
                    size,
                    *proportion_interval(falls <= size * (1 + 1e-5)),
                    len(falls),
                )
                for size in sizes
            ]
    return pd.DataFrame(rows, columns=list(CURVES))


class _Family(NamedTuple):
    name: str
    norm: str
    attacks: Sequence[AttackPlan]


def _families(plan: Plan) -> list[_Family]:
    """Attacks that make a curve: one that looks for the smallest change, or the same one at several budgets."""
    found = [_Family(attack.label, norm, [attack]) for attack in plan.attacks if (norm := norm_of(attack))]
    alike: dict[tuple[Any, ...], list[AttackPlan]] = {}
    for attack in plan.attacks:
        kind = (attack.budget or "").partition(":")[0].strip().lower()
        if kind in {"linf", "l1", "l2"}:
            alike.setdefault((attack.name, kind, attack.settings), []).append(attack)
    for (name, kind, settings), attacks in alike.items():
        if len(attacks) > 1:
            said = [f"{key}={value}" for key, value in settings]
            found.append(_Family(" ".join([name, *said]), kind, sorted(attacks, key=_amount)))
    return found


def _amount(attack: AttackPlan) -> float:
    from weakspot.budgets import read_budget

    return float(getattr(read_budget(str(attack.budget)), "eps"))  # noqa: B009 - Budget is a protocol without it


def _falls(run: Run, attacks: Sequence[AttackPlan], region: str, norm: str) -> NDArray[np.float64]:
    """(images,) the size at which each fell, infinite where it held."""
    import pandas as pd

    found, missing = [], []
    for attack in attacks:
        table = cell(run, attack.label, region, ["index", "fooled", "correct", norm])
        table = table[table["correct"].fillna(False)]
        if len(attacks) > 1:
            unknown = table.loc[table["fooled"].isna(), "index"]
            missing.append(pd.Series(_amount(attack), index=unknown.to_numpy(), dtype=float))
        table = table[table["fooled"].notna()]
        size = table[norm].to_numpy(float) if len(attacks) == 1 else np.full(len(table), _amount(attack))
        size = np.where(table["fooled"].to_numpy(bool), size, np.inf)
        found.append(pd.Series(size, index=table["index"].to_numpy()))
    falls = pd.concat(found).groupby(level=0).min()
    if missing:  # who is unknown at a smaller budget may have fallen there
        least = pd.concat(missing).groupby(level=0).min().reindex(falls.index)
        falls = falls[~(least < falls)]
    return falls.to_numpy(float)


def _grid(falls: NDArray[np.float64]) -> list[float]:
    known = falls[np.isfinite(falls)]
    if not len(known):
        return []
    return [float(size) for size in np.unique(np.quantile(known, np.linspace(0, 1, POINTS), method="higher"))]


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
                run.sql("select * from outcomes")
                .filter(f"attack = {quoted(attack)} and region = {quoted(region)}")
                .filter("correct and fooled is not null")
                .project('"index", fooled')
                .df()
            )
            found[ended["index"].to_numpy(), first, second] = np.where(ended["fooled"].astype(bool), 0, 1)
    return found
