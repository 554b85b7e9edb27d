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
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from weakspot.audit.plan.plan import AttackPlan, Plan, is_minimal, norm_of
from weakspot.audit.store.run import Run
from weakspot.budgets import read_budget
from weakspot.statistics import false_discovery

if TYPE_CHECKING:
    import pandas as pd


NORMS = ("linf", "l2", "l1")  # budgets that a distance of the records can be compared with
ROUNDING = (1e-5, 1e-6)  # of a distance in float32, relative and absolute


class Limit(NamedTuple):
    """A stated budget: its text, its kind (linf, l2, l1, ...) and its amount."""

    budget: str
    kind: str
    amount: float


def stated_budgets(plan: Plan) -> list[Limit]:
    """The different budgets that the plan or any of its attacks states."""
    texts = [*plan.stated_budgets, *(attack.budget for attack in plan.attacks if attack.budget)]
    found: dict[tuple[str, float], Limit] = {}
    for text in texts:
        kind = text.partition(":")[0].strip().lower()
        amount = float(getattr(read_budget(text), "eps"))  # noqa: B009 - Budget is a protocol without it
        found.setdefault((kind, amount), Limit(text, kind, amount))
    return list(found.values())


def limit_of(plan: Plan, attack: AttackPlan) -> Limit | None:
    """The stated budget at which a minimal-norm attack is counted.

    The only one in the attack's own norm; if none is in that norm, the only one of the plan. None where there is no
    such budget, where there are several, and for SSIM budgets, to which the records hold no distance.
    """
    stated = stated_budgets(plan)
    among = [one for one in stated if one.kind == norm_of(attack)] or stated
    return among[0] if len(among) == 1 and among[0].kind in NORMS else None


def judged_attacks(plan: Plan) -> list[str]:
    """Labels of the attacks that have a robust accuracy: all but minimal-norm attacks without a limit."""
    return [attack.label for attack in plan.attacks if not is_minimal(attack) or limit_of(plan, attack)]


def counted_budget(plan: Plan, attack: AttackPlan) -> str | None:
    """The budget at which an attack's robust accuracy is counted, as text."""
    limit = limit_of(plan, attack) if is_minimal(attack) else None
    return limit.budget if limit else attack.budget


def outcomes_query(plan: Plan, *, eight_bit: bool) -> str:
    """SQL for the records with two more columns, both null where it is not known how the attack ended.

    `fooled`: whether the attacked image is misclassified (reaches its target); of a minimal-norm attack whatever its
    size. `robust`: whether the image counts in robust accuracy; null too for attacks that have none.
    """
    fooled = "success_8bit" if eight_bit else "success"
    cases = [
        f"when {quoted(attack.label)} then {_within(limit_of(plan, attack), fooled)}"
        for attack in plan.attacks
        if is_minimal(attack)
    ]
    robust = f"case attack {' '.join(cases)} else not {fooled} end" if cases else f"not {fooled}"
    return f"select *, {fooled} as fooled, ({robust})::boolean as robust from records"  # noqa: S608 - ours


def _within(limit: Limit | None, fooled: str) -> str:
    if limit is None:
        return "null"
    most = limit.amount * (1 + ROUNDING[0]) + ROUNDING[1]
    return f"not ({fooled} and {limit.kind} <= {most!r})"


def quoted(text: str) -> str:
    """A text as SQL has it."""
    return "'" + text.replace("'", "''") + "'"


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
