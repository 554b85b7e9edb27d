"""Cells of a run, one attack in one region each: their outcomes and their robust accuracy."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import NamedTuple, Self
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from weakspot.audit.store.records import COLUMNS, quoted
from weakspot.audit.store.run import Run
from weakspot.regions.spec import RegionSpec
from weakspot.statistics import proportion_interval

MAX_IMAGES = 1000  # whose maps are compared
IMAGES_IN_MEMORY = 128  # images whose maps are in memory at full size
NUMBERS = ("DOUBLE", "FLOAT", "BIGINT", "INTEGER", "SMALLINT", "TINYINT")
COMPANIONS = ("_null", "_null_low", "_null_high", "_p", "_p_less", "_q")  # columns that belong to a score
WHOLE_IMAGE = "none"  # the region of an attack that may change every pixel


@dataclass(frozen=True)
class CellSummary:
    """The robust accuracy of one cell.

    Attributes:
        attack: the attack's label.
        budget: the budget at which robust accuracy is counted: the attack's own, or the stated one for a minimal-norm
            attack; None if there is none.
        region: the region's text in the plan.
        region_fraction: mean fraction of the image, over the images with a known outcome; NaN if there are none.
        images: images with a known outcome.
        robust_accuracy: fraction of these images that the attack did not fool within the budget; NaN for a
            minimal-norm attack without a stated budget (see `Plan.limit_of`).
        low: lower end of the exact 95% interval over images; NaN if robust_accuracy is.
        high: upper end.
        errors: images on which the model or an analysis failed.
        known: False if the attack is a plug-in that is not installed here: what its success means is unknown.
    """

    attack: str
    budget: str | None
    region: str
    region_fraction: float
    images: int
    robust_accuracy: float
    low: float
    high: float
    errors: int
    known: bool = True

    @property
    def is_control(self) -> bool:
        """Whether the region only serves as a control of another one."""
        return RegionSpec.parse(self.region).is_control

    @property
    def name(self) -> str:
        """The attack with its budget: "fmn at linf:4/255"."""
        return attack_name(self.attack, self.budget)


def attack_name(label: str, budget: str | None) -> str:
    """The label and, unless it already contains it, the budget: "pgd at linf:4/255"."""
    return f"{label} at {budget}" if budget and budget not in label else label


def in_region(region: str) -> str:
    """Where an attack acts, in a sentence: "confined to cam", "on the whole image"."""
    return "on the whole image" if region == WHOLE_IMAGE else f"confined to {region}"


def cell_summaries(run: Run) -> list[CellSummary]:
    """One summary per attack and reported region, in the order of the plan."""
    outcomes = run.sql(
        "select attack, region, index, fooled, robust, region_fraction, error is not null as failed from outcomes"
    ).df()
    summaries = []
    for attack, region in run.plan.reported_cells:
        rows = outcomes[(outcomes["attack"] == attack.label) & (outcomes["region"] == region)]
        # The outcome is unknown where the model or the attack raised an exception.
        known = rows[rows["fooled"].notna()].sort_values("index")
        robust = known["robust"].dropna().to_numpy(dtype=bool)
        interval = proportion_interval(robust) if len(robust) else (np.nan,) * 3
        summaries.append(
            CellSummary(
                attack=attack.label,
                budget=run.plan.counted_budget(attack),
                region=region,
                region_fraction=float(known["region_fraction"].mean()),
                images=len(known),
                robust_accuracy=interval[0],
                low=interval[1],
                high=interval[2],
                errors=int(rows["failed"].sum()),
                known=attack.is_known,
            )
        )
    return summaries


def quoted_name(name: str) -> str:
    """A column name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def read_cell(run: Run, attack: str, region: str, columns: Sequence[str]) -> pd.DataFrame:
    """These columns of one cell, among them fooled and robust if asked for, in the order of images."""
    names = ", ".join(quoted_name(name) for name in columns)
    query = f"select {names} from outcomes where attack = $attack and region = $region order by index"  # noqa: S608
    frame: pd.DataFrame = run.sql(query, attack=attack, region=region).df()
    return frame


class Outcomes(NamedTuple):
    """Outcomes (n,) in a region and (n, K) in its controls, of the n images with a known outcome in both.

    Controls with an unknown outcome are NaN. `labels` (n,) are the classes of the images, -1 if unknown.
    """

    labels: NDArray[np.integer]
    fooled: NDArray[np.float64]
    sizes: NDArray[np.float64]
    fractions: NDArray[np.float64]
    control_fooled: NDArray[np.float64]
    control_sizes: NDArray[np.float64]
    control_fractions: NDArray[np.float64]

    def of_class(self, label: int) -> Self:
        """The outcomes of the images of one class."""
        return type(self)(*(values[self.labels == label] for values in self))


def read_outcomes(run: Run, attack: str, region: str, controls: Sequence[str], norm: str | None) -> Outcomes:
    """The outcomes of correctly classified images in a region and its controls, with sizes in a norm if given."""
    # Without a norm, nobody looks at the sizes: any column of numbers will do.
    size = norm or "region_fraction"
    columns = ["index", "label", "fooled", "correct", "region_fraction", *([] if norm is None else [norm])]
    own = read_cell(run, attack, region, columns).set_index("index")
    own = own[own["fooled"].notna() & own["correct"].fillna(False).astype(bool)]
    # Reindexed to the region's images: a control with an unknown outcome becomes NaN there.
    frames = [
        read_cell(run, attack, text, columns).set_index("index").reindex(own.index) for text in controls
    ]

    def stacked(column: str) -> NDArray[np.float64]:
        parts = [frame[column].astype("Float64").to_numpy(float, na_value=np.nan) for frame in frames]
        return np.column_stack(parts)

    known = np.isfinite(stacked("fooled"))
    # An image is compared if at least one of its controls is known.
    some = known.any(1)
    return Outcomes(
        own["label"].astype("Int64").fillna(-1).to_numpy(np.int64)[some],
        own["fooled"].to_numpy(float)[some],
        own[size].to_numpy(float)[some],
        own["region_fraction"].to_numpy(float)[some],
        stacked("fooled")[some],
        stacked(size)[some],
        np.where(known, stacked("region_fraction"), np.nan)[some],
    )


def in_reported_regions(run: Run) -> str:
    """SQL condition that leaves out regions made for other images, which serve only as controls."""
    return f"region in ({', '.join(quoted(region) for region in run.plan.reported_regions)})"


def score_names(run: Run, attack_scores: Sequence[str], *, booleans: bool = True) -> list[str]:
    """Numeric columns that are scores: those of the attack that are named, then all of the analyses.

    Columns that belong to a score, such as its null and its p value, are not among them.
    """
    relation = run.sql("select * from records limit 0")
    kinds = {*NUMBERS, "BOOLEAN"} if booleans else {*NUMBERS}
    numeric = [
        name for name, kind in zip(relation.columns, relation.types, strict=True) if str(kind) in kinds
    ]
    own = [name for name in numeric if name not in COLUMNS and not name.endswith(COMPANIONS)]
    return [*(name for name in attack_scores if name in numeric), *own]


def recorded_columns(run: Run) -> list[str]:
    """The names of the columns of the records."""
    return list(run.sql("select * from records limit 0").columns)


def evenly_spread(images: NDArray[np.int64]) -> NDArray[np.int64]:
    """At most `MAX_IMAGES` of the images, evenly spread over the list."""
    if len(images) <= MAX_IMAGES:
        return images
    return images[np.linspace(0, len(images) - 1, MAX_IMAGES).round().astype(np.int64)]


def in_blocks(images: NDArray[np.int64]) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """Slices of a stored map that hold the images, in parts that fit the memory, and their places in each slice."""
    for start in range(0, int(images.max(initial=-1)) + 1, IMAGES_IN_MEMORY):
        block = images[(images >= start) & (images < start + IMAGES_IN_MEMORY)]
        if len(block):
            yield slice(start, start + IMAGES_IN_MEMORY), block - start


def once_per_run(compute: Callable[[Run], pd.DataFrame]) -> Callable[[Run], pd.DataFrame]:
    """Cache the result for each complete `Run`: the summary, the page and a gate all ask for it."""
    # Weak keys, so that results disappear together with their run.
    cache: WeakKeyDictionary[Run, pd.DataFrame] = WeakKeyDictionary()

    @wraps(compute)
    def cached(run: Run) -> pd.DataFrame:
        if not run.complete:  # more records may arrive
            return compute(run)
        if run not in cache:
            cache[run] = compute(run)
        # A copy, so that no caller changes what the next one gets.
        return cache[run].copy()

    return cached
