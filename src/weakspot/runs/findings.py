"""Findings: what a run says beyond single images, each with its interval, its control and its share of chance.

Regions are compared with controls of equal area on the same images, scores with their own nulls; where many are judged,
p values are corrected for their number (q).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from weakspot.runs.plan import AttackPlan, Plan, control_of
from weakspot.runs.run import Run
from weakspot.runs.tables import COLUMNS
from weakspot.statistics import false_discovery, mean_interval, mean_intervals, share_interval, sign_flip_test

if TYPE_CHECKING:
    import pandas as pd

NULL_SUFFIXES = ("_null", "_null_low", "_null_high", "_p", "_p_less")
MEASURES = (
    "confidence_adversarial",
    "margin_adversarial",
    "ssim",
)  # of the attack itself, beside analyses' scores
CONTRASTS = (
    "attack", "region", "control", "region_share", "control_share", "images", "measure", "norm",
    "here", "there", "held_here", "held_there", "difference", "low", "high", "p", "q",
)  # fmt: skip
CURVES = ("attack", "region", "control", "norm", "size", "fooled", "low", "high", "images")
SCORES = (
    "attack", "region", "score", "images", "mean", "low", "high",
    "null", "excess", "excess_low", "excess_high", "p", "q",
)  # fmt: skip
POINTS = 40  # of a curve


def _once(compute: Callable[[Run], pd.DataFrame]) -> Callable[[Run], pd.DataFrame]:
    """Computed once for each `Run` that is complete: the summary, the page and a gate all ask."""
    known: WeakKeyDictionary[Run, pd.DataFrame] = WeakKeyDictionary()

    @wraps(compute)
    def look(run: Run) -> pd.DataFrame:
        if not run.complete:
            return compute(run)
        if run not in known:
            known[run] = compute(run)
        return known[run].copy()

    return look


@_once
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
            here, there = (found[side].to_numpy(float) for side in ("success", "success_there"))
            differences, middles = here - there, (_mean(here), _mean(there), 0.0, 0.0)
        else:
            here, there, held = _sizes(run, attack.label, found, norm)
            differences = np.log2(there) - np.log2(here)
            middles = (_geometric(here), _geometric(there), *held)
        mean, low, high = mean_interval(differences)
        # Of all images, those that fell nowhere too.
        shares = [_mean(found[side].to_numpy(float)) for side in ("region_share", "region_share_there")]
        measure = ("fooled", "") if norm is None else ("smallest size", norm)
        p = sign_flip_test(differences) if len(differences) else np.nan
        rows.append(
            (attack.label, region, control, *shares, len(differences), *measure, *middles, mean, low, high, p)
        )
    table = pd.DataFrame(rows, columns=list(CONTRASTS[:-1]))
    table["q"] = _corrected(table["p"])
    return table


@_once
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
    controls = {control_of(region) for region in plan.regions}
    rows: list[tuple[Any, ...]] = []
    for name, norm, attacks in _families(plan):
        found = {region: _falls(run, attacks, region, norm) for region in plan.regions}
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


@_once
def score_findings(run: Run) -> pd.DataFrame:
    """The mean of every score in every attack x region with its interval, and how far it lies from its null.

    Returns:
        Columns attack, region, score; images; mean, low, high; and where the score has a null: null, excess (mean over
        images of score - null) with excess_low and excess_high, p by flipping signs, q corrected over all rows.
    """
    import pandas as pd

    names, numeric = score_names(run), _columns(run)
    columns = [*names, *(f"{name}_null" for name in names if f"{name}_null" in numeric)]
    rows = []
    for attack, region in run.plan.cells if names else ():
        table = _cell(run, attack.label, region, columns).astype("float64")
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
                p = sign_flip_test(excess[name].to_numpy(float)) if excess[name].notna().any() else np.nan
                beside = (null, *found[f"{name}_excess"], p)
            rows.append((attack.label, region, name, *own, *beside))
    table = pd.DataFrame(rows, columns=list(SCORES[:-1]))
    table["q"] = _corrected(table["p"])
    return table


def score_names(run: Run) -> list[str]:
    """Columns of the records that are numbers worth a mean: of the attack, then of the analyses."""
    numeric = _columns(run)
    own = [name for name in numeric if name not in COLUMNS and not name.endswith(NULL_SUFFIXES)]
    return [*(name for name in MEASURES if name in numeric), *own]


def norm_of(attack: AttackPlan) -> str | None:
    """Of an attack that looks for the smallest change, the norm in which it does; else None."""
    own = {"carlini_wagner": "l2", "elastic_net": "l1"}
    if attack.name == "fmn":
        return str(dict(attack.settings).get("norm", "linf"))
    return own.get(attack.name)


def bounded_attacks(plan: Plan) -> list[str]:
    """Labels of the attacks whose success is news: those that look for the smallest change find one nearly always."""
    return [attack.label for attack in plan.attacks if norm_of(attack) is None]


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
        table = _cell(run, attack.label, region, ["index", "success", "correct", norm])
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


def _side_by_side(run: Run, attack: str, region: str, control: str, norm: str | None) -> pd.DataFrame:
    """The images that are read rightly and whose fate in both places is known, a row each."""
    columns = ["index", "success", "correct", "region_share", *([] if norm is None else [norm])]
    here, there = (_cell(run, attack, place, columns) for place in (region, control))
    both = here.merge(there, on="index", suffixes=("", "_there"))
    known = both["success"].notna() & both["success_there"].notna() & both["correct"].fillna(False)
    return both[known]


def _sizes(
    run: Run, attack: str, found: pd.DataFrame, norm: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], tuple[float, float]]:
    """Smallest sizes here and there of the images that fell in either, and the shares that held in the one."""
    query = f"select max({norm}) from records where success and attack = $attack"  # noqa: S608 - linf, l1 or l2
    (worst,) = run.sql(query, attack=attack).fetchall()[0]
    fell = [found[side].to_numpy(bool) for side in ("success", "success_there")]
    sizes = [found[side].to_numpy(float) for side in (norm, f"{norm}_there")]
    here, there = (np.where(ok, size, worst or np.nan) for ok, size in zip(fell, sizes, strict=True))
    kept = (fell[0] | fell[1]) & (here > 0) & (there > 0)
    return here[kept], there[kept], (_mean(~fell[0][kept]), _mean(~fell[1][kept]))


def _cell(run: Run, attack: str, region: str, columns: Sequence[str]) -> pd.DataFrame:
    """These columns of one attack in one region, in the order of images."""
    chosen = ", ".join('"' + name.replace('"', '""') + '"' for name in columns)
    query = f"select {chosen} from records where attack = $attack and region = $region order by index"  # noqa: S608
    found: pd.DataFrame = run.sql(query, attack=attack, region=region).df()
    return found


def _columns(run: Run) -> list[str]:
    """Names of the columns that hold numbers."""
    relation = run.sql("select * from records limit 0")
    kinds = zip(relation.columns, relation.types, strict=True)
    return [name for name, kind in kinds if str(kind) in {"DOUBLE", "FLOAT", "BIGINT", "INTEGER", "BOOLEAN"}]


def _corrected(p: pd.Series[float]) -> NDArray[np.float64]:
    corrected = np.full(len(p), np.nan)
    known = p.notna().to_numpy()
    corrected[known] = false_discovery(p[known].to_numpy(float))
    return corrected


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else np.nan


def _geometric(sizes: NDArray[np.float64]) -> float:
    return float(np.exp(np.log(sizes).mean())) if len(sizes) else np.nan
