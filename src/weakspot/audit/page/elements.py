"""Elements of a run's page: sections, tables, cells and thumbnails, as plain values that the template writes."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from weakspot.audit.findings.outcomes import WHOLE_IMAGE
from weakspot.statistics.number_format import number, p_value, percent

TITLES = {
    "margin_clean": "margin before the attack",
    "margin_adversarial": "margin after the attack",
    "confidence_clean": "confidence in the label before the attack",
    "confidence_adversarial": "confidence in the label after the attack",
    "linf": "largest change of a channel (linf)",
    "l2": "L2 norm of the change",
    "pixels": "pixels changed",
    "ssim_windowed": "mean SSIM over sliding windows (ssim_windowed)",
}
Row = Mapping[Hashable, Any]  # of a data frame


@dataclass(frozen=True)
class Chart:
    """A chart for the page.

    Attributes:
        title: the heading, and the entry in a list to choose from.
        spec: the Vega-Lite specification.
        meaning: what it shows, in one sentence.
        group: charts of one group are shown together if the reader chooses among groups.
    """

    title: str
    spec: Mapping[str, object]
    meaning: str
    group: str

    def __repr__(self) -> str:
        return f"Chart({self.title!r})"


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, the value it is sorted by, and small print below it, such as an interval."""

    text: str
    order: float | str
    small: str = ""


@dataclass(frozen=True)
class Table:
    """A table that the reader can unfold, sort and, if it is long, filter.

    Attributes:
        name: unique on the page.
        columns: headings.
        rows: one cell per column.
    """

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def __repr__(self) -> str:
        return f"Table({self.name!r}, {len(self.rows)} rows x {len(self.columns)} columns)"


@dataclass(frozen=True)
class Thumbnail:
    """An attacked image.

    Attributes:
        name: of the image.
        caption: the outcome.
        pictures: (title, data URL) pairs; empty if the run stored no maps. A picture that would be blank has no URL,
            and its title says why.
        pixelated: whether it is so small that its pixels are drawn as squares.
    """

    name: str
    caption: str
    pictures: Sequence[tuple[str, str]]
    pixelated: bool

    def __repr__(self) -> str:
        return f"Thumbnail({self.name!r}: {self.caption})"


@dataclass(frozen=True)
class Section:
    """One question and its answer.

    Attributes:
        key: the anchor in the page's address.
        title: the question, in short.
        sentences: the answer.
        charts: shown below the sentences.
        choose: label of a list from which the reader chooses one group of charts; if empty, all are shown.
        galleries: (heading, images) pairs.
        tables: the numbers, folded.
        notes: how to read them, folded with them.
    """

    key: str
    title: str
    sentences: Sequence[str]
    charts: Sequence[Chart] = ()
    choose: str = ""
    galleries: Sequence[tuple[str, Sequence[Thumbnail]]] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()

    @property
    def is_empty(self) -> bool:
        """Whether the run has nothing to show here: the sentences say why."""
        return not (self.charts or self.galleries or self.tables)

    def __repr__(self) -> str:
        parts = f"{len(self.sentences)} sentences, {len(self.charts)} charts, tables: {list(self.tables)}"
        return f"Section({self.key!r}, {parts})"


def text_cell(text: object) -> Cell:
    """A cell of text; anything else, for example a missing value, is left empty."""
    text = text if isinstance(text, str) else ""
    return Cell(text, text.casefold())


def count_cell(count: float) -> Cell:
    """A cell with an integer; empty for NaN."""
    return Cell("" if math.isnan(count) else f"{int(count):,}", float(count))


def percent_cell(value: float, low: float = math.nan, high: float = math.nan) -> Cell:
    """A cell with a fraction and its interval, if there is one."""
    if math.isnan(value):
        return Cell("", math.nan)
    return Cell(percent(value), value, "" if math.isnan(low) else f"{percent(low)} to {percent(high)}")


def number_cell(value: float, low: float = math.nan, high: float = math.nan) -> Cell:
    """A cell with a number and its interval, if there is one."""
    if math.isnan(value):
        return Cell("", math.nan)
    return Cell(number(value), value, "" if math.isnan(low) else f"{number(low)} to {number(high)}")


Column = Callable[[Row], Cell]  # makes the cell of a row


def texts(key: str) -> Column:
    """A column of texts."""
    return lambda row: text_cell(row[key])


def counts(key: str) -> Column:
    """A column of integers."""
    return lambda row: count_cell(row[key])


def percents(key: str, *interval: str) -> Column:
    """A column of fractions, with the columns of their intervals."""
    return lambda row: percent_cell(row[key], *(row[end] for end in interval))


def numbers(key: str, *interval: str) -> Column:
    """A column of numbers, with the columns of their intervals."""
    return lambda row: number_cell(row[key], *(row[end] for end in interval))


def p_values(key: str) -> Column:
    """A column of p values."""
    return lambda row: Cell("" if math.isnan(row[key]) else p_value(row[key], ""), row[key])


def table_of(name: str, rows: pd.DataFrame, columns: Mapping[str, Column]) -> Table:
    """A table with a row for each row of a frame; `columns` maps headings to columns."""
    cells = [[cell(row) for cell in columns.values()] for row in rows.to_dict("records")]
    return Table(name, list(columns), cells)


def score_title(score: str) -> str:
    """A score's name for the reader."""
    return TITLES.get(score, score.replace("_", " "))


def heading(attack: str, region: str) -> str:
    """A cell in short, for tables and charts: "pgd · cam"."""
    return f"{attack} · {'whole image' if region == WHOLE_IMAGE else region}"
