"""Sentences on explained images: what happened to one and to all, with the number, the chance level and the doubt."""

from __future__ import annotations

import math
from fractions import Fraction

import pandas as pd

from weakspot.explanations.agreement import WHOLE
from weakspot.explanations.explanation import Explanation
from weakspot.statistics import LEAST_OTHERS
from weakspot.statistics.number_format import counted, number, p_value, percent

MAX_GAP = 0.1  # completeness gap above which nothing is claimed
FEW = 0.5  # fraction of the changed cells up to which they are worth a headline
IDENTICAL = "The two images are identical; there is nothing to explain."
WHERE, WHY, LOCAL, HELPS = QUESTIONS = ("Where", "Why", "How local", "What helps")


def headline(row: pd.Series) -> str:
    """Class and confidence before and after: "Egyptian cat 40% → lynx 97%"."""
    before = f"{row['label']} {percent(row['label_clean'])}"
    return f"{before} → {row['adversarial_class']} {percent(row['adversarial_class_adversarial'])}"


def verdict(explanation: Explanation, index: int = 0) -> str:
    """The verdict on pair number `index`, in a few sentences."""
    row = explanation.scores.iloc[index]
    if row["linf"] == 0:
        return IDENTICAL
    sentences = [_outcome(row)]
    if "effect_in_roi" in row:
        sentences.append(_location(row))
    elif _failed(row):
        sentences.append(f"{_margin_taken(row)}.")
    if "promotion_log2_ratio" in row and row["read_clean_as"] == row["label"]:
        sentences.append(_perturbation_type(row))
    return " ".join(sentences)


def page_verdict(row: pd.Series) -> str:
    """The verdict below the headline of the page, which states a plain success; the rest is below the questions."""
    if row["linf"] == 0:
        return IDENTICAL
    sentences = []
    if _failed(row) or not row["success_8bit"] or row["read_clean_as"] != row["label"]:
        sentences.append(_outcome(row))
    if _failed(row):
        sentences.append(f"{_margin_taken(row)}.")
    if located(row) and not math.isnan(row.get("relation", math.nan)):
        sentences.append(f"{_relation(row, 'That margin was lost' if _failed(row) else 'It acts')}.")
    return " ".join(sentences)


def strongest_fact(row: pd.Series) -> str:
    """The least that was found to be enough, in one sentence; empty if nothing was."""
    sufficient = row.get("sufficient_fraction", math.nan)
    if not row["success_8bit"] or not sufficient <= FEW:
        return ""
    return f"Changing {_cells(sufficient)} is enough to fool the network."


def overview(scores: pd.DataFrame) -> str:
    """One sentence over several images: on how many the attack succeeds; empty for one image."""
    correct = scores[scores["read_clean_as"] == scores["label"]]
    total, wrong = len(correct), len(scores) - len(correct)
    if len(scores) == 1:
        return ""
    if not total:
        return f"All {counted(wrong)} are misclassified without any attack."
    done = int(correct["success_8bit"].sum())
    rounded = int((correct["success"] & ~correct["success_8bit"]).sum())
    which = f"the {counted(total)}" if total > 1 else "the one image"
    if wrong:
        which += " that the network classifies correctly"
    if total == 1:
        sentence = f"The attack {'succeeds' if done else 'fails'} on {which}"
    elif done == total:
        sentence = f"The attack succeeds on all {which.removeprefix('the ')}"
    else:
        sentence = f"The attack succeeds on {done or 'none'} of {which}"
    if rounded:
        sentence += f", and on {rounded} only before rounding to 8 bits"
    if wrong:
        sentence += f"; {wrong} {'is' if wrong == 1 else 'are'} misclassified without any attack"
    return sentence + "."


def findings(row: pd.Series) -> dict[str, tuple[str, list[str]]]:
    """For each question what was found, in a few words (or none) and in sentences."""
    found: dict[str, tuple[str, list[str]]] = {question: ("", []) for question in QUESTIONS}
    if row["linf"] == 0:
        return found
    if "effect_in_roi" in row:
        found[WHERE] = (_where(row), [_location(row)])
    if "promotion_log2_ratio" in row and row["read_clean_as"] == row["label"]:
        found[WHY] = (_why(row), [_perturbation_type(row)])
    found[LOCAL] = _how_local(row)
    found[HELPS] = _what_helps(row)
    return found


def _failed(row: pd.Series) -> bool:
    return not row["success"] and not row["success_8bit"] and row["read_clean_as"] == row["label"]


def located(row: pd.Series) -> bool:
    """Whether the effect could be located, of an attack that was free to act anywhere."""
    return bool(
        row.get("roi_fraction", 0) > 0
        and not math.isnan(row["effect_in_roi"])
        and row["completeness_gap"] <= MAX_GAP
        and row["reached_fraction"] >= WHOLE
    )


def _where(row: pd.Series) -> str:
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
    if math.isnan(row["promotion_log2_ratio"]):
        return f"neither raises {row['target']} nor lowers {row['label']}"
    effects = ((row["target"], row["whole_promotion"]), (row["label"], -row["whole_suppression"]))
    return "logits: " + ", ".join(
        f"{name} {'+' if change > 0 else ''}{number(change)}" for name, change in effects
    )


def _how_local(row: pd.Series) -> tuple[str, list[str]]:
    short, sentences = "", []
    sufficient, weak = (row.get(name, math.nan) for name in ("sufficient_fraction", "weak_pixels"))
    if not math.isnan(sufficient):
        short = f"changing {_cells(sufficient)} is enough"
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
        left = row["weakest_pixel"] / row["margin_clean"]
        sentences.append(
            "No single pixel tried is enough, with each channel set to 0 or 1: the worst leaves "
            f"{percent(left)} of the margin of {row['label']}."
        )
    return short, sentences


def _what_helps(row: pd.Series) -> tuple[str, list[str]]:
    short, sentences = "", []
    needed, units = (row.get(name, math.nan) for name in ("necessary_fraction", "units_to_revert"))
    if not math.isnan(needed):
        short = f"undoing {_cells(needed)} stops it"
        sentences.append(
            f"If {percent(needed)} of the changed cells get their clean values back, the attack no longer succeeds (a "
            "small set, found greedily with the clean image at hand; a defense does not have that)."
        )
    if units < 1:
        random = row["random_units_to_revert"]
        beside = "only all of them do" if random == 1 else f"{percent(random)} are needed"
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
    ratio = Fraction(fraction).limit_denominator(4096)
    if ratio.numerator == 1 < ratio.denominator:
        return f"1 in {ratio.denominator} changed cells"
    return f"{percent(fraction)} of the changed cells"


def _outcome(row: pd.Series) -> str:
    label, reached, target = row["label"], row["adversarial_class"], row["target"]
    before, after = percent(row["label_clean"]), percent(row["adversarial_class_adversarial"])
    if row["read_clean_as"] != label:
        return (
            f"Without an attack, the image is classified as {row['read_clean_as']}, not as {label} ({before}), so "
            f"the attack cannot count as a success; the adversarial image is classified as {reached} ({after})."
        )
    if row["success"]:
        change = f"changed the classification from {label} ({before}) to {reached} ({after})"
        if row["success_8bit"]:
            return f"The attack {change}."
        return (
            f"The attack fools the network only before rounding to 8 bits: it {change}, but the result no longer fools "
            "the network when stored in an image file."
        )
    if row["success_8bit"]:
        return (
            "The attack fools the network only after rounding to 8 bits, as in an image file; before rounding, the "
            f"image is classified as {reached} ({after})."
        )
    if row["asked_for_target"]:
        return (
            f"The attack failed: its target {target} reached {percent(row['target_adversarial'])}, and the image is "
            f"classified as {reached} ({after})."
        )
    return (
        f"The attack failed: the image is still classified as {label} ({before} before, {after} after); the closest "
        f"other class is {target}."
    )


def _location(row: pd.Series) -> str:
    if row["roi_fraction"] == 0:
        return f"No part of the image stands out for {row['label']}, so there is no region where the network looks."
    if math.isnan(row["effect_in_roi"]):
        return f"The attack hardly reduced the margin of {row['label']}, or the loss could not be located."
    # Completeness of integrated gradients: the map must sum to the whole drop of the margin.
    if row["completeness_gap"] > MAX_GAP:
        return (
            "The effect could not be located: the sum of the vulnerability map differs from the actual drop of "
            f"the margin by {percent(row['completeness_gap'])}, which happens if a network's output is random."
        )
    if not row["success"] or row["read_clean_as"] != row["label"]:
        # It has no effect to locate, but may have reduced the margin.
        if row["reached_fraction"] < WHOLE:
            return f"{_margin_taken(row)} by changing {percent(row['changed_fraction'])} of the pixels."
        return f"{_margin_taken(row)}. {_relation(row, 'That margin was lost')}."
    if row["reached_fraction"] < WHOLE:
        return (
            f"It changed {percent(row['changed_fraction'])} of the pixels and left "
            f"{percent(1 - row['reached_fraction'])} of the image untouched. Its effect can only lie near changed "
            "pixels, so it is not compared with where the network looks."
        )
    return f"{_relation(row, 'It acts')}."


def _margin_taken(row: pd.Series) -> str:
    """How much of the margin an attack took that did not succeed, without the full stop."""
    label, rival = row["label"], row["target"]
    taken = row.get("margin_taken", math.nan)
    if "margin_taken" not in row and row["margin_clean"] > 0:
        # Without the analysis overlap, the margin over the best other class is known.
        taken, rival = 1 - row["margin_adversarial"] / row["margin_clean"], "any other class"
    if math.isnan(taken):
        return f"The attack put {label} further behind {rival}"
    if taken <= 0:
        return f"The attack removed nothing of the margin of {label} over {rival}"
    fraction = "all" if taken >= 1 else percent(taken)
    return f"The attack removed {fraction} of the margin of {label} over {rival}"


def _relation(row: pd.Series, subject: str) -> str:
    """Where the effect lies; a direction is stated only if every setting gives the same one (`relation`)."""
    effect = (
        f"{percent(row['effect_in_roi'])} of the effect falls on the {percent(row['roi_fraction'])} of the image that "
        f"matters most for {row['label']}"
    )
    relation = row.get("relation", math.nan)
    if math.isnan(relation):
        return (
            f"{effect} (no p value: that needs at least {LEAST_OTHERS} other images of the same source, in the batch "
            "or in --reference FOLDER)"
        )
    doubt = (
        f"({percent(row['effect_in_roi_null'])} on the part that matters in other images; "
        f"{p_value(row['relation_p'])}, {p_value(row['relation_q'], 'q')} over the images)"
    )
    if relation > 0:
        return f"{subject} where the network looks: {effect} {doubt}"
    if relation < 0:
        return f"{subject} away from where the network looks: only {effect} {doubt}"
    return f"There is no clear relation to where the network looks: {effect} {doubt}"


def _perturbation_type(row: pd.Series) -> str:
    """Whether the perturbation raises the target's logit or lowers the label's (Xu et al. 2019, arXiv 1904.02057)."""
    promotion, suppression = row["whole_promotion"], row["whole_suppression"]
    target, label = row["target"], row["label"]
    if math.isnan(row["promotion_log2_ratio"]):
        return f"The perturbation neither raises the logit of {target} nor lowers that of {label}."
    effects = (
        f"{_verb(promotion)} the logit of {target} by {number(abs(promotion))} and "
        f"{_verb(-suppression)} that of {label} by {number(abs(suppression))}"
    )
    if row["perturbation_type"] == "balanced":
        return f"The perturbation is balanced: it {effects}, and neither effect is more than twice the other."
    return f"The perturbation is {row['perturbation_type']}: it {effects}."


def _verb(change: float) -> str:
    return "raises" if change > 0 else "lowers"
