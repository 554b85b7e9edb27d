"""Curves: how many images of a run fall to changes up to a size, in every region."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from weakspot.runs.cells import cell, once
from weakspot.runs.plan import AttackPlan, Plan, control_of, norm_of
from weakspot.runs.run import Run
from weakspot.statistics import share_interval

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
                    *share_interval(falls <= size * (1 + 1e-5)),
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
        table = cell(run, attack.label, region, ["index", "success", "correct", norm])
        table = table[table["correct"].fillna(False)]
        if len(attacks) > 1:
            unknown = table.loc[table["success"].isna(), "index"]
            missing.append(pd.Series(_amount(attack), index=unknown.to_numpy(), dtype=float))
        table = table[table["success"].notna()]
        size = table[norm].to_numpy(float) if len(attacks) == 1 else np.full(len(table), _amount(attack))
        size = np.where(table["success"].to_numpy(bool), size, np.inf)
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
