"""Locations: whether attacks act where the network looks, by the stored maps of a run.

The statistic of an attack with its own image's importance map is compared with the same attack and the importance maps
of all other images of the run. Only attacks that were free to change any pixel are tested: where a confined attack acts
follows from where it was allowed to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from weakspot.explanations.agreement import agreement
from weakspot.runs.cells import cell, once
from weakspot.runs.run import Run
from weakspot.statistics import LEAST_RUN, other_image_test, run_test

if TYPE_CHECKING:
    import pandas as pd

    from weakspot.runs.maps import StoredMap

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
