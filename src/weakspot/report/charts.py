"""A scatter plot as plain coordinates, for a template to draw without a library.

Charts: Vega-Lite specifications in the page's own colors, and the libraries that draw them, once for a page.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from weakspot.report.explanation_page import text

if TYPE_CHECKING:
    import altair as alt


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


# Colors are variables of the page's style sheet: the drawing follows the reader's light or dark, and the printer.
INK, FAINT, LINE, CARD = "var(--ink)", "var(--faint)", "var(--line)", "var(--card)"
SERIES = tuple(f"var(--series-{number})" for number in range(7))
OUTCOMES = {"fooled": "var(--fooled)", "held": "var(--held)"}
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 4], [10, 3], [1, 3])
WORDS_WIDE = 150  # pixels, of a name beside an axis
FIGURES = 4  # of a number in a specification

CONFIG: dict[str, Any] = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "text": {"color": INK, "fontSize": 12},
    "rule": {"color": INK},
    "axis": {
        "labelColor": INK, "titleColor": FAINT, "gridColor": LINE, "domainColor": LINE, "tickColor": LINE,
        "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "labelLimit": WORDS_WIDE,
    },
    "legend": {
        "labelColor": INK, "titleColor": FAINT, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal",
        "orient": "top", "labelLimit": 220, "symbolStrokeWidth": 2,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """A drawing of numbers.

    Attributes:
        title: what stands above it, and in the list to choose from.
        spec: of Vega-Lite.
        meaning: what it shows, in one sentence.
        group: charts of one group are shown together where the reader chooses.
    """

    title: str
    spec: Mapping[str, Any]
    meaning: str
    group: str


def finished(
    title: str, meaning: str, drawing: alt.LayerChart | alt.FacetChart, height: int, group: str = ""
) -> Chart:
    """A chart as wide as the place it is put into, in a group of its own unless it is given one."""
    spec = drawing.properties(width="container", height=height).to_dict()
    for needless in ("$schema", "config"):
        spec.pop(needless, None)
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    return Chart(title, spec, meaning, group or title)


def rows(table: Sequence[Mapping[str, Any]]) -> alt.InlineData:
    """Rows as the data of a chart: few figures, what is not finite left out."""
    import altair as alt

    return alt.InlineData(values=[{key: plain(value) for key, value in row.items()} for row in table])


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(f"{value:.{FIGURES}g}") if np.isfinite(value) else None
    return value


def cycled(values: Sequence[Any], count: int) -> list[Any]:
    """As many as there are things to be told apart, from the beginning again where they do not suffice."""
    return [values[number % len(values)] for number in range(count)]


def libraries() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script."""
    import vl_convert

    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def packed(written: str) -> str:
    """Text as the page carries it: compressed, in base64."""
    return text(zlib.compress(written.encode("utf-8"), 9))
