"""The unit page: what a layer's units stand for, with the pictures that excite them; one self-contained HTML file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from weakspot.defenses.unit_masking import MEASURES, THESE
from weakspot.dissection.sensitivity import LEVEL
from weakspot.report.charts import scatter
from weakspot.report.explanation_page import text
from weakspot.report.rendering import rendered
from weakspot.statistics.number_format import p_value, percent

if TYPE_CHECKING:
    from weakspot.defenses.unit_study import UnitStudy
    from weakspot.dissection import Dissection
    from weakspot.dissection.unit_examples import Shown

DIMMED = 0.3  # brightness outside the unit's active sites


def unit_page(
    found: Mapping[str, Dissection],
    pictures: Mapping[str, Mapping[int, Sequence[Shown]]],
    *,
    model: str,
    made: Mapping[str, str],
    studies: Mapping[str, UnitStudy] | None = None,
    together: Sequence[str] = (),
) -> str:
    """The page as HTML; whatever came from outside is escaped.

    Args:
        found: layer to its dissection.
        pictures: layer to unit to the pictures that are shown of it.
        model: the classifier's name.
        made: how it came about.
        studies: layer to what an attack does to its units; none where nothing was attacked.
        together: sentences on the units of all layers under attack.
    """
    studies = studies or {}
    return rendered(
        "units.html",
        styles=["units.css"],
        script="units.js",
        model=model,
        made=dict(made),
        layers=[_layer(one, pictures.get(name, {}), studies.get(name)) for name, one in found.items()],
        attacked=bool(studies),
        together=list(together),
    )


def _layer(
    found: Dissection, pictures: Mapping[int, Sequence[Shown]], study: UnitStudy | None
) -> dict[str, Any]:
    table = found.units if study is None else study.units
    detectors = table[table["concept"].notna()]
    counts = detectors.groupby(["category", "concept"]).size().sort_values(ascending=False)
    largest = int(counts.max()) if len(counts) else 1
    shown = table.sort_values("iou", ascending=False)
    return {
        "study": None if study is None else _study(study),
        "name": found.layer,
        "units": len(table),
        "detectors": len(detectors),
        "least": found.options["min_iou"],
        "bars": [
            {
                "concept": concept,
                "category": category,
                "units": int(number),
                "width": round(100 * number / largest),
            }
            for category, concept, number in counts.reset_index().itertuples(index=False)
        ],
        "rows": [
            {
                "unit": int(row["unit"]),
                "concept": row["concept"] if isinstance(row["concept"], str) else "",
                "category": row["category"] if isinstance(row["category"], str) else "",
                "iou": float(row["iou"]),
                "others": ", ".join(
                    f"{row[name]} {row[f'{name}_iou']:.3f}" for name in ("second", "third") if name in row
                ),
                "sensitivity": None if study is None else float(row["sensitivity"]),
                "noise": None if study is None else float(row["noise"]),
                "p": None
                if study is None
                else p_value(float(row["p_value"])).removeprefix("p ").lstrip("= "),
                "pictures": [
                    {"image": one.image, "data": _picture(one), "fraction": float(one.active.float().mean())}
                    for one in pictures.get(int(row["unit"]), ())
                ],
            }
            for _, row in shown.iterrows()
        ],
    }


def _study(study: UnitStudy) -> dict[str, Any]:
    rows = [] if study.masking is None else study.masking.to_dict("records")
    return {
        "sentences": list(study.sentences),
        "scatter": scatter(study.units, LEVEL),
        "masked": ", ".join(map(str, study.masked)),
        "masking": [
            {
                "masked": row["masked"],
                "units": row["units"],
                "images": row["images"],
                **{
                    measure: [percent(row[f"{measure}{end}"]) for end in ("", "_low", "_high")]
                    for measure in MEASURES
                },
                "lead": f"{100 * row['lead']:+.1f}" if row["masked"] != THESE else "",
                "p": p_value(row["p"]).removeprefix("p ").lstrip("= ") if row["masked"] != THESE else "",
            }
            for row in rows
        ],
    }


def _picture(shown: Shown) -> str:
    """The picture as JPEG data, dim where the unit is not active and with the border between drawn."""
    pixels = shown.pixels.permute(1, 2, 0).numpy()
    pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    active = shown.active.numpy()
    lit = np.where(active[..., None], pixels, DIMMED * pixels)
    inner = np.pad(active, 1)
    edge = active & ~(inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:])
    lit[edge] = (1.0, 0.85, 0.0)
    buffer = io.BytesIO()
    Image.fromarray((lit * 255).round().astype(np.uint8)).save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + text(buffer.getvalue())
