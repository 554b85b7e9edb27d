"""Sections on what was tested: sizes, regions against controls, scores against chance, perturbations, layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from weakspot.audit.findings.curves import OUTCOMES, RANDOM_EDIT
from weakspot.audit.page.charts import budget_chart, layer_chart
from weakspot.audit.page.sections import (
    Cell,
    Section,
    Table,
    count_cell,
    number_cell,
    percent_cell,
    score_title,
    text_cell,
)
from weakspot.audit.page.sentences import (
    NAMED,
    Row,
    budget_sentences,
    finding_sentences,
    heading,
    layer_sentences,
    type_sentences,
)
from weakspot.explanations.locality_by_radius import locality_sentence
from weakspot.statistics.number_format import p_value

MAX_ABREAST = (
    12  # attacks x regions whose layer curves are shown at once; of more, the reader chooses an attack
)


def _p_cell(p: float) -> Cell:
    return Cell("" if math.isnan(p) else p_value(p).removeprefix("p = ").removeprefix("p "), p)


def budget_section(curves: pd.DataFrame, contrasts: pd.DataFrame, compared: Sequence[str] = ()) -> Section:
    """Which sizes of change fool how many images in which region, and whether its controls are fooled as well.

    Args:
        curves: from `budget_curves`.
        contrasts: from `region_contrasts`.
        compared: `contrast_sentences` of the contrasts.
    """
    key, name = "sizes", "Size of change needed, by region"
    if curves.empty and contrasts.empty:
        needed = (
            "The run has no sizes to compare: several budgets (--budget linf:1/255,linf:4/255) or a minimal-norm "
            "attack give curves, and --controls adds controls of equal area."
        )
        return Section(key, name, [needed])
    sentences = [*budget_sentences(curves), *compared]
    if contrasts.empty:
        sentences.append(
            "The run has no controls, so a region may be fooled more often only because of its area or its position; "
            "--controls adds them."
        )
    charts = [
        budget_chart(f"{attack}, {norm}", rows)
        for (attack, norm), rows in curves.groupby(["attack", "norm"], sort=False)
    ]
    tables = [_curve_table(curves)] if contrasts.empty else [_contrast_table(contrasts), _curve_table(curves)]
    note = (
        "The controls are the regions of other images of the run, chosen to be within a tenth of the region's area and "
        "used unchanged, and the region shifted within the image. A region is called weak, or stronger, if q is at "
        "most .05, the interval excludes zero and the difference is at least 5 points (a factor of 1.1 for sizes) "
        "against both kinds, on at least 40 images. p tests whether the outcomes of region and controls are "
        "exchangeable within each image; q is p corrected for the number of comparisons (Benjamini and Hochberg). For "
        "the measure fooled, a larger value means a weaker region. For the measure smallest size, a smaller value "
        "does, and the difference is log2 of the controls' size over the region's."
    )
    choose = "Attack and norm" if len(charts) > 1 else ""
    notes = [] if contrasts.empty else [note]
    return Section(key, name, sentences, charts=charts, choose=choose, tables=tables, notes=notes)


def _contrast_table(contrasts: pd.DataFrame) -> Table:
    rows = [
        [
            text_cell(row["attack"]), text_cell(row["region"]),
            text_cell(f"{row['control']} ({row['draws']})" if row["draws"] > 1 else row["control"]),
            percent_cell(row["region_fraction"]), percent_cell(row["control_fraction"]), count_cell(row["images"]),
            text_cell(f"{row['measure']} {row['norm']}".strip()), number_cell(row["region_value"]),
            number_cell(row["control_value"]), number_cell(row["difference"], row["low"], row["high"]),
            _p_cell(row["p"]), _p_cell(row["q"]),
        ]
        for row in contrasts.to_dict("records")
    ]  # fmt: skip
    columns = (
        "attack", "region", "control", "area", "control's area", "images", "measure", "in the region",
        "in the controls", "difference [95%]", "p", "q",
    )  # fmt: skip
    return Table("contrasts", columns, rows)


def _curve_table(curves: pd.DataFrame) -> Table:
    """The end of every curve, and its sizes at quarters of the images."""
    rows = []
    for (attack, norm, region), curve in curves.groupby(["attack", "norm", "region"], sort=False):
        ordered = curve.sort_values("size")
        end = ordered.iloc[-1]
        quarters = [float(ordered[ordered["fooled"] >= part]["size"].min()) for part in (0.25, 0.5, 0.75)]
        rows.append(
            [
                text_cell(attack), text_cell(norm), text_cell(region), text_cell("yes" if end["control"] else "no"),
                count_cell(end["images"]), *map(number_cell, quarters), number_cell(float(end["size"])),
                percent_cell(end["fooled"], end["low"], end["high"]),
            ]
        )  # fmt: skip
    columns = (
        "attack", "norm", "region", "control", "images", "size that fools 25%", "50%", "75%", "largest size",
        "fooled at that size",
    )  # fmt: skip
    return Table("sizes", columns, rows)


def finding_section(findings: pd.DataFrame, not_tested: str = "") -> Section:
    """The means of all scores, and whether attacks act where the network looks.

    Args:
        findings: from `score_findings`.
        not_tested: why attacks are not compared with where the network looks; empty if they are.
    """
    key, name = "findings", "Do attacks act where the network looks?"
    if findings.empty:
        return Section(
            key, name, ["The run has no scores to test; --analyses overlap,promotion,propagation adds them."]
        )
    rows = [
        [
            text_cell(row["attack"]), text_cell(row["region"]), text_cell(score_title(row["score"])),
            count_cell(row["images"]), number_cell(row["mean"], row["low"], row["high"]), number_cell(row["null"]),
            number_cell(row["excess"], row["excess_low"], row["excess_high"]), _p_cell(row["p"]), _p_cell(row["q"]),
            count_cell(row["alone"]), number_cell(row["shifted"]),
        ]
        for row in findings.to_dict("records")
    ]  # fmt: skip
    columns = (
        "attack", "region", "score", "images", "mean [95%]", "with other images", "difference [95%]", "p", "q",
        "images individually significant", "shifted within this image",
    )  # fmt: skip
    note = (
        "Only attacks on the whole image are tested: a confined attack can only act where it is allowed "
        "to. Scores of the overlap analysis are compared with the same attack and the importance maps of the other "
        "images of the run (at most 1000 images; maps are averaged to at most 64 sites per side). The maps are "
        "permuted among the images for p, which needs 10 images; a test of a single image needs 19 others. "
        '"Shifted within this image" is the mean with the map shifted against its own image: attacks and attention '
        "both favor the middle of an image, so a difference from this value may reflect only that."
    )
    sentences = [*finding_sentences(findings), *([not_tested] if not_tested else [])]
    return Section(key, name, sentences, tables=[Table("findings", columns, rows)], notes=[note])


def layer_section(curves: pd.DataFrame) -> Section:
    """How the change spreads through the layers.

    Args:
        curves: from `layer_curves`.
    """
    key, name = "depth", "How the change travels through the layers"
    if curves.empty:
        return Section(
            key,
            name,
            ["The run stored no curves over the layers; --analyses propagation, with maps, adds them."],
        )
    charts, last, rows = [], [], []
    cells = len(curves[["attack", "region"]].drop_duplicates())
    for (measure, attack, region), curve in curves.groupby(["measure", "attack", "region"], sort=False):
        highest = curves[curves["measure"] == measure][["mean", "high"]].max().max()
        if curve["mean"].notna().any():
            group = f"{measure}, {attack}" if cells > MAX_ABREAST else str(measure)
            charts.append(
                layer_chart(f"{measure}: {heading(str(attack), str(region))}", group, curve, float(highest))
            )
        at_end = curve[(curve["place"] == curve["place"].max()) & (curve["images"] > 0)]
        ends: dict[str, Row] = {row["outcome"]: row for row in at_end.to_dict("records")}
        if measure == curves["measure"].iloc[0]:
            last.append((ends.get("fooled"), ends.get("withstood")))
        rows.append(
            [
                *map(
                    text_cell, (measure, attack, region, next(iter(ends.values()))["layer"] if ends else None)
                ),
                *(_end_cell(ends.get(outcome)) for outcome in (*OUTCOMES, RANDOM_EDIT)),
                *(count_cell(ends[outcome]["images"] if outcome in ends else 0) for outcome in OUTCOMES),
            ]
        )
    columns = (
        "measure", "attack", "region", "last layer", "fooled [95%]", "withstood [95%]", "random edit [95%]",
        "images fooled", "images that withstood",
    )  # fmt: skip
    note = (
        "Spread is the fraction of a layer's sites that change by more than a tenth of the layer's peak in the clean "
        "image; reach is the largest change divided by that peak. Only images that are correctly classified without an "
        "attack count, and a random edit of the attack's size is shown for comparison. Intervals of a mean "
        "(bootstrap-t) need 20 images; of more than 1,000 images, 1,000 evenly spaced ones are used."
    )
    table = Table("depth", columns, rows)
    return Section(
        key, name, layer_sentences(last), charts=charts, choose="What is drawn", tables=[table], notes=[note]
    )


def _end_cell(row: Row | None) -> Cell:
    return number_cell(row["mean"], row["low"], row["high"]) if row else number_cell(math.nan)


def type_section(types: pd.DataFrame) -> list[Section]:
    """How many perturbations promote the target, suppress the label, or both; no section if no type is known.

    Args:
        types: from `perturbation_types`.
    """
    sentences = type_sentences(types)
    if not sentences:
        return []
    rows = [
        [
            text_cell(row["attack"]), text_cell(row["region"]), text_cell(row["type"]), count_cell(row["count"]),
            count_cell(row["images"]), percent_cell(row["fraction"], row["low"], row["high"]),
        ]
        for row in types.to_dict("records")
    ]  # fmt: skip
    columns = ("attack", "region", "type", "images of this type", "images fooled", "fraction [95%]")
    note = (
        "A perturbation is promotion-dominated if it raises the target's logit by more than twice what it takes from "
        "the label's, suppression-dominated in the opposite case, and balanced otherwise (Xu et al. 2019, arXiv "
        "1904.02057). Only images that are correctly classified, then fooled, count; intervals are exact "
        "(Clopper-Pearson)."
    )
    tables = [Table("types", columns, rows)]
    return [Section("types", "Promotion and suppression", sentences, tables=tables, notes=[note])]


def locality_section(table: pd.DataFrame) -> list[Section]:
    """Where else the changed pixel of an attack works, by distance; no section if no attack changed one pixel.

    Args:
        table: from `pixel_localities`.
    """
    if table.empty:
        return []
    sentences = [
        f"{heading(str(attack), str(region))}: {locality_sentence(rows)}"
        for (attack, region), rows in list(table.groupby(["attack", "region"], sort=False))[:NAMED]
    ]
    rows = [
        [
            text_cell(row["attack"]), text_cell(row["region"]), text_cell(str(row["radius"])),
            count_cell(row["images"]), percent_cell(row["rate"], row["low"], row["high"]),
            number_cell(row["excess"], row["excess_low"], row["excess_high"]), count_cell(row["failed_images"]),
            percent_cell(row["failed_rate"], row["failed_low"], row["failed_high"]),
        ]
        for row in table.to_dict("records")
    ]  # fmt: skip
    columns = (
        "attack", "region", "moved by", "attacks that fooled", "still fools [95%]", "excess over random sites [95%]",
        "attacks that failed", "fools when moved [95%]",
    )  # fmt: skip
    note = (
        "Rates are means over images of the fraction of sites at that distance (in pixels, along either axis) where "
        "the attack's pixel value changes the class from the label. Failed attacks are the control. Intervals of rates "
        "are exact, with as many trials as images; an interval of the excess needs 20 images."
    )
    tables = [Table("locality", columns, rows)]
    return [Section("locality", "The same pixel at other sites", sentences, tables=tables, notes=[note])]
