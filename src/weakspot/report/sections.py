"""Sections of a run's report: sentences, then pictures, then tables, as plain values that the template writes down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from weakspot.report.charts import Chart


@dataclass(frozen=True)
class Cell:
    """Of a table.

    Attributes:
        text: as it is read.
        order: what it is sorted by.
        aside: what stands small below it, such as an interval.
    """

    text: str
    order: float | str
    aside: str = ""


@dataclass(frozen=True)
class Table:
    """Rows that the reader may sort, and filter where there are many.

    Attributes:
        name: unlike all others of the page.
        columns: headings.
        rows: as many cells each.
        note: what stands below.
    """

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Thumbnail:
    """One image with what was done to it.

    Attributes:
        name: of the image.
        caption: what became of it.
        pictures: title to picture as a data URL; none where the run kept no maps.
        pixelated: whether its pixels are to be seen as such.
    """

    name: str
    caption: str
    pictures: Sequence[tuple[str, str]]
    pixelated: bool


@dataclass(frozen=True)
class Section:
    """One question and its answer.

    Attributes:
        key: in the page's address.
        title: the question, short.
        sentences: the answer in words.
        charts: drawings.
        choose: of the charts one group is shown, chosen from a list with this heading; all of them where it is empty.
        galleries: heading to images.
        tables: the numbers.
        notes: how to read it.
    """

    key: str
    title: str
    sentences: Sequence[str]
    charts: Sequence[Chart] = ()
    choose: str = ""
    galleries: Sequence[tuple[str, Sequence[Thumbnail]]] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()


def word(text: object) -> Cell:
    """A cell of text; what is missing stays empty."""
    said = text if isinstance(text, str) else ""
    return Cell(said, said.casefold())


def count(number: float) -> Cell:
    """A cell with a whole number."""
    return Cell("" if math.isnan(number) else f"{int(number):,}", float(number))


def fraction(value: float, low: float = math.nan, high: float = math.nan) -> Cell:
    """A cell with a share and, where there is one, its interval."""
    if math.isnan(value):
        return Cell("", math.nan)
    return Cell(f"{value:.1%}", value, "" if math.isnan(low) else f"{low:.1%} to {high:.1%}")


def figure(value: float, low: float = math.nan, high: float = math.nan) -> Cell:
    """A cell with a number in three figures and, where there is one, its interval."""
    if math.isnan(value):
        return Cell("", math.nan)
    return Cell(_figures(value), value, "" if math.isnan(low) else f"{_figures(low)} to {_figures(high)}")


def _figures(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
