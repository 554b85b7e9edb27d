"""`TrainConfig`: the usual values of the data, its record, and values that do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.tiny import QUICK, fresh, halves, quick_train
from weakspot import L2, Linf
from weakspot.training import RECIPES, TrainConfig
from weakspot.training.config import ResolvedConfig


@pytest.mark.parametrize(
    ("config", "channels", "expected"),
    [
        (TrainConfig(), 1, (Linf(0.3), 40, 0.01, "none")),
        (TrainConfig(), 3, (Linf(8 / 255), 10, 2 / 255, "crop,flip")),
        (TrainConfig(steps=5), 3, (Linf(8 / 255), 5, 2.5 * 8 / 255 / 5, "crop,flip")),
        (TrainConfig(budget=L2(0.5)), 3, (L2(0.5), 10, 2.5 * 0.5 / 10, "crop,flip")),
        (TrainConfig(budget=L2(0.5), step_size=0.1, augment="crop"), 1, (L2(0.5), 40, 0.1, "crop")),
        (TrainConfig(recipe="fast", steps=9), 1, (Linf(0.3), 1, 0.0, "none")),
    ],
    ids=repr,
)
def test_values_that_are_not_given_are_those_of_the_data(
    config: TrainConfig, channels: int, expected: tuple[Any, ...]
) -> None:
    resolved = config.resolved(channels)
    assert (resolved.budget, resolved.steps, resolved.step_size, resolved.augment) == pytest.approx(expected)
    assert resolved.resolved(channels) == resolved


def test_a_fraction_that_attacks_no_image_is_refused_only_where_images_are_attacked() -> None:
    small = TrainConfig(batch_size=16, attacked_fraction=0.01)
    with pytest.raises(ValueError, match="attacks no image of a batch of 16"):
        small.resolved(1)
    assert replace(small, recipe="standard").resolved(1).attacked == 0
    assert replace(small, attacked_fraction=0.0).resolved(1).attacked == 0
    assert replace(small, attacked_fraction=0.04).resolved(1).attacked == 1


def test_the_repr_has_what_differs_from_the_defaults() -> None:
    assert repr(TrainConfig(recipe="fast", epochs=3)) == "TrainConfig(recipe='fast', epochs=3)"
    assert repr(TrainConfig()) == "TrainConfig()"


def test_the_record_has_everything_that_decides_the_weights_and_nothing_else() -> None:
    record = QUICK.resolved(1).as_record()
    assert record["attacked_fraction"] == 0.5
    assert record == TrainConfig(**{**vars(QUICK), "device": "cpu", "workers": 0}).resolved(1).as_record()
    changed = TrainConfig(**{**vars(QUICK), "budget": L2(1.0)}).resolved(1)
    slightly = TrainConfig(**{**vars(QUICK), "budget": L2(1.0000004)}).resolved(1)
    assert changed.as_record() != slightly.as_record()


def test_the_learning_rate_falls_along_a_cosine() -> None:
    config = ResolvedConfig(learning_rate=0.2)
    assert [config.rate(done) for done in (0, 0.5, 1)] == pytest.approx([0.2, 0.1, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "localised"}, "recipe must be one of .*, got 'localised' .did you mean 'localized'"),
        ({"recipe": ["full"]}, r"recipe must be one of .*, got \['full'\]"),
        ({"attacked_fraction": 1.5}, "attacked_fraction must be between 0 and 1, got 1.5"),
        ({"attacked_fraction": float("nan")}, "attacked_fraction must be between 0 and 1, got nan"),
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"steps": "3"}, "steps must be an integer of at least 1, got '3'"),
        ({"workers": -1}, "workers must be an integer of at least 0, got -1"),
        ({"learning_rate": -1}, "learning_rate must be a finite number of at least 0, got -1"),
        ({"augment": "rotate"}, "augment must be one of none, crop, crop,flip, got 'rotate'"),
        ({"precision": "8"}, "precision must be one of .*, got '8'"),
        ({"budget": 0.1}, "budget"),
        ({"seed": 0.5}, "seed"),
    ],
)
def test_values_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 500}, "batch_size must be at most the 180 images to train on, got 500"),
        ({"device": "abacus"}, "abacus"),
        ({"out": 3}, "out must be the path of a folder, got 3"),
        ({"about": {"settings": 1}}, "about must not have the names .*, got 'settings'"),
        ({"about": {"path": Path()}}, "about must hold values that JSON has"),
        ({"about": {"note": float("nan")}}, "about must hold values that JSON has"),
        (
            {"attacked_fraction": 0.01, "batch_size": 16},
            r"attacked_fraction must be 0 or more than 0.03125, got 0.01 \(which attacks no image of a batch of 16",
        ),
        (
            {"learning_rate": 1e30},
            r"learning_rate must be .* got 1e\+30 \(the training diverged in epoch 1\)",
        ),
    ],
)
def test_values_that_do_not_fit_the_data_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick_train(fresh(), halves(), **changes)


def test_every_recipe_has_a_summary() -> None:
    assert all(recipe.summary for recipe in RECIPES.values())


def test_numbers_of_numpy_are_recorded_as_those_of_python() -> None:
    config = TrainConfig(epochs=np.int64(3), learning_rate=np.float32(0.5), budget=Linf(np.float32(0.25)))  # type: ignore[arg-type]
    assert repr(config) == "TrainConfig(budget=Linf(eps=0.25), epochs=3, learning_rate=0.5)"
    assert config == TrainConfig(epochs=3, learning_rate=0.5, budget=Linf(0.25))


@pytest.mark.parametrize("value", [np.True_, np.array(3), np.float64(3)], ids=repr)
def test_other_values_of_numpy_are_no_counts(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^epochs must be an integer of at least 1, got"):
        TrainConfig(epochs=value)
