"""The verdict on a defense, from the table of `evaluate_defense`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from weakspot.statistics import mcnemar_counts, paired_proportion_interval
from weakspot.statistics.number_format import counted, p_value, percent, with_interval

if TYPE_CHECKING:
    import pandas as pd

UNDEFENDED = "undefended"  # the column of the model without the defense


class AttackRow:
    """Names of the rows of the table, in their order. Rows with {} are formatted with a number."""

    CLEAN = "clean"
    TRANSFERRED = "transferred from the undefended model"
    SUBSTITUTE = "transferred from the substitute"
    OWN = "white-box"
    STRAIGHT = "BPDA (straight-through)"
    UNDEFENDED_GRADIENTS = "BPDA (undefended gradients)"
    REGION = "white-box (region of importance)"
    DRAWS = "white-box, {} draws"
    ENSEMBLE = "ensemble"
    QUERIES = "square search, {} queries"
    ORACLE = "oracle region"


# Thresholds, chosen on defenses of digits 0 to 99 and measured on others (docs/how-to-evaluate-a-defense.md).
MIN_GAIN = 0.05  # in accuracy under attack; a smaller gain is no protection
SIGNIFICANT = 0.05  # p value of McNemar's exact test
MIN_AGREEING = 0.9  # fraction of images whose gradients must predict the margin
MIN_STILL_FALLING = 0.5  # fraction of surviving images whose gradient must lower the margin where PGD ended
MAX_LAST_DOUBLING = 0.02  # accuracy that the last doubling of queries, or of draws, may remove
MAX_QUERIES_ONLY = 0.1  # accuracy that queries may remove after all gradient attacks
ROUNDING = 1e-9


@dataclass(frozen=True)
class Verdict:
    """Whether a defense protects against an attacker who knows it.

    Attributes:
        status: "protects", "no protection" or "cannot be judged".
        sentence: the status with its evidence, which `str` returns.
    """

    status: str
    sentence: str

    def __str__(self) -> str:
        return self.sentence


def verdict(table: pd.DataFrame) -> Verdict:
    """Sum up the table of `evaluate_defense`.

    Fewer than 5 images cannot be judged, nor attacks that cost the undefended model at most 5 points of accuracy. With
    more, a defense protects if two conditions hold:

    1. After all attacks, it has more than 5 points of accuracy over the undefended model beyond its net gain without
       an attack (one-sided McNemar p of what is left at most .05). Otherwise there is no protection, or none shown if
       the 95% interval of the gain reaches beyond 5 points.
    2. Nothing shows that stronger attacks would succeed. Some gradients predict the defended model's margin on at least
       90% of the images and, where their attack ended, still lower it on half of the surviving images. The last
       doubling of queries, and of the draws of a random defense, reduced accuracy by at most 2 points. Queries reduced
       it by at most 10 points after all gradient attacks. Otherwise the defense cannot be judged.

    Args:
        table: from `evaluate_defense`, or read from `defense.csv`.

    Raises:
        ValueError: if it is anything else.
    """
    import pandas as pd

    if not isinstance(table, pd.DataFrame) or not len(table) or "defended_only" not in table:
        raise ValueError(f"table must be one that evaluate_defense returned, got {type(table).__name__}")
    rows = table[table["attack"] != AttackRow.ORACLE]
    worst = rows.iloc[-1]
    count = int(worst["images"])
    # A model that is more accurate without an attack keeps that gain under attacks, which is no protection.
    clean = rows.iloc[0]
    already = max(0, int(clean["defended_only"]) - int(clean["undefended_only"]))
    gained, lost = max(0, int(worst["defended_only"]) - already), int(worst["undefended_only"])
    gain = (gained - lost) / count
    # Only images that the two models classify differently carry evidence; the others cancel.
    p = mcnemar_counts(gained, lost, alternative="greater")
    leads = rows.set_index("attack").dropna(subset="agreement")
    measured = (
        f"accuracy after all attacks is {_accuracy(worst, 'defended')} with the defense and "
        f"{_accuracy(worst, UNDEFENDED)} without it ({counted(count, 'image')}, "
        f"{f'a net gain of {already:,} without an attack is not counted, ' if already else ''}{p_value(p)})"
    )
    # Even if every other image were gained, p would exceed the level.
    if mcnemar_counts(count - already, 0, alternative="greater") > SIGNIFICANT:
        return Verdict(
            "cannot be judged",
            f"Cannot be judged: {counted(count, 'image')} {'is' if count == 1 else 'are'} too few to show a gain. "
            f"Measured: {measured}.",
        )
    if float(clean[UNDEFENDED] - worst[UNDEFENDED]) <= MIN_GAIN + ROUNDING and gain >= -MIN_GAIN:
        return Verdict(
            "cannot be judged",
            f"Cannot be judged: the attacks fool too few images without a defense for a gain of more than "
            f"{100 * MIN_GAIN:.0f} points (raise the budget). Measured: {measured}.",
        )
    if gain <= MIN_GAIN + ROUNDING:
        # With few images, a gain that was not seen is not excluded.
        # Only the counts matter for the interval: the first images are gained, the last ones lost.
        places = np.arange(count)
        excluded = paired_proportion_interval(places < gained, places >= count - lost)[2] <= MIN_GAIN
        return Verdict("no protection", f"No protection{'' if excluded else ' shown'}: {measured}.")
    if p > SIGNIFICANT:
        return Verdict("no protection", f"No protection shown: {measured}, and the difference can be chance.")
    reasons = _doubts(rows, leads)
    if reasons:
        return Verdict(
            "cannot be judged", f"Cannot be judged: {' and '.join(reasons)}. Measured: {measured}."
        )
    return Verdict("protects", f"Protects against these attacks: {measured}.{_masking_note(leads)}")


def unfinished(table: pd.DataFrame) -> Verdict:
    """The verdict on an evaluation that was interrupted: none, with the accuracy so far.

    Args:
        table: the rows of the attacks that had finished.
    """
    last = table.iloc[-1]
    after = "the clean images" if last["attack"] == AttackRow.CLEAN else last["attack"]
    return Verdict(
        "cannot be judged",
        f"Cannot be judged: the evaluation was interrupted after {after}. Accuracy so far is "
        f"{_accuracy(last, 'defended')} with the defense and {_accuracy(last, UNDEFENDED)} without it "
        f"({counted(int(last['images']))}).",
    )


def _doubts(rows: pd.DataFrame, leads: pd.DataFrame) -> list[str]:
    """The reasons why a gain may be an illusion."""
    reasons = []
    agreeing = leads[leads["agreement"] >= MIN_AGREEING - ROUNDING]
    # NaN where no image is left.
    still_falling = agreeing["agreement_at_end"].fillna(1.0).max()
    if agreeing.empty:
        reasons.append(
            f"gradients are masked (the best of {len(leads)} sources of gradients predicts the defended model's "
            f"margin on {percent(leads['agreement'].max())} of the images)"
        )
    elif still_falling < MIN_STILL_FALLING - ROUNDING:
        reasons.append(
            f"gradients are masked near the decision boundary (where the gradient attacks stopped, following the "
            f"gradient still lowers the margin on only {percent(still_falling)} of the surviving images)"
        )
    # Rows are accuracies after all attacks so far, so the difference to the row above is what an attack takes.
    count, falls = int(rows["images"].iloc[0]), -rows["defended"].diff()
    averages, searches = (
        rows["attack"].str.startswith(name.partition("{")[0]) for name in (AttackRow.DRAWS, AttackRow.QUERIES)
    )
    if averages.any() and falls[averages].iloc[-1] > MAX_LAST_DOUBLING + ROUNDING:
        reasons.append(
            f"the attack still improves with more draws averaged (the last doubling fooled "
            f"{falls[averages].iloc[-1] * count:.0f} more of {count} images)"
        )
    if searches.sum() < 2:
        reasons.append("the number of queries was never doubled (raise queries to at least 1000)")
    elif falls[searches].iloc[-1] > MAX_LAST_DOUBLING + ROUNDING:
        reasons.append(
            f"the query-based attack still improves with more queries (the last doubling fooled "
            f"{falls[searches].iloc[-1] * count:.0f} more of {count} images; raise queries)"
        )
    only = falls[searches].sum()
    if only > MAX_QUERIES_ONLY + ROUNDING:
        reasons.append(
            f"{percent(only)} of the images withstand all gradient attacks but not the query-based attack"
        )
    return reasons


def _masking_note(leads: pd.DataFrame) -> str:
    """A sentence for a model that protects although its own gradients mislead."""
    own, best = float(leads["agreement"][AttackRow.OWN]), str(leads["agreement"].idxmax())
    if own >= MIN_AGREEING - ROUNDING:
        return ""
    return (
        f" Its own gradients are masked: they predict its margin on {percent(own)} of the images, those of {best} on "
        f"{percent(leads['agreement'].max())}."
    )


def _accuracy(row: pd.Series, side: str) -> str:
    return with_interval(row[side], row[f"{side}_low"], row[f"{side}_high"])
