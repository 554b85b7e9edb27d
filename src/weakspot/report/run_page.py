"""The page of a run: a whole data set in one self-contained HTML file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weakspot.report.charts import CONFIG, libraries, packed
from weakspot.report.rendering import rendered
from weakspot.report.sections import Section, Table

SHOWN = 200  # rows of a table that are on the page at once


@dataclass(frozen=True)
class Heading:
    """What stands on top.

    Attributes:
        title: whose report it is.
        subtitle: how much was done.
        warning: what keeps the numbers from being final; nothing where it is empty.
        facts: (number, what it is) each.
        sentences: what was found, in words.
    """

    title: str
    subtitle: str
    warning: str
    facts: Sequence[tuple[str, str]]
    sentences: Sequence[str]


def run_page(
    heading: Heading, sections: Sequence[Section], made: Mapping[str, str], questions: Mapping[str, str]
) -> str:
    """The report as HTML; whatever came from outside is escaped.

    Args:
        heading: of the page.
        sections: in this order.
        made: how it came about.
        questions: how to ask further: shell and python.
    """
    drawn = [chart for section in sections for chart in section.charts]
    return rendered(
        "run.html",
        styles=["run.css"],
        script="run.js",
        heading=heading,
        sections=sections,
        made=dict(made),
        folder=questions,
        shown=SHOWN,
        libraries=packed(libraries()) if drawn else "",
        drawings=packed(json.dumps({"config": CONFIG, "specs": [dict(chart.spec) for chart in drawn]})),
        numbers={id(chart): number for number, chart in enumerate(drawn)},
        identity=id,
        rest={
            table.name: _rest(table)
            for section in sections
            for table in section.tables
            if len(table.rows) > SHOWN
        },
    )


def _rest(table: Table) -> list[list[Any]]:
    """The rows that are not written down but come when the reader sorts or filters."""
    return [[[cell.text, _order(cell.order), cell.aside] for cell in row] for row in table.rows[SHOWN:]]


def _order(order: float | str) -> float | str | None:
    return None if isinstance(order, float) and math.isnan(order) else order
