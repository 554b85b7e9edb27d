"""What was found on explained images, for the page: one sentence over all, the strongest fact, and an answer to each
question.
"""

import math
from fractions import Fraction

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from weakspot.budgets import Linf
from weakspot.explanations.agreement import WHOLE
from weakspot.explanations.certified_pixels import certificate_finding
from weakspot.explanations.weakest_places import square_finding
from weakspot.report.image_verdict import located, location, perturbation_type
from weakspot.statistics.number_format import counted, in_levels, number, percent, tenths
from weakspot.vulnerability.square import at_most

FEW = 0.5  # fraction of the changed cells up to which they are worth a headline
WHERE, WHY, LOCAL, HELPS = QUESTIONS = ("Where", "Why", "How local", "What helps")


def overview(scores: pd.DataFrame, images: NDArray[np.int_]) -> str:
    """One sentence over several images: on how many the attack succeeds; empty for one image.

    Args:
        scores: one row per pair.
        images: (pairs,) the number of each pair's clean image.
    """
    correct = scores[scores["read_clean_as"] == scores["label"]]
    total, wrong = len(correct), len(scores) - len(correct)
    if len(scores) == 1:
        return ""
    if (several := len(np.unique(images))) < len(scores):
        fooling = counted(int(correct["success_8bit"].sum()), "pair")
        verb = "has" if wrong == 1 else "have"
        ending = (
            f" ({wrong} of the {len(scores)} {verb} a clean image that is misclassified already)"
            if wrong
            else ""
        )
        return (
            f"{counted(len(scores), 'pair')} of {counted(several)}: the attack succeeds in {fooling}{ending}."
        )
    if not total:
        return f"{_all(wrong).capitalize()} are misclassified without any attack."
    done = int(correct["success_8bit"].sum())
    rounded = int((correct["success"] & ~correct["success_8bit"]).sum())
    which = f"the {counted(total)}" if total > 1 else "the one image"
    if wrong:
        which += " that the network classifies correctly"
    if total == 1:
        sentence = f"The attack {'succeeds' if done else 'fails'} on {which}"
    elif done == total:
        sentence = f"The attack succeeds on {_all(total)}{which.removeprefix(f'the {counted(total)}')}"
    else:
        sentence = f"The attack succeeds on {done or 'none'} of {which}"
    if squares := _squares(correct):
        known = " that the network classifies correctly"
        # Said once, in the half of the sentence that comes first.
        sentence = sentence.removesuffix(known)
        sentence = f"{squares}{known if wrong else ''}; {sentence[0].lower()}{sentence[1:]}"
    if rounded:
        sentence += f", and on {rounded} only before rounding to 8 bits"
    if wrong:
        sentence += f"; {wrong} {'is' if wrong == 1 else 'are'} misclassified without any attack"
    return sentence + "."


def strongest_fact(row: pd.Series) -> str:
    """The least that was found to be enough, in one sentence; empty if nothing was."""
    if row.get("smallest_square_side", math.nan) > 0:
        return square_finding(row) or ""
    sufficient = row.get("sufficient_fraction", math.nan)
    if not row["success_8bit"] or not sufficient <= FEW:
        return ""
    return f"Changing {_cells(sufficient)} is enough to fool the network."


def findings(row: pd.Series) -> dict[str, tuple[str, list[str]]]:
    """For each question what was found, in a few words (or none) and in sentences."""
    found: dict[str, tuple[str, list[str]]] = {question: ("", []) for question in QUESTIONS}
    if row["linf"] == 0:
        return found
    where = []
    if "effect_in_roi" in row:
        where.append(location(row))
    weakest = row.get("weakest_cell", math.nan)
    if math.isinf(weakest):
        where.append("From gradients alone, no change of a single cell of the grid is enough (an estimate).")
    elif weakest > 0:
        where.append(
            f"From gradients alone, the weakest cell needs a change of {in_levels(weakest)} (an estimate "
            "for each cell, if only that cell may change)."
        )
    if certified := certificate_finding(row):
        where.append(certified)
    found[WHERE] = (_where(row), where)
    if "promotion_log2_ratio" in row and row["read_clean_as"] == row["label"]:
        found[WHY] = (_why(row), [perturbation_type(row)])
    found[LOCAL] = _how_local(row)
    found[HELPS] = _what_helps(row)
    return found


def _squares(correct: pd.DataFrame) -> str:
    """On how many images of how many the budget is enough inside a square; empty if not found or not looked for."""
    if "smallest_square_side" not in correct or not (correct["smallest_square_side"] > 0).any():
        return ""
    found = correct[correct["smallest_square_side"] > 0]
    sides, areas, budgets = (
        (found[f"smallest_square_{name}"].min(), found[f"smallest_square_{name}"].max())
        for name in ("side", "fraction", "budget")
    )
    side = _range(f"{sides[0]:.0f}", f"{sides[1]:.0f}")
    area = _range(*map(tenths, areas))
    budget = _range(*(at_most(Linf(budget)) for budget in budgets))
    count = f"{len(found)} of the {counted(len(correct))}"
    if len(found) == len(correct):
        count = _all(len(correct)) if len(correct) > 1 else "the one image"
    return (
        f"A square of {side} {'pixel' if sides[1] == 1 else 'pixels'} a side ({area} of the image), changed by at "
        f"most {budget}, is enough to fool the network on {count}"
    )


def _all(count: int) -> str:
    """All of several images.

    >>> _all(1), _all(2), _all(4)
    ('the image', 'both images', 'all 4 images')
    """
    return {1: "the image", 2: "both images"}.get(count, f"all {counted(count)}")


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _where(row: pd.Series) -> str:
    if "effect_in_roi" not in row:
        return ""
    relation = row.get("relation", math.nan)
    if row["reached_fraction"] < WHOLE:
        return f"{percent(row['changed_fraction'])} of the pixels changed"
    if not located(row):
        return ""
    if math.isnan(relation):
        return f"{percent(row['effect_in_roi'])} of the effect on the {percent(row['roi_fraction'])} that matters most"
    return {1: "where the network looks", -1: "away from where the network looks"}.get(
        relation, "no clear relation"
    )


def _why(row: pd.Series) -> str:
    if row["whole_promotion"] <= 0 and row["whole_suppression"] <= 0:
        return f"neither raises {row['target']} nor lowers {row['label']}"
    effects = ((row["target"], row["whole_promotion"]), (row["label"], -row["whole_suppression"]))
    return "logits: " + ", ".join(
        f"{name} {'+' if change > 0 else ''}{number(change)}" for name, change in effects
    )


def _how_local(row: pd.Series) -> tuple[str, list[str]]:
    short, sentences = "", []
    if row["read_clean_as"] == row["label"] and (square := square_finding(row)):
        found = not math.isnan(row["smallest_square_side"])
        side = row["smallest_square_side"]
        short = f"a square of {counted(int(side), 'pixel')} is enough" if found else "no square found"
        sentences.append(f"{square} A smaller one may be enough, too." if found else square)
    sufficient, weak = (row.get(name, math.nan) for name in ("sufficient_fraction", "weak_pixels"))
    if sufficient == 1:
        sentences.append("No part of the changed cells was found to be enough alone (a greedy search).")
    elif not math.isnan(sufficient):
        short = short or f"changing {_cells(sufficient)} is enough"
        sentences.append(
            f"Changing {_cells(sufficient)} is enough to fool the network, with the rest of the image clean (a small "
            "set, found greedily; a smaller one may exist)."
        )
    if weak > 0:
        short = "a single pixel is enough"
        sentences.append(
            f"{percent(weak)} of the pixels tried are enough alone, with each channel set to 0 or 1."
        )
    elif weak == 0:
        short = short or "no single pixel tried is enough"
        sentence = "No single pixel tried is enough, with each channel set to 0 or 1"
        if row["margin_clean"] > 0:  # else it is a tie, of which there is no part
            left = row["weakest_pixel"] / row["margin_clean"]
            sentence += f": the worst leaves {percent(left)} of the margin of {row['label']}"
        sentences.append(f"{sentence}.")
    return short, sentences


def _what_helps(row: pd.Series) -> tuple[str, list[str]]:
    short, sentences = "", []
    needed, units = (row.get(name, math.nan) for name in ("necessary_fraction", "units_to_revert"))
    if needed == 1:
        sentences.append(
            "No part of the changed cells was found whose clean values alone stop the attack (a greedy search)."
        )
    elif not math.isnan(needed):
        short = f"undoing {_cells(needed)} stops it"
        sentences.append(
            f"If {percent(needed)} of the changed cells get their clean values back, the attack no longer succeeds (a "
            "small set, found greedily with the clean image at hand; a defense does not have that)."
        )
    if units < 1:
        random = row["random_units_to_revert"]
        beside = f"{percent(random)} was the smallest part tried that does"
        if math.isnan(random):
            beside = "no part that was tried does"
        elif random == 1:
            beside = "no part that was tried does, only all of them"
        sentences.append(
            f"The clean values of the {percent(units)} of the last layer's units that changed most restore the "
            f"decision; of units drawn at random, {beside}."
        )
    return short, sentences


def _cells(fraction: float) -> str:
    """A fraction of the changed cells in words that can be counted.

    >>> _cells(1 / 64), _cells(13 / 64), _cells(1.0)
    ('1 in 64 changed cells', '20% of the changed cells', '100% of the changed cells')
    """
    # Back from a float to whole numbers of cells, as long as there are at most 4096.
    ratio = Fraction(fraction).limit_denominator(4096)
    if ratio.numerator == 1 < ratio.denominator:
        return f"1 in {ratio.denominator} changed cells"
    return f"{percent(fraction)} of the changed cells"
