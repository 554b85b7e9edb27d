"""Curves of a run: images fooled by changes up to a size, and how changes spread through the layers."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from weakspot.audit.findings.outcomes import evenly_spread, in_blocks, once_per_run, read_cell
from weakspot.audit.plan.attack_plan import NORMS, AttackPlan, Value, read_limit
from weakspot.audit.plan.plan import Plan
from weakspot.audit.store.run import Run
from weakspot.statistics import mean_intervals, proportion_interval

BUDGET_COLUMNS = ("attack", "region", "control", "norm", "size", "fooled", "low", "high", "images")
MAX_POINTS = 40  # of a budget curve
FLOAT32 = 1e-5  # relative rounding of stored sizes

LAYER_COLUMNS = (
    "measure", "attack", "region", "outcome", "place", "layer", "mean", "low", "high", "images",
)  # fmt: skip
BOOTSTRAP_COLUMNS = 200  # at once
RANDOM_EDIT = "random edit"
OUTCOMES = ("fooled", "withstood")
FIRST_MEASURE = "spread"


@once_per_run
def budget_curves(run: Run) -> pd.DataFrame:
    """How many of the correctly classified images fall to changes up to a size, in every region.

    The curve of a minimal-norm attack is the distribution of the sizes that it needed. An attack that the plan runs at
    several budgets has one point per budget: an image falls at a budget if it fell at that one or a smaller one.

    Returns:
        Columns attack; region; control (whether the region is another region's control); norm ("linf", "l1" or "l2");
        size; fooled, a fraction with its exact 95% interval low, high over images; images.
    """
    regions = run.plan.reported_regions
    specs = run.plan.specs.values()
    controls = {
        spec.text for spec in specs if spec.control_of is not None and spec.control_of.text in regions
    }
    rows: list[tuple[object, ...]] = []
    for family in families(run.plan):
        sizes_by_region = {region: _smallest_sizes(run, family, region) for region in regions}
        finite = [sizes[np.isfinite(sizes)].max(initial=0) for sizes in sizes_by_region.values()]
        largest = float(max(finite, default=0))
        for region, smallest in sizes_by_region.items():
            for size in _curve_sizes(family, smallest, largest) if len(smallest) else ():
                # Sizes are stored in float32: one that equals the budget may lie above it by rounding.
                fooled = proportion_interval(smallest <= size * (1 + FLOAT32))
                rows.append(
                    (family.name, region, region in controls, family.norm, size, *fooled, len(smallest))
                )
    return pd.DataFrame(rows, columns=list(BUDGET_COLUMNS))


class Family(NamedTuple):
    """Attacks that make one curve: a minimal-norm attack, or one attack at several budgets."""

    name: str
    norm: str
    attacks: Sequence[AttackPlan]


def families(plan: Plan) -> list[Family]:
    """The curves that a plan gives in each region."""
    result = [
        Family(attack.label, norm, [attack]) for attack in plan.attacks if (norm := attack.recorded_norm)
    ]
    groups: dict[tuple[str, str, tuple[tuple[str, Value], ...]], list[AttackPlan]] = {}
    for attack in plan.attacks:
        kind = read_limit(attack.budget).kind if attack.budget else ""
        if kind in NORMS:
            groups.setdefault((attack.name, kind, attack.settings), []).append(attack)
    for (name, kind, settings), attacks in groups.items():
        if len(attacks) > 1:
            title = " ".join([name, *(f"{key}={value}" for key, value in settings)])
            result.append(Family(title, kind, sorted(attacks, key=_budget_size)))
    return result


def _budget_size(attack: AttackPlan) -> float:
    return read_limit(str(attack.budget)).amount


def _smallest_sizes(run: Run, family: Family, region: str) -> NDArray[np.float64]:
    """(images,) the smallest size at which each image was fooled, infinite if it withstood."""
    several = len(family.attacks) > 1
    fell, unknown = [], []
    for attack in family.attacks:
        cell = read_cell(run, attack.label, region, ["index", "fooled", "correct", family.norm])
        cell = cell[cell["correct"].fillna(False)].set_index("index")
        known = cell[cell["fooled"].notna()]
        size = _budget_size(attack) if several else known[family.norm].to_numpy(float)
        fell.append(pd.Series(np.where(known["fooled"].to_numpy(bool), size, np.inf), index=known.index))
        if several:
            unknown.append(pd.Series(size, index=cell.index[cell["fooled"].isna()], dtype=float))
    smallest = pd.concat(fell).groupby(level=0).min()
    if unknown:  # an image with an unknown outcome at a smaller budget may already have fallen there
        earliest = pd.concat(unknown).groupby(level=0).min().reindex(smallest.index)
        # Negated, so that images without an unknown outcome, whose earliest is NaN, stay.
        smallest = smallest[~(earliest < smallest)]
    return np.asarray(smallest, dtype=float)


def _curve_sizes(family: Family, smallest: NDArray[np.float64], largest: float) -> list[float]:
    """The sizes at which a curve has points."""
    if len(family.attacks) > 1:
        return [_budget_size(attack) for attack in family.attacks]
    fell = smallest[np.isfinite(smallest)]
    if len(fell):
        # method="higher": every point of the curve is a size that occurred.
        quantiles = np.quantile(fell, np.linspace(0, 1, MAX_POINTS), method="higher")
        return [float(size) for size in np.unique(quantiles)]
    return [largest] if largest else []


def layer_curves(run: Run) -> pd.DataFrame:
    """How far changes spread through the layers: means over images, fooled beside withstood and random edits.

    Only images that are correctly classified without an attack count, at most 1000 of them. "random edit" is the mean
    over all of these, for a random edit of the attack's size.

    Returns:
        Columns measure; attack; region; outcome ("fooled", "withstood" or "random edit"); place and layer (number and
        name); mean, low, high (NaN if `statistics.mean_intervals` gives no interval); images.
    """
    names = [name for name in run.maps if "curve" in run.maps[name].about]
    rows: list[tuple[object, ...]] = []
    if names:
        outcomes = _outcomes(run, len(run.maps[names[0]]))
        for name in sorted(names, key=lambda name: (FIRST_MEASURE not in name, name)):
            rows += _layer_curve(run, name, outcomes)
    return pd.DataFrame(rows, columns=list(LAYER_COLUMNS))


def _layer_curve(run: Run, name: str, outcomes: NDArray[np.int8]) -> Iterator[tuple[object, ...]]:
    """The rows of one stored array (image, attack, region, layer)."""
    stored = run.maps[name]
    # The map is described as "spread", or "spread, random edit" for its control.
    measure, _, random_edit = str(stored.about["curve"]).partition(", ")
    images = evenly_spread(np.flatnonzero((outcomes >= 0).any((1, 2))))
    parts = [stored[block][places].astype(np.float64) for block, places in in_blocks(images)]
    values = np.concatenate([np.empty((0, *stored.shape[1:])), *parts])
    values = np.where(np.isfinite(values), values, np.nan)
    ended = outcomes[images]
    if random_edit:
        groups = {RANDOM_EDIT: ended >= 0}
    else:
        groups = {outcome: ended == number for number, outcome in enumerate(OUTCOMES)}
    keys: list[tuple[object, ...]] = []
    # One column per cell, outcome and layer, NaN for images that are not in the group.
    columns = []
    for attack, region in run.plan.reported_cells:
        at = run.plan.attacks.index(attack), run.plan.regions.index(region)
        for outcome, members in groups.items():
            columns.append(np.where(members[:, *at, None], values[:, *at], np.nan))
            for layer, step in enumerate(stored.about["steps"], start=1):
                keys.append((attack.label, region, outcome, layer, step))
    table = np.concatenate(columns, axis=1)
    # In parts, because the bootstrap resamples all columns of a part at once.
    slices = np.split(table, range(BOOTSTRAP_COLUMNS, table.shape[1], BOOTSTRAP_COLUMNS), axis=1)
    intervals = np.concatenate([mean_intervals(part) for part in slices])
    counts = np.isfinite(table).sum(0)
    for key, interval, count in zip(keys, intervals, counts, strict=True):
        yield (measure, *key, *map(float, interval), int(count))


def _outcomes(run: Run, images: int) -> NDArray[np.int8]:
    """(images, attacks, regions): 0 fooled, 1 withstood, -1 unknown or misclassified without an attack."""
    outcomes = np.full((images, len(run.plan.attacks), len(run.plan.regions)), -1, np.int8)
    for first, attack in enumerate(run.plan.attacks):
        for second, region in enumerate(run.plan.regions):
            cell = read_cell(run, attack.label, region, ["index", "correct", "fooled"])
            ended = cell[cell["correct"].fillna(False).astype(bool) & cell["fooled"].notna()]
            outcomes[ended["index"].to_numpy(), first, second] = ~ended["fooled"].astype(bool)
    return outcomes
