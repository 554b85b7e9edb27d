"""The explanation page: one self-contained HTML file that opens offline with a double click."""

from __future__ import annotations

import html
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from weakspot.explanations.analysis import Series
from weakspot.explanations.explanation import Explanation
from weakspot.explanations.locality_by_radius import RATES, locality_of, locality_sentence
from weakspot.report.figures import MapView, map_views
from weakspot.report.image_verdict import headline
from weakspot.report.rendering import (
    CATEGORIES,
    base64_text,
    color_table,
    compressed_levels,
    gradient,
    picture_url,
    rendered,
)
from weakspot.statistics.number_format import number, p_value, percent

WIDTH, HEIGHT = 600, 120  # of the drawing of the layer curves, in its own units
FRACTIONS = {
    "effect_in_roi", "jaccard", "roa_largest_fraction", "changed_fraction", "reached_fraction", "roi_fraction",
    "margin_taken", "completeness_gap",
}  # fmt: skip
COMPANIONS = ("_null", "_p", "_q", "_shift_null", "_shift_p")  # columns that belong to a score
RELATIONS = {1: "where it looks", -1: "away from there", 0: "not clear"}
SORT_KEYS = ("effect_in_roi", "relation_p", "margin_drop")


def page(explanation: Explanation) -> str:
    """The whole report as HTML; all text from outside is escaped."""
    kinds = ("signed", "magnitude")
    return rendered(
        "page.html",
        script="page.js",
        model=explanation.model,
        pairs=[_pair(explanation, index) for index in range(len(explanation))],
        attack=explanation.made.get("attack", ""),
        locality=_locality(explanation),
        made=dict(explanation.made),
        rules="".join(f"i.{kind} {{ background: {gradient(kind)} }}\n" for kind in kinds),
        shared={
            "tables": {kind: base64_text(color_table(kind).tobytes()) for kind in kinds},
            "categories": list(CATEGORIES),
        },
    )


def notebook_frame(explanation: Explanation) -> str:
    """The page in an iframe, which keeps its style and the notebook's apart."""
    source = html.escape(page(explanation), quote=True)
    return f'<iframe srcdoc="{source}" style="width:100%;height:60rem;border:1px solid #8888"></iframe>'


def _pair(explanation: Explanation, index: int) -> dict[str, object]:
    """The template's variables for one pair; "data" goes to the page's script."""
    row = explanation.scores.iloc[index]
    views = map_views(explanation, index)
    browsers = [layer_browser(series, index) for series in explanation.series.values()]
    height, width = explanation.pairs.clean.shape[2:]
    clean, adversarial = (
        picture_url(_eight_bit(images[index]))
        for images in (explanation.pairs.clean, explanation.pairs.adversarial)
    )
    scores = [
        _score_row(row, name, meaning)
        for name, meaning in explanation.meanings.items()
        if name in row and not name.endswith(COMPANIONS)
    ]
    return {
        "name": str(row["image"]),
        "headline": headline(row),
        "verdict": explanation.verdict(index),
        "failure": _failure(row),
        "adversarial": adversarial,
        "maps": [_map(view) for view in views],
        "scales": _scales(views),
        "scores": scores,
        "compared": any(score.p for score in scores),
        "related": row.get("relation_p", np.nan) >= 0,
        "sort": {key: float(row[key]) for key in SORT_KEYS if key in row},
        "series": [browser for browser, _ in browsers],
        "data": {
            "clean": clean,
            "adversarial": adversarial,
            "height": height,
            "width": width,
            "maps": {view.name: _levels(view) for view in views},
            "series": [frames for _, frames in browsers],
        },
    }


def _failure(row: pd.Series) -> str:
    """What to say about an attack that did not succeed; empty if it did."""
    correct = row["read_clean_as"] == row["label"]
    if correct and row["success_8bit"]:
        return ""
    return "fools only before rounding to 8 bits" if correct and row["success"] else "attack failed"


def _eight_bit(image: Tensor) -> NDArray[np.uint8]:
    """(C, H, W) in [0, 1] as (H, W, 3), or the mean over channels (H, W) if there are not three."""
    levels: NDArray[np.uint8] = (image.clamp(0, 1) * 255).round().byte().numpy()
    return levels.transpose(1, 2, 0) if len(levels) == 3 else levels.mean(0).astype(np.uint8)


def _map(view: MapView) -> dict[str, object]:
    legend = [
        {"name": name, "category": category, "area": percent(float((view.values == category).mean()))}  # noqa: PD011
        for category, name in enumerate(view.picture.categories)
    ]
    return {
        "name": view.name,
        "title": view.title,
        "meaning": view.meaning,
        "kind": view.picture.kind,
        "low": view.low,
        "high": view.high,
        "legend": legend,
    }


def _scales(views: Sequence[MapView]) -> list[dict[str, object]]:
    """Maps in groups that share one scale, in order; the difference is shown elsewhere."""
    groups: dict[str, list[str]] = {}
    for view in views:
        if view.name != "difference":
            groups.setdefault(view.picture.scale or view.name, []).append(view.name)
    return [{"title": title if len(names) > 1 else "", "names": names} for title, names in groups.items()]


def _levels(view: MapView) -> dict[str, object]:
    """The raw map for the page's script: 8-bit levels between its own smallest and largest value."""
    values = np.nan_to_num(view.values)
    low, high = float(values.min()), float(values.max())
    if view.picture.kind == "category":
        low, high = 0.0, 255.0
    return {
        "values": compressed_levels(values, low, high),
        "range": [low, high],
        "limits": [view.low, view.high],
        "kind": view.picture.kind,
        "categories": list(view.picture.categories),
    }


@dataclass(frozen=True)
class ScoreRow:
    """A row of the table of scores, as text: a score, its meaning, and what it is compared with ("" if nothing)."""

    name: str
    meaning: str
    value: str
    others: str
    p: str
    q: str
    shifted: str


def _score_row(row: pd.Series, name: str, meaning: str) -> ScoreRow:
    formatted = percent if name in FRACTIONS else number
    null, p, q, shift_null, shift_p = (float(row.get(f"{name}{suffix}", np.nan)) for suffix in COMPANIONS)
    value = formatted(float(row[name]))
    if name == "relation":
        value = RELATIONS.get(row[name], "not compared")
    elif f"{name}_shift_p" in row and np.isnan(shift_p) and not np.isnan(row[name]):
        value = "not compared"  # it follows from where the attack was allowed to act
    # Comparisons with NaN are false: a missing p value stays missing.
    # A p value from shifts is small for unrelated images, too: it is shown only beside the one from other images.
    p, q, shift_p = (value if p >= 0 else np.nan for value in (p, q, shift_p))
    shifted = "" if np.isnan(shift_null) else formatted(shift_null)
    if shifted and not np.isnan(shift_p):
        shifted += f" ({p_value(shift_p)})"
    others = "" if np.isnan(null) else formatted(null)
    return ScoreRow(name.replace("_", " "), meaning, value, others, _bare(p), _bare(q), shifted)


def _bare(p: float) -> str:
    """A p value for a column with its own heading; empty if there is none."""
    return "" if np.isnan(p) else p_value(p).removeprefix("p = ").removeprefix("p ")


def _locality(explanation: Explanation) -> dict[str, object] | None:
    """How often the pixel of a one-pixel attack fools at other sites, over all images; None for other attacks."""
    table = locality_of(explanation.scores)
    if table is None:
        return None

    def rate(row: Mapping[Hashable, Any], prefix: str) -> list[str]:
        return [percent(row[f"{prefix}{name}"]) for name in RATES if row[f"{prefix}images"]]

    rows = [
        {
            "radius": row["radius"],
            "images": row["images"],
            "rate": rate(row, ""),
            "excess": points(row["excess"], row["excess_low"], row["excess_high"]),
            "failed_images": row["failed_images"],
            "failed": rate(row, "failed_"),
        }
        for row in table.to_dict("records")
    ]
    return {"sentence": locality_sentence(table), "rows": rows}


def points(value: float, low: float, high: float) -> str:
    """A difference of two fractions in percentage points, with its interval if there is one.

    >>> points(0.123, 0.05, 0.2), points(-0.02, float("nan"), float("nan"))
    ('+12 [+5, +20]', '-2')
    """
    if np.isnan(value):
        return ""
    return f"{100 * value:+.0f}" + ("" if np.isnan(low) else f" [{100 * low:+.0f}, {100 * high:+.0f}]")


def layer_browser(series: Series, index: int) -> tuple[dict[str, object], list[dict[str, object]]]:
    """The template's variables for one pair's maps along the layers, and the frames that the script draws."""
    frames: list[dict[str, object]] = []
    for step, maps, tops in zip(series.steps, series.maps, series.tops, strict=True):
        values = np.nan_to_num(maps[index].numpy().astype(np.float32), posinf=0, neginf=0)
        highest, top = float(values.max()), float(np.nan_to_num(tops[index].item(), posinf=0))
        frame = {"step": step, "height": values.shape[0], "width": values.shape[1], "highest": highest}
        frames.append(
            {**frame, "values": compressed_levels(values, 0.0, highest), "top": top or highest or 1.0}
        )
    curves = {name: values[index].double().numpy() for name, values in series.curves.items()}
    limit = max((float(np.nanmax(_finite(curve), initial=0)) for curve in curves.values()), default=0) or 1.0
    return {
        "title": series.title,
        "meaning": series.meaning,
        "last": len(frames) - 1,
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
    down = HEIGHT * (1 - np.nan_to_num(_finite(curve)) / limit)
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.isfinite(values), values, np.nan)
