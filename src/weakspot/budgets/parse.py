"""Budgets as text: linf:4/255, l2:1.5, l1:12, ssim:0.01, ssim-local:0.01."""

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from weakspot._checks import unknown_choice
from weakspot.budgets.base import Budget
from weakspot.budgets.norms import L1, L2, Linf
from weakspot.budgets.ssim import SSIM


class BudgetKind(NamedTuple):
    """A kind of budget that a text can name.

    Attributes:
        make: the budget of an amount.
        summary: what the amount bounds.
        example: a text with a typical amount.
    """

    make: Callable[[float], Budget]
    summary: str
    example: str


# The kinds that --budget and plans take; their help and `weakspot attack --list` are written from this table.
BUDGETS = {
    "linf": BudgetKind(Linf, "largest change of any channel of any pixel", "linf:4/255"),
    "l2": BudgetKind(L2, "Euclidean norm of the change", "l2:1.5"),
    "l1": BudgetKind(L1, "sum of all absolute changes", "l1:20"),
    "ssim": BudgetKind(
        SSIM, "loss of structural similarity, mean over patches (ssim_budget_spent)", "ssim:0.01"
    ),
    "ssim-local": BudgetKind(
        lambda eps: SSIM(eps, mode="local"),
        "loss of structural similarity in any patch (ssim_local_budget_spent)",
        "ssim-local:0.05",
    ),
}


def read_amount(text: str) -> float:
    """A number or a fraction; raises ValueError if the text is neither.

    >>> read_amount("0.5"), read_amount("1/4")
    (0.5, 0.25)
    """
    number = text.strip().lower()
    try:
        # No exponents of many digits: Fraction would write out all their zeros.
        return float(Fraction(number)) if len(number.partition("e")[2]) <= 4 else float(number)
    except (ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"amount must be a number or a fraction, got {text!r}") from error


def read_budget(text: str) -> Budget:
    """Parse a budget.

    Args:
        text: KIND:AMOUNT, where the amount is a number or a fraction.

    Raises:
        ValueError: if the text has another form, the kind is unknown, or that kind cannot have the amount.

    >>> read_budget("linf:4/255")
    Linf(eps=0.01568627450980392)
    """
    kind, colon, amount = str(text).strip().lower().partition(":")
    if not colon:
        raise ValueError(f"budget must be KIND:AMOUNT, got {text!r} (for example linf:4/255 or l2:1.5)")
    if kind not in BUDGETS:
        raise ValueError(unknown_choice("budget kind", kind, BUDGETS))
    try:
        eps = read_amount(amount)
    except ValueError:
        raise ValueError(
            f"budget must end with a number or a fraction, got {text!r} (for example linf:4/255)"
        ) from None
    return BUDGETS[kind].make(eps)
