"""Numbers as people read them, for the sentences, tables and charts of reports."""

from __future__ import annotations

import math

ROUNDING = 1e-9


def percent(fraction: float) -> str:
    """A fraction as a percentage; only exactly 0 and 1 are printed as 0% and 100%.

    >>> percent(0.414), percent(0.0004), percent(0.9996), percent(1.0), percent(0.0)
    ('41%', 'under 0.1%', 'over 99.9%', '100%', '0%')
    """
    if math.isnan(fraction):
        return "not defined"
    if 0 < fraction < 0.001:
        return "under 0.1%"
    if -0.005 < fraction < 0:
        return "0%"
    if 0.999 < fraction < 1:
        return "over 99.9%"
    if 0 < fraction < 0.01 or 0.99 < fraction < 1:
        return f"{fraction:.1%}"
    return f"{fraction:.0%}"


def p_value(p: float, name: str = "p") -> str:
    """A p value without false precision; `name` is its symbol.

    >>> p_value(0.0123), p_value(0.00002), p_value(0.26), p_value(1.0)
    ('p = .012', 'p < .001', 'p = .26', 'p = 1')
    """
    if math.isnan(p):
        return f"{name} not defined"
    if p < 0.001:
        return f"{name} < .001"
    digits = f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
    return f"{name} = 1" if float(digits) == 1 else f"{name} = {digits.lstrip('0')}"


def number(value: float) -> str:
    """A score with three significant digits.

    >>> number(0.123456), number(51.97), number(float("nan")), number(31), number(-1.5e-17)
    ('0.123', '52', 'not defined', '31', '0')
    """
    if math.isnan(value):
        return "not defined"
    return "0" if abs(value) < ROUNDING else f"{value:.3g}"


def counted(count: int, noun: str = "image") -> str:
    """A count with its noun.

    >>> counted(1), counted(2000), counted(2, "class")
    ('1 image', '2,000 images', '2 classes')
    """
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"
