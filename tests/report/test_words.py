"""Words: every case gets its own sentence, with number, chance and doubt."""

from __future__ import annotations

import pandas as pd
import pytest

from weakspot.report.words import headline, verdict

BASE = {
    "image": "cat.png", "label": "lynx", "target": "tabby", "landed": "tabby", "read_clean_as": "lynx",
    "success": True, "asked_for_target": False, "completeness_gap": 0.002, "reached_share": 1.0,
    "label_clean": 0.4, "label_adversarial": 0.01, "target_clean": 0.1, "target_adversarial": 0.97,
    "landed_adversarial": 0.97, "linf": 0.016, "changed_share": 1.0, "changed_in_roi": 0.2,
    "effect_in_roi": 0.61, "effect_in_roi_null": 0.2, "effect_in_roi_null_low": 0.1, "effect_in_roi_null_high": 0.3,
    "effect_in_roi_p": 0.012, "effect_in_roi_p_less": 0.99,
}  # fmt: skip


class Told:
    """As much of an Explanation as words need."""

    def __init__(self, **changed: object) -> None:
        self.scores = pd.DataFrame([{**BASE, "success_8bit": changed.get("success", True), **changed}])


def said(**changed: object) -> str:
    return verdict(Told(**changed))  # type: ignore[arg-type]


def test_the_headline_names_both_classes_with_their_confidence() -> None:
    assert headline(pd.Series(BASE)) == "lynx 40% → tabby 97%"


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        (
            {},
            (
                "It works mostly where the network looks: 61% of its effect falls on the 20% of the image that matters "
                "most for lynx (by chance 20%, p = .012)."
            ),
        ),
        ({"effect_in_roi": 0.36}, "It works more than chance would have it where the network looks: 36%"),
        (
            {"effect_in_roi_p": 0.26, "effect_in_roi": 0.22},
            (
                "no more than by chance: 22% of its effect falls on the 20% of the image that matters most for lynx "
                "(by chance 20%, mostly between 10% and 30%; p = .26)."
            ),
        ),
        (
            {"effect_in_roi_p": 0.99, "effect_in_roi_p_less": 0.02, "effect_in_roi": 0.05},
            (
                "It works away from where the network looks: only 5% of its effect falls on the 20% of the image that "
                "matters most for lynx (by chance 20%, p = .020)."
            ),
        ),
        (
            {"changed_share": 0.3, "reached_share": 0.4, "changed_in_roi": 0.66},
            "It changed only 30% of the pixels, 66% of them in the 20%",
        ),
        (
            {"effect_in_roi": float("nan")},
            "It took next to nothing from the lead of lynx, or nothing that could be placed.",
        ),
        (
            {"success": False, "landed": "lynx", "landed_adversarial": 0.3},
            "The attack failed: the image is still read as lynx (40% before, 30% after); it came closest to tabby.",
        ),
        (
            {"success": False, "asked_for_target": True, "landed": "fox", "landed_adversarial": 0.5},
            "The attack failed: it asked for tabby and reached 97%; the image is read as fox 50%.",
        ),
        (
            {"read_clean_as": "dog"},
            (
                "Without any attack the image is read as dog and not as lynx (40%), so there is no success to explain; "
                "the adversarial image is read as tabby 97%."
            ),
        ),
        (
            {"success": False, "asked_for_target": True, "landed": "lynx", "landed_adversarial": 0.3},
            "The attack failed: it asked for tabby and reached 97%; the image is read as lynx 30%.",
        ),
        ({"changed_share": 0.27}, "It works mostly where the network looks"),
        ({"completeness_gap": 0.96}, "What it did could not be placed: the vulnerability map is 96% off"),
        ({"linf": 0.0}, "The two images are identical; there is nothing to explain."),
    ],
)
def test_a_case_is_said_in_its_own_words(changed: dict[str, object], wanted: str) -> None:
    assert wanted in said(**changed)


def test_a_success_that_only_one_side_of_rounding_has_is_told_as_such() -> None:
    before, after = said(success_8bit=False), said(success=False, landed="lynx", success_8bit=True)
    assert before.startswith(
        "The attack fools the network only before rounding to 8 bits: it moved the image from lynx 40% to tabby 97%, "
        "but a picture file of the result no longer fools."
    )
    assert after.startswith("The attack fools the network only after rounding to 8 bits")
    assert "failed" in said(success=False)


def test_a_confined_attack_is_not_credited_with_alignment() -> None:
    assert "p =" not in said(changed_share=0.3, reached_share=0.4, effect_in_roi=0.99, effect_in_roi_p=0.001)


def test_without_overlap_only_what_happened_is_said() -> None:
    told = Told()
    told.scores = told.scores.drop(columns=[column for column in BASE if column.startswith("effect")])
    assert verdict(told) == "The attack moved the image from lynx 40% to tabby 97%."  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("promotion", "suppression", "ratio", "kind", "wanted"),
    [
        (8.2, 1.5, 2.45, "promotion-dominated", "promotion-dominated: it raises the logit of tabby by 8.2 and lowers "),
        (8.2, 1.5, 2.45, "promotion-dominated", "and lowers that of lynx by 1.5."),
        (8.2, -1.5, 10.0, "promotion-dominated", "it raises the logit of tabby by 8.2 and raises that of lynx by 1.5."),
        (0.5, 3.0, -2.58, "suppression-dominated", "suppression-dominated: it raises the logit of tabby by 0.5"),
        (2.0, 3.0, -0.58, "balanced", "balanced: it raises the logit of tabby by 2 and lowers that of lynx by 3, and "),
        (2.0, 3.0, -0.58, "balanced", "and neither effect is more than twice the other."),
        (-1.0, -2.0, float("nan"), None, "It neither raises the logit of tabby nor lowers that of lynx."),
    ],
)  # fmt: skip
def test_the_type_of_the_perturbation_is_one_sentence(
    promotion: float, suppression: float, ratio: float, kind: str | None, wanted: str
) -> None:
    known = {
        "whole_promotion": promotion, "whole_suppression": suppression, "promotion_log2_ratio": ratio,
        "perturbation_type": kind,
    }  # fmt: skip
    assert wanted in said(**known)
    # Of an image that is misclassified without any attack, nothing is typed.
    assert "logit" not in said(**known, read_clean_as="dog")
    assert "logit" not in said(**known, linf=0)
