"""Contrasts: every region of a run beside controls of equal area, on the same images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from weakspot.runs.cells import cell, corrected, once
from weakspot.runs.plan import AttackPlan, Plan, control_of, norm_of
from weakspot.runs.run import Run
from weakspot.statistics import mean_interval, mean_test

if TYPE_CHECKING:
    import pandas as pd

CONTRASTS = (
    "attack", "region", "control", "region_share", "control_share", "images", "measure", "norm",
    "here", "there", "held_here", "held_there", "difference", "low", "high", "p", "q",
)  # fmt: skip


@once
def region_contrasts(run: Run) -> pd.DataFrame:
    """Every region beside its control of equal area, on the images that the model reads rightly.

    A row for each attack and region whose control ("matched:" before it) is in the plan too. What is measured is the
    share that is "fooled", or, of attacks that look for the smallest change, the "smallest size": its geometric mean
    over images. An image that falls in one of the two places only counts there, in the other with the largest size
    that the attack needed anywhere in the run, which makes differences smaller rather than larger.

    Returns:
        Columns attack, region, control; region_share, control_share of the image; images; measure and the norm of
        its sizes, "" of shares; here, there; held_here, held_there, the share of these images that fell in the other
        place only, so that "here" or "there" is a least size;
        difference with low and high, its 95% interval over images: of shares here - there, of sizes
        log2(there / here), so that above zero the region is the weaker place; p by flipping signs, two-sided;
        q corrected over all rows (Benjamini and Hochberg).
    """
    import pandas as pd

    plan = run.plan
    rows = []
    for attack, region, control in _controlled(plan):
        norm = norm_of(attack)
        found = _side_by_side(run, attack.label, region, control, norm)
        if norm is None:
            here, there = (found[side].to_numpy(float) for side in ("fooled", "fooled_there"))
            differences, middles = here - there, (_mean(here), _mean(there), 0.0, 0.0)
        else:
            here, there, held = _sizes(run, attack.label, found, norm)
            differences = np.log2(there) - np.log2(here)
            middles = (_geometric(here), _geometric(there), *held)
        mean, low, high = mean_interval(differences)
        # Of all images, those that fell nowhere too.
        shares = [_mean(found[side].to_numpy(float)) for side in ("region_share", "region_share_there")]
        measure = ("fooled", "") if norm is None else ("smallest size", norm)
        p = mean_test(differences) if len(differences) else np.nan
        rows.append(
            (attack.label, region, control, *shares, len(differences), *measure, *middles, mean, low, high, p)
        )
    table = pd.DataFrame(rows, columns=list(CONTRASTS[:-1]))
    table["q"] = corrected(table["p"])
    return table


def told(contrasts: pd.DataFrame) -> list[str]:
    """Each contrast in a sentence, the weakest place first; without an interval that leaves zero it says so."""
    order = contrasts.sort_values("difference", ascending=False)
    return [_sentence(row) for row in order.itertuples(index=False)]


def _sentence(row: Any) -> str:
    place = f"{row.region} ({row.region_share:.0%} of the image)"
    if np.isnan(row.region_share):
        return f"{row.attack} confined to {row.region}: no image is known to have been attacked there and in controls."
    if not row.images:
        return f"{row.attack} confined to {place} and in controls of equal area fools none of the images read rightly."
    if row.measure == "fooled":
        seen = f"{row.attack} confined to {place} fools {row.here:.0%}, in controls of equal area {row.there:.0%}"
        apart = f"{100 * row.difference:+.0f} points"
        if np.isfinite(row.low):
            apart += f", 95% from {100 * row.low:+.0f} to {100 * row.high:+.0f}"
    else:
        seen = (
            f"{row.attack} confined to {place} needs {_least(row.held_here)}{_in_steps(row.here, row.norm)}, in "
            f"controls of equal area {_least(row.held_there)}{_in_steps(row.there, row.norm)}"
        )
        apart = f"{2**row.difference:.2f} times as much there"
        if np.isfinite(row.low):
            apart += f", 95% from {2**row.low:.2f} to {2**row.high:.2f}"
    if not np.isfinite(row.low) or row.q > 0.05 or row.low <= 0 <= row.high:
        verdict = "no weaker or stronger than chance can explain"
    else:
        verdict = "a weak region" if row.difference > 0 else "stronger than controls"
    return f"{seen} ({apart}; q {_p(row.q)}): {verdict}."


def _least(held: float) -> str:
    return "at least " if held else ""


def _in_steps(size: float, norm: str) -> str:
    """A size in words: of single pixels in steps of a picture file, else with the name of its norm."""
    steps = 255 * size
    if norm == "linf":
        return f"{steps:.2g}/255" if steps < 10 else f"{steps:.0f}/255"
    return f"{size:.3g} in {norm.upper()}"


def _p(value: float) -> str:
    return "below 0.001" if value < 0.001 else f"{value:.3f}"


def _controlled(plan: Plan) -> Iterator[tuple[AttackPlan, str, str]]:
    for attack in plan.attacks:
        for region in plan.regions:
            if control_of(region) in plan.regions:
                yield attack, region, control_of(region)


def _side_by_side(run: Run, attack: str, region: str, control: str, norm: str | None) -> pd.DataFrame:
    """The images that are read rightly and whose fate in both places is known, a row each."""
    columns = ["index", "fooled", "correct", "region_share", *([] if norm is None else [norm])]
    here, there = (cell(run, attack, place, columns) for place in (region, control))
    both = here.merge(there, on="index", suffixes=("", "_there"))
    known = both["fooled"].notna() & both["fooled_there"].notna() & both["correct"].fillna(False)
    return both[known]


def _sizes(
    run: Run, attack: str, found: pd.DataFrame, norm: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], tuple[float, float]]:
    """Smallest sizes here and there of the images that fell in either, and the shares that held in the one."""
    query = f"select max({norm}) from outcomes where fooled and attack = $attack"  # noqa: S608 - linf, l1 or l2
    (worst,) = run.sql(query, attack=attack).fetchall()[0]
    fell = [found[side].to_numpy(bool) for side in ("fooled", "fooled_there")]
    sizes = [found[side].to_numpy(float) for side in (norm, f"{norm}_there")]
    here, there = (np.where(ok, size, worst or np.nan) for ok, size in zip(fell, sizes, strict=True))
    kept = (fell[0] | fell[1]) & (here > 0) & (there > 0)
    return here[kept], there[kept], (_mean(~fell[0][kept]), _mean(~fell[1][kept]))


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else np.nan


def _geometric(sizes: NDArray[np.float64]) -> float:
    return float(np.exp(np.log(sizes).mean())) if len(sizes) else np.nan
