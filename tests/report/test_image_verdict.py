"""Words: every case gets its own sentence, with number, chance and doubt."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from weakspot.report.image_verdict import headline, verdict

BASE = {
    "image": "cat.png", "label": "lynx", "target": "tabby", "adversarial_class": "tabby", "read_clean_as": "lynx",
    "success": True, "asked_for_target": False, "completeness_gap": 0.002, "reached_fraction": 1.0,
    "label_clean": 0.4, "label_adversarial": 0.01, "target_clean": 0.1, "target_adversarial": 0.97,
    "adversarial_class_adversarial": 0.97, "linf": 0.016, "changed_fraction": 1.0,
    "effect_in_roi": 0.61, "effect_in_roi_null": 0.31, "roi_fraction": 0.2, "margin_taken": 1.8, "margin_drop": 3.0,
    "moran_i": 0.2,
    "relation": 1.0, "relation_p": 0.012, "relation_q": 0.04,
}  # fmt: skip


NAN = float("nan")
FAILED = {"success": False, "adversarial_class": "lynx", "adversarial_class_adversarial": 0.3}


class Explained:
    """The part of an Explanation that verdicts read."""

    def __init__(self, **changed: object) -> None:
        self.scores = pd.DataFrame([{**BASE, "success_8bit": changed.get("success", True), **changed}])


def verdict_for(**changed: object) -> str:
    return verdict(Explained(**changed))  # type: ignore[arg-type]


def test_the_headline_names_both_classes_with_their_confidence() -> None:
    assert headline(pd.Series(BASE)) == "lynx 40% → tabby 97%"


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        (
            {},
            (
                "It acts where the network looks: 61% of the effect falls on the 20% of the image that matters most "
                "for lynx (31% on the part that matters in other images; p = .012, q = .040 over the images)."
            ),
        ),
        (
            {"relation": 0.0, "relation_p": 0.26, "relation_q": 0.5, "effect_in_roi": 0.33},
            (
                "There is no clear relation to where the network looks: 33% of the effect falls on the 20% of the "
                "image that matters most for lynx (31% on the part that matters in other images; p = .26, q = .50 over "
                "the images)."
            ),
        ),
        (
            {"relation": -1.0, "relation_p": 0.02, "effect_in_roi": 0.05},
            (
                "It acts away from where the network looks: only 5% of the effect falls on the 20% of the image that "
                "matters most for lynx (31% on the part that matters in other images; p = .020,"
            ),
        ),
        (
            {"relation": NAN, "relation_p": NAN, "relation_q": NAN, "effect_in_roi_null": NAN},
            (
                "61% of the effect falls on the 20% of the image that matters most for lynx (no p value: that takes 19 "
                "other images whose importance maps show evidence)."
            ),
        ),
        (
            {"changed_fraction": 0.3, "reached_fraction": 0.4},
            (
                "It changed 30% of the pixels, and 60% of the image lies away from them. Its effect can only lie near "
                "changed pixels, so it is not compared with where the network looks."
            ),
        ),
        (
            {"effect_in_roi": NAN, "margin_drop": -0.2, "completeness_gap": 9.0},
            "The attack did not noticeably reduce the margin of lynx over tabby, so there is no effect to locate.",
        ),
        (
            {"effect_in_roi": NAN},
            "The effect on the margin could not be located: gains and losses at different places nearly cancel.",
        ),
        (
            {"effect_in_roi": NAN, "moran_i": NAN},
            "The effect on the margin could not be located: every place lost the same.",
        ),
        (
            {"effect_in_roi": NAN, "completeness_gap": 9.0},
            "differs from the actual drop of the margin by 900%",
        ),
        (
            {"roi_fraction": 0.0},
            "The importance map shows no evidence for lynx, so there is no region of importance.",
        ),
        (
            {**FAILED, "margin_taken": 0.34, "effect_in_roi": 0.4},
            (
                "The attack removed 34% of the margin of lynx over tabby. That margin was lost where the network "
                "looks: 40% of the effect falls on the 20%"
            ),
        ),
        (
            {**FAILED, "margin_taken": 0.34, "relation": NAN},
            "The attack removed 34% of the margin of lynx over tabby. 61% of the effect falls on the 20%",
        ),
        (
            {**FAILED, "margin_taken": 0.34, "changed_fraction": 0.3, "reached_fraction": 0.4},
            "The attack removed 34% of the margin of lynx over tabby by changing 30% of the pixels.",
        ),
        (
            {**FAILED, "asked_for_target": True, "adversarial_class": "fox", "margin_taken": 2.5},
            "The attack removed all of the margin of lynx over tabby.",
        ),
        ({"read_clean_as": "dog", "margin_taken": NAN}, "The attack put lynx further behind tabby."),
        (
            {"success": False, "adversarial_class": "lynx", "adversarial_class_adversarial": 0.3},
            (
                "The attack found no adversarial example: the image is still classified as lynx (40% before, 30% "
                "after); the closest other class is tabby."
            ),
        ),
        (
            {
                "success": False,
                "asked_for_target": True,
                "adversarial_class": "fox",
                "adversarial_class_adversarial": 0.5,
            },
            (
                "The attack found no adversarial example for its target tabby, which reached 97%; the image is "
                "classified as fox (50%)."
            ),
        ),
        (
            {"read_clean_as": "dog"},
            (
                "Without an attack, the image is classified as dog, not as lynx (40%), so the attack cannot "
                "count as a success; the adversarial image is classified as tabby (97%)."
            ),
        ),
        (
            {
                "success": False,
                "asked_for_target": True,
                "adversarial_class": "lynx",
                "adversarial_class_adversarial": 0.3,
            },
            (
                "The attack found no adversarial example for its target tabby, which reached 97%; the image is "
                "classified as lynx (30%)."
            ),
        ),
        ({"changed_fraction": 0.27}, "It acts where the network looks"),
        (
            {"completeness_gap": 0.96},
            "the sum of the vulnerability map differs from the actual drop of the margin by 96%",
        ),
        ({"linf": 0.0}, "The two images are identical; there is nothing to explain."),
    ],
)
def test_each_case_has_its_own_sentence(changed: dict[str, object], wanted: str) -> None:
    assert wanted in verdict_for(**changed)


def test_a_success_on_one_side_of_rounding_is_reported_as_such() -> None:
    before, after = (
        verdict_for(success_8bit=False),
        verdict_for(success=False, adversarial_class="lynx", success_8bit=True),
    )
    assert before.startswith(
        "The attack fools the network only before rounding to 8 bits: it changed the classification from lynx (40%) to "
        "tabby (97%), but the result no longer fools the network when stored in an image file."
    )
    assert after.startswith("The attack fools the network only after rounding to 8 bits")
    assert "found no adversarial example" in verdict_for(success=False)


@pytest.mark.parametrize("success", [True, False])
def test_a_confined_or_sparse_attack_is_not_compared_with_where_the_network_looks(success: bool) -> None:
    for changed in (0.3, 0.0001):
        sentences = verdict_for(
            changed_fraction=changed, reached_fraction=0.4, effect_in_roi=0.99, success=success
        )
        assert "p =" not in sentences
        assert "99%" not in sentences
        assert "confined" not in sentences  # a sparse attack chose its place


OUTCOMES: dict[str, dict[str, object]] = {
    "failed": {"success": False, "adversarial_class": "lynx"},
    "misread": {"read_clean_as": "dog"},
    "fooled": {},
}


@pytest.mark.parametrize("outcome", list(OUTCOMES))
@pytest.mark.parametrize("relation", [1.0, 0.0, -1.0, float("nan")])
def test_only_a_success_acts_anywhere_and_p_follows_its_direction(outcome: str, relation: float) -> None:
    sentences = verdict_for(relation=relation, margin_taken=0.5, **OUTCOMES[outcome])
    assert ("It acts" in sentences) == (outcome == "fooled" and relation in (1, -1))
    assert "It works" not in sentences
    assert ("away from" in sentences) == (relation == -1)
    assert ("no clear relation" in sentences) == (relation == 0)
    assert ("p = .012" in sentences) == (not math.isnan(relation))


def test_scores_without_a_comparison_have_no_p() -> None:
    explained = Explained()
    explained.scores = explained.scores.drop(
        columns=["relation", "relation_p", "relation_q", "effect_in_roi_null"]
    )
    assert "no p value: that takes 19 other images" in verdict(explained)  # type: ignore[arg-type]


def test_without_overlap_the_verdict_is_the_outcome() -> None:
    explained = Explained()
    explained.scores = explained.scores.drop(
        columns=[column for column in BASE if column.startswith("effect")]
    )
    assert verdict(explained) == "The attack changed the classification from lynx (40%) to tabby (97%)."  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("promotion", "suppression", "ratio", "kind", "wanted"),
    [
        (8.2, 1.5, 2.45, "promotion-dominated", "promotion-dominated: it raises the logit of tabby by 8.2 and lowers "),
        (8.2, 1.5, 2.45, "promotion-dominated", "and lowers that of lynx by 1.5."),
        (8.2, -1.5, 10.0, "promotion-dominated", "it raises the logit of tabby by 8.2 and raises that of lynx by 1.5."),
        (8.2, 0.0, 10.0, "promotion-dominated", "of tabby by 8.2 and does not change that of lynx."),
        (0.5, 3.0, -2.58, "suppression-dominated", "suppression-dominated: it raises the logit of tabby by 0.5"),
        (2.0, 3.0, -0.58, "balanced", "balanced: it raises the logit of tabby by 2 and lowers that of lynx by 3, and "),
        (2.0, 3.0, -0.58, "balanced", "and neither effect is more than twice the other."),
        (0.5, -3.0, NAN, None, "does not reduce the lead of lynx over tabby: it raises the logit of tabby by 0.5 and "),
        (-1.0, -2.0, float("nan"), None, "The perturbation neither raises the logit of tabby nor lowers that of lynx."),
    ],
)  # fmt: skip
def test_the_type_of_the_perturbation_is_one_sentence(
    promotion: float, suppression: float, ratio: float, kind: str | None, wanted: str
) -> None:
    known = {
        "whole_promotion": promotion, "whole_suppression": suppression, "promotion_log2_ratio": ratio,
        "perturbation_type": kind,
    }  # fmt: skip
    assert wanted in verdict_for(**known)
    # Of an image that is misclassified without any attack, nothing is typed.
    assert "logit" not in verdict_for(**known, read_clean_as="dog")
    assert "logit" not in verdict_for(**known, linf=0)


def test_the_smallest_square_comes_first_and_only_if_one_was_found() -> None:
    square = {
        "smallest_square_side": 11.0, "smallest_square_fraction": 0.0024, "smallest_square_budget": 4 / 255,
        "smallest_square_class": "fox",
    }  # fmt: skip
    said = "An 11 x 11 square, 0.2% of the image, changed by at most 4/255, is enough to turn 'lynx' into 'fox'. "
    assert verdict_for(**square).startswith(f"{said}The attack changed the classification from lynx")
    assert verdict_for(**{**square, "smallest_square_side": NAN}).startswith("The attack changed")


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (0.61, "61% of the effect falls on the 20% of the image that matters most for lynx"),
        (1.0, "100% of the effect falls on"),
        (2.18, "lost 218% of what the margin lost in all, because other places raised it"),
        (
            -0.32,
            "the 20% of the image that matters most for lynx raised the margin, by 32% of what it lost in all",
        ),
    ],
)
def test_a_share_of_an_effect_with_a_sign_is_no_part_of_a_whole(share: float, words: str) -> None:
    for relation in (1.0, 0.0, -1.0):
        said = verdict_for(effect_in_roi=share, relation=relation)
        assert words in said
        assert ("falls on" in said) == (0 <= share <= 1)
    alone = verdict_for(effect_in_roi=share, relation=float("nan"))
    assert words[1:] in alone
    assert "matters most for lynx" in alone
