"""Judging: illusions exposed, the undefended judged alike, oracles kept apart, bad input told."""

from __future__ import annotations

from functools import partial
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import weakspot
from tests.conftest import LinearNetwork, untouched
from tests.defenses.test_neutralizing import Hiding, fragile
from tests.defenses.test_randomness import Shaking, linear
from weakspot.budgets import Linf
from weakspot.checks import ModelWarning
from weakspot.defenses import judge_defense, neutralizing, oracle_neutralized, verdict

ATTACKS = [
    "clean", "replayed", "transfer", "white box", "bare gradients", "inside the region of importance", "black box",
]  # fmt: skip


class Stepped(nn.Module):
    """Answers in steps: no gradient anywhere, an answer that still tells a search where it falls."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = (self.network(images) * 20).round() / 20
        return logits


def masked() -> tuple[nn.Module, Stepped, Tensor, Tensor]:
    """A bare linear network, and one that reads something else entirely, and that in steps."""
    bare, images, labels, _ = linear(12)
    blocks = (
        torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        .repeat_interleave(4, 0)
        .repeat_interleave(4, 1)
        .expand(3, 8, 8)
    )
    other = (
        blocks
        - bare.weight.detach() * (blocks * bare.weight.detach()).sum() / bare.weight.detach().square().sum()
    )
    images = images + (5 - (images * other).sum((1, 2, 3))).view(-1, 1, 1, 1) * other / other.square().sum()
    return bare, Stepped(LinearNetwork(other)).eval(), images.clamp(0, 1), labels


def by_attack(table: pd.DataFrame) -> pd.DataFrame:
    return table.set_index("attack")


def test_a_masked_gradient_is_exposed() -> None:
    bare, defended, images, labels = masked()
    with pytest.warns(ModelWarning, match="gradient"):
        judged = judge_defense(bare, defended, images, labels, budget=Linf(0.1), steps=5, queries=200)
    table = by_attack(judged)["defended"]
    assert table["clean"] == 1
    assert table["replayed"] >= 0.9
    assert table["white box"] >= 0.9
    assert table["black box"] <= 0.1
    assert table["worst of all"] <= 0.1
    said = verdict(judged)
    assert said.startswith("Naive 100%, adaptive 0%")
    assert "no protection against an informed attacker" in said
    assert "(white box 100%, black box 0%: its own gradients overrate it)" in said


def test_rounding_is_exposed_by_the_gradients_of_the_bare_model() -> None:
    model, images, labels = fragile()
    with pytest.warns(ModelWarning, match="gradient"):
        judged = judge_defense(
            model, Hiding(model).eval(), images, labels, budget=Linf(0.05), steps=10, queries=0
        )
    table = by_attack(judged)["defended"]
    assert "black box" not in table
    assert table["bare gradients"] < table["white box"]
    assert table["worst of all"] <= by_attack(judged)["bare"]["worst of all"] + 0.1


@pytest.mark.parametrize("thorough", [False, True])
def test_an_undefended_model_is_judged_alike_and_nothing_is_left_behind(thorough: bool) -> None:
    model, images, labels = fragile()
    told: list[float] = []
    with untouched(model, images, labels):
        judged = judge_defense(
            model, model, images, labels, budget=Linf(0.02), steps=5, queries=20, thorough=thorough,
            progress=told.append,
        )  # fmt: skip
    assert judged["attack"].tolist() == ATTACKS + ["ensemble"] * thorough + ["worst of all"]
    for bound in ("", "_low", "_high"):
        assert judged[f"bare{bound}"].tolist() == judged[f"defended{bound}"].tolist()
    table = by_attack(judged)
    assert (
        table["defended"]["replayed"] == table["defended"]["white box"] == table["defended"]["bare gradients"]
    )
    assert bool(
        (judged["bare_low"] <= judged["bare"]).all() and (judged["bare"] <= judged["bare_high"]).all()
    )
    assert "no protection" in verdict(judged)
    assert told == sorted(told)
    assert told[-1] == 1
    # A second object that computes the same is as undefended as the first.
    twin = judge_defense(
        model, nn.Sequential(model).eval(), images, labels, budget=Linf(0.02), steps=5, queries=20
    )
    assert by_attack(twin)["defended"]["white box"] == table["bare"]["replayed"]


def test_a_random_defence_is_told_of_and_broken_by_averaging() -> None:
    model, images, labels, budget = linear()
    defended = Shaking(model, 0.5, 8.0).eval()
    judge = partial(judge_defense, model, defended, images, labels, budget=budget, steps=10, queries=5)
    before = torch.get_rng_state()
    with pytest.warns(ModelWarning, match="is random: .* give draws, such as 10"):
        once = by_attack(judge())
    averaged = judge(draws=64)
    assert torch.equal(torch.get_rng_state(), before)
    assert once["defended"]["white box"] >= 0.6
    assert by_attack(averaged)["defended"]["white box"] <= 0.1


def test_random_neutralization_is_judged_alike_in_any_order() -> None:
    model, images, labels = fragile()
    defended = neutralizing(model, keep=0.3, randomness=1.0)
    judge = partial(judge_defense, model, defended, budget=Linf(0.01), steps=3, draws=2, queries=5)
    forward = judge(images, labels)
    torch.rand(1)
    backward = judge(images.flip(0), labels.flip(0))
    pd.testing.assert_frame_equal(forward, backward)


def test_the_oracle_stands_apart_under_its_own_name() -> None:
    model, images, labels = fragile()
    with untouched(model, images):
        same = oracle_neutralized(model, images, images, keep=0.1)
    torch.testing.assert_close(model(same), neutralizing(model, keep=0.1)(images))
    judge = partial(
        judge_defense,
        model,
        neutralizing(model, keep=0.1),
        images,
        labels,
        budget=Linf(0.005),
        steps=5,
        queries=0,
    )
    plain = judge()
    with_oracle = judge(oracle=lambda attacked, clean: clean)
    assert with_oracle["attack"].tolist()[-1] == "replayed, oracle region"
    assert with_oracle["defended"].iloc[-1] == 1
    pd.testing.assert_frame_equal(plain, with_oracle.iloc[:-1])
    assert verdict(plain) == verdict(with_oracle)
    with pytest.raises(ValueError, match=r"clean has shape .* accepted are two batches of one shape"):
        oracle_neutralized(model, images, images[:2])


def test_a_transfer_comes_from_the_substitute() -> None:
    bare, defended, images, labels = masked()
    judge = partial(judge_defense, bare, defended, images, labels, budget=Linf(0.1), steps=5, queries=0)
    with pytest.warns(ModelWarning, match="gradient"):
        without = by_attack(judge())
    with pytest.warns(ModelWarning, match="gradient"):
        given = by_attack(judge(substitute=defended.network))
    assert without["defended"]["transfer"] >= 0.9
    assert given["defended"]["transfer"] <= 0.1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"draws": 0}, "draws is 0"),
        ({"queries": -1}, "queries is -1"),
        ({"keep": 3}, "keep is 3"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"budget": 0.1}, "budget is 0.1"),
        ({"defended": len}, "defended is a builtin_function_or_method; accepted is a torch.nn.Module"),
        ({"substitute": 3}, "substitute is a int"),
        ({"labels": torch.full((12,), 9)}, "labels"),
        (
            {"defended": nn.Sequential(nn.Flatten(), nn.Linear(1200, 7)).eval()},
            "defended returns 7 logits .* model 4",
        ),
        ({"defended": nn.Linear(3, 4).eval()}, "defended fails on an image of shape"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(arguments: dict[str, Any], told: str) -> None:
    model, images, labels = fragile()
    given: dict[str, Any] = {
        "model": model,
        "defended": model,
        "images": images,
        "labels": labels,
    } | arguments
    with pytest.raises(ValueError, match=told):
        judge_defense(**given)


def test_the_embedded_network_on_a_photograph() -> None:
    model = weakspot.load("efficientnet_lite0", device="cpu")
    images = weakspot.sample_images((112, 112))[0][:1]
    labels = model(images).argmax(1)
    judged = judge_defense(
        model, neutralizing(model), images, labels, budget=Linf(4 / 255), steps=2, queries=2,
        oracle=partial(oracle_neutralized, model),
    )  # fmt: skip
    table = by_attack(judged)
    assert table["bare"]["clean"] == 1
    assert table["bare"]["replayed"] == 0
    assert "Naive" in verdict(judged)
