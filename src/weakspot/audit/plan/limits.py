"""Limits: the stated budgets at which the robust accuracy of minimal-norm attacks is counted.

A minimal-norm attack finds the smallest change it can and has no budget of its own. An image is lost to it only if that
change is within a budget that the plan states.
"""

from __future__ import annotations

from typing import NamedTuple

from weakspot.audit.plan.attack_plan import AttackPlan
from weakspot.audit.plan.plan import Plan
from weakspot.budgets import read_budget

NORMS = ("linf", "l2", "l1")  # budgets that have a distance in the records


class Limit(NamedTuple):
    """A stated budget: its text, its kind (linf, l2, l1, ...) and its amount."""

    budget: str
    kind: str
    amount: float


def read_limit(text: str) -> Limit:
    """Parse a budget such as linf:4/255."""
    kind = text.partition(":")[0].strip().lower()
    return Limit(text, kind, float(getattr(read_budget(text), "eps")))  # noqa: B009 - Budget is a protocol without it


def stated_budgets(plan: Plan) -> list[Limit]:
    """The different budgets that the plan or any of its attacks states."""
    texts = [*plan.stated_budgets, *(attack.budget for attack in plan.attacks if attack.budget)]
    limits: dict[tuple[str, float], Limit] = {}
    for limit in map(read_limit, texts):
        limits.setdefault((limit.kind, limit.amount), limit)
    return list(limits.values())


def limit_of(plan: Plan, attack: AttackPlan) -> Limit | None:
    """The stated budget at which a minimal-norm attack is counted.

    This is the only stated budget in the attack's own norm or, if there is none in that norm, the only one of the plan.
    None if no budget is stated, if several qualify, for SSIM budgets, for which the records hold no distance, and if
    the attack is not known.
    """
    stated = stated_budgets(plan) if attack.is_known else []
    candidates = [limit for limit in stated if limit.kind == attack.minimized_norm] or stated
    return candidates[0] if len(candidates) == 1 and candidates[0].kind in NORMS else None


def recorded_norm(attack: AttackPlan) -> str | None:
    """The norm that a minimal-norm attack minimizes, if the records hold a distance in it; None otherwise."""
    return attack.minimized_norm if attack.minimized_norm in NORMS else None


def has_robust_accuracy(plan: Plan, attack: AttackPlan) -> bool | None:
    """False for minimal-norm attacks without a limit; None if the attack is not known."""
    if not attack.is_known:
        return None
    return not attack.is_minimal or limit_of(plan, attack) is not None


def counted_budget(plan: Plan, attack: AttackPlan) -> str | None:
    """The budget at which an attack's robust accuracy is counted, as text."""
    limit = limit_of(plan, attack) if attack.is_minimal else None
    return limit.budget if limit else attack.budget
