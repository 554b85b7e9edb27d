"""Words on a run: each sentence says what the numbers carry, and no more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from weakspot.statistics.number_format import counted, number, p_value, percent

LISTED = 6  # regions of a sentence
CERTAIN = 0.05  # a q value up to which a difference is said to be one
Row = Mapping[Any, Any]


def where(row: Row) -> str:
    """Of an attack in a region: "pgd in cam"."""
    return (
        f"{row['attack']} free to change any pixel"
        if row["region"] == "none"
        else f"{row['attack']} in {row['region']}"
    )


def heading(row: Row) -> str:
    """The same in short, for a chart."""
    return f"{row['attack']} · {'anywhere' if row['region'] == 'none' else row['region']}"


def ranged(value: float, low: float, high: float) -> str:
    """A share with its interval."""
    return percent(value) + ("" if math.isnan(low) else f" [{percent(low)}, {percent(high)}]")


def apart(one: Row, other: Row) -> bool:
    """Whether the intervals of two rows do not touch."""
    return bool(one["high"] < other["low"] or other["high"] < one["low"])


def robust_sentences(cells: pd.DataFrame) -> list[str]:
    """On every attack: what it leaves in each region. Regions are not ranked: they differ in area."""
    if not (cells["images"] > 0).any():
        return ["No attack ended in a way that is known."]
    judged = cells[cells["robust_accuracy"].notna()]
    said = []
    for attack, mine in judged.groupby("attack", sort=False):
        first, *others = mine.to_dict("records")
        left = ranged(first["robust_accuracy"], first["low"], first["high"])
        budget = str(first["budget"] or "")
        at = f" at {budget}" if budget and budget not in str(attack) else ""
        sentence = (
            f"{attack}{at} leaves {left} of {counted(first['images'])} read as their class {_there(first)}"
        )
        for row in others[: LISTED - 1]:
            sentence += f", {ranged(row['robust_accuracy'], row['low'], row['high'])} {_there(row)}"
        said.append(sentence + (", and more in the table." if len(others) >= LISTED else "."))
    unjudged = cells[(cells["images"] > 0) & cells["robust_accuracy"].isna()]
    return said + ([no_robust_accuracy(list(unjudged["attack"].unique()))] if len(unjudged) else [])


def no_robust_accuracy(attacks: Sequence[str]) -> str:
    """Why minimal-norm attacks of these labels have none, in a sentence."""
    one = len(attacks) == 1
    return (
        f"{', '.join(attacks)} {'looks' if one else 'look'} for the smallest change and "
        f"{'has' if one else 'have'} no robust accuracy without one stated budget (such as --budget linf:4/255)."
    )


def _there(row: Row) -> str:
    if row["region"] == "none":
        return "with any pixel free"
    return f"in {row['region']} ({percent(row['region_fraction'])} of the image)"


def margin_sentences(summaries: pd.DataFrame) -> list[str]:
    """On the margins that the attacks leave."""
    mine = summaries[(summaries["score"] == "margin_adversarial") & (summaries["images"] > 0)]
    if mine.empty:
        return ["No image has a margin that is known."]
    ranked: Sequence[Row] = mine.sort_values("median", kind="stable").to_dict("records")
    least, most = ranked[0], ranked[-1]
    said = (
        f"The margin is the lead of the label's logit over the next, of the attacked image before it is rounded to 8 "
        f"bits; below zero, that image is misclassified. Its median after {where(least)} is {number(least['median'])}"
    )
    return [said + (f", after {where(most)} {number(most['median'])}." if len(ranked) > 1 else ".")]


def class_sentences(classes: pd.DataFrame, cells: pd.DataFrame, landings: pd.DataFrame) -> list[str]:
    """On the weakest and the strongest class under the strongest attack, and where images land.

    Args:
        classes: columns label, name, images, clean.
        cells: columns label, attack, region, images, robust, low, high.
        landings: columns label, adversarial_class, fooled, of: most frequent class and how many fooled attacks in all.
    """
    names = dict(zip(classes["label"], classes["name"], strict=True))
    known = cells[cells["images"] > 0]
    if known.empty:
        return ["No image has a label and an attack that has a robust accuracy."]
    if len(classes) == 1:
        only = f"There is one class only: {counted(int(classes['images'].iloc[0]))} of {classes['name'].iloc[0]}."
        return [only, *_landing(landings, names)]
    whose = [known["attack"], known["region"]]
    held = (known["robust"] * known["images"]).groupby(whose).sum() / known["images"].groupby(whose).sum()
    attack, region = held.index[int(held.to_numpy().argmin())]
    mine = known[(known["attack"] == attack) & (known["region"] == region)]
    # By the ends of the intervals: a class of two images that are both fooled is no sure loser.
    weak: Row = mine.sort_values(["high", "robust"], kind="stable").iloc[0].to_dict()
    strong: Row = mine.sort_values(["low", "robust"], ascending=False, kind="stable").iloc[0].to_dict()
    if weak["label"] == strong["label"] or (weak["robust"], strong["robust"]) == (0, 0):
        said = [
            (
                f"Under {where(weak)} no class stands out: {names[weak['label']]} is left with "
                f"{ranged(weak['robust'], weak['low'], weak['high'])} of {counted(int(weak['images']))}."
            )
        ]
    else:
        doubt = (
            f" With {len(mine)} classes compared, some of that is chance."
            if apart(weak, strong)
            else " The intervals cannot tell them apart."
        )
        said = [
            (
                f"Under {where(weak)} {names[weak['label']]} is left with "
                f"{ranged(weak['robust'], weak['low'], weak['high'])} of {counted(int(weak['images']))} and "
                f"{names[strong['label']]} with {ranged(strong['robust'], strong['low'], strong['high'])} of "
                f"{counted(int(strong['images']))}.{doubt}"
            )
        ]
    return said + _landing(landings, names)


def _landing(landings: pd.DataFrame, names: dict[Any, str]) -> list[str]:
    if landings.empty:
        return ["No image that was read rightly was fooled, so there is nothing to say on where images land."]
    row = landings.sort_values("fooled", ascending=False, kind="stable").iloc[0]
    fraction = percent(row["fooled"] / row["of"])
    return [
        (
            f"Most often {names.get(row['label'], 'a class')} is fooled into {row['adversarial_class']}: "
            f"in {row['fooled']:,} of "
            f"the {counted(int(row['of']), 'attack')} that fooled one of its images ({fraction})."
        )
    ]


def budget_sentences(curves: pd.DataFrame) -> list[str]:
    """On the size at which half of the images are fooled."""
    said = []
    for (attack, norm), mine in curves.groupby(["attack", "norm"], sort=False):
        halves = {}
        for region, curve in mine.groupby("region", sort=False):
            reached = curve[curve["fooled"] >= 0.5]["size"]
            halves[region] = float(reached.min()) if len(reached) else math.inf
        if not any(math.isfinite(size) for size in halves.values()):
            said.append(f"{attack} ({norm}) fools less than half of the images in every region.")
            continue
        sizes = [
            f"{number(size)} {_inside(region)}"
            if math.isfinite(size)
            else f"no size seen here {_inside(region)}"
            for region, size in halves.items()
        ]
        said.append(f"{attack} has fooled half of the images at an {norm} size of {', '.join(sizes)}.")
    return said


def _inside(region: object) -> str:
    return "with any pixel free" if region == "none" else f"in {region}"


def finding_sentences(found: pd.DataFrame) -> list[str]:
    """On whether attacks act where the network looks, and on other scores that differ from their null."""
    tested = found[found["q"].notna()]
    if tested.empty:
        return []
    located = tested["against"] == "other images"
    said = [_location_sentence(mine) for _, mine in tested[located].groupby("attack", sort=False)]
    others = tested[~located]
    sure = others[(others["q"] <= CERTAIN) & others["excess_low"].notna()].sort_values("q")
    if len(others):
        said.append(
            f"Of {counted(len(others), 'other mean score')} with a null, {len(sure)} "
            f"{'differs' if len(sure) == 1 else 'differ'} from it (q at most {CERTAIN:.2g})."
        )
    return said + [
        f"{_score(row)} of {where(row)} is {number(row['mean'])}, {number(row['null'])} under its null (difference "
        f"{number(row['excess'])} [{number(row['excess_low'])}, {number(row['excess_high'])}], "
        f"{counted(int(row['compared']))})."
        for row in sure.head(2).to_dict("records")
    ]


def _location_sentence(mine: pd.DataFrame) -> str:
    """One attack, free to change any pixel: whether it acts where the network looks, more than in other images."""
    rows: Sequence[Row] = mine.sort_values("q", kind="stable").to_dict("records")
    who = where(rows[0])
    sure = [row for row in rows if row["q"] <= CERTAIN]
    if not sure:
        most = counted(int(max(row["compared"] for row in rows)))
        return (
            f"{who} is not shown to act more or less where the network looks in the image than where it looks in other "
            f"images ({most})."
        )
    signs = {row["excess"] > 0 for row in sure}
    if len(signs) > 1:
        named = "; ".join(f"{_score(row)} {_beside(row)}" for row in sure)
        return f"Where {who} acts is not clear, as the statistics disagree: {named}."
    more = "more" if sure[0]["excess"] > 0 else "less"
    sentence = (
        f"{who} acts {more} where the network looks in the image than where it looks in other images: "
        f"{_score(sure[0])} {_beside(sure[0])}"
    )
    alone = sure[0]["alone"]
    if sure[0]["excess"] > 0 and not math.isnan(alone):
        compared = counted(int(sure[0]["compared"]))
        sentence += f"; {int(alone):,} of {compared} show it by themselves (q over images at most .1)"
    return sentence + "."


def _score(row: Row) -> str:
    return str(row["score"]).replace("_", " ")


def _beside(row: Row) -> str:
    return (
        f"is {number(row['null'] + row['excess'])} with the own map and {number(row['null'])} with others' "
        f"({counted(int(row['compared']))}, q {p_value(row['q']).removeprefix('p ')})"
    )


def depth_sentences(last: Sequence[tuple[Row | None, Row | None]]) -> list[str]:
    """On the last layer, of each attack in each region: fooled and held, either of which may be missing."""
    both = [(fooled, held) for fooled, held in last if fooled and held]
    said = []
    if both:
        fooled, held = max(both, key=lambda pair: min(pair[0]["images"], pair[1]["images"]))
        measured = not math.isnan(fooled["low"]) and not math.isnan(held["low"])
        doubt = (
            "too few to compare"
            if not measured
            else "apart"
            if apart(fooled, held)
            else "the intervals cannot tell them apart"
        )
        said.append(
            f"In the last layer ({fooled['layer']}) the {fooled['measure']} of {where(fooled)} is "
            f"{_figured(fooled)} over {counted(fooled['images'])} that were fooled "
            f"and {_figured(held)} over {counted(held['images'])} that held"
            f"{': ' + doubt if doubt != 'apart' else ''}."
        )
    else:
        said.append(
            "No attack in any region left both images that were fooled and images that held, so there is no control to "
            "compare with."
        )
    said.append(
        "Failed attacks are the control here: their changes travel through the layers too, so spread alone explains "
        "nothing."
    )
    return said


def _figured(row: Row) -> str:
    interval = "" if math.isnan(row["low"]) else f" [{number(row['low'])}, {number(row['high'])}]"
    return number(row["mean"]) + interval
