"""The section on weak spots: the first picture of the page."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from weakspot.audit.findings.weak_places import WeakPlaces, strength
from weakspot.audit.page.charts import OUTCOMES, Spec, _chart, _field, _rows, _squares, _tooltip
from weakspot.audit.page.elements import (
    Chart,
    Column,
    Section,
    Thumbnail,
    counts,
    percents,
    table_of,
    texts,
)
from weakspot.statistics.number_format import size_of_change

KEY, TITLE = "spots", "Where the images are weak"
CELL = 38  # pixels of a cell of the map


def spot_section(
    places: WeakPlaces | None, smallest: Sequence[Thumbnail] = (), *, searched: bool = False
) -> Section:
    """How little must change in each place, and the smallest squares that were enough.

    Args:
        places: from `weak_places`.
        smallest: the images with the smallest squares.
        searched: whether the run has the analysis.
    """
    if places is None:
        nothing = "No correctly classified image was changed by an attack, so no square was looked for."
        needed = "The run has no map of weak spots; --analyses weak_spots adds it."
        return Section(KEY, TITLE, [nothing if searched else needed])
    columns: dict[str, Column] = {
        "image": texts("image"), "side of the square, pixels": counts("side"),
        "fraction of the image": percents("fraction"), "first row": counts("top"), "first column": counts("left"),
    }  # fmt: skip
    note = (
        "Each square was found by an attack that may change only its pixels; smaller ones may be enough, too. The map "
        "is an estimate from gradients alone, without an attack: by how much all values of one cell must change, if "
        "only these may. An image whose cell needs more than the whole range from black to white counts as needing "
        "255/255. Cells differ by a pixel in side if the grid does not divide the image, and a larger cell needs less; "
        "the test of a common place corrects for that."
    )
    return Section(
        KEY,
        TITLE,
        places.sentences(),
        charts=[spot_chart(places)] if places.median.size else (),
        galleries=[("Smallest squares found", smallest)] if smallest else (),
        tables=[table_of("spots", places.squares, columns)],
        notes=[note],
    )


def spot_chart(places: WeakPlaces) -> Chart:
    """The median change needed in each cell, on a logarithmic scale."""
    rows, columns = places.median.shape
    down, across = (axis.ravel() for axis in np.indices(places.median.shape))
    table = pd.DataFrame(
        {
            "row": down + 1,
            "column": across + 1,
            "needed": [size_of_change(size, "linf") for size in places.median.ravel()],
            # In units of 1/255, as the caption says, to fit into the cell.
            "text": [size_of_change(size, "linf").removesuffix("/255") for size in places.median.ravel()],
            "strength": strength(places.median).ravel(),
        }
    )
    shared: Spec = {
        "x": _field("column", "ordinal", title=None, axis=None),
        "y": _field("row", "ordinal", title=None, axis=None),
        "tooltip": _tooltip("row", "column", "needed"),
    }
    layers = _squares(OUTCOMES["fooled"], "strength", _field("text", "nominal"), shared)
    chart = _chart(
        "Change needed in each place, in steps of 1/255",
        "Median over images of the change that is needed if only this part of the image may change, estimated from "
        "gradients; stronger colors need less.",
        {"datasets": {"rows": _rows(table)}, "layer": layers},
        CELL * rows,
    )
    # Squares, whatever the width of the page.
    return Chart(chart.title, {**chart.spec, "width": CELL * columns}, chart.meaning, chart.group)
