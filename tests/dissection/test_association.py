"""Sensitivity beside IoU: what activation or the layer explains is no association, and words say no more than tests."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from weakspot.dissection import (
    Association,
    associate,
    by_category,
    concept_sentence,
    join,
    moved_concepts,
    sensitivity_sentence,
)


def made_up(units: int, linked: float, seed: int = 0) -> pd.DataFrame:
    """Units whose activation drives both sensitivity and IoU, with or without a link of their own."""
    rng = np.random.default_rng(seed)
    activation, own = rng.normal(size=(2, units))
    return pd.DataFrame(
        {
            "sensitivity": np.exp(activation + 0.3 * rng.normal(size=units) + linked * own),
            "iou": np.exp(activation + 0.3 * rng.normal(size=units) + linked * own),
            "mean_activation": activation,
        }
    )


def test_an_association_explained_by_activation_is_none() -> None:
    result = associate(made_up(400, linked=0.0))
    assert result.correlation > 0.7
    assert result.low < 0 < result.high
    assert abs(result.partial) < 0.15
    linked = associate(made_up(400, linked=1.0))
    assert linked.low > 0.5


def test_an_association_explained_by_layers_is_none() -> None:
    rng = np.random.default_rng(0)
    layers = np.repeat([0, 1], 150)
    table = pd.DataFrame(
        {
            "sensitivity": layers + 0.2 * rng.normal(size=300), "iou": layers + 0.2 * rng.normal(size=300),
            "mean_activation": rng.normal(size=300), "layer": np.where(layers, "late", "early"),
        }
    )  # fmt: skip
    result = associate(table)
    assert result.correlation > 0.6
    assert result.low < 0 < result.high


@pytest.mark.parametrize("units", [20, 64])
def test_the_interval_of_no_association_includes_zero(units: int) -> None:
    """40 tables without a link: nominally 2 intervals exclude zero; at most 6 may."""
    result = [associate(made_up(units, linked=0.0, seed=seed)) for seed in range(40)]
    assert sum(not one.low <= 0 <= one.high for one in result) <= 6


def test_few_units_give_no_interval_and_no_claim() -> None:
    result = associate(made_up(19, linked=3.0))
    assert result.partial > 0.5
    assert np.isnan([result.low, result.high]).all()
    assert "no interval and no claim" in result.sentence
    assert "more sensitive" not in result.sentence


def test_a_sentence_claims_only_what_the_interval_shows() -> None:
    none, linked = (associate(made_up(400, linked=one)).sentence for one in (0.0, 1.0))
    assert none.startswith(
        "There is not enough evidence that units that agree better with a concept are more or less"
    )
    assert "includes zero" in none
    assert linked.startswith(
        "Units that agree better with a concept are more sensitive: the rank correlation"
    )
    assert "and at equal mean activation it is 0." in linked
    less = Association(0.5, -0.3, -0.4, -0.2, 90, 2).sentence
    assert "are less sensitive" in less
    assert "at equal mean activation in the same layer it is -0.30 [-0.40, -0.20]" in less
    explained = made_up(50, 0)
    explained["iou"] = explained["mean_activation"]
    assert "nothing is left to correlate" in associate(explained).sentence
    assert "cannot be determined" in associate(explained.assign(iou=0.0)).sentence


def test_joined_units_say_which_concepts_an_attack_moves() -> None:
    sensitivity = pd.DataFrame(
        {
            "unit": range(6), "change": [2.0, 1.0, -3.0, -0.1, 5.0, 1.0], "excess": [2.0, 1.0, -3.0, -0.1, 5.0, -1.0],
            "sensitivity": [2.0, 1.0, 3.0, 0.1, 5.0, 1.5], "noise": [0.1] * 6,
            "p_value": [0.01, 0.2, 0.001, 0.9, 0.001, 0.01],
            "direction_p": [0.01, 0.01, 0.01, 0.01, 0.01, 0.01], "mean_activation": range(6),
        }
    )  # fmt: skip
    units = pd.DataFrame(
        {
            "unit": range(6), "concept": ["dotted", "dotted", "ear", "sky", None, "wheel"], "iou": [0.1] * 6,
            "category": ["texture", "texture", "part", "object", None, "part"],
        }
    )  # fmt: skip
    table = join(sensitivity, units)
    moved = moved_concepts(table).set_index("concept")
    counts = moved.loc[["dotted", "ear", "sky", "wheel"], ["units", "moved", "promoted", "suppressed"]]
    # The wheel ends above where it was, but noise alone would take it higher: moved, in no direction.
    assert counts.to_numpy().tolist() == [[2, 1, 1, 0], [1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 0, 0]]
    assert concept_sentence(moved_concepts(table)) == (
        "The attack moves detectors more than noise of the same size does: it promotes dotted (1 of 2 detectors); it "
        "suppresses ear (1 of 1 detector); it moves wheel (1 of 1 detector) (direction not shown)."
    )
    both = moved_concepts(table).query("concept == 'dotted'").assign(moved=2, suppressed=1)
    assert concept_sentence(both).endswith("it moves dotted (2 of 2 detectors) in both directions.")
    still = "No detector clearly moves more than under noise of the same size."
    assert concept_sentence(moved_concepts(table, level=0.0)) == still
    assert concept_sentence(moved_concepts(table.assign(concept=None))) == "No unit detects a concept."
    kinds = by_category(table).set_index("category")
    assert kinds["units"].to_dict() == {"texture": 2, "part": 2, "object": 1, "none": 1}
    assert kinds.loc["texture", "sensitivity"] == pytest.approx(1.5)


def test_invalid_input_is_an_error() -> None:
    with pytest.raises(ValueError, match="none named 'iou'"):
        associate(made_up(20, 0).drop(columns="iou"))
    with pytest.raises(ValueError, match="at least 10 units, for a correlation, got 3"):
        associate(made_up(3, 0))
    with pytest.raises(ValueError, match="of one layer, got 4 and 5 units"):
        join(pd.DataFrame({"unit": range(4)}), pd.DataFrame({"unit": range(5)}))


@pytest.mark.parametrize("level", [1.5, float("nan"), -1.0])
def test_a_level_is_a_fraction(level: float) -> None:
    with pytest.raises(ValueError, match=r"^level must be between 0 and 1, got"):
        moved_concepts(pd.DataFrame({"concept": []}), level=level)
    with pytest.raises(ValueError, match=r"^level must be between 0 and 1, got"):
        sensitivity_sentence(pd.DataFrame({"images": [3]}), level=level)


def test_tables_of_two_layers_or_without_units_are_refused() -> None:
    one = pd.DataFrame({"unit": [0, 1]})
    with pytest.raises(ValueError, match="must be of one layer, got 2 and 4 units"):
        join(one, pd.concat([one, one]))
    with pytest.raises(ValueError, match=r"^sensitivity must have a column unit"):
        join(pd.DataFrame(), one)
    with pytest.raises(ValueError, match=r"got no concept$"):
        moved_concepts(pd.DataFrame())
