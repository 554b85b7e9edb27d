"""Sections on scores: their distributions and nulls, kinds of perturbations, single pixels, and changes in the layers.

Each sentence states what the numbers support, with its interval and no more.
"""

import math
from collections.abc import Sequence

import pandas as pd

from weakspot.audit.findings.curves import OUTCOMES, RANDOM_EDIT
from weakspot.audit.findings.distributions import Distributions
from weakspot.audit.findings.outcomes import in_region
from weakspot.audit.page.charts import histogram_chart, layer_chart
from weakspot.audit.page.elements import (
    Cell,
    Chart,
    Column,
    Row,
    Section,
    counts,
    heading,
    number_cell,
    numbers,
    p_values,
    percents,
    score_title,
    table_of,
    text_cell,
    texts,
)
from weakspot.audit.page.outcome_sections import intervals_are_apart
from weakspot.explanations.locality_by_radius import locality_sentence
from weakspot.statistics.number_format import counted, number, p_value, with_interval

MAX_Q = 0.05  # up to which a difference is called one
NAMED = 4  # attacks x regions that get a sentence of their own
# Attacks x regions whose layer curves are shown at once; of more, the reader chooses an attack.
MAX_ABREAST = 3


def _cell(row: Row) -> str:
    return f"{row['attack']} {in_region(row['region'])}"


def distribution_section(spread: Distributions) -> Section:
    """How every score is distributed."""
    charts = []
    for score, of_score in spread.bins.groupby("score", sort=False):
        summaries = spread.summaries[(spread.summaries["score"] == score) & (spread.summaries["images"] > 0)]
        headings = {
            (row["attack"], row["region"]): f"{heading(row['attack'], row['region'])}: median "
            f"{number(row['median'])}, {counted(row['images'])}"
            for row in summaries.to_dict("records")
        }
        cells = zip(of_score["attack"], of_score["region"], strict=True)
        bins = of_score[[cell in headings for cell in cells]]
        if len(bins):
            charts.append(histogram_chart(score_title(str(score)), bins, headings))
    columns: dict[str, Column] = {
        "score": lambda row: text_cell(score_title(row["score"])), "attack": texts("attack"),
        "region": texts("region"), "images": counts("images"), "unknown": counts("missing"), "mean": numbers("mean"),
        "median": numbers("median"),
    }  # fmt: skip
    return Section(
        "distributions",
        "Distributions",
        _margin_sentences(spread.summaries),
        charts=charts,
        choose="Score",
        tables=[table_of("distributions", spread.summaries, columns)],
        notes=["If a few values lie far outside, the outermost bars include everything beyond them."],
    )


def _margin_sentences(summaries: pd.DataFrame) -> list[str]:
    """The smallest and the largest median of the margins after an attack."""
    margins = summaries[(summaries["score"] == "margin_adversarial") & (summaries["images"] > 0)]
    if margins.empty:
        return ["No image has a known margin."]
    ranked: Sequence[Row] = margins.sort_values("median", kind="stable").to_dict("records")
    least, most = ranked[0], ranked[-1]
    sentence = (
        "The margin is the logit of the label minus the largest other logit, for the attacked image before it is "
        "rounded to 8 bits; if it is below zero, that image is misclassified. The median margin is "
        f"{number(least['median'])} after {_cell(least)}"
    )
    return [sentence + (f" and {number(most['median'])} after {_cell(most)}." if len(ranked) > 1 else ".")]


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
    columns: dict[str, Column] = {
        "attack": texts("attack"), "region": texts("region"),
        "score": lambda row: text_cell(score_title(row["score"])), "images": counts("images"),
        "mean [95%]": numbers("mean", "low", "high"), "with other images": numbers("null"),
        "difference [95%]": numbers("excess", "excess_low", "excess_high"), "p": p_values("p"), "q": p_values("q"),
        "images individually significant": counts("alone"), "shifted within this image": numbers("shifted"),
    }  # fmt: skip
    note = (
        "Only attacks on the whole image are tested: a confined attack can only act where it is allowed "
        "to. Scores of the overlap analysis are compared with the same attack and the importance maps of the other "
        "images of the run (at most 1000 images; maps are averaged to at most 64 sites per side). The maps are "
        "permuted among the images for p, which needs 10 images; a test of a single image needs 19 others. "
        '"Shifted within this image" is the mean with the map shifted against its own image: attacks and attention '
        "both favor the middle of an image, so a difference from this value may reflect only that."
    )
    sentences = [*finding_sentences(findings), *([not_tested] if not_tested else [])]
    return Section(key, name, sentences, tables=[table_of("findings", findings, columns)], notes=[note])


def finding_sentences(findings: pd.DataFrame) -> list[str]:
    """Whether attacks act where the network looks, and which other scores differ from their null values."""
    tested = findings[findings["q"].notna()]
    located = tested["against"] == "other images"
    sentences = [_location_sentence(rows) for _, rows in tested[located].groupby("attack", sort=False)]
    others = tested[~located]
    different = others[others["q"] <= MAX_Q].sort_values("q")
    if len(others):
        differ = f"{len(different)} {'differs' if len(different) == 1 else 'differ'}"
        sentences.append(
            f"Of {counted(len(others), 'other mean score')} tested against a null value, "
            f"{differ if len(different) else 'none was shown to differ'} from it (q at most .05)."
        )
    for row in different.head(2).to_dict("records"):
        excess = _number_with_interval(row["excess"], row["excess_low"], row["excess_high"])
        sentences.append(
            f"The mean {score_title(row['score'])} of {_cell(row)} is {number(row['mean'])}; its null value is "
            f"{number(row['null'])} (difference {excess}, {counted(int(row['compared']))})."
        )
    return sentences


def _number_with_interval(value: float, low: float, high: float) -> str:
    """Means of few images, and of equal ones, have no interval."""
    return number(value) + ("" if math.isnan(low) else f" [{number(low)}, {number(high)}]")


def _location_sentence(findings: pd.DataFrame) -> str:
    """For one attack on the whole image: whether it acts where the network looks, more than in other images."""
    rows: Sequence[Row] = findings.sort_values("q", kind="stable").to_dict("records")
    attack = _cell(rows[0])
    clear = [row for row in rows if row["q"] <= MAX_Q]
    if not clear:
        images = counted(int(max(row["compared"] for row in rows)))
        return (
            f"There is not enough evidence that {attack} acts more, or less, where the network looks than other "
            f"images' importance maps would predict ({images})."
        )
    if len({row["excess"] > 0 for row in clear}) > 1:
        statistics = "; ".join(_beside_null(row) for row in clear)
        return f"Where {attack} acts is unclear because the statistics differ in direction: {statistics}."
    first = clear[0]
    more = first["excess"] > 0
    sentence = (
        f"{attack} acts {'more' if more else 'less'} where the network looks than other images' importance maps would "
        f"predict: {_beside_null(first)}"
    )
    if more and not math.isnan(first["alone"]):
        images = counted(int(first["compared"]))
        verb = "is" if int(first["alone"]) == 1 else "are"
        sentence += f"; {int(first['alone']):,} of {images} {verb} individually significant (q over images at most .1)"
    return sentence + "."


def _beside_null(row: Row) -> str:
    return (
        f"{score_title(row['score'])} is {number(row['null'] + row['excess'])} with the image's own map and "
        f"{number(row['null'])} with other images' maps ({counted(int(row['compared']))}, {p_value(row['q'], 'q')})"
    )


def type_section(types: pd.DataFrame) -> list[Section]:
    """How many perturbations promote the target, suppress the label, or both; no section if no type is known.

    Args:
        types: from `perturbation_types`.
    """
    groups = list(types[types["images"] > 0].groupby(["attack", "region"], sort=False))
    if not groups:
        return []
    sentences = []
    for (attack, region), rows in groups[:NAMED]:
        parts = [
            f"{with_interval(row['fraction'], row['low'], row['high'])} are {row['type']}"
            for row in rows.sort_values("count", ascending=False, kind="stable").to_dict("records")
        ]
        sentences.append(
            f"Of {counted(int(rows['images'].iloc[0]), 'perturbation')} of known type with which {attack} "
            f"{in_region(str(region))} fooled an image, {', '.join(parts)}."
        )
    if len(groups) > NAMED:
        more = counted(len(groups) - NAMED, "more combination")
        sentences.append(f"The table has {more} of attack and region.")
    columns: dict[str, Column] = {
        "attack": texts("attack"), "region": texts("region"), "type": texts("type"),
        "images of this type": counts("count"), "images fooled": counts("images"),
        "fraction [95%]": percents("fraction", "low", "high"),
    }  # fmt: skip
    note = (
        "A perturbation is promotion-dominated if it raises the target's logit by more than twice what it takes from "
        "the label's, suppression-dominated in the opposite case, and balanced otherwise (Xu et al. 2019, arXiv "
        "1904.02057). Only images that are correctly classified, then fooled, count; intervals are exact "
        "(Clopper-Pearson)."
    )
    tables = [table_of("types", types, columns)]
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
    columns: dict[str, Column] = {
        "attack": texts("attack"), "region": texts("region"), "moved by": lambda row: text_cell(str(row["radius"])),
        "attacks that fooled": counts("images"), "still fools [95%]": percents("rate", "low", "high"),
        "excess over random sites [95%]": numbers("excess", "excess_low", "excess_high"),
        "attacks that failed": counts("failed_images"),
        "fools when moved [95%]": percents("failed_rate", "failed_low", "failed_high"),
    }  # fmt: skip
    note = (
        "Rates are means over images of the fraction of sites at that distance (in pixels, along either axis) where "
        "the attack's pixel value changes the class from the label. Failed attacks are the control. Intervals of rates "
        "are exact, with as many trials as images; an interval of the excess needs 20 images."
    )
    tables = [table_of("locality", table, columns)]
    return [Section("locality", "The same pixel at other sites", sentences, tables=tables, notes=[note])]


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
    charts: list[Chart] = []
    last, rows = [], []
    cells = len(curves[["attack", "region"]].drop_duplicates())
    for (measure, attack, region), curve in curves.groupby(["measure", "attack", "region"], sort=False):
        highest = curves[curves["measure"] == measure][["mean", "high"]].max().max()
        if curve["mean"].notna().any():
            group = f"{measure}, {attack}" if cells > MAX_ABREAST else str(measure)
            title = f"{measure}: {heading(str(attack), str(region))}"
            charts.append(layer_chart(title, group, curve, float(highest)))
        at_end = curve[(curve["place"] == curve["place"].max()) & (curve["images"] > 0)]
        ends: dict[str, Row] = {row["outcome"]: row for row in at_end.to_dict("records")}
        if measure == curves["measure"].iloc[0]:
            last.append((ends.get("fooled"), ends.get("withstood")))
        layer = next(iter(ends.values()))["layer"] if ends else None
        rows.append({"measure": measure, "attack": attack, "region": region, "layer": layer, "ends": ends})

    def mean(outcome: str) -> Column:
        def cell(row: Row) -> Cell:
            end = row["ends"].get(outcome)
            return number_cell(end["mean"], end["low"], end["high"]) if end else number_cell(math.nan)

        return cell

    def images(outcome: str) -> Column:
        return lambda row: number_cell(row["ends"][outcome]["images"] if outcome in row["ends"] else 0)

    columns: dict[str, Column] = {
        "measure": texts("measure"), "attack": texts("attack"), "region": texts("region"), "last layer": texts("layer"),
        **{f"{outcome} [95%]": mean(outcome) for outcome in (*OUTCOMES, RANDOM_EDIT)},
        "images fooled": images("fooled"), "images that withstood": images("withstood"),
    }  # fmt: skip
    note = (
        "Spread is the fraction of a layer's sites that change by more than a tenth of the layer's peak in the clean "
        "image; reach is the largest change divided by that peak. Only images that are correctly classified without an "
        "attack count, and a random edit of the attack's size is shown for comparison. Intervals of a mean "
        "(bootstrap-t) need 20 images; of more than 1,000 images, 1,000 evenly spaced ones are used."
    )
    table = table_of("depth", pd.DataFrame(rows), columns)
    return Section(
        key, name, [layer_sentence(last)], charts=charts, choose="What is drawn", tables=[table], notes=[note]
    )


def layer_sentence(last: Sequence[tuple[Row | None, Row | None]]) -> str:
    """How far changes reach in the last layer, beside failed attacks, which are the control.

    Args:
        last: (fooled, withstood) rows of the last layer for each attack and region; either may be missing.
    """
    pairs = [(fooled, withstood) for fooled, withstood in last if fooled and withstood]
    if not pairs:
        return (
            "No attack in any region left both images that were fooled and images that withstood, so there is no "
            "control to compare with."
        )
    # The cell with the most images in its smaller group.
    fooled, withstood = max(pairs, key=lambda pair: min(pair[0]["images"], pair[1]["images"]))
    if math.isnan(fooled["low"]) or math.isnan(withstood["low"]):
        doubt = "There are too few images to compare the two."
    elif intervals_are_apart(fooled, withstood):
        more = fooled["mean"] > withstood["mean"]
        doubt = f"Changes that fooled reach {'further' if more else 'less far'} than those of failed attacks."
    else:
        doubt = "The intervals overlap, so the difference may be chance: this measure alone does not explain success."
    means = [_number_with_interval(row["mean"], row["low"], row["high"]) for row in (fooled, withstood)]
    return (
        f"In the last layer ({fooled['layer']}), the {fooled['measure']} of {_cell(fooled)} is {means[0]} "
        f"over {counted(fooled['images'])} that were fooled and {means[1]} over "
        f"{counted(withstood['images'])} that withstood. {doubt}"
    )
