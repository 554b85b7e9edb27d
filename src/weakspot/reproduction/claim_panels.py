"""The figure of a reproduction as plain data, so that a stored result can be drawn again anywhere, with matplotlib.

A panel is drawn alone for a page that is also read on a phone, or beside others.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Numbers = tuple[float | None, ...]
CELLS = 16  # a side of a stored map, at most
# From the palette of Okabe and Ito; every color has its own marker and dash, for gray print.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#555555")
MARKERS = ("o", "D", "s", "^")
DASHES = ("solid", "dashed", "dotted", "dashdot")
WIDTH, HEIGHT = 5.2, 3.9  # inches of a panel
ROW = 0.34  # inches of a category, beyond the axes
SMALL = 8.5  # points


@dataclass(frozen=True)
class Series:
    """Values that belong together: one color and one entry in the legend.

    Attributes:
        label: in the legend.
        x: of every point. In a panel of rates, one for each category.
        y: of every point; empty in a panel of rates.
        low: lower ends of 95% intervals, of x in a panel of rates, otherwise of y; may be empty.
        high: upper ends.
    """

    label: str
    x: Numbers
    y: Numbers = ()
    low: Numbers = ()
    high: Numbers = ()


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        kind: "rates" (dots with intervals, a row for each category), "curves", "points" or "map".
        title: a short sentence.
        across: what the horizontal axis shows.
        up: what the vertical axis shows.
        series: the values; none in a map.
        categories: names of the rows of a panel of rates, from the top.
        guide: a value to compare with, drawn as a line: vertical in a panel of rates, horizontal among curves.
        guide_label: what it is.
        slopes: of lines through the origin, among points.
        grid: rows of a map, from the top.
    """

    kind: str
    title: str
    across: str = ""
    up: str = ""
    series: tuple[Series, ...] = ()
    categories: tuple[str, ...] = ()
    guide: float | None = None
    guide_label: str = ""
    slopes: tuple[float, ...] = ()
    grid: tuple[Numbers, ...] = ()

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> Self:
        """The panel that `dataclasses.asdict` took apart."""
        given = dict(values)
        parts = cast("Sequence[Mapping[str, object]]", given.pop("series"))
        series = tuple(Series(**{name: _frozen(value) for name, value in part.items()}) for part in parts)  # type: ignore[arg-type]
        return cls(series=series, **{name: _frozen(value) for name, value in given.items()})  # type: ignore[arg-type]


def map_panel(title: str, maps: Tensor, across: str = "") -> Panel:
    """The mean over images of maps (N, 1, H, W), each scaled to mean 1, in at most 16 x 16 cells.

    Maps that are zero everywhere have no scale and are left out.
    """
    means = maps.double().mean((1, 2, 3))
    scaled = maps.double()[means > 0] / means[means > 0].view(-1, 1, 1, 1)
    mean = scaled.mean(0, keepdim=True) if len(scaled) else torch.zeros(1, *maps.shape[1:])
    cells = adaptive_avg_pool2d(mean, (min(CELLS, maps.shape[2]), min(CELLS, maps.shape[3])))[0, 0]
    return Panel("map", title, across, grid=tuple(rounded(row) for row in cells.tolist()))


def rounded(values: Sequence[float]) -> Numbers:
    """Four digits after the point, which no picture shows; None for NaN, which JSON lacks."""
    return tuple(None if value != value else round(float(value), 4) for value in values)  # noqa: PLR0124 - NaN


def _frozen(value: object) -> object:
    return tuple(_frozen(one) for one in value) if isinstance(value, list) else value


def draw(panels: Sequence[Panel]) -> Figure:
    """Draw panels side by side.

    Raises:
        ValueError: if there are none.
    """
    from matplotlib.figure import Figure

    if not panels:
        raise ValueError("there must be at least one panel to draw (no claim could be tested)")
    rows = max(len(panel.categories) for panel in panels)
    sheet = Figure(figsize=(WIDTH * len(panels), max(HEIGHT, 1.7 + ROW * rows)), layout="constrained")
    for axis, panel in zip(sheet.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axis.set_title("\n".join(textwrap.wrap(panel.title, 46)), fontsize=10, loc="left", parse_math=False)
        axis.set_xlabel(panel.across, fontsize=SMALL, parse_math=False)
        axis.set_ylabel(panel.up, fontsize=SMALL, parse_math=False)
        axis.tick_params(labelsize=SMALL)
        DRAWN[panel.kind](axis, panel)
    return sheet


def _rates(axis: Axes, panel: Panel) -> None:
    """A row for each category, with a dot and an interval for each series."""
    count = len(panel.categories)
    for number, series in enumerate(panel.series):
        # The series of a category share half of its row, one below the other.
        places = np.arange(count) + 0.5 * ((number + 0.5) / len(panel.series) - 0.5)
        color, x = COLORS[number % len(COLORS)], _array(series.x)
        if series.low:
            axis.hlines(places, _array(series.low), _array(series.high), color=color, lw=2.2, alpha=0.55)
        axis.plot(x, places, MARKERS[number % len(MARKERS)], color=color, ms=7, label=series.label)
    axis.set_yticks(range(count), [textwrap.fill(name, 24) for name in panel.categories])
    axis.set_ylim(count - 0.5, -0.5)
    axis.set_xlim(left=min(0.0, axis.get_xlim()[0]))
    if panel.guide is not None:
        axis.axvline(panel.guide, color="0.35", ls="--", lw=1)
        axis.annotate(
            panel.guide_label, (panel.guide, 1), xycoords=("data", "axes fraction"), xytext=(4, -3),
            textcoords="offset points", va="top", fontsize=SMALL - 1, color="0.25", parse_math=False,
        )  # fmt: skip
    axis.grid(axis="x", alpha=0.25)
    _legend(axis, panel)


def _curves(axis: Axes, panel: Panel) -> None:
    for number, series in enumerate(panel.series):
        color = COLORS[number % len(COLORS)]
        x = _array(series.x)
        if series.low:
            axis.fill_between(x, _array(series.low), _array(series.high), color=color, alpha=0.18, lw=0)
        axis.plot(
            x, _array(series.y), color=color, ls=DASHES[number % len(DASHES)], label=series.label,
            marker=MARKERS[number % len(MARKERS)], ms=5,
        )  # fmt: skip
    if panel.guide is not None:
        axis.axhline(panel.guide, color="0.35", ls="--", lw=1)
        axis.annotate(
            panel.guide_label, (1, panel.guide), xycoords=("axes fraction", "data"), xytext=(-4, 4),
            textcoords="offset points", ha="right", fontsize=SMALL - 1, color="0.25", parse_math=False,
        )  # fmt: skip
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    _legend(axis, panel)


def _points(axis: Axes, panel: Panel) -> None:
    for number, series in enumerate(panel.series):
        axis.plot(
            _array(series.x), _array(series.y), MARKERS[number % len(MARKERS)], color=COLORS[number % len(COLORS)],
            ms=5, alpha=0.7, label=series.label,
        )  # fmt: skip
    # Some room around the points, and lines through the origin across it.
    left, right, bottom, top = (*axis.get_xlim(), *axis.get_ylim())
    left, bottom = min(left, 0.0), min(bottom, 0.0)
    for slope in panel.slopes:
        # Up to where the line leaves the panel, at its right or its upper edge.
        end = min(right, top / slope)
        axis.plot([0, end], [0, slope * end], color="0.35", ls="--", lw=1)
    axis.set_xlim(left, right)
    axis.set_ylim(bottom, top)
    axis.grid(alpha=0.25)
    _legend(axis, panel)


def _map(axis: Axes, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    values = np.stack([_array(row) for row in panel.grid])
    shown = axis.imshow(values, cmap="viridis", vmin=0, vmax=max(1.0, float(np.nanmax(values))))
    bar = axis.figure.colorbar(shown, ax=axis, shrink=0.85)
    bar.set_label(panel.across, fontsize=SMALL)
    bar.locator = MaxNLocator(5)
    axis.set_xlabel("")
    axis.set_xticks([])
    axis.set_yticks([])


def _legend(axis: Axes, panel: Panel) -> None:
    if len(panel.series) > 1:
        axis.legend(fontsize=SMALL - 1, frameon=False, loc="best")


def _array(values: Numbers) -> NDArray[np.float64]:
    return np.array([math.nan if value is None else value for value in values], dtype=float)


DRAWN = {"rates": _rates, "curves": _curves, "points": _points, "map": _map}
