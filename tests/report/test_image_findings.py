"""What a page says was found, and what it recommends: each sentence, and cases in which it would be false."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.report.test_image_verdict import BASE, FAILED, NAN
from weakspot.report.image_findings import HELPS, LOCAL, WHERE, WHY, findings, overview, strongest_fact
from weakspot.report.image_verdict import page_verdict, verdict
from weakspot.report.next_steps import next_steps

RIGHT: dict[str, object] = {**BASE, "success_8bit": True, "margin_clean": 2.0, "margin_adversarial": -3.0}
LOST: dict[str, object] = {**RIGHT, **FAILED, "success_8bit": False, "margin_taken": 0.34}
MISREAD: dict[str, object] = {**RIGHT, "read_clean_as": "dog", "margin_taken": NAN}
SQUARE = {
    "smallest_square_side": 24.0, "smallest_square_fraction": 0.01148, "smallest_square_top": 3.0,
    "smallest_square_left": 5.0, "smallest_square_budget": 8 / 255, "smallest_square_class": "tabby",
    "weakest_cell": 0.004,
}  # fmt: skip
NO_SQUARE = {**SQUARE, **dict.fromkeys([f"smallest_square_{name}" for name in ("side", "fraction")], NAN)}


def row(base: dict[str, object], **changed: object) -> pd.Series:
    return pd.Series({**base, **changed})


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([RIGHT], ""),
        ([RIGHT, RIGHT], "The attack succeeds on both images."),
        ([RIGHT, LOST], "The attack succeeds on 1 of the 2 images."),
        ([LOST, LOST], "The attack succeeds on none of the 2 images."),
        (
            [RIGHT, {**RIGHT, "success_8bit": False}],
            "The attack succeeds on 1 of the 2 images, and on 1 only before rounding to 8 bits.",
        ),
        ([MISREAD, MISREAD], "Both images are misclassified without any attack."),
        (
            [RIGHT, MISREAD],
            ("The attack succeeds on the one image that the network classifies correctly; 1 is misclassified without "
            "any attack."),
        ),
        (
            [RIGHT, LOST, MISREAD, MISREAD],
            ("The attack succeeds on 1 of the 2 images that the network classifies correctly; 2 are misclassified "
            "without any attack."),
        ),
        (
            [{**RIGHT, **SQUARE}, {**LOST, **SQUARE, "smallest_square_side": 12.0, "smallest_square_fraction": 0.0029}],
            ("A square of 12 to 24 pixels a side (0.3% to 1.1% of the image), changed by at most 8/255, is enough to "
            "fool the network on both images; the attack succeeds on 1 of the 2 images."),
        ),
        (
            [{**RIGHT, **SQUARE}, {**RIGHT, **NO_SQUARE}],
            (
                "A square of 24 pixels a side (1.1% of the image), changed by at most 8/255, is enough to fool the "
                "network on 1 of the 2 images; the attack succeeds on both images."
            ),
        ),
        (
            [{**RIGHT, **SQUARE, "smallest_square_side": 1.0}] * 2,
            ("A square of 1 pixel a side (1.1% of the image), changed by at most 8/255, is enough to fool the network "
            "on both images; the attack succeeds on both images."),
        ),
        ([{**RIGHT, **NO_SQUARE}] * 2, "The attack succeeds on both images."),
        (
            [{**RIGHT, **SQUARE, "smallest_square_fraction": 1.0}, {**MISREAD, **NO_SQUARE}],
            ("A square of 24 pixels a side (100% of the image), changed by at most 8/255, is enough to fool the "
            "network on the one image that the network classifies correctly; the attack succeeds on the one image; 1 "
            "is misclassified without any attack."),
        ),
        (
            [{**RIGHT, **SQUARE}, {**LOST, **SQUARE}, {**MISREAD, **NO_SQUARE}],
            ("A square of 24 pixels a side (1.1% of the image), changed by at most 8/255, is enough to fool the "
            "network on both images that the network classifies correctly; the attack succeeds on 1 of the 2 images; "
            "1 is misclassified without any attack."),
        ),
    ],
)  # fmt: skip
def test_one_sentence_over_all_images(rows: list[dict[str, object]], wanted: str) -> None:
    assert overview(pd.DataFrame(rows), np.arange(len(rows))) == wanted


def test_pairs_of_one_image_are_not_called_images() -> None:
    pairs = pd.DataFrame([{**RIGHT, **SQUARE}, {**LOST, **SQUARE}, {**RIGHT, **SQUARE}])
    assert overview(pairs, np.zeros(3, dtype=int)) == "3 pairs of 1 image: the attack succeeds in 2 pairs."
    some = pd.DataFrame([{**RIGHT, **SQUARE}, {**RIGHT, **SQUARE}, {**MISREAD, **NO_SQUARE}])
    assert overview(some, np.array([0, 0, 2])) == (
        "3 pairs of 2 images: the attack succeeds in 2 pairs (1 of the 3 has a clean image that is misclassified "
        "already)."
    )


def test_sizes_of_many_digits_are_gray_levels_rounded_upward() -> None:
    odd = {**RIGHT, **SQUARE, "smallest_square_budget": 100.0412 / 255}
    assert "changed by at most 100.1/255, is enough" in strongest_fact(row(odd))
    assert "changed by at most 8/255 to 100.1/255, is enough" in overview(
        pd.DataFrame([odd, {**RIGHT, **SQUARE}]), np.arange(2)
    )


def test_the_strongest_fact_is_what_was_found_to_be_enough() -> None:
    assert strongest_fact(row(RIGHT, **SQUARE)) == (
        "A 24 x 24 square, 1.1% of the image, changed by at most 8/255, is enough to turn 'lynx' into 'tabby'."
    )
    # A search of its own: it may succeed where the attack found nothing.
    assert "24 x 24" in strongest_fact(row(LOST, **SQUARE))
    cells = {"sufficient_fraction": 1 / 64}
    assert (
        strongest_fact(row(RIGHT, **cells)) == "Changing 1 in 64 changed cells is enough to fool the network."
    )
    assert strongest_fact(row(RIGHT, **NO_SQUARE, **cells)).startswith("Changing 1 in 64")


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"sufficient_fraction": NAN},
        {"sufficient_fraction": 0.9},  # nearly all of the attack: nothing to say
        {"sufficient_fraction": 0.1, "success_8bit": False},  # not in a file
        dict(NO_SQUARE),
    ],
)
def test_nothing_is_a_fact_that_was_not_found(changed: dict[str, object]) -> None:
    assert strongest_fact(row(RIGHT, **changed)) == ""


def test_the_verdict_below_a_headline_is_the_outcome_only_if_it_is_not_a_plain_success() -> None:
    assert page_verdict(row(RIGHT, relation=NAN)) == ""
    assert page_verdict(row(RIGHT)).startswith("It acts where the network looks: 61% of the effect")
    assert page_verdict(row(RIGHT, reached_fraction=0.4)) == ""  # not compared, so p is not spoken
    assert page_verdict(row(LOST, relation=NAN)) == (
        "The attack found no adversarial example: the image is still classified as lynx (40% before, 30% after); the "
        "closest other class is tabby. The attack removed 34% of the margin of lynx over tabby."
    )
    assert "removed nothing of the margin" in page_verdict(row(LOST, relation=NAN, margin_taken=-0.2))
    assert "misclassified" not in page_verdict(row(MISREAD, relation=NAN))
    assert page_verdict(row(MISREAD, relation=NAN)).startswith(
        "Without an attack, the image is classified as dog"
    )
    assert "identical" in page_verdict(row(RIGHT, linf=0.0))


def test_without_overlap_a_failed_attack_still_says_what_it_took() -> None:
    scores = row(LOST, margin_adversarial=1.5).drop(
        [name for name in LOST if name.startswith(("effect", "relation", "margin_taken", "roi", "reached"))]
    )
    assert page_verdict(scores).endswith("The attack removed 25% of the margin of lynx over any other class.")


def test_each_question_has_its_own_answer() -> None:
    found = findings(
        row(
            RIGHT, **SQUARE, relation=NAN, whole_promotion=11.4, whole_suppression=3.16, promotion_log2_ratio=1.85,
            perturbation_type="promotion-dominated", sufficient_fraction=1 / 64, necessary_fraction=0.4,
            weak_pixels=0.0, weakest_pixel=1.5, units_to_revert=0.3, random_units_to_revert=1.0,
        )
    )  # fmt: skip
    assert found[WHERE][0] == "61% of the effect on the 20% that matters most"
    assert "the weakest cell needs a change of 1.02/255 (an estimate" in found[WHERE][1][1]
    assert found[WHY][0] == "logits: tabby +11.4, lynx -3.16"
    assert found[LOCAL][0] == "a square of 24 pixels is enough"
    assert "the worst leaves 75% of the margin of lynx" in found[LOCAL][1][-1]
    assert found[HELPS][0] == "undoing 40% of the changed cells stops it"
    assert "of units drawn at random, no part that was tried does, only all of them." in found[HELPS][1][1]
    never = findings(row(RIGHT, units_to_revert=0.3, random_units_to_revert=NAN))[HELPS][1][0]
    assert never.endswith("restore the decision; of units drawn at random, no part that was tried does.")
    less = findings(row(RIGHT, units_to_revert=0.3, random_units_to_revert=0.1))[HELPS][1][0]
    assert less.endswith(
        "restore the decision; of units drawn at random, 10% was the smallest part tried that does."
    )


@pytest.mark.parametrize(
    ("relation", "wanted"),
    [
        (1.0, "where the network looks"),
        (-1.0, "away from where the network looks"),
        (0.0, "no clear relation"),
    ],
)
def test_where_an_attack_acts_is_as_tested(relation: float, wanted: str) -> None:
    assert findings(row(RIGHT, relation=relation))[WHERE][0] == wanted
    confined = findings(row(RIGHT, relation=relation, reached_fraction=0.4, changed_fraction=0.3))
    assert confined[WHERE][0] == "30% of the pixels changed"


def test_a_cell_that_no_change_of_which_is_enough_has_no_size() -> None:
    (_, said) = findings(row(RIGHT, **{**SQUARE, "weakest_cell": float("inf")}))[WHERE][1]
    assert said == "From gradients alone, no change of a single cell of the grid is enough (an estimate)."


def test_all_changed_cells_are_no_small_set() -> None:
    found = findings(row(RIGHT, sufficient_fraction=1.0, necessary_fraction=1.0))
    assert found[LOCAL] == (
        "",
        ["No part of the changed cells was found to be enough alone (a greedy search)."],
    )
    assert found[HELPS] == (
        "",
        [
            "No part of the changed cells was found whose clean values alone stop the attack (a greedy search)."
        ],
    )


def test_restoring_all_units_is_no_finding() -> None:
    found = findings(row(RIGHT, units_to_revert=1.0, random_units_to_revert=1.0))
    assert found[HELPS] == ("", [])


# Everything at once, and which scores are defined only together.
EVERYTHING: dict[str, object] = {
    **RIGHT, **SQUARE, "whole_promotion": 11.4, "whole_suppression": 3.16, "promotion_log2_ratio": 1.85,
    "perturbation_type": "promotion-dominated", "sufficient_fraction": 1 / 64, "necessary_fraction": 0.4,
    "weak_pixels": 0.0, "weakest_pixel": 1.5, "units_to_revert": 0.3, "random_units_to_revert": 0.5,
}  # fmt: skip
TOGETHER = [
    ["relation", "relation_p", "relation_q", "effect_in_roi_null"],
    ["effect_in_roi", "relation", "relation_p", "relation_q", "effect_in_roi_null"],
    ["margin_taken"],
    ["moran_i", "effect_in_roi"],
    ["smallest_square_side", "smallest_square_fraction"],
    ["weakest_cell"],
    ["promotion_log2_ratio"],
    ["sufficient_fraction"],
    ["necessary_fraction"],
    ["weak_pixels", "weakest_pixel"],
    ["units_to_revert", "random_units_to_revert"],
    ["random_units_to_revert"],
]


@pytest.mark.parametrize("base", [{}, LOST, MISREAD], ids=["fooled", "failed", "misread"])
@pytest.mark.parametrize("undefined", TOGETHER, ids=", ".join)
def test_no_sentence_has_a_number_that_is_not_defined(undefined: list[str], base: dict[str, object]) -> None:
    scores = row({**EVERYTHING, **base}, **dict.fromkeys(undefined, NAN))
    found = [text for short, sentences in findings(scores).values() for text in (short, *sentences)]
    explained: Any = Explained(scores=pd.DataFrame([scores]))
    texts = [
        *found,
        strongest_fact(scores),
        overview(pd.DataFrame([scores] * 2), np.arange(2)),
        verdict(explained),
    ]
    for text in [*texts, page_verdict(scores)]:
        assert not re.search(r"not defined|\b(nan|inf|None)\b", text), text


def test_of_a_tie_no_part_is_left() -> None:
    found = findings(row(RIGHT, margin_clean=0.0, weak_pixels=0.0, weakest_pixel=0.0))
    assert found[LOCAL][1] == ["No single pixel tried is enough, with each channel set to 0 or 1."]


class Explained(SimpleNamespace):
    """The part of an Explanation that next steps read."""


def steps(rows: list[dict[str, object]], **made: str) -> list[str]:
    explained: Any = Explained(
        scores=pd.DataFrame(rows), made=made, noun="image", images=np.arange(len(rows))
    )
    found = next_steps(explained)
    assert all(step.reason.endswith(":") and step.command.startswith("weakspot ") for step in found)
    return [f"{step.reason} {step.command}" for step in found]


OPTIONS = "--budget linf:8/255 --model 'my nets:build' --size 32x32"
MADE = {"command": f"weakspot explain a.png {OPTIONS}", "options": OPTIONS}


def test_a_weak_background_is_said_only_of_attacks_on_the_background() -> None:
    untested = {**RIGHT, "relation": NAN}
    confined = {**untested, "reached_fraction": 0.6}
    assert not any("localized" in step for step in steps([untested], **MADE))
    assert not any("localized" in step for step in steps([LOST], **MADE, region="background"))
    said = steps([confined, LOST], **MADE, region="background")
    assert said[0] == (
        "1 of 2 images is fooled by a change of the background alone. Train on images whose background is attacked (a "
        "folder with one folder per class): weakspot train photos/ --size 64x64 --recipe localized --out runs/localized"
    )
    assert not any("--reference" in step for step in said)  # a confined attack is not compared


def test_commands_repeat_the_model_and_the_budget() -> None:
    said = steps([{**RIGHT, "relation": NAN}, LOST], **MADE)
    audit = next(step for step in said if "weakspot audit" in step)
    assert f"--regions none,cam,background --controls {OPTIONS} --out" in audit
    background = " ".join(steps([RIGHT], **MADE, region="background"))
    assert f"--regions background --controls {OPTIONS} --out" in background
    assert "--model my_package.models:build" in " ".join(steps([RIGHT]))  # made in Python
    assert "--model" not in " ".join(steps([RIGHT], command="weakspot explain --samples"))


def test_a_map_is_recommended_where_none_was_made() -> None:
    def maps(found: list[str]) -> list[str]:
        return [step for step in found if "weakspot map" in step]

    (step,) = maps(steps([RIGHT], **MADE))
    assert step.endswith(
        "weakspot map photos/ --budget linf:8/255 --model 'my nets:build' --size 32x32 --out runs/map"
    )
    assert not maps(steps([{**RIGHT, **SQUARE}], **MADE))


def test_recommendations_follow_from_the_findings() -> None:
    failed = " ".join(steps([LOST, LOST], command="weakspot explain a b"))
    assert (
        "The attack found no adversarial example for 2 images; this does not mean that none exists." in failed
    )
    assert "--recipe" not in failed
    assert "--attack ensemble" in failed
    stronger = " ".join(steps([LOST], command="weakspot explain a", attack="ensemble, linf:4/255"))
    assert "--attack ensemble" not in stronger
    assert "weakspot map photos/ --effort verified" in stronger
    fooled = " ".join(steps([RIGHT, RIGHT], command="weakspot explain a b"))
    assert "Both images are fooled." in fooled
    assert "found no adversarial example" not in fooled
    assert "--reference" not in fooled  # it was tested
    assert "neutralize" not in fooled
    few = {**RIGHT, "necessary_fraction": 0.1}
    assert "neutralize" in " ".join(steps([few, few], command="weakspot explain a b"))
    assert "neutralize" not in " ".join(steps([few, RIGHT, RIGHT], command="weakspot explain a b c"))
    assert "1 image is an example, not a rate." in " ".join(steps([RIGHT]))


def test_a_targeted_attack_that_ends_in_a_third_class_has_found_an_adversarial_example() -> None:
    third = {**LOST, "adversarial_class": "fox", "asked_for_target": True}
    assert "found no adversarial example" not in " ".join(steps([third, third]))
    assert "found no adversarial example for 1 image;" in " ".join(steps([third, LOST]))


def test_recommendations_are_true_of_one_image_of_some_and_of_many() -> None:
    few = {**RIGHT, "necessary_fraction": 0.1}
    one, two = steps([few]), steps([few] * 2)
    assert any("or less stops the successful attack." in step for step in one)
    assert any("or less stops most of the successful attacks." in step for step in two)
    assert steps([RIGHT, MISREAD])[0].startswith("The one correctly classified image is fooled.")
    assert steps([RIGHT, RIGHT, MISREAD])[0].startswith("Both correctly classified images are fooled.")
    many = " ".join(steps([RIGHT] * 40))
    assert "not a rate" not in many
    assert "Measure robust accuracy" in many
