"""The figure of a reproduction as plain data, so that a stored result can be drawn again anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

Numbers = tuple[float | None, ...]
CELLS = 16  # a side of a stored map, at most


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
