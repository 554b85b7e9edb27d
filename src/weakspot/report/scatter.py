"""A scatter plot as plain coordinates, for a template to draw without a library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 42
RADIUS = 3


@dataclass(frozen=True)
class Dot:
    """One unit.

    Attributes:
        x: from the left, in units of the drawing.
        y: from the top.
        filled: whether the unit moves more than under noise.
        title: what is read when it is pointed at.
    """

    x: float
    y: float
    filled: bool
    title: str


@dataclass(frozen=True)
class Scatter:
    """Sensitivity (on a logarithmic scale) against IoU.

    Attributes:
        dots: of the units.
        across: (place, label) of each tick of the x axis.
        up: (place, label) of each tick of the y axis.
        missing: how many units are not drawn, as they do not change or do not vary over clean images.
    """

    dots: Sequence[Dot]
    across: Sequence[tuple[float, str]]
    up: Sequence[tuple[float, str]]
    missing: int
    size: tuple[int, int] = (WIDTH, HEIGHT)
    frame: tuple[int, int, int, int] = (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)


def scatter(units: pd.DataFrame, level: float) -> Scatter | None:
    """Sensitivity against IoU of the units of a layer; None where there are none to draw.

    Args:
        units: columns unit, iou, sensitivity, p_value, concept.
        level: of the corrected p value at which a unit counts as moved beyond noise.
    """
    sizes = units["sensitivity"].astype(float)
    drawn = units[(sizes > 0) & (sizes < math.inf) & units["iou"].notna()]
    if drawn.empty:
        return None
    logs = drawn["sensitivity"].map(math.log10)
    low, high = math.floor(float(logs.min())), math.ceil(float(logs.max()))
    high = high if high > low else low + 1
    most, step = _limit(float(drawn["iou"].max()))

    def across(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * value / most

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    dots = [
        Dot(
            round(across(float(row["iou"])), 1),
            round(up(math.log10(row["sensitivity"])), 1),
            bool(row["p_value"] <= level),
            f"unit {row['unit']}, {row['concept'] if isinstance(row['concept'], str) else 'no concept'}: "
            f"sensitivity {row['sensitivity']:.3g}, IoU {row['iou']:.3f}",
        )
        for row in drawn.to_dict("records")
    ]
    return Scatter(
        dots,
        [(round(across(step * n), 1), f"{step * n:.3g}") for n in range(round(most / step) + 1)],
        [(round(up(power), 1), f"{10.0**power:.3g}") for power in range(low, high + 1)],
        len(units) - len(drawn),
    )


def _limit(largest: float) -> tuple[float, float]:
    """The end of an axis from 0 and the distance of its ticks: the least round ones that hold the largest value."""
    for power in range(-4, 1):
        for factor in (1, 2, 5):
            step = factor * 10.0**power
            if largest <= 5 * step:
                return float(step * max(1, math.ceil(round(largest / step, 9)))), step
    return 5.0, 1.0
