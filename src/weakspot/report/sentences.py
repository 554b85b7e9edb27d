"""Words: what happened to an image, with the number, the chance level and the doubt in one sentence."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pandas as pd

from weakspot.explanations.agreement import WHOLE
from weakspot.statistics import LEAST_OTHERS
from weakspot.statistics.number_format import number, p_value, percent

if TYPE_CHECKING:
    from weakspot.explanations.explanation import Explanation


UNACCOUNTED = 0.1  # completeness gap above which nothing is claimed


def headline(row: pd.Series) -> str:
    """Class and confidence before and after: "Egyptian cat 40% → lynx 97%"."""
    before = f"{row['label']} {percent(row['label_clean'])}"
    return f"{before} → {row['adversarial_class']} {percent(row['adversarial_class_adversarial'])}"


def verdict(explanation: Explanation, index: int = 0) -> str:
    """One or two sentences on one pair.

    Args:
        explanation: of the pair among others.
        index: of the pair.
    """
    row = explanation.scores.iloc[index]
    if row["linf"] == 0:
        return "The two images are identical; there is nothing to explain."
    sentences = [_what_happened(row)]
    if "effect_in_roi" in row:
        sentences.append(_where(row))
    if "promotion_log2_ratio" in row and row["read_clean_as"] == row["label"]:
        sentences.append(_which_logits(row))
    return " ".join(sentences)


def _what_happened(row: pd.Series) -> str:
    before, after = percent(row["label_clean"]), percent(row["adversarial_class_adversarial"])
    if row["read_clean_as"] != row["label"]:
        return (
            f"Without any attack the image is read as {row['read_clean_as']} and not as {row['label']} ({before}), so "
            f"there is no success to explain; the adversarial image is read as {row['adversarial_class']} {after}."
        )
    if row["success"]:
        moved = f"moved the image from {row['label']} {before} to {row['adversarial_class']} {after}"
        if row["success_8bit"]:
            return f"The attack {moved}."
        return (
            f"The attack fools the network only before rounding to 8 bits: it {moved}, but a picture file of the "
            "result no longer fools."
        )
    if row["success_8bit"]:
        return (
            f"The attack fools the network only after rounding to 8 bits: a picture file of the result does; before "
            f"rounding it is read as {row['adversarial_class']} {after}."
        )
    if row["asked_for_target"]:
        return (
            f"The attack failed: it asked for {row['target']} and reached {percent(row['target_adversarial'])}; the "
            f"image is read as {row['adversarial_class']} {after}."
        )
    return (
        f"The attack failed: the image is still read as {row['label']} ({before} before, {after} after); "
        f"it came closest to {row['target']}."
    )


def _where(row: pd.Series) -> str:
    if row["roi_fraction"] == 0:
        return f"No part of the image stands out for {row['label']}, so there is no place where the network looks."
    if math.isnan(row["effect_in_roi"]):
        return f"It took next to nothing from the lead of {row['label']}, or nothing that could be placed."
    if row["completeness_gap"] > UNACCOUNTED:
        return (
            f"What it did could not be placed: the vulnerability map is {percent(row['completeness_gap'])} off the "
            "whole effect, as happens where a network answers at random."
        )
    if not row["success"] or row["read_clean_as"] != row["label"]:
        return _taken(row)
    if row["reached_fraction"] < WHOLE:
        return (
            f"It changed {percent(row['changed_fraction'])} of the pixels and left "
            f"{percent(1 - row['reached_fraction'])} of "
            "the image untouched; where it acts follows from that and is not compared with where the network looks."
        )
    return f"{_relation(row, 'It acts')}."


def _taken(row: pd.Series) -> str:
    """On an attack that failed, or had nothing to fool: it has no place where it works."""
    lost = row["margin_taken"]
    if math.isnan(lost):
        amount = f"It put {row['label']} further behind {row['target']}"
    else:
        fraction = "all" if lost >= 1 else percent(lost)
        amount = f"It took {fraction} of the lead of {row['label']} over {row['target']}"
    if row["reached_fraction"] < WHOLE:
        return f"{amount}, by changing {percent(row['changed_fraction'])} of the pixels."
    return f"{amount}. {_relation(row, 'That was lost')}."


def _relation(row: pd.Series, subject: str) -> str:
    """Where the effect lies, in one clause; a direction only where every setting gives the same."""
    fraction, area = percent(row["effect_in_roi"]), percent(row["roi_fraction"])
    here = f"{fraction} of the effect falls on the {area} of the image that matters most for {row['label']}"
    relation = row.get("relation", math.nan)
    if math.isnan(relation):
        return (
            f"{here}; a p value needs at least {LEAST_OTHERS} other images of the same source, in the batch or from "
            "--reference FOLDER"
        )
    doubt = f"{p_value(row['relation_p'])}, {p_value(row['relation_q'], 'q')} over the images"
    others = f"{percent(row['effect_in_roi_null'])} on what matters in other images; {doubt}"
    if relation > 0:
        return f"{subject} where the network looks: {here} ({others})"
    if relation < 0:
        return f"{subject} away from where the network looks: only {here} ({others})"
    return f"There is no clear relation to where the network looks: {here} ({others})"


def _which_logits(row: pd.Series) -> str:
    """The type of the perturbation (Xu et al. 2019): whether it raises the target's logit or lowers the label's."""
    promotion, suppression = row["whole_promotion"], row["whole_suppression"]
    target, label = row["target"], row["label"]
    if math.isnan(row["promotion_log2_ratio"]):
        return f"It neither raises the logit of {target} nor lowers that of {label}."
    effects = (
        f"{_moves(promotion)} the logit of {target} by {number(abs(promotion))} and "
        f"{_moves(-suppression)} that of {label} by {number(abs(suppression))}"
    )
    kind = row["perturbation_type"]
    if kind == "balanced":
        return f"The perturbation is balanced: it {effects}, and neither effect is more than twice the other."
    return f"The perturbation is {kind}: it {effects}."


def _moves(change: float) -> str:
    return "raises" if change > 0 else "lowers"
