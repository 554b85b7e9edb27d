"""Outcomes in a region beside those in its controls of equal area, on the same images, and their comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from weakspot.audit.findings.outcomes import read_cell
from weakspot.audit.plan.plan import Plan, recorded_norm
from weakspot.audit.store.run import Run
from weakspot.statistics import mean_interval, paired_proportion_interval, region_test

OTHERS, SHIFTED = "other images", "shifted"  # kinds of controls
FOOLED, SMALLEST = "fooled", "smallest size"  # measures


def comparisons(plan: Plan) -> Iterator[tuple[str, str | None, str, str, Sequence[str]]]:
    """Attack, its norm if it is a minimal-norm attack, region, kind of control, and the controls of that kind."""
    for attack in plan.attacks:
        for region, spec in plan.specs.items():
            controls = [one for one in plan.specs.values() if one.control_of == spec]
            drawn = [control.text for control in controls if control.donor is not None]
            shifted = [control.text for control in controls if control.donor is None]
            for kind, texts in ((OTHERS, drawn), (SHIFTED, shifted)):
                if texts and not spec.is_control:
                    yield attack.label, recorded_norm(attack), region, kind, texts


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Outcomes (n,) in the region and (n, K) in its controls, of the n images with a known outcome in both.

    Controls with an unknown outcome are NaN. `labels` (n,) are the classes of the images, -1 if unknown.
    """

    labels: NDArray[np.integer]
    fooled: NDArray[np.float64]
    sizes: NDArray[np.float64]
    fractions: NDArray[np.float64]
    control_fooled: NDArray[np.float64]
    control_sizes: NDArray[np.float64]
    control_fractions: NDArray[np.float64]

    def of_class(self, label: int) -> Outcomes:
        """The outcomes of the images of one class."""
        rows = self.labels == label
        return Outcomes(*(getattr(self, one.name)[rows] for one in fields(self)))


def compared(outcomes: Outcomes, norm: str | None, largest: float | None) -> tuple[object, ...]:
    """region_fraction to p of `Contrast`.

    Args:
        outcomes: in the region and in one kind of control.
        norm: of the sizes that are compared; None compares the fractions of images fooled.
        largest: `largest_size`, if there is a norm.
    """
    images, values = _fooled(outcomes) if largest is None else _smallest_sizes(outcomes, largest)
    fractions = _mean(outcomes.fractions), _mean(_row_means(outcomes.control_fractions))
    return *fractions, images, FOOLED if norm is None else SMALLEST, norm or "", *values


def largest_size(run: Run, attack: str, norm: str) -> float:
    """The largest size that an attack needed anywhere in the run; NaN if it fooled no image."""
    query = f"select max({norm}) from outcomes where fooled and attack = $attack"  # noqa: S608 - linf, l1 or l2
    (largest,) = run.sql(query, attack=attack).fetchall()[0]
    return largest or np.nan


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


NOTHING = (0, (np.nan, np.nan, 0.0, 0.0, np.nan, np.nan, np.nan, np.nan))


def _fooled(outcomes: Outcomes) -> tuple[int, tuple[float, ...]]:
    """Number of images, and region_value to p of `Contrast`, for fractions of images fooled."""
    region, controls = outcomes.fooled, outcomes.control_fooled
    if not len(region):
        return NOTHING
    differences = region - _row_means(controls)
    mean, low, high = mean_interval(differences)
    if np.isin(differences, (-1, 0, 1)).all() or np.isnan(low):
        # With one control per image this is a paired difference of proportions, whose interval exists even if hardly
        # any image differs. It also stands in for the mean over several controls that (nearly) always agree.
        first_known = np.isnan(controls).argmin(1)[:, None]
        first = np.take_along_axis(controls, first_known, 1)[:, 0]
        _, low, high = paired_proportion_interval(region == 1, first == 1)
        low, high = (low, high) if low <= mean <= high else (np.nan, np.nan)
    values = (_mean(region), _mean(_row_means(controls)), 0.0, 0.0, mean, low, high)
    return len(region), (*values, region_test(region, controls))


def _smallest_sizes(outcomes: Outcomes, largest: float) -> tuple[int, tuple[float, ...]]:
    """The same for smallest sizes, over the images that were fooled in at least one of the places."""
    fooled, control_fooled = outcomes.fooled == 1, outcomes.control_fooled == 1
    region = np.where(fooled, outcomes.sizes, largest)
    controls = np.where(control_fooled, outcomes.control_sizes, largest)
    # A size of zero has no logarithm: such an image was misclassified before the change.
    controls = np.where(np.isfinite(outcomes.control_fooled) & (controls > 0), controls, np.nan)
    used = (fooled | control_fooled.any(1)) & (region > 0) & np.isfinite(controls).any(1)
    if not used.any():
        return NOTHING
    # Minus log2: larger values mean a weaker region, as with fractions.
    own, others = -np.log2(region[used]), -np.log2(controls[used])
    censored = np.where(np.isfinite(others), ~control_fooled[used], np.nan)
    return int(used.sum()), (
        float(2 ** -own.mean()),
        float(2 ** -_row_means(others).mean()),
        _mean((~fooled[used]).astype(float)),
        _mean(_row_means(censored)),
        *mean_interval(own - _row_means(others)),
        region_test(own, others),
    )


def _row_means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) means over the finite values in each row of (n, K); NaN for a row without any."""
    known = np.isfinite(values)
    means: NDArray[np.float64] = np.where(known, values, 0.0).sum(1) / np.maximum(known.sum(1), 1)
    return np.where(known.any(1), means, np.nan)


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else np.nan
