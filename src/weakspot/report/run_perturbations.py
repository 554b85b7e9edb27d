"""Sections on perturbations: which logits they move, and where else a single changed pixel works."""

from __future__ import annotations

import pandas as pd

from weakspot.explanations.radii import locality_sentence
from weakspot.report.run_words import counted, heading, ranged, where
from weakspot.report.sections import Section, Table, count, share, word
from weakspot.report.sections import figure as number

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
            share(row["share"], row["low"], row["high"]),
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
            share(row["rate"], row["low"], row["high"]),
            number(row["excess"], row["excess_low"], row["excess_high"]),
            count(row["failed_images"]), share(row["failed_rate"], row["failed_low"], row["failed_high"]),
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
