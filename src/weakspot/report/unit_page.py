"""The unit page: what a layer's units respond to, with the pictures that activate them most, in one HTML file."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from weakspot.defenses.unit_masking import MEASURES, THESE
from weakspot.defenses.unit_study import UnitStudy
from weakspot.dissection import Dissection
from weakspot.dissection.sensitivity import LEVEL
from weakspot.dissection.unit_examples import UnitExample
from weakspot.report.rendering import picture_url, rendered
from weakspot.statistics.number_format import p_value, percent

EXAMPLES = 6  # units with pictures that are shown before unfolding
DIMMED = 0.3  # brightness outside the unit's active sites
WIDTH, HEIGHT = 420, 300  # of the scatter plot, in its own units
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 42  # margins


def unit_page(
    layers: Mapping[str, Dissection],
    pictures: Mapping[str, Mapping[int, Sequence[UnitExample]]],
    *,
    model: str,
    made: Mapping[str, str],
    studies: Mapping[str, UnitStudy] | None = None,
    together: Sequence[str] = (),
) -> str:
    """The page as HTML; all text from outside is escaped.

    Args:
        layers: layer name to its dissection.
        pictures: layer name to unit to the pictures shown for it.
        model: the classifier's name.
        made: how the dissection was made, name to value.
        studies: layer name to the effect of an attack on its units; none if nothing was attacked.
        together: sentences on the units of all layers under attack.
    """
    studies = studies or {}
    return rendered(
        "units.html",
        styles=["units.css"],
        script="units.js",
        model=model,
        made=dict(made),
        layers=[_layer(one, pictures.get(name, {}), studies.get(name)) for name, one in layers.items()],
        attacked=bool(studies),
        together=list(together),
    )


def _layer(
    dissection: Dissection, pictures: Mapping[int, Sequence[UnitExample]], study: UnitStudy | None
) -> dict[str, object]:
    """The template's variables for one layer."""
    units = dissection.units if study is None else study.units
    detectors = units[units["concept"].notna()]
    counts = detectors.groupby(["category", "concept"]).size().sort_values(ascending=False)
    largest = int(counts.max()) if len(counts) else 1
    rows = [
        _row(row, pictures, study) for row in detectors.sort_values("iou", ascending=False).to_dict("records")
    ]
    # The best unit of each concept that has pictures, in the order of the bars.
    # Of equal keys the last one stays: reversed, that is the unit with the largest IoU.
    best = {row.concept: row for row in reversed(rows) if row.pictures}
    return {
        "study": None if study is None else _study(study),
        "name": dissection.layer,
        "units": len(units),
        "detectors": len(detectors),
        "min_iou": dissection.options.min_iou,
        "bars": [
            {"concept": concept, "category": category, "units": int(n), "width": round(100 * n / largest)}
            for category, concept, n in counts.reset_index().itertuples(index=False)
        ],
        "examples": [best[concept] for _, concept in counts.index if concept in best][:EXAMPLES],
        "rows": rows,
    }


@dataclass(frozen=True)
class UnitRow:
    """A unit that detects a concept, as the template draws it.

    Attributes:
        unit: its number.
        concept: with which it agrees best.
        category: of that concept.
        iou: with that concept.
        others: the next best concepts with their IoU.
        sensitivity: under attack; None if nothing was attacked.
        noise: under noise of the same size.
        p: of the difference, as text.
        pictures: (number of the image, data URL, fraction of active sites).
    """

    unit: int
    concept: str
    category: str
    iou: float
    others: str
    sensitivity: float | None
    noise: float | None
    p: str | None
    pictures: Sequence[tuple[int, str, float]]

    def __repr__(self) -> str:
        return f"UnitRow({self.unit}, {self.concept!r}, IoU {self.iou:.3f}, {len(self.pictures)} pictures)"


def _row(
    row: Mapping[Hashable, Any], pictures: Mapping[int, Sequence[UnitExample]], study: UnitStudy | None
) -> UnitRow:
    return UnitRow(
        unit=int(row["unit"]),
        concept=row["concept"],
        category=row["category"],
        iou=float(row["iou"]),
        others=", ".join(
            f"{row[name]} {row[f'{name}_iou']:.3f}" for name in ("second", "third") if name in row
        ),
        sensitivity=None if study is None else float(row["sensitivity"]),
        noise=None if study is None else float(row["noise"]),
        p=None if study is None else p_value(float(row["p_value"]), ""),
        pictures=[
            (shown.image, _picture(shown), float(shown.active.float().mean()))
            for shown in pictures.get(int(row["unit"]), ())
        ],
    )


def _study(study: UnitStudy) -> dict[str, object]:
    """The template's variables for the units of one layer under attack."""
    rows = [] if study.masking is None else study.masking.to_dict("records")
    return {
        "sentences": list(study.sentences),
        "scatter": scatter(study.units, LEVEL),
        "masked": ", ".join(map(str, study.masked)),
        "masking": [
            {
                **{name: row[name] for name in ("masked", "units", "images")},
                **{
                    name: [percent(row[f"{name}{end}"]) for end in ("", "_low", "_high")] for name in MEASURES
                },
                "gain": f"{100 * row['gain']:+.1f}" if row["masked"] != THESE else "",
                "p": p_value(row["p"], "") if row["masked"] != THESE else "",
            }
            for row in rows
        ],
    }


def _picture(shown: UnitExample) -> str:
    """The picture as a data URL, dimmed where the unit is inactive, with the border of the active sites drawn."""
    pixels = shown.pixels.permute(1, 2, 0).numpy()
    pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    active = shown.active.numpy()
    lit = np.where(active[..., None], pixels, DIMMED * pixels)
    # An active site is on the border unless its four neighbors are active; outside the picture counts as inactive.
    padded = np.pad(active, 1)
    border = active & ~(padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:])
    lit[border] = (1.0, 0.85, 0.0)
    return picture_url((lit * 255).round().astype(np.uint8), jpeg_quality=82)


@dataclass(frozen=True)
class Dot:
    """One unit of the scatter plot.

    Attributes:
        x: from the left.
        y: from the top.
        filled: whether the unit moves more than under noise.
        title: its tooltip.
    """

    x: float
    y: float
    filled: bool
    title: str


@dataclass(frozen=True)
class Scatter:
    """Sensitivity (on a logarithmic scale) against IoU, as plain coordinates that the template draws in SVG.

    Attributes:
        dots: one per unit.
        across: (place, label) of each tick of the x axis.
        up: (place, label) of each tick of the y axis.
        missing: units that are not drawn because they do not change or do not vary over clean images.
        size: width and height.
        frame: left, top, right, bottom of the plot.
    """

    dots: Sequence[Dot]
    across: Sequence[tuple[float, str]]
    up: Sequence[tuple[float, str]]
    missing: int
    size: tuple[int, int] = (WIDTH, HEIGHT)
    frame: tuple[int, int, int, int] = (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)

    def __repr__(self) -> str:
        return f"Scatter({len(self.dots)} dots, {self.missing} missing)"


def scatter(units: pd.DataFrame, level: float) -> Scatter | None:
    """Sensitivity against IoU of a layer's units; None if there are none to draw.

    Args:
        units: columns unit, iou, sensitivity, p_value, concept.
        level: corrected p value up to which a unit counts as moved beyond noise.
    """
    sizes = units["sensitivity"].astype(float)
    drawn = units[(sizes > 0) & (sizes < math.inf) & units["iou"].notna()]
    if drawn.empty:
        return None
    logs = np.log10(drawn["sensitivity"].astype(float))
    # Whole powers of ten, at least one apart.
    low, high = math.floor(float(logs.min())), math.ceil(float(logs.max()))
    high = max(high, low + 1)
    end, step = _axis(float(drawn["iou"].max()))

    def across(iou: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * iou / end, 1)

    def up(power: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (power - low) / (high - low), 1)

    dots = [
        Dot(
            across(float(row["iou"])),
            up(math.log10(row["sensitivity"])),
            bool(row["p_value"] <= level),
            f"unit {row['unit']}, {row['concept'] if isinstance(row['concept'], str) else 'no concept'}: "
            f"sensitivity {row['sensitivity']:.3g}, IoU {row['iou']:.3f}",
        )
        for row in drawn.to_dict("records")
    ]
    return Scatter(
        dots,
        [(across(step * n), f"{step * n:.3g}") for n in range(round(end / step) + 1)],
        [(up(power), f"{10.0**power:.3g}") for power in range(low, high + 1)],
        len(units) - len(drawn),
    )


def _axis(largest: float) -> tuple[float, float]:
    """End and tick distance of an axis from 0: the smallest 1, 2 or 5 times a power of ten with at most six ticks.

    >>> _axis(0.25), _axis(0.4)
    ((0.25, 0.05), (0.4, 0.1))
    """
    for power in range(-4, 1):
        for factor in (1, 2, 5):
            step = factor * 10.0**power
            if largest <= 5 * step:
                # Rounded first, so that 0.3 / 0.1 does not take a fourth step.
                return float(step * max(1, math.ceil(round(largest / step, 9)))), step
    return 5.0, 1.0
