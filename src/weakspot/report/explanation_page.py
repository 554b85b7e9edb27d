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

from weakspot.explanations.explanation import Explanation
from weakspot.explanations.locality_by_radius import RATES, locality_of, locality_sentence
from weakspot.report.glossary import TERMS, anchor, linked
from weakspot.report.image_findings import (
    HELPS,
    LOCAL,
    QUESTIONS,
    WHERE,
    WHY,
    findings,
    in_levels,
    overview,
    strongest_fact,
)
from weakspot.report.image_verdict import headline, page_verdict
from weakspot.report.layer_browser import layer_browser
from weakspot.report.map_views import MapView, filled, map_views, worth_drawing
from weakspot.report.next_steps import next_steps
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

THUMBNAIL = 96  # pixels
FRACTIONS = {
    "effect_in_roi", "jaccard", "roa_largest_fraction", "changed_fraction", "reached_fraction", "roi_fraction",
    "margin_taken", "completeness_gap",
}  # fmt: skip
COMPANIONS = ("_null", "_p", "_q", "_shift_null", "_shift_p")  # columns that belong to a score
RELATIONS = {1: "where it looks", -1: "away from there", 0: "not clear"}
SORT_KEYS = ("effect_in_roi", "relation_p", "margin_drop")
# The question that each analysis answers; those of other packages come last, under a heading of their own.
ANSWERS = {
    "weak_spots": WHERE,
    "cam": WHERE, "ssim": WHERE, "overlap": WHERE, "promotion": WHY, "propagation": WHY, "locality": LOCAL,
    "restoration": HELPS, "units": HELPS,
}  # fmt: skip
OTHER = "Other analyses"
LEADS = (
    "first_order",
    "vulnerability",
)  # the first picture of a pair: the first of these maps that shows something


def page(explanation: Explanation) -> str:
    """The whole report as HTML; all text from outside is escaped."""
    kinds = ("signed", "magnitude")
    return rendered(
        "page.html",
        rules="".join(f"i.{kind} {{ background: {gradient(kind)} }}\n" for kind in kinds),
        scripts=["folds.js", "page.js"],
        linked=linked,
        anchor=anchor,
        model=explanation.model,
        overview=overview(explanation.scores),
        pairs=[_pair(explanation, index) for index in range(len(explanation))],
        overlays=_overlays(explanation),
        attack=explanation.made.get("attack", ""),
        locality=_locality(explanation),
        steps=next_steps(explanation),
        terms=TERMS,
        meanings={name: text for name, text in explanation.meanings.items() if not name.endswith(COMPANIONS)},
        made=dict(explanation.made),
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
    views, remarks = worth_drawing(map_views(explanation, index))
    leads = [view for name in LEADS for view in views if view.name == name]
    browsers = {name: layer_browser(series, index) for name, series in explanation.series.items()}
    height, width = explanation.pairs.clean.shape[2:]
    pixels = [
        _eight_bit(images[index]) for images in (explanation.pairs.clean, explanation.pairs.adversarial)
    ]
    clean, adversarial = map(picture_url, pixels)
    scores = [
        _score_row(row, name, meaning)
        for name, meaning in explanation.meanings.items()
        if name in row and not name.endswith(COMPANIONS)
    ]
    fact, spoken, verdict = strongest_fact(row), explanation.verdict(index), page_verdict(row)
    return {
        "name": str(row["image"]),
        "headline": headline(row),
        "fact": fact,
        "verdict": verdict,
        "finding": spoken if spoken.startswith(fact) else f"{fact} {spoken}",
        "failure": _failure(row),
        "thumbnail": _thumbnail(pixels[1]),
        "lead": _map(leads[0]) if leads else None,
        "difference": next(_map(view) for view in views if view.name == "difference"),
        "sections": _sections(explanation, row, [v for v in views if v not in leads[:1]], remarks, browsers),
        "scores": scores,
        "compared": any(score.p for score in scores),
        "related": row.get("relation_p", np.nan) >= 0,
        "sort": {key: float(row[key]) for key in SORT_KEYS if key in row},
        "data": {
            "clean": clean,
            "adversarial": adversarial,
            "height": height,
            "width": width,
            "maps": {view.name: _levels(view) for view in views},
            "series": {name: frames for name, (_, frames) in browsers.items()},
        },
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


def _sections(
    explanation: Explanation,
    row: pd.Series,
    views: Sequence[MapView],
    remarks: Mapping[str, str],
    browsers: Mapping[str, tuple[dict[str, object], list[dict[str, object]]]],
) -> list[PageSection]:
    """The questions that an analysis answered, in order."""
    found = findings(row)
    sections = []
    for title in (*QUESTIONS, OTHER):
        analyses = [a for name, a in explanation.analyses.items() if ANSWERS.get(name, OTHER) == title]
        names = [name for analysis in analyses for name in analysis.maps]
        series = [name for analysis in analyses for name in analysis.series]
        finding, sentences = found.get(title, ("", []))
        shown = [view for view in views if view.name in names]
        said = [*sentences, *(remarks[name] for name in names if name in remarks)]
        if shown or said or series:
            drawn = [{"key": name, **browsers[name][0]} for name in series]
            sections.append(PageSection(title, finding, said, _scales(shown), drawn))
    return sections


def _overlays(explanation: Explanation) -> list[tuple[str, str]]:
    """Name and title of every map that can be laid over the photographs."""
    pictures = explanation.pictures
    titles = {name: filled(pictures[name].title, "label", "competing class") for name in explanation.maps}
    return [("difference", "Difference"), *titles.items()]


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


def _thumbnail(pixels: NDArray[np.uint8]) -> str:
    """A small JPEG of about `THUMBNAIL` pixels."""
    step = max(1, min(pixels.shape[:2]) // THUMBNAIL)
    return picture_url(np.ascontiguousarray(pixels[::step, ::step]), jpeg_quality=80)


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
        "low": _end(view, view.low),
        "high": _end(view, view.high),
        "legend": legend,
        "square": view.square,
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
            "maps": [_map(view) for view in group],
            "meanings": list(dict.fromkeys(view.meaning for view in group)),
        }
        for title, group in groups.items()
    ]


def _levels(view: MapView) -> dict[str, object]:
    """The raw map for the page's script: 8-bit levels between its own smallest and largest value."""
    values, *limits = view.scaled
    low, high = float(values.min()), float(values.max())
    if view.picture.kind == "category":
        low, high = 0.0, 255.0
    return {
        "values": compressed_levels(values, low, high),
        "range": [low, high],
        "limits": limits,
        "logarithmic": view.logarithmic,
        "kind": view.picture.kind,
        "categories": list(view.picture.categories),
    }


@dataclass(frozen=True)
class ScoreRow:
    """A row of the table of scores, as text: a score, its meaning, and what it is compared with ("" if nothing)."""

    key: str
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
    value = "none" if np.isinf(row[name]) else formatted(float(row[name]))
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
    return ScoreRow(name, name.replace("_", " "), meaning, value, others, _bare(p), _bare(q), shifted)


def _bare(p: float) -> str:
    """A p value for a column with its own heading; empty if there is none."""
    return "" if np.isnan(p) else p_value(p, "")


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
