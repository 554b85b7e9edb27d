"""Locations: whether attacks act where the network looks, by the stored maps of a run.

The statistic of an attack with its own image's importance map is compared with the same attack and the importance maps
of all other images of the run. Only attacks that were free to change any pixel are tested: where a confined attack acts
follows from where it was allowed to.

Perturbations: the type of each, and where else a single changed pixel works, counted over a run's images.

Scores: the mean of every score of a run in every attack and region, and how far it lies from its null.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from weakspot.audit.findings.robustness import cell, corrected, numeric_columns, once
from weakspot.audit.store.records import COLUMNS
from weakspot.audit.store.run import Run
from weakspot.explanations.agreement import agreement
from weakspot.explanations.locality_by_radius import MEANINGS, RANDOM, locality_table
from weakspot.explanations.promotion import TYPES
from weakspot.statistics import (
    LEAST_RUN,
    mean_interval,
    mean_intervals,
    mean_test,
    other_image_test,
    proportion_interval,
    run_test,
)

if TYPE_CHECKING:
    import pandas as pd

    from weakspot.audit.store.stored_maps import StoredMap


MOST = 1000  # images that are compared with each other
SIDE = 64  # sites of a map, to which larger ones are averaged
BLOCK = 128  # images whose maps are in memory at full size
EVERYWHERE = "none"  # the region of attacks that are tested
ALONE = 0.1  # of q over images, for one image by itself
IMPORTANCE, VULNERABILITY = "importance", "vulnerability"
LOCATIONS = ("attack", "score", "compared", "value", "null", "excess", "p", "alone")


@once
def location_findings(run: Run) -> pd.DataFrame:
    """How each attack, free to change any pixel, goes with the importance maps of its own and of other images.

    At most 1000 images are compared, evenly spread over the list; maps with a side over 64 are averaged to 64.

    Returns:
        Columns attack; score; compared, how many images have the statistic; value, its mean with the own maps; null,
        with all other images'; excess, a list of the one less the other for each image; p of
        `statistics.run_test`, NaN below 10 images; alone, how many images by themselves exceed the others (q over
        images at most .1, `statistics.other_image_test`), NaN below 20 images. Empty if the run kept no maps of the
        analysis overlap, or has no attack with any pixel free.
    """
    import pandas as pd

    rows = []
    for place, attack in enumerate(run.plan.attacks):
        maps = _maps(run, attack.label, place)
        if maps is None:
            continue
        for score, matrix in agreement(*maps).items():
            whole, single = run_test(matrix, seed=run.plan.seed), other_image_test(matrix)
            value, q = single.value.cpu().numpy(), single.q.cpu().numpy()
            null = _others(matrix)
            known = np.isfinite(value - null)
            excess = (value - null)[known]
            alone = int(((q <= ALONE) & (value > null)).sum()) if np.isfinite(q).any() else np.nan
            level = float(null[known].mean()) if known.any() else np.nan
            rows.append(
                (attack.label, score, whole.images, whole.value, level, excess.tolist(), whole.p, alone)
            )
    return pd.DataFrame(rows, columns=list(LOCATIONS))


def _others(matrix: torch.Tensor) -> NDArray[np.float64]:
    """(N,) mean of each attack's statistic with other images' maps, NaN where none is known."""
    apart = matrix.clone().fill_diagonal_(torch.nan)
    known = apart.isfinite()
    means = apart.where(known, 0).sum(1) / known.sum(1)
    return np.asarray(means.double().cpu().numpy())


def untested(run: Run) -> str:
    """Why attacks are not compared with where the network looks, in a sentence; empty if they are."""
    found = location_findings(run)
    if len(found) and found["p"].notna().any():
        return ""
    what = "Whether attacks act where the network looks is not tested"
    if EVERYWHERE not in run.plan.regions:
        return f"{what}: that takes the region none, as a confined attack acts where it was allowed to."
    if "overlap" not in run.plan.analyses or not run.plan.maps:
        return f"{what}: that takes the stored maps of the analysis overlap (--analyses overlap, --maps)."
    return f"{what}: that takes {LEAST_RUN} images on which the attack took some of the margin."


def _maps(run: Run, attack: str, place: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Importance and vulnerability (N, 1, H, W) of the images that have both."""
    stored = run.maps
    if EVERYWHERE not in run.plan.regions or not {IMPORTANCE, VULNERABILITY} <= set(stored):
        return None
    region = run.plan.regions.index(EVERYWHERE)
    known = cell(run, attack, EVERYWHERE, ["index", "success"]).dropna()["index"].to_numpy(np.int64)
    if len(known) > MOST:
        known = known[np.linspace(0, len(known) - 1, MOST).round().astype(np.int64)]
    both = [_read(stored[name], known, (place, region)) for name in (IMPORTANCE, VULNERABILITY)]
    finite = torch.stack([maps.isfinite().flatten(1).all(1) for maps in both]).all(0)
    return (both[0][finite], both[1][finite]) if bool(finite.any()) else None


def _read(stored: StoredMap, images: NDArray[np.int64], where: tuple[int, int]) -> torch.Tensor:
    """(N, 1, H, W) of one cell, averaged to at most `SIDE` sites a side."""
    parts = []
    for start in range(0, len(stored), BLOCK):
        mine = images[(images >= start) & (images < start + BLOCK)]
        if len(mine):
            block: NDArray[Any] = stored[start : start + BLOCK, where[0], where[1]]
            parts.append(_averaged(torch.from_numpy(block[mine - start])[:, None].float()))
    return torch.cat(parts) if parts else torch.empty(0, 1, 1, 1)


def _averaged(maps: torch.Tensor) -> torch.Tensor:
    height, width = maps.shape[2:]
    shrink = SIDE / max(height, width)
    if shrink >= 1:
        return maps
    return F.interpolate(
        maps, size=(max(1, round(height * shrink)), max(1, round(width * shrink))), mode="area"
    )


TYPE = "perturbation_type"


def perturbation_types(run: Run) -> pd.DataFrame:
    """How many perturbations that fooled are of each type, in every attack x region.

    Returns:
        Columns attack, region, type ("suppression-dominated", "balanced", "promotion-dominated"), count, images (that
        were classified correctly and then fooled, and whose type is known), share, low, high (exact 95% interval). No
        rows if the run has no types.
    """
    rows = []
    for attack, region in run.plan.cells if _has(run, TYPE) else ():
        table = cell(run, attack.label, region, [TYPE, "correct", "fooled"])
        fooled, _ = _ended(table)
        known = table.loc[fooled & table[TYPE].notna().to_numpy(), TYPE]
        for kind in TYPES.values():
            hits = known.eq(kind).to_numpy(bool)
            rows.append((attack.label, region, kind, int(hits.sum()), len(hits), *proportion_interval(hits)))
    return pd.DataFrame(rows, columns=["attack", "region", "type", "count", "images", "share", "low", "high"])


def localities(run: Run) -> pd.DataFrame:
    """`locality_table` of every attack x region that changed single pixels.

    Returns:
        Columns attack, region and those of `locality_table`. No rows if the run has no one-pixel pairs.
    """
    parts = []
    for attack, region in run.plan.cells if _has(run, RANDOM) else ():
        table = cell(run, attack.label, region, [*MEANINGS, "correct", "fooled"])
        if table[RANDOM].notna().any():
            found = locality_table(table[list(MEANINGS)].astype("float64"), *_ended(table))
            parts.append(found.assign(attack=attack.label, region=region))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _ended(table: pd.DataFrame) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which correctly classified images were fooled and which were not; an unknown end is neither."""
    right, fooled, held = (
        table[name].eq(value).fillna(value=False).to_numpy(bool)
        for name, value in (("correct", True), ("fooled", True), ("fooled", False))
    )
    return right & fooled, right & held


def _has(run: Run, column: str) -> bool:
    return column in run.sql("select * from records limit 0").columns


SHIFT_NULL = "_shift_null"
OTHERS = "other images"
NULL_SUFFIXES = ("_null", "_null_low", "_null_high", "_p", "_p_less", "_q")
MEASURES = (
    "confidence_adversarial",
    "margin_adversarial",
    "ssim_windowed",
)  # of the attack itself, beside analyses' scores
SCORES = (
    "attack", "region", "score", "images", "mean", "low", "high",
    "null", "excess", "excess_low", "excess_high", "p", "compared", "alone", "against", "shifted", "q",
)  # fmt: skip


@once
def score_findings(run: Run) -> pd.DataFrame:
    """The mean of every score in every attack x region with its interval, and how far it lies from its null.

    Only attacks that were free to change any pixel are tested: what a score says of the place of an attack follows, in
    a confined one, from where it was confined to. Scores of the overlap analysis are tested against other images'
    importance maps (`location_findings`). The null of any other score is its column NAME_null, tested by
    `statistics.mean_test`.

    Returns:
        Columns attack, region, score; images; mean, low, high; where the score is tested, null, excess (mean over
        images of score - null) with excess_low and excess_high, p, compared (images of the test) and q, corrected over
        all rows; alone, how many images by themselves exceed other images' (NaN where that is not known); against,
        "other images", "its null", or "" where the score is not tested; shifted, the mean where the score's map is
        shifted within its image, which is no null.
    """
    import pandas as pd

    names, numeric = score_names(run), set(numeric_columns(run))
    nulls = [name for name in names if f"{name}_null" in numeric]
    shifted = [name for name in names if f"{name}{SHIFT_NULL}" in numeric]
    located: dict[Any, Any] = {(row.attack, row.score): row for row in location_findings(run).itertuples()}
    columns = [*names, *(f"{name}_null" for name in nulls), *(f"{name}{SHIFT_NULL}" for name in shifted)]
    rows = []
    for attack, region in run.plan.reported_cells if names else ():
        table = cell(run, attack.label, region, columns).astype("float64")
        found = dict(zip(names, mean_intervals(table[names].to_numpy(float)), strict=True))
        for name in names:
            beside: tuple[float, ...] = (np.nan,) * 7
            against, null = "", np.nan
            if region == EVERYWHERE and (attack.label, name) in located:
                one = located[attack.label, name]
                beside = (
                    one.null,
                    *mean_interval(np.array(one.excess, float)),
                    one.p,
                    one.compared,
                    one.alone,
                )
                against = OTHERS
            elif region == EVERYWHERE and name in nulls:
                beside = _against(table[name] - table[f"{name}_null"], table[f"{name}_null"])
                against = "its null"
            if region == EVERYWHERE and name in shifted:
                null = round(float(table[f"{name}{SHIFT_NULL}"].mean()), 12)
            rows.append(
                (
                    attack.label,
                    region,
                    name,
                    int(table[name].notna().sum()),
                    *found[name],
                    *beside,
                    against,
                    null,
                )
            )
    table = pd.DataFrame(rows, columns=list(SCORES[:-1]))
    table["q"] = corrected(table["p"])
    return table


def _against(excess: pd.Series[float], null: pd.Series[float]) -> tuple[float, ...]:
    """null, excess, low, high, p, compared, alone of a score that comes with its null."""
    values = excess.dropna().to_numpy(float)
    if not len(values):
        return (np.nan,) * 7
    return (round(float(null.mean()), 12), *mean_interval(values), mean_test(values), len(values), np.nan)


def score_names(run: Run) -> list[str]:
    """Columns of the records that are numbers worth a mean: of the attack, then of the analyses."""
    numeric = numeric_columns(run)
    own = [name for name in numeric if name not in COLUMNS and not name.endswith(NULL_SUFFIXES)]
    return [*(name for name in MEASURES if name in numeric), *own]
