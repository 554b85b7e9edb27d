"""Numbers as people read them, for the sentences, tables and charts of reports."""

import math

ROUNDING = 1e-9


def percent(fraction: float) -> str:
    """A fraction as a percentage. Between 0 and 1, nothing else is printed as 0% or 100%; outside, all is rounded.

    >>> percent(0.414), percent(0.0004), percent(0.9996), percent(1.0), percent(0.0)
    ('41%', 'under 0.1%', 'over 99.9%', '100%', '0%')
    >>> percent(-0.004), percent(-0.005), percent(-0.0), percent(1.004), percent(1.3), percent(-0.2)
    ('0%', '0%', '0%', '100%', '130%', '-20%')
    """
    if math.isnan(fraction):
        return "not defined"
    if 0 < fraction < 0.001:
        return "under 0.1%"
    # Otherwise it would be printed as -0%; Python rounds .5 to even.
    if -0.005 <= fraction <= 0:
        return "0%"
    if 0.999 < fraction < 1:
        return "over 99.9%"
    if 0 < fraction < 0.01 or 0.99 < fraction < 1:
        return f"{fraction:.1%}"
    return f"{fraction:.0%}"


def tenths(fraction: float) -> str:
    """An area as a percentage with one decimal, where `percent` would round it to a whole number.

    >>> tenths(0.0148), tenths(0.66), tenths(0.0004), tenths(1.0), tenths(0.9996)
    ('1.5%', '66.0%', 'under 0.1%', '100%', 'over 99.9%')
    """
    return f"{fraction:.1%}" if 0.001 <= fraction < 0.9995 else percent(fraction)


def p_value(p: float, name: str = "p") -> str:
    """A p value without false precision; `name` is its symbol, or empty under a heading that names it.

    >>> p_value(0.0123), p_value(0.00002), p_value(0.26), p_value(1.0), p_value(0.26, ""), p_value(0.00002, "")
    ('p = .012', 'p < .001', 'p = .26', 'p = 1', '.26', '< .001')
    """
    if math.isnan(p):
        return f"{name} not defined".strip()
    if p < 0.001:
        return f"{name} < .001".strip()
    digits = f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
    text = "1" if float(digits) == 1 else digits.lstrip("0")
    return f"{name} = {text}" if name else text


def number(value: float) -> str:
    """A score with three significant digits, or all digits before the point.

    >>> number(0.123456), number(51.97), number(float("nan")), number(31), number(-1.5e-17), number(12345.6)
    ('0.123', '52', 'not defined', '31', '0', '12,346')
    >>> number(999.7), number(999.4), number(0.9996), number(-0.99996), number(0.99999999), number(1.0)
    ('1,000', '999', '0.9996', '-0.99996', '1', '1')
    """
    if math.isnan(value):
        return "not defined"
    size = abs(value)
    if size < ROUNDING:
        return "0"
    # From here on, three significant digits would be printed as a power of ten (1e+03).
    if size >= 999.5:
        return f"{value:,.0f}"
    # 1 may mean "unchanged" or "perfect", so a value below it gets as many digits as tell it from 1.
    digits = 3
    while digits < 6 and size < 1 == float(f"{size:.{digits}g}"):
        digits += 1
    return f"{value:.{digits}g}"


def signed(value: float) -> str:
    """A difference with its sign and two decimals.

    >>> signed(0.128), signed(-0.004), signed(-1.5)
    ('+0.13', '+0.00', '-1.50')
    """
    return f"{round(value, 2) + 0.0:+.2f}"  # adding 0.0 takes the sign from a zero


def with_interval(value: float, low: float, high: float) -> str:
    """A fraction with its interval, if there is one.

    >>> with_interval(0.61, 0.4, 0.8), with_interval(0.61, float("nan"), float("nan"))
    ('61% [40%, 80%]', '61%')
    """
    return percent(value) + ("" if math.isnan(low) else f" [{percent(low)}, {percent(high)}]")


def points(difference: float, low: float = math.nan, high: float = math.nan) -> str:
    """A difference of two fractions in percentage points, with its interval, if there is one.

    >>> points(0.125, 0.031, 0.22), points(-0.3), points(-0.0004)
    ('+12.5 points [+3.1, +22.0]', '-30.0 points', '+0.0 points')
    """
    # Adding 0.0 takes the sign from a zero.
    value, least, most = (f"{round(100 * one, 1) + 0.0:+.1f}" for one in (difference, low, high))
    return f"{value} points" + ("" if math.isnan(low) else f" [{least}, {most}]")


def size_of_change(size: float, norm: str) -> str:
    """The size of a change: L-infinity sizes in steps of an 8-bit image, others with the name of their norm.

    >>> size_of_change(0.0314, "linf"), size_of_change(0.0784, "linf"), size_of_change(0.5, "l2")
    ('8/255', '20/255', '0.5 in L2')
    """
    if norm != "linf":
        return f"{number(size)} in {norm.upper()}"
    steps = round(255 * size, 6)
    return f"{steps:.2g}/255" if steps < 10 else f"{steps:.0f}/255"


def in_levels(size: float) -> str:
    """A change of values in [0, 1] in gray levels of 255.

    >>> in_levels(4 / 255), in_levels(0.0041), in_levels(1.0)
    ('4/255', '1.05/255', '255/255')
    """
    return f"{number(255 * size)}/255"


def counted(count: int, noun: str = "image") -> str:
    """A count with its noun.

    >>> counted(1), counted(2000), counted(2, "class"), counted(2, "query")
    ('1 image', '2,000 images', '2 classes', '2 queries')
    """
    if count == 1:
        return f"1 {noun}"
    return (
        f"{count:,} {noun[:-1]}ies"
        if noun.endswith("ry")
        else f"{count:,} {noun}{'es' if noun.endswith('s') else 's'}"
    )
