"""The rule of verdicts, threshold by threshold, on tables made by hand."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest

from weakspot.defenses import verdict
from weakspot.defenses.verdicts import unfinished
from weakspot.statistics import mcnemar_counts, proportion_interval

COUNT = 100
QUERIES = ("square search, 500 queries", "square search, 1000 queries")


def table(
    accuracies: dict[str, tuple[float, float]], *, lost: int = 0, leads: dict[str, tuple[float, float]] | None = None
) -> pd.DataFrame:  # fmt: skip
    """Rows of undefended and defended accuracy; `lost` images are correct without the defense only."""
    agreements = {"white-box": (1.0, 1.0)} if leads is None else leads
    rows = []
    for attack, sides in accuracies.items():
        row: dict[str, Any] = {"attack": attack, "images": COUNT}
        for side, accuracy in zip(("undefended", "defended"), sides, strict=True):
            bounds = proportion_interval(np.arange(COUNT) < round(accuracy * COUNT))
            row |= dict(zip((side, f"{side}_low", f"{side}_high"), bounds, strict=True))
        gained = round((sides[1] - sides[0]) * COUNT)
        row["undefended_only"], row["defended_only"] = lost + max(0, -gained), lost + max(0, gained)
        row["agreement"], row["agreement_at_end"] = agreements.get(attack, (np.nan, np.nan))
        rows.append(row)
    return pd.DataFrame(rows)


def standing(
    undefended: float, defended: float, *, gradients: float | None = None, first: float | None = None
) -> Any:
    """Accuracies left after all gradient attacks, after the first search and at the end."""
    after = defended if gradients is None else gradients
    return {
        "clean": (1.0, 1.0),
        "white-box": (undefended, after),
        QUERIES[0]: (undefended, defended if first is None else first),
        QUERIES[1]: (undefended, defended),
    }


@pytest.mark.parametrize(
    ("made", "status", "words"),
    [
        (table(standing(0.2, 0.25)), "no protection", "No protection shown: accuracy .* 25%"),
        (table(standing(0.2, 0.2)), "no protection", "No protection: accuracy .* 20%"),
        # Sixty images changed sides: 5 more points may have been missed.
        (table(standing(0.3, 0.3), lost=30), "no protection", "No protection shown: accuracy .* 30%"),
        (table(standing(0.2, 0.26)), "protects", r"Protects against these attacks: accuracy .* 26% \[18%, 36%\] w"),
        (table(standing(0.2, 0.1)), "no protection", "No protection: accuracy .* 10%"),
        # Six points of sixty images that changed sides: chance.
        (table(standing(0.3, 0.36), lost=27), "no protection", r"p = .26\), and the difference can be chance"),
        (table(standing(0.1, 0.8), leads={"white-box": (0.89, 1.0)}), "cannot be judged", "are masked .the best of 1"),
        (table(standing(0.1, 0.8), leads={"white-box": (0.9, 0.5)}), "protects", r"p < .001\).$"),
        (
            table(standing(0.1, 0.8), leads={"white-box": (1.0, 0.49)}), "cannot be judged",
            "masked near the decision boundary .* still lowers the margin on only 49%",
        ),
        # A lead that agrees everywhere except where attacks end, and one that agrees only there.
        (
            table(standing(0.1, 0.8) | {"BPDA (straight-through)": (0.1, 0.8)},
                  leads={"white-box": (1.0, 0.0), "BPDA (straight-through)": (0.1, 1.0)}),
            "cannot be judged", "near the decision boundary",
        ),
        (
            table({"clean": (1.0, 1.0), "white-box": (0.1, 0.8), "BPDA (straight-through)": (0.1, 0.8)}
                  | standing(0.1, 0.8), leads={"white-box": (0.2, 0.0), "BPDA (straight-through)": (0.95, 1.0)}),
            "protects", r"own gradients are masked: they predict its margin on 20% of the images, those of BPDA \(str",
        ),
        # No image is left: nothing speaks against the gradients.
        (table(standing(0.1, 0.8), leads={"white-box": (1.0, np.nan)}), "protects", "80%"),
        (table(standing(0.1, 0.78, first=0.8)), "protects", "78%"),
        (table(standing(0.1, 0.77, first=0.8)), "cannot be judged", r"fooled 3 more of 100 images; raise queries\)"),
        (table(standing(0.1, 0.7, first=0.7, gradients=0.8)), "protects", "70%"),
        (table(standing(0.1, 0.69, first=0.69, gradients=0.8)), "cannot be judged", "11% of the images withstand"),
        (
            table(dict(list(standing(0.1, 0.8).items())[:-1])), "cannot be judged", "never doubled",
        ),
        (
            table({"clean": (1.0, 1.0), "white-box": (0.1, 0.8), "white-box, 8 draws": (0.1, 0.7)}
                  | dict(list(standing(0.1, 0.7).items())[2:])), "cannot be judged", "improves with more draws",
        ),
        (
            table({"clean": (1.0, 1.0), "white-box": (0.1, 0.8), "white-box, 8 draws": (0.1, 0.7),
                   "white-box, 16 draws": (0.1, 0.69)} | dict(list(standing(0.1, 0.69).items())[2:])),
            "protects", "69%",
        ),
        # All doubts are in the sentence, and the oracle's row does not count.
        (
            table(standing(0.1, 0.6, first=0.8, gradients=0.8), leads={"white-box": (0.0, 0.0)}), "cannot be judged",
            "^Cannot be judged: gradients are masked .* and the query-based attack .* and 20% of the images",
        ),
        (table(standing(0.1, 0.1) | {"oracle region": (0.1, 0.9)}), "no protection", "No protection: accuracy .* 10%"),
    ],
)  # fmt: skip
def test_the_rule(made: pd.DataFrame, status: str, words: str) -> None:
    result = verdict(made)
    assert result.status == status, result
    assert re.search(words, str(result)), result
    assert str(result) == result.sentence


@pytest.mark.parametrize(("images", "status"), [(4, "cannot be judged"), (5, "protects")])
def test_so_few_images_that_no_outcome_is_significant_cannot_be_judged(images: int, status: str) -> None:
    made = table(standing(0.0, 1.0)).assign(images=images)
    attacked = made["attack"] != "clean"
    made = made.assign(defended_only=images * attacked)
    result = verdict(made)
    assert result.status == status
    assert ("4 images are too few to show a gain" in str(result)) == (images == 4)
    one = verdict(made.assign(images=1, defended_only=1 * attacked)).sentence
    assert one.startswith("Cannot be judged: 1 image is too few to show a gain.")
    assert "(1 image, p" in one
    lost = made.assign(defended_only=0, undefended_only=images * attacked)
    assert verdict(lost).status == ("cannot be judged" if images == 4 else "no protection")


def test_attacks_that_fool_almost_no_image_do_not_show_that_a_defense_is_worthless() -> None:
    for defended in (1.0, 0.96, 0.93):
        result = verdict(table(standing(0.96, defended)))
        assert result.status == "cannot be judged", result
        assert (
            "fool too few images without a defense for a gain of more than 5 points (raise the budget)"
            in str(result)
        )
    assert verdict(table(standing(0.94, 0.94))).status == "no protection"
    # Images that are misclassified without an attack are not fooled by one.
    assert verdict(table(standing(0.6, 0.6) | {"clean": (0.6, 0.6)})).status == "cannot be judged"
    # A defense that is weaker than nothing is none, whatever the budget.
    assert verdict(table(standing(0.96, 0.3))).sentence.startswith("No protection: accuracy")


@pytest.mark.parametrize(
    ("attacked", "status"),
    [
        ((0.5, 1.0), "cannot be judged"),  # the attacks took nothing from either model
        ((0.4, 0.9), "no protection"),  # nor less from one than from the other
        ((0.3, 0.82), "no protection"),
        ((0.3, 0.9), "protects"),
    ],
)
def test_a_better_classifier_is_no_defense(attacked: tuple[float, float], status: str) -> None:
    result = verdict(table(standing(*attacked) | {"clean": (0.5, 1.0)}))
    assert result.status == status, result
    assert "(100 images, a net gain of 50 without an attack is not counted, p" in str(result)


def test_images_gained_without_an_attack_are_not_counted_as_enough_images() -> None:
    few = table(standing(0.0, 1.0) | {"clean": (0.8, 1.0)}).assign(images=5)
    few[["undefended_only", "defended_only"]] = [[0, 1], *[[0, 5]] * (len(few) - 1)]
    assert "5 images are too few to show a gain" in verdict(few).sentence


def test_an_evaluation_that_was_interrupted_says_after_what() -> None:
    one = table({"clean": (1.0, 1.0)}).assign(images=1)
    assert "interrupted after the clean images. Accuracy so far" in str(unfinished(one))
    assert str(unfinished(one)).endswith("(1 image).")


def test_mcnemar_is_the_fraction_of_all_ways_to_flip_the_pairs() -> None:
    for only_first, only_second in itertools.product(range(6), range(6)):
        count = only_first + only_second
        ways = [sum(flips) >= only_first for flips in itertools.product((0, 1), repeat=count)]
        assert mcnemar_counts(only_first, only_second, alternative="greater") == pytest.approx(np.mean(ways))


def test_mcnemar_rejects_chance_no_more_often_than_its_level() -> None:
    generator = np.random.default_rng(0)
    only_first = generator.binomial(30, 0.5, 4000)
    rejected = np.mean(
        [mcnemar_counts(int(first), 30 - int(first), alternative="greater") <= 0.05 for first in only_first]
    )
    assert 0.01 <= rejected <= 0.06
