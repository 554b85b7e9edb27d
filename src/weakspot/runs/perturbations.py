"""Perturbations: the type of each, and where else a single changed pixel works, counted over a run's images."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from weakspot.explanations.promotion import TYPES
from weakspot.explanations.radii import MEANINGS, RANDOM, locality_table
from weakspot.runs.cells import cell
from weakspot.runs.run import Run
from weakspot.statistics import share_interval

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
            rows.append((attack.label, region, kind, int(hits.sum()), len(hits), *share_interval(hits)))
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
