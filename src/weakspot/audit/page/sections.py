"""Sections of a run's page: sentences, then charts, images and tables, as plain values that the template writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from weakspot.audit.findings.distributions import Classes, Distributions, Extremes
from weakspot.audit.page.charts import Chart, confusion_chart, histogram_chart, robust_chart
from weakspot.audit.page.sentences import (
    class_sentences,
    heading,
    image_sentences,
    margin_sentences,
    robust_sentences,
)

MAX_CLASSES = 20  # of a grid of confusions
MAX_GRIDS = 13
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


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, the value it is sorted by, and small print below it, such as an interval."""

    text: str
    order: float | str
    small: str = ""


@dataclass(frozen=True)
class Table:
    """A table that the reader can sort and, if it is long, filter.

    Attributes:
        name: unique on the page.
        columns: headings.
        rows: one cell per column.
        note: text below the table.
    """

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""

    def __repr__(self) -> str:
        return f"Table({self.name!r}, {len(self.rows)} rows x {len(self.columns)} columns)"


@dataclass(frozen=True)
class Thumbnail:
    """An attacked image.

    Attributes:
        name: of the image.
        caption: the outcome.
        pictures: (title, data URL) pairs; empty if the run stored no maps.
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
        tables: the numbers.
        notes: how to read them.
    """

    key: str
    title: str
    sentences: Sequence[str]
    charts: Sequence[Chart] = ()
    choose: str = ""
    galleries: Sequence[tuple[str, Sequence[Thumbnail]]] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()

    def __repr__(self) -> str:
        parts = f"{len(self.sentences)} sentences, {len(self.charts)} charts, tables: {list(self.tables)}"
        return f"Section({self.key!r}, {parts})"


def text_cell(text: object) -> Cell:
    """A cell of text; anything else, for example a missing value, is left empty."""
    text = text if isinstance(text, str) else ""
    return Cell(text, text.casefold())


def count_cell(number: float) -> Cell:
    """A cell with an integer; empty for NaN."""
    return Cell("" if math.isnan(number) else f"{int(number):,}", float(number))


def percent_cell(value: float, low: float = math.nan, high: float = math.nan) -> Cell:
    """A cell with a fraction and its interval, if there is one."""
    if math.isnan(value):
        return Cell("", math.nan)
    return Cell(f"{value:.1%}", value, "" if math.isnan(low) else f"{low:.1%} to {high:.1%}")


def number_cell(value: float, low: float = math.nan, high: float = math.nan) -> Cell:
    """A cell with a number to three significant digits and its interval, if there is one."""
    if math.isnan(value):
        return Cell("", math.nan)
    interval = "" if math.isnan(low) else f"{_three_digits(low)} to {_three_digits(high)}"
    return Cell(_three_digits(value), value, interval)


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def score_title(score: str) -> str:
    """A score's name for the reader."""
    return TITLES.get(score, score.replace("_", " "))


def robust_section(cells: pd.DataFrame, clean: float, *, eight_bit: bool = True) -> Section:
    """Robust accuracy of every attack in every region.

    Args:
        cells: the fields of `CellSummary` as columns.
        clean: clean accuracy, or NaN.
        eight_bit: whether images were counted as stored with 8 bits.
    """
    rows = [
        [
            text_cell(row["attack"]), text_cell(row["budget"]), text_cell(row["region"]),
            percent_cell(row["region_fraction"]), count_cell(row["images"]), percent_cell(row["robust_accuracy"]),
            Cell("" if math.isnan(row["low"]) else f"{row['low']:.1%} to {row['high']:.1%}", row["low"]),
            count_cell(row["errors"]),
        ]
        for row in cells.to_dict("records")
    ]  # fmt: skip
    columns = ("attack", "budget", "region", "area", "images", "robust accuracy", "95% interval", "errors")
    stored = "as stored in an 8-bit image file" if eight_bit else "before it is rounded to 8 bits"
    return Section(
        "robust",
        "Robust accuracy by attack and region",
        robust_sentences(cells),
        charts=[robust_chart(cells, clean)] if cells["robust_accuracy"].notna().any() else (),
        tables=[Table("robust", columns, rows)],
        notes=[
            (
                f"Robust accuracy is the fraction of images that are classified as their label after the attack, each "
                f"{stored}; images that are misclassified without an attack count as not robust. For minimal-norm "
                "attacks, an image counts as lost only if its change is within the budget in the table. The area is "
                "the region's mean fraction of the image: a larger region is a stronger attack, whatever it covers."
            )
        ],
    )


def distribution_section(spread: Distributions) -> Section:
    """How every score is distributed."""
    charts = []
    for score, of_score in spread.bins.groupby("score", sort=False):
        summaries = spread.summaries[(spread.summaries["score"] == score) & (spread.summaries["images"] > 0)]
        headings = {
            (row["attack"], row["region"]): f"{heading(row['attack'], row['region'])}: median "
            f"{number_cell(row['median']).text}, {row['images']:,} images"
            for row in summaries.to_dict("records")
        }
        cells = zip(of_score["attack"], of_score["region"], strict=True)
        bins = of_score[[cell in headings for cell in cells]]
        if len(bins):
            charts.append(histogram_chart(score_title(str(score)), bins, headings))
    rows = [
        [
            text_cell(score_title(row["score"])), text_cell(row["attack"]), text_cell(row["region"]),
            count_cell(row["images"]), count_cell(row["missing"]), number_cell(row["mean"]), number_cell(row["median"]),
        ]
        for row in spread.summaries.to_dict("records")
    ]  # fmt: skip
    columns = ("score", "attack", "region", "images", "unknown", "mean", "median")
    return Section(
        "distributions",
        "Distributions",
        margin_sentences(spread.summaries),
        charts=charts,
        choose="Score",
        tables=[Table("distributions", columns, rows)],
        notes=["If a few values lie far outside, the outermost bars include everything beyond them."],
    )


def class_section(by_class: Classes) -> Section:
    """Robust accuracy of every class, and the classes that fooled images end in."""
    cells = by_class.cells
    columns = list(dict.fromkeys(zip(cells["attack"], cells["region"], strict=True)))
    robust = {
        (row["label"], row["attack"], row["region"]): percent_cell(row["robust"], row["low"], row["high"])
        for row in cells.to_dict("records")
    }
    ends = {
        row["label"]: Cell(
            row["adversarial_class"],
            row["adversarial_class"].casefold(),
            f"{row['fooled']:,} of {row['of']:,} fooled",
        )
        for row in by_class.adversarial.to_dict("records")
    }
    rows = [
        [
            text_cell(row["name"]),
            count_cell(row["images"]),
            percent_cell(row["clean"]),
            *(robust.get((row["label"], *column), percent_cell(math.nan)) for column in columns),
            ends.get(row["label"], text_cell(None)),
        ]
        for row in by_class.classes.to_dict("records")
    ]
    headings = [heading(attack, region) for attack, region in columns]
    return Section(
        "classes",
        "Classes",
        class_sentences(by_class),
        charts=_confusion_charts(by_class.confusions, columns),
        choose="Classes of fooled images, under",
        tables=[
            Table("classes", ["label", "images", "clean accuracy", *headings, "most often fooled into"], rows)
        ],
        notes=[
            (
                "Percentages under attack are robust accuracy with the exact 95% interval (Clopper and Pearson); with "
                "few images of a class they are wide. The classes of fooled images are counted over all attacks and "
                "regions, for images that are correctly classified without an attack."
            )
        ],
    )


def _confusion_charts(confusions: pd.DataFrame, cells: Sequence[tuple[str, str]]) -> list[Chart]:
    names = set(confusions["label"]) | set(confusions["adversarial_class"])
    if not 1 < len(names) <= MAX_CLASSES:
        return []
    # One grid over everything first, then one per cell.
    total = confusions.groupby(["label", "adversarial_class"])[["fooled"]].sum().reset_index()
    charts = [confusion_chart("all attacks in all regions", total)]
    for attack, region in cells if len(cells) > 1 else ():
        rows = confusions[(confusions["attack"] == attack) & (confusions["region"] == region)]
        if len(rows) and len(charts) < MAX_GRIDS:
            charts.append(confusion_chart(heading(attack, region), rows))
    return charts


def image_section(ends: Extremes, easiest: Sequence[Thumbnail], hardest: Sequence[Thumbnail]) -> Section:
    """The images at both ends, as thumbnails in the same order."""
    sentences = image_sentences(ends)
    shown = [*easiest, *hardest]
    if shown and not any(image.pictures for image in shown):
        sentences.append("The run stored no maps, so that only names are shown; --maps stores pictures.")
    galleries = [("Fooled most easily", easiest), ("Withstood longest", hardest)]
    mapped = any(name == "importance" for image in easiest for name, _ in image.pictures)
    note = "Importance is evidence for the label in the clean image (brighter is more), over the photograph in gray."
    return Section(
        "images",
        "Images",
        sentences,
        galleries=[(name, images) for name, images in galleries if images],
        notes=[note] if mapped else [],
    )
