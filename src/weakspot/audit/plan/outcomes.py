"""Robust accuracy: the one definition that tables, pages, gates and comparisons share.

An attack *fools* the model on an image if the attacked image, stored with 8 bits per channel, is misclassified. In a
run opened with `eight_bit=False` the attacked image counts as it was before rounding. An image is *robust* against an
attack if the attack does not fool the model within its budget. A minimal-norm attack has no budget of its own: the plan
states one, and only images whose change is within it count as lost.
"""

from __future__ import annotations

from typing import NamedTuple

from weakspot.audit.plan.plan import AttackPlan, Plan, is_minimal, norm_of
from weakspot.budgets import read_budget

NORMS = ("linf", "l2", "l1")  # the records store a distance in each of these norms
RELATIVE, ABSOLUTE = 1e-5, 1e-6  # float32 tolerances of a stored distance


class Limit(NamedTuple):
    """A stated budget: its text, its kind (linf, l2, l1, ...) and its size."""

    budget: str
    kind: str
    size: float


def budget_limit(text: str) -> Limit:
    """Parse a budget such as linf:4/255."""
    kind = text.partition(":")[0].strip().lower()
    return Limit(text, kind, float(getattr(read_budget(text), "eps")))  # noqa: B009 - the protocol has no eps


def stated_budgets(plan: Plan) -> list[Limit]:
    """The distinct budgets that the plan or one of its attacks states."""
    limits: dict[tuple[str, float], Limit] = {}
    for text in [*plan.stated_budgets, *(attack.budget for attack in plan.attacks if attack.budget)]:
        limit = budget_limit(text)
        limits.setdefault((limit.kind, limit.size), limit)
    return list(limits.values())


def limit_of(plan: Plan, attack: AttackPlan) -> Limit | None:
    """The stated budget at which a minimal-norm attack is counted.

    It is the only budget in the attack's own norm or, if none is in that norm, the only budget of the plan. None if
    there is no such budget, if there are several, and for SSIM budgets, because the records store no SSIM distance.
    """
    stated = stated_budgets(plan)
    candidates = [limit for limit in stated if limit.kind == norm_of(attack)] or stated
    return candidates[0] if len(candidates) == 1 and candidates[0].kind in NORMS else None


def judged_attacks(plan: Plan) -> list[str]:
    """Labels of the attacks that have a robust accuracy: all except minimal-norm attacks without a limit."""
    return [attack.label for attack in plan.attacks if not is_minimal(attack) or limit_of(plan, attack)]


def counted_budget(plan: Plan, attack: AttackPlan) -> str | None:
    """The budget at which an attack's robust accuracy is counted, as text."""
    limit = limit_of(plan, attack) if is_minimal(attack) else None
    return limit.budget if limit else attack.budget


def outcomes_query(plan: Plan, *, eight_bit: bool) -> str:
    """SQL for the records with two more columns, both null where the outcome of the attack is unknown.

    `fooled`: the attacked image is misclassified (or reaches its target), whatever the size of the change.
    `robust`: the image counts in robust accuracy; also null for attacks that have no robust accuracy.
    """
    fooled = "success_8bit" if eight_bit else "success"
    cases = [
        f"when {quoted(attack.label)} then {_not_fooled_within(limit_of(plan, attack), fooled)}"
        for attack in plan.attacks
        if is_minimal(attack)
    ]
    robust = f"case attack {' '.join(cases)} else not {fooled} end" if cases else f"not {fooled}"
    return f"select *, {fooled} as fooled, ({robust})::boolean as robust from records"  # noqa: S608 - quoted above


def _not_fooled_within(limit: Limit | None, fooled: str) -> str:
    if limit is None:
        return "null"
    largest = limit.size * (1 + RELATIVE) + ABSOLUTE
    return f"not ({fooled} and {limit.kind} <= {largest!r})"


def quoted(text: str) -> str:
    """A text as a SQL literal."""
    return "'" + text.replace("'", "''") + "'"


def quoted_name(name: str) -> str:
    """A column name as a SQL identifier."""
    return '"' + name.replace('"', '""') + '"'
