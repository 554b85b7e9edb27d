"""Contrasts: every region of a run beside controls of its area, on the same images, and what they allow to say.

A region is weak if an attack confined to it does more than one confined to its controls: the same region shifted within
the image, and the regions of other images. The first alone is no evidence: regions that are made from an image lie
where images and attacks gather, in the middle, and shifting takes them away from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from weakspot.audit.findings.robustness import cell, corrected, once
from weakspot.audit.plan.plan import Plan, control_of, is_control, is_other, norm_of, other_region
from weakspot.audit.store.run import Run
from weakspot.regions.spec import RegionSpec
from weakspot.statistics import mean_interval, paired_proportion_interval, region_test

if TYPE_CHECKING:
    import pandas as pd


OTHERS, SHIFTED = "other images", "shifted"  # kinds of controls
CERTAIN = 0.05  # of q
LEAST_IMAGES = 40  # for a verdict
LEAST_POINTS = 0.05  # of a difference in the share of images fooled, for a verdict
LEAST_RATIO = 1.1  # of smallest sizes, for a verdict
ROUNDING = 1e-9
WEAK, STRONG = "a weak region", "stronger than controls"
UNCLEAR = "not shown to be weaker or stronger than all controls"
CONTRASTS = (
    "attack", "region", "control", "draws", "region_fraction", "control_fraction", "images", "measure", "norm",
    "here", "there", "held_here", "held_there", "difference", "low", "high", "p", "q",
)  # fmt: skip


@once
def region_contrasts(run: Run) -> pd.DataFrame:
    """Every region beside its controls, on the images that are correctly classified without an attack.

    A row for each attack, region, and kind of control that the plan has. What is measured is the share of images that
    the attack fools, or, of minimal-norm attacks, the "smallest size" that does: its geometric mean over images. An
    image that an attack fools in only some of the places counts in the others with the largest size that the attack
    needed anywhere in the run, which makes differences smaller rather than larger.

    Returns:
        Columns attack, region; control, "other images" or "shifted"; draws, how many of these for each image;
        region_fraction, control_fraction of the image; images; measure and the norm of its
        sizes, "" of fractions; here, there;
        held_here, held_there, the fraction of sizes that are such a largest one, so that "here" or "there" is a least
        size; difference with low and high, its 95% interval over images, NaN where there is none: of shares
        here - there, of sizes log2(there / here), so that above zero the region is the weaker place; p, two-sided, by
        giving the region's outcome and its controls' to each other within every image (`statistics.region_test`);
        q corrected over all rows (Benjamini and Hochberg).
    """
    import pandas as pd

    rows = []
    for label, norm, region, control, texts in _comparisons(run.plan):
        found = _side_by_side(run, label, region, texts, norm)
        shares = [_mean(_row_means(side)) for side in (found.own_fractions[:, None], found.other_fractions)]
        measured = _fooled(found) if norm is None else _sized(run, label, found, norm)
        measure = ("fooled", "") if norm is None else ("smallest size", norm)
        rows.append(
            (label, region, control, len(texts), *shares, measured.images, *measure, *measured.figures)
        )
    table = pd.DataFrame(rows, columns=list(CONTRASTS[:-1]))
    table["q"] = corrected(table["p"])
    return table


def verdict(contrasts: pd.DataFrame) -> str:
    """What the comparisons of one attack in one region allow to say, in a few words.

    "a weak region" and "stronger than controls" need a q of at most .05, an interval without zero and a difference of
    at least 5 points (of sizes, a factor of 1.1), in the same direction, against other images' regions and against the
    shifted one, each on at least 40 images. A region that is the same in every image has no other images' to be
    compared with: of its place alone it is said that it is weaker or stronger.

    Args:
        contrasts: the rows of `region_contrasts` of one attack and region.
    """
    rows = {row.control: row for row in _named(contrasts)}
    region = next(iter(rows.values())).region
    if SHIFTED not in rows or (RegionSpec.parse(region).depends_on_image and OTHERS not in rows):
        missing = "shifted ones" if SHIFTED not in rows else "other images' regions"
        return f"not judged, as the run has no {missing} as controls"
    fewest = min(row.images for row in rows.values())
    if fewest < LEAST_IMAGES:
        return f"not judged, as that takes {LEAST_IMAGES} images and this is {fewest}"
    clear = {_direction(row) for row in rows.values()}
    if len(clear) > 1 or 0 in clear:
        return UNCLEAR
    if not all(_enough(row) for row in rows.values()):
        which = "weaker" if clear == {1} else "stronger"
        least = (
            f"{100 * LEAST_POINTS:.0f} points" if _is_fraction(rows[SHIFTED]) else f"factor of {LEAST_RATIO}"
        )
        return f"{which} than controls, but not by the {least} that a verdict takes"
    if OTHERS in rows:
        return WEAK if clear == {1} else STRONG
    place = "weaker" if clear == {1} else "stronger"
    return f"a {place} place than others of its shape; what the images show there is not judged"


def _named(rows: pd.DataFrame) -> list[Any]:
    """Rows as named tuples."""
    return list(rows.itertuples(index=False))


def _direction(row: Any) -> int:
    """1 if the region is clearly the weaker place, -1 if it is the stronger one, else 0."""
    if not row.q <= CERTAIN or not (row.low > 0 or row.high < 0):
        return 0
    return int(np.sign(row.difference))


def _enough(row: Any) -> bool:
    least = LEAST_POINTS if _is_fraction(row) else np.log2(LEAST_RATIO)
    return bool(abs(row.difference) >= least - ROUNDING)


def _is_fraction(row: Any) -> bool:
    return bool(row.measure == "fooled")


def told(contrasts: pd.DataFrame) -> list[str]:
    """A sentence for each attack in each region, beginning with the largest difference from other images' regions."""
    groups = [rows for _, rows in contrasts.groupby(["attack", "region"], sort=False)]
    groups.sort(key=lambda rows: float(rows["difference"].fillna(-np.inf).iloc[0]), reverse=True)
    return [_sentence(rows) for rows in groups]


def _sentence(rows: pd.DataFrame) -> str:
    first, *others = _named(rows)
    if all(np.isnan(row.region_fraction) for row in (first, *others)):
        return (
            f"{first.attack} confined to {first.region}: no correctly classified image was attacked both there and in "
            "controls."
        )
    place = f"{first.region} ({rows['region_fraction'].max():.0%} of the image)"
    if not any(row.images for row in (first, *others)):
        return f"{first.attack} confined to {place} or to its controls fools no correctly classified image."
    told_of = f"{first.attack} confined to {place} {_figure(first)} of {_images(first)}"
    for row in (first, *others):
        told_of += f"; {_beside(row, first)}"
    return f"{told_of}: {verdict(rows)}."


def _images(row: Any) -> str:
    return f"{row.images:,} image{'' if row.images == 1 else 's'}"


def _figure(row: Any) -> str:
    if not row.images:
        return "is compared on none"
    if _is_fraction(row):
        return f"fools {row.here:.0%}"
    return f"needs {_size(row.here, row.held_here, row.norm)} on average"


def _beside(row: Any, first: Any) -> str:
    """One control: what the attack does there, and by how much that differs."""
    many = f"{row.draws} other images' regions" if row.draws > 1 else "another image's region"
    who = many if row.control == OTHERS else "the region shifted within the image"
    if abs(row.control_fraction - row.region_fraction) >= 0.005:
        who += f" ({row.control_fraction:.0%})"
    if not row.images:
        return f"{who} on no image"
    if row.images != first.images:
        who += f", on {_images(row)}"
    if _is_fraction(row):
        apart = f"{100 * row.difference:+.1f} points"
        if np.isfinite(row.low):
            apart += f", 95% from {100 * row.low:+.1f} to {100 * row.high:+.1f}"
        return f"in {who} {row.there:.0%} ({apart}, q {_p(row.q)})"
    apart = f"{2**row.difference:.2f} times as much"
    if np.isfinite(row.low):
        apart += f", 95% from {2**row.low:.2f} to {2**row.high:.2f}"
    return f"in {who} {_size(row.there, row.held_there, row.norm)} ({apart}, q {_p(row.q)})"


def _size(size: float, held: float, norm: str) -> str:
    """A size in words: of single pixels in steps of a picture file, else with the name of its norm."""
    least, steps = "at least " if held else "", round(255 * size, 6)
    if norm == "linf":
        return least + (f"{steps:.2g}/255" if steps < 10 else f"{steps:.0f}/255")
    return f"{least}{size:.3g} in {norm.upper()}"


def _p(value: float) -> str:
    return "unknown" if np.isnan(value) else "below 0.001" if value < 0.001 else f"{value:.3f}"


def _comparisons(plan: Plan) -> Iterator[tuple[str, str | None, str, str, Sequence[str]]]:
    """Attack, its norm, region, kind of control and the regions that are it."""
    for attack in plan.attacks:
        for region in plan.regions:
            if is_control(region):
                continue
            drawn = [text for text in plan.regions if is_other(text) and other_region(text)[0] == region]
            shifted = [text for text in plan.regions if text == control_of(region)]
            for kind, texts in ((OTHERS, drawn), (SHIFTED, shifted)):
                if texts:
                    yield attack.label, norm_of(attack), region, kind, texts


@dataclass(frozen=True, eq=False)
class _Sides:
    """Outcomes (n,) and (n, K) of correctly classified images of which one is known on both sides.

    NaN where a control's outcome is unknown.
    """

    fell: NDArray[np.float64]
    sizes: NDArray[np.float64]
    own_fractions: NDArray[np.float64]
    other_fell: NDArray[np.float64]
    other_sizes: NDArray[np.float64]
    other_fractions: NDArray[np.float64]


@dataclass(frozen=True)
class _Measured:
    """images; and figures: here, there, held_here, held_there, difference, low, high, p."""

    images: int
    figures: tuple[float, ...]


def _side_by_side(run: Run, attack: str, region: str, controls: Sequence[str], norm: str | None) -> _Sides:
    columns = ["index", "fooled", "correct", "region_fraction", *([] if norm is None else [norm])]
    own = cell(run, attack, region, columns).set_index("index")
    own = own[own["fooled"].notna() & own["correct"].fillna(False).astype(bool)]
    others = [cell(run, attack, text, columns).set_index("index").reindex(own.index) for text in controls]

    def beside(column: str) -> NDArray[np.float64]:
        return np.column_stack(
            [other[column].astype("Float64").to_numpy(float, na_value=np.nan) for other in others]
        )

    fell = beside("fooled")
    known = np.isfinite(fell)
    some = known.any(1)
    size = norm or "region_fraction"
    return _Sides(
        own["fooled"].to_numpy(float)[some],
        own[size].to_numpy(float)[some],
        own["region_fraction"].to_numpy(float)[some],
        fell[some],
        beside(size)[some],
        np.where(known, beside("region_fraction"), np.nan)[some],
    )


def _fooled(found: _Sides) -> _Measured:
    """Shares of images fooled, here and in the controls."""
    here, there = found.fell, found.other_fell
    if not len(here):
        return _Measured(0, (np.nan, np.nan, 0.0, 0.0, np.nan, np.nan, np.nan, np.nan))
    differences = here - _row_means(there)
    mean, low, high = mean_interval(differences)
    if np.isin(differences, (-1, 0, 1)).all() or np.isnan(low):
        # With one control of each image this is a paired difference of proportions, which has an interval also where
        # hardly any image differs. It stands in for the mean of several controls that (nearly) always agree.
        first = np.take_along_axis(there, np.isnan(there).argmin(1)[:, None], 1)[:, 0]
        _, low, high = paired_proportion_interval(here == 1, first == 1)
        low, high = (low, high) if low <= mean <= high else (np.nan, np.nan)
    p = region_test(here, there)
    return _Measured(len(here), (_mean(here), _mean(_row_means(there)), 0.0, 0.0, mean, low, high, p))


def _sized(run: Run, attack: str, found: _Sides, norm: str) -> _Measured:
    """Smallest sizes here and in the controls, of images that fell in one of the places."""
    query = f"select max({norm}) from outcomes where fooled and attack = $attack"  # noqa: S608 - linf, l1 or l2
    (worst,) = run.sql(query, attack=attack).fetchall()[0]
    largest = worst or np.nan
    here = np.where(found.fell == 1, found.sizes, largest)
    there = np.where(found.other_fell == 1, found.other_sizes, largest)
    there = np.where(np.isfinite(found.other_fell) & (there > 0), there, np.nan)
    kept = (found.fell == 1) | (found.other_fell == 1).any(1)
    kept &= (here > 0) & np.isfinite(there).any(1)
    if not kept.any():
        return _Measured(0, (np.nan, np.nan, 0.0, 0.0, np.nan, np.nan, np.nan, np.nan))
    own, others = -np.log2(here[kept]), -np.log2(there[kept])
    held = np.where(np.isfinite(others), found.other_fell[kept] == 0, np.nan)
    figures = (
        float(2 ** -own.mean()),
        float(2 ** -_row_means(others).mean()),
        _mean((found.fell[kept] == 0).astype(float)),
        _mean(_row_means(held)),
        *mean_interval(own - _row_means(others)),
        region_test(own, others),
    )
    return _Measured(int(kept.sum()), figures)


def _row_means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) means of what is known in the rows (n, K)."""
    known = np.isfinite(values)
    means: NDArray[np.float64] = np.where(known, values, 0.0).sum(1) / np.maximum(known.sum(1), 1)
    return np.where(known.any(1), means, np.nan)


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else np.nan
