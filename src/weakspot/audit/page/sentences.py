"""Sentences of a run's page: each states what the numbers support, with its interval and no more."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import pandas as pd

from weakspot.audit.findings.distributions import Classes, Extremes
from weakspot.audit.findings.outcomes import WHOLE_IMAGE, attack_in_region, attack_name, with_interval
from weakspot.audit.findings.summary import no_robust_accuracy
from weakspot.statistics.number_format import counted, number, p_value, percent

LISTED = 6  # regions named in one sentence
MAX_Q = 0.05  # up to which a difference is called one
NAMED = 4  # attacks x regions that get a sentence about their perturbations
Row = Mapping[Hashable, Any]


def heading(attack: str, region: str) -> str:
    """A cell in short, for tables and charts: "pgd · cam"."""
    return f"{attack} · {'whole image' if region == WHOLE_IMAGE else region}"


def _cell(row: Row) -> str:
    return attack_in_region(row["attack"], row["region"])


def _intervals_are_apart(row: Row, other: Row) -> bool:
    return bool(row["high"] < other["low"] or other["high"] < row["low"])


def robust_sentences(cells: pd.DataFrame) -> list[str]:
    """Robust accuracy under each attack, by region. Regions are not ranked, because they differ in area."""
    if not (cells["images"] > 0).any():
        return ["No attack has a known outcome."]
    judged = cells[cells["robust_accuracy"].notna()]
    sentences = []
    for attack, rows in judged.groupby("attack", sort=False):
        first, *others = rows.to_dict("records")
        budget = first["budget"] if isinstance(first["budget"], str) else None
        accuracy = with_interval(first["robust_accuracy"], first["low"], first["high"])
        verb = "remains" if first["images"] == 1 else "remain"
        sentence = (
            f"Under {attack_name(str(attack), budget)} {_on_region(first)}, {accuracy} of {counted(first['images'])} "
            f"{verb} correctly classified"
        )
        for row in others[: LISTED - 1]:
            accuracy = with_interval(row["robust_accuracy"], row["low"], row["high"])
            sentence += f"; {_on_region(row)}, {accuracy}"
        sentences.append(
            sentence + ("; the table lists the other regions." if len(others) >= LISTED else ".")
        )
    unjudged = cells[(cells["images"] > 0) & cells["robust_accuracy"].isna()]
    return sentences + ([no_robust_accuracy(list(unjudged["attack"].unique()))] if len(unjudged) else [])


def _on_region(row: Row) -> str:
    if row["region"] == WHOLE_IMAGE:
        return "on the whole image"
    return f"confined to {row['region']} ({percent(row['region_fraction'])} of the image)"


def margin_sentences(summaries: pd.DataFrame) -> list[str]:
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


def class_sentences(by_class: Classes) -> list[str]:
    """The weakest and the strongest class under the strongest attack, and where fooled images end."""
    classes, cells = by_class.classes, by_class.cells
    names = dict(zip(classes["label"], classes["name"], strict=True))
    known = cells[cells["images"] > 0]
    if known.empty:
        return ["No image has both a label and an attack with a robust accuracy."]
    ends = _adversarial_class_sentence(by_class.adversarial, names)
    if len(classes) == 1:
        only = f"The run has a single class, {classes['name'].iloc[0]}, with {counted(int(classes['images'].iloc[0]))}."
        return [only, ends]
    key = [known["attack"], known["region"]]
    # Weighted by images: a small class must not decide which attack is the strongest.
    robust = (known["robust"] * known["images"]).groupby(key).sum() / known["images"].groupby(key).sum()
    attack, region = robust.index[int(robust.to_numpy().argmin())]
    rows = known[(known["attack"] == attack) & (known["region"] == region)]
    # Ranked by the ends of the intervals: with two images, both fooled, a class is not surely the weakest.
    weak: Row = rows.sort_values(["high", "robust"], kind="stable").iloc[0].to_dict()
    strong: Row = rows.sort_values(["low", "robust"], ascending=False, kind="stable").iloc[0].to_dict()
    if weak["label"] == strong["label"] or (weak["robust"], strong["robust"]) == (0, 0):
        sentence = (
            f"Under {_cell(weak)}, no class stands out: {_class_accuracy(weak)} {names[weak['label']]} remain "
            "correctly classified."
        )
    else:
        doubt = (
            f"With {len(rows)} classes compared, part of that difference is chance."
            if _intervals_are_apart(weak, strong)
            else "The intervals overlap, so the difference may be chance."
        )
        sentence = (
            f"Under {_cell(weak)}, {_class_accuracy(weak)} {names[weak['label']]} remain correctly classified, and "
            f"{_class_accuracy(strong)} {names[strong['label']]}. {doubt}"
        )
    return [sentence, ends]


def _class_accuracy(row: Row) -> str:
    accuracy = with_interval(row["robust"], row["low"], row["high"])
    return f"{accuracy} of {counted(int(row['images']))} of"


def _adversarial_class_sentence(adversarial: pd.DataFrame, names: Mapping[Hashable, str]) -> str:
    if adversarial.empty:
        return "No correctly classified image was fooled, so there are no adversarial classes to report."
    row = adversarial.sort_values("fooled", ascending=False, kind="stable").iloc[0]
    return (
        f"The most frequent confusion is {names.get(row['label'], 'a class')} classified as "
        f"{row['adversarial_class']}: in {row['fooled']:,} of {counted(int(row['of']), 'attack')} that fooled an image "
        f"of that class ({percent(row['fooled'] / row['of'])})."
    )


def image_sentences(ends: Extremes) -> list[str]:
    """How many images withstood every attack, and how the images are ranked."""
    if not ends.images:
        return ["No correctly classified image has an attack with a known outcome."]
    which = "every attack" if ends.all_attacks else "every attack, not counting minimal-norm attacks"
    ranking = (
        "Images are ranked by the size of the smallest change (L2 norm) that fooled them in any region"
        if ends.by_size
        else "Images are ranked by the smallest margin that any attack in any region left, before rounding to 8 bits"
    )
    outcome = (
        f"Of {counted(ends.images)} correctly classified without an attack, {ends.fooled:,} "
        f"{'was' if ends.fooled == 1 else 'were'} fooled at least once and "
        f"{ends.images - ends.fooled:,} withstood {which}."
    )
    return [outcome, f"{ranking}; images that were never fooled rank as the hardest."]


def budget_sentences(curves: pd.DataFrame) -> list[str]:
    """The size at which half of the images are fooled, by attack and region."""
    sentences = []
    for (attack, norm), rows in curves.groupby(["attack", "norm"], sort=False):
        halves = {}
        for region, curve in rows.groupby("region", sort=False):
            reached = curve[curve["fooled"] >= 0.5]["size"]
            halves[str(region)] = float(reached.min()) if len(reached) else math.inf
        if all(math.isinf(size) for size in halves.values()):
            sentences.append(f"{attack} ({norm}) fools less than half of the images in every region.")
            continue
        sizes = [
            f"{'none of the tested sizes' if math.isinf(size) else number(size)} "
            f"{'on the whole image' if region == WHOLE_IMAGE else f'in {region}'}"
            for region, size in halves.items()
        ]
        sentences.append(
            f"Size ({norm}) at which {attack} has fooled half of the images: {', '.join(sizes)}."
        )
    return sentences


def finding_sentences(findings: pd.DataFrame) -> list[str]:
    """Whether attacks act where the network looks, and which other scores differ from their null values."""
    tested = findings[findings["q"].notna()]
    located = tested["against"] == "other images"
    sentences = [_location_sentence(rows) for _, rows in tested[located].groupby("attack", sort=False)]
    others = tested[~located]
    different = others[(others["q"] <= MAX_Q) & others["excess_low"].notna()].sort_values("q")
    if len(others):
        differ = f"{len(different) or 'none'} {'differ' if len(different) > 1 else 'differs'}"
        sentences.append(
            f"Of {counted(len(others), 'other mean score')} tested against a null value, {differ} from it "
            "(q at most .05)."
        )
    return sentences + [
        f"The mean {_score(row)} of {_cell(row)} is {number(row['mean'])}; its null value is {number(row['null'])} "
        f"(difference {number(row['excess'])} [{number(row['excess_low'])}, {number(row['excess_high'])}], "
        f"{counted(int(row['compared']))})."
        for row in different.head(2).to_dict("records")
    ]


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
        statistics = "; ".join(f"{_score(row)} {_with_null(row)}" for row in clear)
        return f"Where {attack} acts is unclear because the statistics differ in direction: {statistics}."
    first = clear[0]
    more = first["excess"] > 0
    sentence = (
        f"{attack} acts {'more' if more else 'less'} where the network looks than other images' importance maps would "
        f"predict: {_score(first)} {_with_null(first)}"
    )
    if more and not math.isnan(first["alone"]):
        images = counted(int(first["compared"]))
        verb = "is" if int(first["alone"]) == 1 else "are"
        sentence += f"; {int(first['alone']):,} of {images} {verb} individually significant (q over images at most .1)"
    return sentence + "."


def _score(row: Row) -> str:
    return str(row["score"]).replace("_", " ")


def _with_null(row: Row) -> str:
    return (
        f"is {number(row['null'] + row['excess'])} with the image's own map and {number(row['null'])} with other "
        f"images' maps ({counted(int(row['compared']))}, {p_value(row['q'], 'q')})"
    )


def type_sentences(types: pd.DataFrame) -> list[str]:
    """The types of the perturbations that fooled, for the first cells."""
    groups = list(types[types["images"] > 0].groupby(["attack", "region"], sort=False))
    sentences = []
    for (attack, region), rows in groups[:NAMED]:
        parts = [
            f"{with_interval(row['fraction'], row['low'], row['high'])} are {row['type']}"
            for row in rows.sort_values("count", ascending=False, kind="stable").to_dict("records")
        ]
        sentences.append(
            f"Of the perturbations with which {attack_in_region(str(attack), str(region))} fooled "
            f"{counted(int(rows['images'].iloc[0]))}, {', '.join(parts)}."
        )
    more = len(groups) - NAMED
    return sentences + (
        [f"The table has {counted(more, 'more combination')} of attack and region."] if more > 0 else []
    )


def layer_sentences(last: Sequence[tuple[Row | None, Row | None]]) -> list[str]:
    """How far changes reach in the last layer.

    Args:
        last: (fooled, withstood) rows of the last layer for each attack and region; either may be missing.
    """
    pairs = [(fooled, withstood) for fooled, withstood in last if fooled and withstood]
    if pairs:
        # The cell with the most images in its smaller group.
        fooled, withstood = max(pairs, key=lambda pair: min(pair[0]["images"], pair[1]["images"]))
        doubt = ""
        if math.isnan(fooled["low"]) or math.isnan(withstood["low"]):
            doubt = " There are too few images to compare the two."
        elif not _intervals_are_apart(fooled, withstood):
            doubt = " The intervals overlap, so the difference may be chance."
        first = (
            f"In the last layer ({fooled['layer']}), the {fooled['measure']} of {_cell(fooled)} is {_mean(fooled)} "
            f"over {counted(fooled['images'])} that were fooled and {_mean(withstood)} over "
            f"{counted(withstood['images'])} that withstood.{doubt}"
        )
    else:
        first = (
            "No attack in any region left both images that were fooled and images that withstood, so there is no "
            "control to compare with."
        )
    return [
        first,
        "Failed attacks are the control: their changes spread too, so spread alone does not explain success.",
    ]


def _mean(row: Row) -> str:
    interval = "" if math.isnan(row["low"]) else f" [{number(row['low'])}, {number(row['high'])}]"
    return number(row["mean"]) + interval
