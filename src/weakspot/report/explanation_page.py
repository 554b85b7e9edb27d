"""The page: one self-contained HTML file that opens by double click, offline.

Leafing: maps along the layers of a network and the curves over them, as the page shows them.
"""

from __future__ import annotations

import base64
import html
import io
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image
from torch import Tensor

from weakspot.explanations.locality_by_radius import RATES, locality_of, locality_sentence
from weakspot.report.figures import MapView, drawings
from weakspot.report.rendering import CATEGORIES, gradient, rendered, table
from weakspot.report.sentences import headline
from weakspot.statistics.number_format import number, p_value, percent

if TYPE_CHECKING:
    from weakspot.explanations.analysis import Series
    from weakspot.explanations.explanation import Explanation


WIDTH, HEIGHT = 600, 120  # of the drawing of the curves, in its own units


def leaves(series: Series, index: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the page writes of one pair's series, and the frames that its script draws."""
    frames = []
    for step, maps, tops in zip(series.steps, series.maps, series.tops, strict=True):
        values = np.nan_to_num(maps[index].numpy().astype(np.float32), posinf=0, neginf=0)
        highest, top = float(values.max()), float(np.nan_to_num(tops[index].item(), posinf=0))
        frames.append(
            {
                "step": step,
                "height": values.shape[0],
                "width": values.shape[1],
                "values": text(
                    zlib.compress(np.rint(values * (255 / (highest or 1))).astype(np.uint8).tobytes(), 9)
                ),
                "highest": highest,
                "top": top or highest or 1.0,
            }
        )
    curves = {name: values[index].double().numpy() for name, values in series.curves.items()}
    limit = (
        max((float(np.nanmax(values, initial=0)) for values in map(_finite, curves.values())), default=0)
        or 1.0
    )
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
                "points": _points(values, limit),
                "values": [float(f"{value:.3g}") for value in values],
            }
            for name, values in curves.items()
        ],
    }, frames


def _points(values: np.ndarray, limit: float) -> str:
    """Of an SVG polyline, from left to right."""
    across = np.linspace(0, WIDTH, len(values)) if len(values) > 1 else np.array([WIDTH / 2])
    down = HEIGHT * (1 - np.nan_to_num(_finite(values)) / limit)
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))


def text(content: bytes) -> str:
    """Bytes as base64."""
    return base64.b64encode(content).decode("ascii")


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


SHARES = {
    "effect_in_roi",
    "jaccard",
    "roa_largest_fraction",
    "changed_fraction",
    "reached_fraction",
    "roi_fraction",
    "margin_taken",
    "completeness_gap",
}
SUFFIXES = ("_null", "_p", "_q", "_shift_null", "_shift_p")  # what stands beside a score
RELATIONS = {1: "where it looks", -1: "away from there", 0: "not clear"}


def page(explanation: Explanation) -> str:
    """The whole report as HTML; whatever came from outside is escaped."""
    return rendered(
        "page.html",
        script="page.js",
        model=explanation.model,
        pairs=[_pair(explanation, index) for index in range(len(explanation))],
        attack=explanation.made.get("attack", ""),
        locality=_locality(explanation),
        made=dict(explanation.made),
        gradients={kind: gradient(kind) for kind in ("signed", "magnitude")},
        shared={
            "tables": {kind: text(table(kind).tobytes()) for kind in ("signed", "magnitude")},
            "categories": list(CATEGORIES),
        },
    )


def _locality(explanation: Explanation) -> dict[str, Any] | None:
    """How often the one pixel of an attack fools elsewhere, over all images; None of other attacks."""
    table = locality_of(explanation.scores)
    if table is None:
        return None

    def interval(row: dict[Any, Any], prefix: str) -> list[str]:
        return [percent(row[f"{prefix}{name}"]) for name in RATES if row[f"{prefix}images"]]

    return {
        "sentence": locality_sentence(table),
        "rows": [
            {
                "radius": row["radius"],
                "images": row["images"],
                "rate": interval(row, ""),
                "excess": points(row["excess"], row["excess_low"], row["excess_high"]),
                "failed_images": row["failed_images"],
                "failed": interval(row, "failed_"),
            }
            for row in table.to_dict("records")
        ],
    }


def points(value: float, low: float, high: float) -> str:
    """A difference of two shares in points, with its interval where there is one.

    >>> points(0.123, 0.05, 0.2), points(-0.02, float("nan"), float("nan"))
    ('+12 [+5, +20]', '-2')
    """
    if np.isnan(value):
        return ""
    return f"{100 * value:+.0f}" + ("" if np.isnan(low) else f" [{100 * low:+.0f}, {100 * high:+.0f}]")


def notebook_frame(explanation: Explanation) -> str:
    """The page in a frame of its own, so that its style and a notebook's do not meet."""
    source = html.escape(page(explanation), quote=True)
    return f'<iframe srcdoc="{source}" style="width:100%;height:60rem;border:1px solid #8888"></iframe>'


def _pair(explanation: Explanation, index: int) -> dict[str, Any]:
    row = explanation.scores.iloc[index]
    maps = drawings(explanation, index)
    told = [leaves(series, index) for series in explanation.series.values()]
    leafed = [heading for heading, _ in told]
    height, width = explanation.pairs.clean.shape[2:]
    scores = _score_rows(row, explanation.meanings)
    return {
        "name": str(row["image"]),
        "headline": headline(row),
        "verdict": explanation.verdict(index),
        "outcome": _outcome(row),
        "clean": _png(explanation.pairs.clean[index]),
        "adversarial": _png(explanation.pairs.adversarial[index]),
        "maps": [_map(drawing) for drawing in maps],
        "scales": _scales(maps),
        "scores": scores,
        "compared": any(score["p"] for score in scores),
        "related": row.get("relation_p", np.nan) >= 0,
        "sort": {
            key: float(row[key]) for key in ("effect_in_roi", "relation_p", "margin_drop") if key in row
        },
        "series": leafed,
        "data": {
            "height": height,
            "width": width,
            "maps": {drawing.name: _packed(drawing) for drawing in maps},
            "series": [frames for _, frames in told],
        },
    }


def _outcome(row: pd.Series) -> str:
    """What is said of an attack that did not succeed; nothing of one that did."""
    if row["read_clean_as"] == row["label"] and row["success_8bit"]:
        return ""
    before = row["read_clean_as"] == row["label"] and row["success"]
    return "fools only before rounding to 8 bits" if before else "attack failed"


def _map(drawing: MapView) -> dict[str, Any]:
    values, picture = drawing.values, drawing.picture  # noqa: PD011 - an array, not a frame
    return {
        "name": drawing.name,
        "title": drawing.title,
        "meaning": drawing.meaning,
        "kind": picture.kind,
        "scale": picture.scale,
        "low": drawing.low,
        "high": drawing.high,
        "legend": [
            {"name": name, "category": category, "area": percent(float((values == category).mean()))}
            for category, name in enumerate(picture.categories)
        ],
    }


def _scales(maps: list[MapView]) -> list[dict[str, Any]]:
    """Maps in groups that share one scale, in the order they came; the difference is drawn elsewhere."""
    groups: dict[str, list[str]] = {}
    for drawing in maps:
        if drawing.name != "difference":
            groups.setdefault(drawing.picture.scale or drawing.name, []).append(drawing.name)
    return [{"title": title if len(names) > 1 else "", "names": names} for title, names in groups.items()]


def _packed(drawing: MapView) -> dict[str, Any]:
    """The raw map as bytes between its own least and greatest value, compressed."""
    values = np.nan_to_num(drawing.values)
    low, high = (
        (0.0, 255.0) if drawing.picture.kind == "category" else (float(values.min()), float(values.max()))
    )
    levels = np.rint((values - low) * (255 / ((high - low) or 1))).astype(np.uint8)
    return {
        "values": text(zlib.compress(levels.tobytes(), 9)),
        "range": [low, high],
        "limits": [drawing.low, drawing.high],
        "kind": drawing.picture.kind,
        "categories": list(drawing.picture.categories),
    }


def _score_rows(row: pd.Series, meanings: dict[str, str]) -> list[dict[str, str]]:
    rows = []
    for name, meaning in meanings.items():
        if name not in row or name.endswith(SUFFIXES):
            continue
        say = percent if name in SHARES else number
        beside = {suffix: float(row.get(f"{name}{suffix}", np.nan)) for suffix in SUFFIXES}
        value = say(float(row[name]))
        if name == "relation":
            value = RELATIONS.get(row[name], "not compared")
        elif f"{name}_shift_p" in row and np.isnan(beside["_shift_p"]) and not np.isnan(row[name]):
            value = "not compared"  # it follows from where the attack was allowed to act
        # A p value by shifts finds unrelated images alike: it is shown only beside that by other images.
        p, q, shift_p = (
            p_value(beside[suffix]).removeprefix("p = ").removeprefix("p ") if beside["_p"] >= 0 else ""
            for suffix in ("_p", "_q", "_shift_p")
        )
        shifted = "" if np.isnan(beside["_shift_null"]) else say(beside["_shift_null"])
        rows.append(
            {
                "name": name.replace("_", " "),
                "meaning": meaning,
                "value": value,
                "others": "" if np.isnan(beside["_null"]) else say(beside["_null"]),
                "p": p,
                "q": q,
                "shifted": f"{shifted} (p {'' if shift_p.startswith('<') else '= '}{shift_p})"
                if shifted and shift_p
                else shifted,
            }
        )
    return rows


def _png(image: Tensor) -> str:
    levels = (image.clamp(0, 1) * 255).round().byte().numpy()
    pixels = levels.transpose(1, 2, 0) if len(levels) == 3 else levels.mean(0).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + text(buffer.getvalue())
