"""The parts of the explanation page that answer one question each: sentences, maps on common scales, layer browsers.

A part can stand in another page, too: the explorer shows one analysis of one pair with `panel`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from weakspot.explanations.analysis import Series
from weakspot.explanations.explanation import Explanation
from weakspot.report.image_findings import HELPS, LOCAL, QUESTIONS, WHERE, WHY, findings
from weakspot.report.map_views import MapView, map_views, worth_drawing
from weakspot.report.rendering import compressed_levels, fragment, picture_url
from weakspot.statistics.number_format import in_levels, percent

# The question that each analysis answers; those of other packages come last, under a heading of their own.
ANSWERS = {
    "weak_spots": WHERE, "certificate": WHERE,
    "cam": WHERE, "ssim": WHERE, "overlap": WHERE, "promotion": WHY, "propagation": WHY, "locality": LOCAL,
    "restoration": HELPS, "units": HELPS,
}  # fmt: skip
OTHER = "Other analyses"
WIDTH, HEIGHT = 600, 120  # of the drawing of the curves, in its own units
CHANGED, ALL = 0.1, 0.9  # a layer of which 90% changed by a tenth of its top shows no place

Browsers = Mapping[str, tuple[dict[str, object], list[dict[str, object]]]]


@dataclass(frozen=True)
class Panel:
    """What the analyses of an explanation say about one pair.

    Attributes:
        html: sentences, maps and layer browsers, for a page to insert; all text in it is escaped.
        data: what static/pictures.js draws in it.
        sentences: the answer in full, also in `html`.
    """

    html: str
    data: Mapping[str, object]
    sentences: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Panel({' '.join(self.sentences)!r}, {len(self.html)} characters)"


def panel(explanation: Explanation, index: int = 0) -> Panel:
    """The sections of the report on one pair, without the page around them.

    Terms are not links, because the glossary is on the page only.
    """
    row = explanation.scores.iloc[index]
    views, remarks = worth_drawing(map_views(explanation, index))
    browsers = layer_browsers(explanation, index)
    parts = sections(explanation, row, views, remarks, browsers)
    html = fragment("panel_parts.html", linked=str, sections=parts)
    sentences = tuple(sentence for part in parts for sentence in part.sentences)
    return Panel(html, pair_data(explanation, index, views, browsers), sentences)


def layer_browser(series: Series, index: int) -> tuple[dict[str, object], list[dict[str, object]]]:
    """The template's variables for one pair's maps along the layers, and the frames that the script draws."""
    frames: list[dict[str, object]] = []
    first_shown = len(series.steps) - 1
    for step, maps, tops in zip(series.steps, series.maps, series.tops, strict=True):
        values = np.nan_to_num(maps[index].numpy().astype(np.float32), posinf=0, neginf=0)
        highest, top = float(values.max()), float(np.nan_to_num(tops[index].item(), posinf=0))
        # A layer that is silent in the clean image has no peak; then the largest change is the brightest.
        top = top or highest or 1.0
        # The slider starts at the last layer whose map shows something: often the whole last layer has changed.
        if float((maps[index] > CHANGED * top).float().mean()) < ALL:
            first_shown = len(frames)
        frame = {"step": step, "height": values.shape[0], "width": values.shape[1], "highest": highest}
        frames.append({**frame, "values": compressed_levels(values, 0.0, highest), "top": top})
    curves = {name: values[index].double().numpy() for name, values in series.curves.items()}
    finite = (np.max(curve, initial=0, where=np.isfinite(curve)) for curve in curves.values())
    limit = float(max(finite, default=0)) or 1.0
    return {
        "title": series.title,
        "meaning": series.meaning,
        "last": len(frames) - 1,
        "first_shown": first_shown,
        "first_step": series.steps[0],
        "last_step": series.steps[-1],
        "size": (WIDTH, HEIGHT),
        "limit": limit,
        "curves": [
            {
                "name": name,
                "points": _polyline(curve, limit),
                "values": [float(f"{value:.3g}") for value in curve],
            }
            for name, curve in curves.items()
        ],
    }, frames


def _polyline(curve: NDArray[np.float64], limit: float) -> str:
    """The points of an SVG polyline, from left to right; SVG's y axis points down."""
    across = np.linspace(0, WIDTH, len(curve)) if len(curve) > 1 else np.array([WIDTH / 2])
    down = HEIGHT * (1 - np.nan_to_num(curve, posinf=0, neginf=0) / limit)
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))


def layer_browsers(explanation: Explanation, index: int) -> Browsers:
    """The template's variables and the frames of one pair's maps along the layers, by name."""
    return {name: layer_browser(series, index) for name, series in explanation.series.items()}


def pair_data(
    explanation: Explanation, index: int, views: Sequence[MapView], browsers: Browsers
) -> dict[str, object]:
    """What static/pictures.js needs to draw a pair: both images, maps, and frames along the layers."""
    height, width = explanation.pairs.clean.shape[2:]
    return {
        "clean": picture_url(eight_bit(explanation.pairs.clean[index])),
        "adversarial": picture_url(eight_bit(explanation.pairs.adversarial[index])),
        "height": height,
        "width": width,
        "maps": {view.name: _levels(view) for view in views},
        "series": {name: frames for name, (_, frames) in browsers.items()},
    }


@dataclass(frozen=True)
class PageSection:
    """What the page says and shows about one question, for one pair.

    Attributes:
        title: the question.
        finding: the answer in a few words; may be empty.
        sentences: the answer in full, and what maps would show that are not drawn.
        scales: groups of maps that share a color scale.
        browsers: the template's variables of maps along the layers.
    """

    title: str
    finding: str
    sentences: Sequence[str]
    scales: Sequence[Mapping[str, object]]
    browsers: Sequence[Mapping[str, object]]


def sections(
    explanation: Explanation,
    row: pd.Series,
    views: Sequence[MapView],
    remarks: Mapping[str, str],
    browsers: Browsers,
) -> list[PageSection]:
    """The questions that an analysis answered, in order."""
    found = findings(row)
    parts = []
    for title in (*QUESTIONS, OTHER):
        analyses = [a for name, a in explanation.analyses.items() if ANSWERS.get(name, OTHER) == title]
        names = [name for analysis in analyses for name in analysis.maps]
        series = [name for analysis in analyses for name in analysis.series]
        finding, sentences = found.get(title, ("", []))
        shown = [view for view in views if view.name in names]
        remarked = [*sentences, *(remarks[name] for name in names if name in remarks)]
        if shown or remarked or series:
            drawn = [{"key": name, **browsers[name][0]} for name in series]
            parts.append(PageSection(title, finding, remarked, _scales(shown), drawn))
    return parts


def eight_bit(image: Tensor) -> NDArray[np.uint8]:
    """(C, H, W) in [0, 1] as (H, W, 3), or the mean over channels (H, W) if there are not three."""
    levels: NDArray[np.uint8] = (image.clamp(0, 1) * 255).round().byte().numpy()
    return levels.transpose(1, 2, 0) if len(levels) == 3 else levels.mean(0).astype(np.uint8)


def map_values(view: MapView) -> dict[str, object]:
    """The template's variables of one map."""
    legend = [
        {"name": name, "category": category, "area": percent(float((view.values == category).mean()))}  # noqa: PD011
        for category, name in enumerate(view.picture.categories)
    ]
    return {
        "name": view.name,
        "title": view.title,
        "meaning": view.meaning,
        "kind": view.picture.kind,
        "low": _end(view, view.low),
        "high": _end(view, view.high),
        "legend": legend,
        "square": view.square,
        "cells": view.cells is not None,
        "size": view.values.shape,  # noqa: PD011 - an array
    }


def _end(view: MapView, value: float) -> str:
    """The value of the first or last color, as text."""
    if view.logarithmic:
        return in_levels(value) + (" (weak)" if value == view.high else "")
    return f"{value:+.2g}" if view.picture.kind == "signed" else f"{value:.3g}"


def _scales(views: Sequence[MapView]) -> list[dict[str, object]]:
    """Maps in groups that share one color scale, in order."""
    groups: dict[str, list[MapView]] = {}
    for view in views:
        groups.setdefault(view.picture.scale or view.name, []).append(view)
    return [
        {
            "title": title[:1].upper() + title[1:] if len(group) > 1 else "",
            "maps": [map_values(view) for view in group],
            "meanings": list(dict.fromkeys(view.meaning for view in group)),
        }
        for title, group in groups.items()
    ]


def _levels(view: MapView) -> dict[str, object]:
    """The raw map for the page's script: 8-bit levels between its own smallest and largest value."""
    values, *limits = view.scaled
    low, high = float(values.min()), float(values.max())
    if view.picture.kind == "category":
        # With these limits, a level is the number of its category.
        low, high = 0.0, 255.0
    return {
        "values": compressed_levels(values, low, high),
        "range": [low, high],
        "limits": limits,
        "logarithmic": view.logarithmic,
        "kind": view.picture.kind,
        "categories": list(view.picture.categories),
        "cells": view.cells,
    }
