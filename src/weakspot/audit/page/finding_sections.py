"""Sections on what was tested: sizes that fool, regions against controls, scores against chance, depth.

Sections on perturbations: which logits they move, and where else a single changed pixel works.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from weakspot.audit.page.charts import RANDOM, budget_chart, depth_chart
from weakspot.audit.page.outcome_sections import title
from weakspot.audit.page.sentences import (
    Row,
    budget_sentences,
    depth_sentences,
    finding_sentences,
    heading,
    ranged,
    where,
)
from weakspot.explanations.locality_by_radius import locality_sentence
from weakspot.report.sections import Cell, Section, Table, count, figure, fraction, word
from weakspot.report.sections import figure as number
from weakspot.statistics.number_format import counted, p_value

ABREAST = 12  # attacks x regions whose curves are shown at once; of more one attack is chosen


def budget_section(curves: pd.DataFrame, contrasts: pd.DataFrame, compared: Sequence[str] = ()) -> Section:
    """Which size of change fools how many images in which region, and whether its controls do as well.

    Args:
        curves: columns attack, region, control, norm, size, fooled, low, high, images.
        contrasts: columns attack, region, control, draws, region_fraction, control_fraction, images, measure, norm,
            here,
            there, difference, low, high, p, q.
        compared: each region beside its controls, in a sentence.
    """
    key, name = "sizes", "How much it takes in each region"
    if curves.empty and contrasts.empty:
        return Section(
            key,
            name,
            [
                (
                    "The run has nothing to compare sizes by: several budgets (--budget linf:1/255,linf:4/255) or an "
                    "attack that looks for the smallest change give curves, and --controls adds controls of equal area."
                )
            ],
        )
    sentences = [*budget_sentences(curves), *compared]
    if contrasts.empty:
        sentences.append(
            "There are no controls, so a region may fall more often for its area or its place; --controls adds them."
        )
    charts = [
        budget_chart(f"{attack}, {norm}", mine)
        for (attack, norm), mine in curves.groupby(["attack", "norm"], sort=False)
    ]
    listed = [
        [
            word(row["attack"]), word(row["region"]), word(_control(row)), fraction(row["region_fraction"]),
            fraction(row["control_fraction"]), count(row["images"]), word(f"{row['measure']} {row['norm']}".strip()),
            figure(row["here"]),
            figure(row["there"]), figure(row["difference"], row["low"], row["high"]), _p(row["p"]), _p(row["q"]),
        ]
        for row in contrasts.to_dict("records")
    ]  # fmt: skip
    columns = (
        "attack", "region", "control", "area", "control's area", "images", "measure", "here", "there",
        "difference [95%]", "p", "q",
    )  # fmt: skip
    return Section(
        key,
        name,
        sentences,
        charts=charts,
        choose="Attack and norm" if len(charts) > 1 else "",
        tables=[Table("contrasts", columns, listed), _curve_table(curves)] if listed else [_curve_table(curves)],
        notes=[
            ("Controls lie in the same image: the regions of other images of the run, chosen to be within a tenth of "
            "the region's area and left as they are, and the region shifted. A region is called weak, or stronger, if "
            "q is at most .05, the interval leaves zero out and the difference is at least 5 points (of sizes, a "
            "factor of 1.1) against both kinds, on at least 40 images. p asks whether the region's outcome could as "
            "well be any control's; q is p corrected for the number of comparisons (Benjamini and Hochberg). Measured "
            "as fooled, more is weaker; measured as smallest size, less is weaker, and the difference is log2 of there "
            "over here.")
        ]
        if listed
        else [],
    )  # fmt: skip


def _control(row: Row) -> str:
    """A kind of control, and how many of it each image has."""
    return f"{row['control']} ({row['draws']})" if row["draws"] > 1 else str(row["control"])


def _curve_table(curves: pd.DataFrame) -> Table:
    """The end of every curve, and its size at quarters of the images."""
    listed = []
    for (attack, norm, region), mine in curves.groupby(["attack", "norm", "region"], sort=False):
        ordered = mine.sort_values("size")
        end = ordered.iloc[-1]
        sizes = [ordered[ordered["fooled"] >= part]["size"].min() for part in (0.25, 0.5, 0.75)]
        listed.append(
            [
                word(attack), word(norm), word(region), word("yes" if end["control"] else "no"), count(end["images"]),
                *(figure(float(size)) for size in sizes), figure(float(end["size"])),
                fraction(end["fooled"], end["low"], end["high"]),
            ]
        )  # fmt: skip
    columns = (
        "attack", "norm", "region", "control", "images", "size that fools 25%", "50%", "75%", "largest size",
        "fooled by then",
    )  # fmt: skip
    return Table("sizes", columns, listed)


def finding_section(found: pd.DataFrame, untested: str = "") -> Section:
    """The means of all scores, and whether attacks act where the network looks.

    Args:
        found: columns attack, region, score, images, mean, low, high, null, excess, excess_low, excess_high, p,
            compared, alone, shifted, q.
        untested: why attacks are not compared with where the network looks; empty if they are.
    """
    key, name = "findings", "Do attacks act where the network looks?"
    if found.empty:
        return Section(
            key,
            name,
            ["There are no scores to be tested; --analyses overlap,promotion,propagation adds them."],
        )
    listed = [
        [
            word(row["attack"]), word(row["region"]), word(title(row["score"])), count(row["images"]),
            figure(row["mean"], row["low"], row["high"]), figure(row["null"]),
            figure(row["excess"], row["excess_low"], row["excess_high"]), _p(row["p"]), _p(row["q"]),
            count(row["alone"]), figure(row["shifted"]),
        ]
        for row in found.to_dict("records")
    ]  # fmt: skip
    columns = (
        "attack", "region", "score", "images", "mean [95%]", "with other images", "difference [95%]", "p", "q",
        "images above by themselves", "shifted within this image",
    )  # fmt: skip
    note = (
        "Tested are attacks that were free to change any pixel: where a confined attack acts follows from where it was "
        "allowed to. Scores of the overlap analysis are compared with the same attack and the importance maps of the "
        "other images of the run (at most 1000 images, maps averaged to at most 64 sites a side); p permutes the maps "
        "among the images, from 10 images on. Images by themselves need 19 others. Shifted within this image is the "
        "mean where the map is shifted against its own image: attacks and attention both favor the middle, so a "
        "difference from it shows no more than that."
    )
    said = [*finding_sentences(found), *([untested] if untested else [])]
    return Section(key, name, said, tables=[Table("findings", columns, listed)], notes=[note])


def depth_section(depths: pd.DataFrame) -> Section:
    """How the change spreads through the layers.

    Args:
        depths: columns measure, attack, region, outcome, place, layer, mean, low, high, images.
    """
    key, name = "depth", "How the change travels through the layers"
    if depths.empty:
        return Section(
            key,
            name,
            ["The run keeps no curves over the layers; --analyses propagation, with maps, adds them."],
        )
    charts, last, listed = [], [], []
    groups = depths.groupby(["measure", "attack", "region"], sort=False)
    cells = len(depths[["attack", "region"]].drop_duplicates())
    for (measure, attack, region), mine in groups:
        where = {"attack": attack, "region": region}
        highest = depths[depths["measure"] == measure][["mean", "high"]].max().max()
        if mine["mean"].notna().any():
            group = f"{measure}, {attack}" if cells > ABREAST else str(measure)
            charts.append(
                depth_chart(f"{measure}: {heading(where)}", group, str(measure), mine, float(highest))
            )
        ends: dict[str, Row] = {
            row["outcome"]: row
            for row in mine[mine["place"] == mine["place"].max()].to_dict("records")
            if row["images"]
        }  # fmt: skip
        if measure == depths["measure"].iloc[0]:
            last.append((ends.get("fooled"), ends.get("held")))
        told = next(iter(ends.values()), None)
        listed.append(
            [word(measure), word(attack), word(region), word(told["layer"] if told else None)]
            + [
                figure(row["mean"], row["low"], row["high"]) if (row := ends.get(outcome)) else figure(float("nan"))
                for outcome in ("fooled", "held", *RANDOM)
            ]
            + [count(ends[outcome]["images"] if outcome in ends else 0) for outcome in ("fooled", "held")]
        )  # fmt: skip
    columns = (
        "measure", "attack", "region", "last layer", "fooled [95%]", "held [95%]", "random edit [95%]",
        "images fooled", "images that held",
    )  # fmt: skip
    return Section(
        key,
        name,
        depth_sentences(last),
        charts=charts,
        choose="What is drawn",
        tables=[Table("depth", columns, listed)],
        notes=[
            (
                "Spread is the share of a layer's sites that change by over a tenth of the layer's peak in the clean "
                "image, reach the largest change over that peak. Of images that were read rightly before; a random "
                "edit of the attack's size stands beside. Intervals of a mean (bootstrap-t) need 20 images; of "
                "more than 1,000 images, 1,000 evenly spread over the list are read."
            )
        ],
    )


def _p(value: float) -> Cell:
    return Cell("" if math.isnan(value) else p_value(value).removeprefix("p = ").removeprefix("p "), value)


NAMED = 4  # attacks x regions that get a sentence


def type_section(types: pd.DataFrame) -> list[Section]:
    """How many perturbations promote the target, suppress the label, or both; nothing where no type is known.

    Args:
        types: columns attack, region, type, count, images, share, low, high.
    """
    known = types[types["images"] > 0]
    if known.empty:
        return []
    sentences = []
    for (attack, region), rows in known.groupby(["attack", "region"], sort=False):
        parts = [
            f"{ranged(row['share'], row['low'], row['high'])} are {row['type']}"
            for row in rows.sort_values("count", ascending=False, kind="stable").to_dict("records")
        ]
        fooled = counted(int(rows["images"].iloc[0]))
        sentences.append(
            f"Of the perturbations by which {where({'attack': attack, 'region': region})} fooled {fooled}, "
            f"{', '.join(parts)}."
        )
    more = len(sentences) - NAMED
    if more > 0:
        sentences = [*sentences[:NAMED], f"The table has {more} more."]
    listed = [
        [
            word(row["attack"]), word(row["region"]), word(row["type"]), count(row["count"]), count(row["images"]),
            fraction(row["fraction"], row["low"], row["high"]),
        ]
        for row in types.to_dict("records")
    ]  # fmt: skip
    columns = ("attack", "region", "type", "images of this type", "images fooled", "share [95%]")
    return [
        Section(
            "types",
            "Promotion and suppression",
            sentences,
            tables=[Table("types", columns, listed)],
            notes=[
                (
                    "A perturbation is promotion-dominated if it raises the target's logit by more than twice what it "
                    "takes from the label's, suppression-dominated if the other way round, else balanced (Xu et al. "
                    "2019, arXiv 1904.02057). Counted are images that were classified correctly and then fooled; "
                    "intervals are exact (Clopper-Pearson)."
                )
            ],
        )
    ]


def locality_section(table: pd.DataFrame) -> list[Section]:
    """Where else the one changed pixel of an attack works, by distance; nothing where no attack changed one pixel.

    Args:
        table: columns attack, region and those of `locality_table`.
    """
    if table.empty:
        return []
    groups = list(table.groupby(["attack", "region"], sort=False))
    sentences = [
        f"{heading({'attack': attack, 'region': region})}: {locality_sentence(rows)}"
        for (attack, region), rows in groups[:NAMED]
    ]
    listed = [
        [
            word(row["attack"]), word(row["region"]), word(str(row["radius"])), count(row["images"]),
            fraction(row["rate"], row["low"], row["high"]),
            number(row["excess"], row["excess_low"], row["excess_high"]),
            count(row["failed_images"]), fraction(row["failed_rate"], row["failed_low"], row["failed_high"]),
        ]
        for row in table.to_dict("records")
    ]  # fmt: skip
    columns = (
        "attack", "region", "moved by", "attacks that fooled", "still fools [95%]", "lead over random sites [95%]",
        "attacks that failed", "fools when moved [95%]",
    )  # fmt: skip
    return [
        Section(
            "locality",
            "The same pixel at other sites",
            sentences,
            tables=[Table("locality", columns, listed)],
            notes=[
                (
                    "The mean over images of the share of sites at that distance (in pixels, along either axis) where "
                    "the attack's pixel value changes the class from the label. Failed attacks are the control. "
                    "Intervals of rates are exact, with as many trials as images; of the lead only from 20 images up."
                )
            ],
        )
    ]
