"""The explanation page: one self-contained HTML file that opens offline with a double click."""

import html
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from weakspot.explanations.explanation import Explanation
from weakspot.explanations.locality_by_radius import RATES, locality_of, locality_sentence
from weakspot.report.glossary import TERMS, anchor, linked
from weakspot.report.image_findings import overview, strongest_fact
from weakspot.report.image_verdict import headline, page_verdict
from weakspot.report.map_views import filled, map_views, worth_drawing
from weakspot.report.next_steps import next_steps
from weakspot.report.page_sections import eight_bit, layer_browsers, map_values, pair_data, sections
from weakspot.report.rendering import gradient, picture_url, rendered, shared_colors
from weakspot.statistics.number_format import number, p_value, percent

THUMBNAIL = 96  # pixels
FRACTIONS = {
    "effect_in_roi", "jaccard", "roa_largest_fraction", "changed_fraction", "reached_fraction", "roi_fraction",
    "margin_taken", "completeness_gap", "proven_fraction", "refuted_fraction", "unknown_fraction",
}  # fmt: skip
COMPANIONS = ("_null", "_p", "_q", "_shift_null", "_shift_p")  # columns that belong to a score
RELATIONS = {1: "where it looks", -1: "away from there", 0: "not clear"}
SORT_KEYS = ("effect_in_roi", "relation_p", "margin_drop")
# The first picture of a pair is the first of these maps that shows something.
LEADS = ("first_order", "vulnerability")


def page(explanation: Explanation) -> str:
    """The whole report as HTML; all text from outside is escaped."""
    return rendered(
        "page.html",
        rules="".join(f"i.{kind} {{ background: {gradient(kind)} }}\n" for kind in ("signed", "magnitude")),
        script="page.js",
        linked=linked,
        anchor=anchor,
        model=explanation.model,
        overview=overview(explanation.scores, explanation.images),
        pairs=[_pair(explanation, index) for index in range(len(explanation))],
        overlays=_overlays(explanation),
        attack=explanation.made.get("attack", ""),
        locality=_locality(explanation),
        steps=next_steps(explanation),
        terms=TERMS,
        meanings={name: text for name, text in explanation.meanings.items() if not name.endswith(COMPANIONS)},
        made={name: text for name, text in explanation.made.items() if name != "options"},  # in the command
        shared=shared_colors(),
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
    browsers = layer_browsers(explanation, index)
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
        # The verdict may begin with the strongest fact, the sentence on the smallest square.
        "finding": spoken if spoken.startswith(fact) else f"{fact} {spoken}",
        "failure": _failure(row),
        "thumbnail": _thumbnail(eight_bit(explanation.pairs.adversarial[index])),
        "lead": map_values(leads[0]) if leads else None,
        "difference": next(map_values(view) for view in views if view.name == "difference"),
        "sections": sections(explanation, row, [v for v in views if v not in leads[:1]], remarks, browsers),
        "scores": scores,
        "compared": any(score.p for score in scores),
        "related": row.get("relation_p", np.nan) >= 0,
        "sort": {key: float(row[key]) for key in SORT_KEYS if key in row},
        "data": pair_data(explanation, index, views, browsers),
    }


def _overlays(explanation: Explanation) -> list[tuple[str, str]]:
    """Name and title of every map that can be laid over the photographs."""
    pictures = explanation.pictures
    titles = {name: filled(pictures[name].title, "label", "competing class") for name in explanation.maps}
    return [("difference", "Difference"), *titles.items()]


def _failure(row: pd.Series) -> str:
    """What to say about an attack that did not succeed; empty if it did."""
    correct = row["read_clean_as"] == row["label"]
    if not correct:
        return "misclassified without an attack"
    if row["success_8bit"]:
        return ""
    if row["success"]:
        return "fools only before rounding to 8 bits"
    return "not the target" if row["asked_for_target"] else "not found"


def _thumbnail(pixels: NDArray[np.uint8]) -> str:
    """A small JPEG of about `THUMBNAIL` pixels."""
    step = max(1, min(pixels.shape[:2]) // THUMBNAIL)
    return picture_url(np.ascontiguousarray(pixels[::step, ::step]), jpeg_quality=80)


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
    table = locality_of(explanation.scores, explanation.images)
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
