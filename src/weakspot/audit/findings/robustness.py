"""Robustness: the one definition of robust accuracy that tables, pages, gates and comparisons use.

An attack fooled the model on an image if the attacked image, stored with 8 bits, is misclassified (or, where the run is
opened with `eight_bit=False`, if the image is before it is stored). An image is robust against an attack at its budget
unless that attack fooled the model within the budget. A minimal-norm attack has no budget of its own: it is counted at
a budget that the plan states, and only images whose change is within that are lost to it.

What findings share: the cells of a run's records, computed once, and p values corrected for their number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from weakspot.audit.store.run import Run
from weakspot.statistics import false_discovery

if TYPE_CHECKING:
    import pandas as pd


def once(compute: Callable[[Run], pd.DataFrame]) -> Callable[[Run], pd.DataFrame]:
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


def cell(run: Run, attack: str, region: str, columns: Sequence[str]) -> pd.DataFrame:
    """These columns of one attack in one region, fooled and robust among them, in the order of images."""
    chosen = ", ".join('"' + name.replace('"', '""') + '"' for name in columns)
    query = f"select {chosen} from outcomes where attack = $attack and region = $region order by index"  # noqa: S608
    found: pd.DataFrame = run.sql(query, attack=attack, region=region).df()
    return found


def numeric_columns(run: Run) -> list[str]:
    """Names of the columns that hold numbers."""
    relation = run.sql("select * from records limit 0")
    kinds = zip(relation.columns, relation.types, strict=True)
    return [name for name, kind in kinds if str(kind) in {"DOUBLE", "FLOAT", "BIGINT", "INTEGER", "BOOLEAN"}]


def corrected(p: pd.Series[float]) -> NDArray[np.float64]:
    """The p values corrected for their number (Benjamini and Hochberg), NaN where there is none."""
    found = np.full(len(p), np.nan)
    known = p.notna().to_numpy()
    found[known] = false_discovery(p[known].to_numpy(float))
    return found
