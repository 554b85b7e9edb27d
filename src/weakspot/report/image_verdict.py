"""The verdict on an explained image: what happened, with the number, the chance level and the doubt."""

import math

import pandas as pd

from weakspot.explanations.agreement import WHOLE
from weakspot.explanations.explanation import Explanation
from weakspot.explanations.weakest_places import square_finding
from weakspot.statistics import LEAST_OTHERS
from weakspot.statistics.number_format import number, p_value, percent

MAX_GAP = 0.1  # completeness gap above which nothing is claimed
NO_DROP = 1e-6  # drop of the margin up to which there is nothing to locate, as in `agreement.lost_margin`
IDENTICAL = "The two images are identical; there is nothing to explain."


def headline(row: pd.Series) -> str:
    """Class and confidence before and after: "Egyptian cat 40% → lynx 97%"."""
    before = f"{row['label']} {percent(row['label_clean'])}"
    return f"{before} → {row['adversarial_class']} {percent(row['adversarial_class_adversarial'])}"


def verdict(explanation: Explanation, index: int = 0) -> str:
    """The verdict on pair number `index`, in a few sentences."""
    row = explanation.scores.iloc[index]
    if row["linf"] == 0:
        return IDENTICAL
    # First what is weak whatever the attack did, then what the attack did.
    sentences = [square_finding(row) or ""] if row.get("smallest_square_side", math.nan) > 0 else []
    sentences.append(_outcome(row))
    if "effect_in_roi" in row:
        sentences.append(location(row))
    elif _failed(row):
        sentences.append(f"{_margin_taken(row)}.")
    if "promotion_log2_ratio" in row and row["read_clean_as"] == row["label"]:
        sentences.append(perturbation_type(row))
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


def uncompared(scores: pd.DataFrame) -> bool:
    """Whether effects were located and, for lack of other images, not compared with where the network looks."""
    if "relation" not in scores or scores["relation"].notna().any():
        return False
    return any(located(row) for _, row in scores.iterrows())


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
            f"The attack found no adversarial example for its target {target}, which reached "
            f"{percent(row['target_adversarial'])}; the image is classified as {reached} ({after})."
        )
    return (
        f"The attack found no adversarial example: the image is still classified as {label} ({before} before, {after} "
        f"after); the closest other class is {target}."
    )


def location(row: pd.Series) -> str:
    """Where the effect of an attack lies, or why the verdict does not name a place."""
    if row["roi_fraction"] == 0:
        return (
            f"The importance map shows no evidence for {row['label']}, so there is no region of importance."
        )
    unlocated = math.isnan(row["effect_in_roi"])
    if unlocated and not row["margin_drop"] > NO_DROP:
        margin = f"the margin of {row['label']} over {row['target']}"
        return f"The attack did not noticeably reduce {margin}, so there is no effect to locate."
    # Completeness of integrated gradients: the map must sum to the whole drop of the margin.
    if row["completeness_gap"] > MAX_GAP:
        return (
            "The effect could not be located: the sum of the vulnerability map differs from the actual drop of "
            f"the margin by {percent(row['completeness_gap'])}, which happens if a network's output is random."
        )
    if unlocated:
        flat = math.isnan(row["moran_i"])  # the vulnerability map has no contrast
        why = "every place lost the same" if flat else "gains and losses at different places nearly cancel"
        return f"The effect on the margin could not be located: {why}."
    if not row["success"] or row["read_clean_as"] != row["label"]:
        # It has no effect to locate, but may have reduced the margin.
        if row["reached_fraction"] < WHOLE:
            return f"{_margin_taken(row)} by changing {percent(row['changed_fraction'])} of the pixels."
        return f"{_margin_taken(row)}. {_relation(row, 'That margin was lost')}."
    if row["reached_fraction"] < WHOLE:
        return (
            f"It changed {percent(row['changed_fraction'])} of the pixels, and "
            f"{percent(1 - row['reached_fraction'])} of the image lies away from them. Its effect can only lie near "
            "changed pixels, so it is not compared with where the network looks."
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
    share = row["effect_in_roi"]
    place = f"the {percent(row['roi_fraction'])} of the image that matters most for {row['label']}"
    effect = f"{percent(share)} of the effect falls on {place}"
    # The effect has a sign: where the attack raises the margin, it is negative.
    if share > 1:
        effect = (
            f"{place} lost {percent(share)} of what the margin lost in all, because other places raised it"
        )
    elif percent(share).startswith("-"):
        effect = f"{place} raised the margin, by {percent(-share)} of what it lost in all"
    relation = row.get("relation", math.nan)
    if math.isnan(relation):
        others = f"{LEAST_OTHERS} other images whose importance maps show evidence"
        return f"{effect[0].upper()}{effect[1:]} (no p value: that takes {others})"
    doubt = (
        f"({percent(row['effect_in_roi_null'])} on the part that matters in other images; "
        f"{p_value(row['relation_p'])}, {p_value(row['relation_q'], 'q')} over the images)"
    )
    if relation > 0:
        return f"{subject} where the network looks: {effect} {doubt}"
    if relation < 0:
        only = "" if effect.startswith("the") else "only "
        return f"{subject} away from where the network looks: {only}{effect} {doubt}"
    return f"There is no clear relation to where the network looks: {effect} {doubt}"


def perturbation_type(row: pd.Series) -> str:
    """Whether the perturbation raises the target's logit or lowers the label's (Xu et al. 2019, arXiv 1904.02057)."""
    promotion, suppression = row["whole_promotion"], row["whole_suppression"]
    target, label = row["target"], row["label"]
    if promotion <= 0 and suppression <= 0:
        return f"The perturbation neither raises the logit of {target} nor lowers that of {label}."
    effects = (
        f"{_effect(promotion, f'the logit of {target}')} and {_effect(-suppression, f'that of {label}')}"
    )
    if math.isnan(row["promotion_log2_ratio"]):
        return f"The perturbation does not reduce the lead of {label} over {target}: it {effects}."
    if row["perturbation_type"] == "balanced":
        return f"The perturbation is balanced: it {effects}, and neither effect is more than twice the other."
    return f"The perturbation is {row['perturbation_type']}: it {effects}."


def _effect(change: float, logit: str) -> str:
    size = number(abs(change))
    if size == "0":
        return f"does not change {logit}"
    return f"{'raises' if change > 0 else 'lowers'} {logit} by {size}"
