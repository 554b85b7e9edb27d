"""Charts: Vega-Lite specifications in the page's own colours, and the libraries that draw them, once for a page."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from weakspot.report.leafing import text

if TYPE_CHECKING:
    import altair as alt

# Colours are variables of the page's style sheet: the drawing follows the reader's light or dark, and the printer.
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
