"""Scores of a run beside their nulls, and whether attacks act where the network looks.

The statistic of an attack with its own image's importance map is compared with the same attack and the importance maps
of all other images of the run. Only attacks on the whole image are tested: where a confined attack acts follows from
where it was allowed to act.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from weakspot.audit.findings.outcomes import (
    WHOLE_IMAGE,
    evenly_spread,
    in_blocks,
    once_per_run,
    read_cell,
    recorded_columns,
    score_names,
)
from weakspot.audit.store.run import Run
from weakspot.audit.store.stored_maps import StoredMap
from weakspot.explanations.agreement import agreement
from weakspot.explanations.locality_by_radius import MEANINGS, RANDOM, locality_table
from weakspot.explanations.promotion import TYPES
from weakspot.statistics import (
    LEAST_RUN,
    false_discovery,
    mean_interval,
    mean_intervals,
    mean_test,
    other_image_test,
    proportion_interval,
    run_test,
)

MAX_SIDE = 64  # sites per side; larger maps are averaged
MAX_Q = 0.1  # over images, for one image by itself
IMPORTANCE, VULNERABILITY = "importance", "vulnerability"
LOCATION_COLUMNS = ("attack", "score", "compared", "value", "null", "excess", "p", "alone")

SHIFT_NULL = "_shift_null"
# The attack's own scores, beside those of the analyses.
ATTACK_SCORES = ("confidence_adversarial", "margin_adversarial", "ssim_windowed")
OTHER_IMAGES, OWN_NULL = "other images", "its null"

TYPE = "perturbation_type"
TYPE_COLUMNS = ("attack", "region", "type", "count", "images", "fraction", "low", "high")


@once_per_run
def location_findings(run: Run) -> pd.DataFrame:
    """Compare each attack on the whole image with the importance maps of its own image and of other images.

    Of more than 1000 images, 1000 evenly spread over the list are compared; maps with a side over 64 are averaged.

    Returns:
        Columns attack; score; compared (images that have the statistic); value (its mean with the images' own maps);
        null (with all other images' maps); excess (a list: own - other images', per image); p
        (`statistics.run_test`, NaN below 10 images); alone (images that exceed the others by themselves: q over images
        at most .1 in `statistics.other_image_test`; NaN below 20 images). Empty if the run stored no maps of the
        analysis "overlap" or no attack was run on the whole image.
    """
    rows = []
    for place, attack in enumerate(run.plan.attacks):
        maps = _importance_and_vulnerability(run, attack.label, place)
        for score, matrix in agreement(*maps).items() if maps is not None else ():
            # matrix[j, i]: attack j with the importance map of image i; the diagonal holds the own pairs.
            whole, single = run_test(matrix, seed=run.plan.seed), other_image_test(matrix)
            value, q = single.value.cpu().numpy(), single.q.cpu().numpy()
            null = _mean_with_others(matrix)
            known = np.isfinite(value - null)
            excess = (value - null)[known].tolist()
            alone = int(((q <= MAX_Q) & (value > null)).sum()) if np.isfinite(q).any() else np.nan
            mean_null = float(null[known].mean()) if known.any() else np.nan
            rows.append((attack.label, score, whole.images, whole.value, mean_null, excess, whole.p, alone))
    return pd.DataFrame(rows, columns=list(LOCATION_COLUMNS))


def _mean_with_others(matrix: torch.Tensor) -> NDArray[np.float64]:
    """(N,) mean of each attack's statistic with other images' maps; NaN if none is known."""
    others = matrix.clone().fill_diagonal_(torch.nan)
    known = others.isfinite()
    means = others.where(known, 0).sum(1) / known.sum(1)
    return np.asarray(means.double().cpu().numpy())


def not_tested_because(run: Run) -> str:
    """One sentence on why attacks are not compared with where the network looks; empty if they are."""
    findings = location_findings(run)
    if len(findings) and findings["p"].notna().any():
        return ""
    if WHOLE_IMAGE not in run.plan.regions:
        needed = "the region none, because a confined attack acts where it was allowed to act"
    elif "overlap" not in run.plan.analyses or not run.plan.maps:
        needed = "the stored maps of the analysis overlap (--analyses overlap, --maps)"
    else:
        needed = f"{LEAST_RUN} images on which the attack reduced the margin"
    return f"Whether attacks act where the network looks was not tested. The test needs {needed}."


def _importance_and_vulnerability(
    run: Run, attack: str, place: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The two maps (N, 1, H, W) of the images that have both."""
    if WHOLE_IMAGE not in run.plan.regions or not {IMPORTANCE, VULNERABILITY} <= set(run.maps):
        return None
    region = run.plan.regions.index(WHOLE_IMAGE)
    images = read_cell(run, attack, WHOLE_IMAGE, ["index", "success"]).dropna()["index"].to_numpy(np.int64)
    images = evenly_spread(images)
    importance, vulnerability = (
        _read(run.maps[name], images, place, region) for name in (IMPORTANCE, VULNERABILITY)
    )
    known = importance.isfinite().flatten(1).all(1) & vulnerability.isfinite().flatten(1).all(1)
    return (importance[known], vulnerability[known]) if bool(known.any()) else None


def _read(stored: StoredMap, images: NDArray[np.int64], attack: int, region: int) -> torch.Tensor:
    """(N, 1, H, W) of one cell, averaged to at most `MAX_SIDE` sites per side."""
    parts = [
        _averaged(torch.from_numpy(stored[block, attack, region][places])[:, None].float())
        for block, places in in_blocks(images)
    ]
    return torch.cat(parts) if parts else torch.empty(0, 1, 1, 1)


def _averaged(maps: torch.Tensor) -> torch.Tensor:
    scale = MAX_SIDE / max(maps.shape[2:])
    if scale >= 1:
        return maps
    # "area" takes the mean over each site, so that no evidence is skipped.
    return F.interpolate(maps, size=[max(1, round(side * scale)) for side in maps.shape[2:]], mode="area")


class Finding(NamedTuple):
    """The mean of one score in one cell, beside its null.

    Attributes:
        attack: the attack's label.
        region: the region's text.
        score: the score's name.
        images: images that have the score.
        mean: over images.
        low: lower end of its 95% interval; NaN if there is none.
        high: upper end.
        null: mean of the score's null; NaN, like the fields after it, if the score is not tested.
        excess: mean over images of score - null, with its 95% interval.
        excess_low: lower end.
        excess_high: upper end.
        p: of the test.
        compared: images in the test.
        alone: images that exceed other images by themselves; NaN if unknown.
        against: what the score is tested against: "other images", "its null", or "" if it is not tested.
        shifted: mean with the score's map shifted within its image; for illustration, not a null.
        q: p corrected over all findings of the run (Benjamini and Hochberg).
    """

    attack: str
    region: str
    score: str
    images: int
    mean: float
    low: float
    high: float
    null: float = np.nan
    excess: float = np.nan
    excess_low: float = np.nan
    excess_high: float = np.nan
    p: float = np.nan
    compared: float = np.nan
    alone: float = np.nan
    against: str = ""
    shifted: float = np.nan
    q: float = np.nan


@once_per_run
def score_findings(run: Run) -> pd.DataFrame:
    """The mean of every score in every cell with its interval, and how far it lies from its null.

    Only attacks on the whole image are tested. Scores of the analysis "overlap" are tested against other images'
    importance maps (`location_findings`), other scores against their column NAME_null by `statistics.mean_test`.

    Returns:
        One row per attack, region and score, with the columns of `Finding`.
    """
    names, recorded = score_names(run, ATTACK_SCORES), recorded_columns(run)
    nulls = {name: f"{name}_null" for name in names if f"{name}_null" in recorded}
    shifted = {name: f"{name}{SHIFT_NULL}" for name in names if f"{name}{SHIFT_NULL}" in recorded}
    locations = location_findings(run).set_index(["attack", "score"]).to_dict("index")
    rows = []
    for attack, region in run.plan.reported_cells if names else ():
        columns = [*names, *nulls.values(), *shifted.values()]
        cell = read_cell(run, attack.label, region, columns).astype("float64")
        means = mean_intervals(cell[names].to_numpy(float))
        for name, interval in zip(names, means, strict=True):
            finding = Finding(attack.label, region, name, int(np.isfinite(cell[name]).sum()), *interval)
            if region == WHOLE_IMAGE:  # other regions are not tested
                if (attack.label, name) in locations:
                    location = locations[attack.label, name]
                    excess, low, high = mean_interval(np.array(location["excess"], float))
                    finding = finding._replace(
                        against=OTHER_IMAGES, null=location["null"], excess=excess, excess_low=low, excess_high=high,
                        p=location["p"], compared=location["compared"], alone=location["alone"],
                    )  # fmt: skip
                elif name in nulls:
                    finding = _against_null(finding, cell[name], cell[nulls[name]])
                if name in shifted:
                    finding = finding._replace(shifted=round(float(cell[shifted[name]].mean()), 12))
            rows.append(finding)
    table = pd.DataFrame(rows, columns=list(Finding._fields))
    table["q"] = false_discovery(table["p"].to_numpy(float))
    return table


def _against_null(finding: Finding, score: pd.Series, null: pd.Series) -> Finding:
    """The finding, tested against the score's null column."""
    finding = finding._replace(against=OWN_NULL)
    excess = (score - null).dropna().to_numpy(float)
    if not len(excess):
        return finding
    mean, low, high = mean_interval(excess)
    return finding._replace(
        null=round(float(null.mean()), 12),  # so that the mean of equal nulls is that null
        excess=mean, excess_low=low, excess_high=high, p=mean_test(excess), compared=len(excess),
    )  # fmt: skip


def perturbation_types(run: Run) -> pd.DataFrame:
    """How many of the perturbations that fooled are of each type, in every cell.

    Returns:
        Columns attack; region; type ("suppression-dominated", "balanced" or "promotion-dominated"); count; images
        (correctly classified, then fooled, and of known type); fraction with its exact 95% interval low, high. No rows
        if the run has no types.
    """
    rows = []
    for attack, region in run.plan.reported_cells if TYPE in recorded_columns(run) else ():
        cell = read_cell(run, attack.label, region, [TYPE, "correct", "fooled"])
        fooled, _ = _fooled_and_failed(cell)
        types = cell.loc[fooled & cell[TYPE].notna().to_numpy(), TYPE]
        for kind in TYPES.values():
            hits = types.eq(kind).to_numpy(bool)
            rows.append((attack.label, region, kind, int(hits.sum()), len(hits), *proportion_interval(hits)))
    return pd.DataFrame(rows, columns=list(TYPE_COLUMNS))


def pixel_localities(run: Run) -> pd.DataFrame:
    """`locality_table` of every cell whose attack changed single pixels.

    Returns:
        Columns attack, region and those of `locality_table`. No rows if the run has no one-pixel pairs.
    """
    tables = []
    for attack, region in run.plan.reported_cells if RANDOM in recorded_columns(run) else ():
        cell = read_cell(run, attack.label, region, [*MEANINGS, "correct", "fooled"])
        if cell[RANDOM].notna().any():
            table = locality_table(cell[list(MEANINGS)].astype("float64"), *_fooled_and_failed(cell))
            tables.append(table.assign(attack=attack.label, region=region))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _fooled_and_failed(cell: pd.DataFrame) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which correctly classified images were fooled and which were not; unknown outcomes are in neither."""
    correct, fooled, failed = (
        cell[name].eq(value).fillna(value=False).to_numpy(bool)
        for name, value in (("correct", True), ("fooled", True), ("fooled", False))
    )
    return correct & fooled, correct & failed
