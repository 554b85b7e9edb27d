"""Budgets as text: linf:4/255, l2:1.5, l1:12, ssim:0.01, ssim-local:0.01."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from weakspot._checks import unknown_choice
from weakspot.budgets.base import Budget
from weakspot.budgets.norms import L1, L2, Linf
from weakspot.budgets.ssim import SSIM

MAKERS: dict[str, Callable[[float], Budget]] = {
    "linf": Linf,
    "l2": L2,
    "l1": L1,
    "ssim": SSIM,
    "ssim-local": lambda eps: SSIM(eps, mode="local"),
}


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
    if kind not in MAKERS:
        raise ValueError(unknown_choice("budget kind", kind, MAKERS))
    try:
        # No exponents of many digits: Fraction would write out all their zeros.
        eps = float(Fraction(amount.strip())) if len(amount.partition("e")[2]) <= 4 else float(amount)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(
            f"budget must end with a number or a fraction, got {text!r} (for example linf:4/255)"
        ) from None
    return MAKERS[kind](eps)
