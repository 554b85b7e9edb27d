"""Evaluation on planted weaknesses: "protects" for a robust network, never for a broken defense."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import weakspot
from tests.defenses.planted import BUDGET, Inline, one_hot, planted, reversed_gradient
from tests.defenses.test_neutralization import fragile
from tests.defenses.test_randomized import Shaking, linear
from tests.networks import LinearNetwork, PoolingNetwork, Wrapped, untouched
from weakspot._checks import ModelWarning
from weakspot.budgets import L2, Linf
from weakspot.defenses import (
    DrawnByImage,
    Verdict,
    evaluate_defense,
    neutralizing,
    oracle_neutralized,
    verdict,
)

ATTACKS = [
    "clean", "transferred from the undefended model", "white-box", "BPDA (straight-through)",
    "BPDA (undefended gradients)", "white-box (region of importance)", "square search, 500 queries",
    "square search, 1000 queries",
]  # fmt: skip


def by_attack(table: pd.DataFrame) -> pd.DataFrame:
    return table.set_index("attack")


@cache  # several tests look at one verdict
def judged(defended: nn.Module, **options: Any) -> tuple[pd.DataFrame, Verdict]:
    undefended, _, _, images, labels = planted()
    table = evaluate_defense(undefended, defended.eval(), images, labels, budget=BUDGET, steps=10, **options)
    return table, verdict(table)


def detached(images: Tensor) -> Tensor:
    return images.detach()


def by_hash(images: Tensor, strength: float) -> Tensor:
    """Noise that is a function of the image's content."""
    noise = []
    for image in (images.detach() * 255).round().byte():
        digest = hashlib.blake2b(image.numpy().tobytes(), digest_size=6).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest))
        noise.append(torch.rand(image.shape, generator=generator) - 0.5)
    return images + strength * torch.stack(noise)


FIRST, SECOND, ROBUST, *_ = planted()
DETACHED, ONE_HOT = Wrapped(FIRST, detached), Inline(SECOND, after=one_hot)
BROKEN: dict[str, Callable[[], nn.Module]] = {
    "detach, own network": lambda: DETACHED,
    "detach, foreign network": lambda: Wrapped(SECOND, detached),
    "detach, no inner network": lambda: Inline(SECOND, detached),
    "reversed gradient": lambda: Wrapped(SECOND, reversed_gradient),
    "reversed gradient, no inner network": lambda: Inline(SECOND, reversed_gradient),
    "rounded images": lambda: Wrapped(SECOND, lambda images: (images * 32).round() / 32),
    "rounded logits": lambda: Inline(SECOND, after=lambda logits: (4 * logits).round() / 4),
    "saturated logits": lambda: Wrapped(SECOND, after=lambda logits: (50 * logits).tanh()),
    "temperature": lambda: Wrapped(SECOND, after=lambda logits: 1e6 * logits),
    "one-hot, own network": lambda: Wrapped(FIRST, after=one_hot),
    "noise at every call": lambda: Wrapped(SECOND, lambda images: images + 0.1 * torch.randn_like(images)),
    "noise by a hash of the image": lambda: Inline(SECOND, partial(by_hash, strength=0.05)),
    "gradient through half of the pixels": lambda: Wrapped(
        SECOND, lambda images: torch.where(torch.rand_like(images) < 0.5, images, images.detach())
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_defense_does_not_protect(name: str) -> None:
    table, result = judged(BROKEN[name]())
    assert result.status == "no protection", (result, table)
    assert by_attack(table)["defended"]["clean"] == 1
    assert float(table["defended"].iloc[-1]) == 0


def test_a_broken_defense_that_withstands_every_attack_cannot_be_judged() -> None:
    """Neither gradients nor outputs show its weakness: one-hot logits, and no inner network."""
    table, result = judged(ONE_HOT)
    assert float(table["defended"].iloc[-1]) == 1
    assert result.status == "cannot be judged"
    assert (
        "gradients are masked (the best of 2 sources of gradients predicts the defended model's margin on 0%"
        in str(result)
    )


@pytest.mark.parametrize("hidden", [False, True])
def test_a_robust_network_protects_also_where_its_own_gradients_are_masked(hidden: bool) -> None:
    table, result = judged(Wrapped(ROBUST, detached) if hidden else ROBUST)
    assert result.status == "protects"
    assert str(result).startswith(
        "Protects against these attacks: accuracy after all attacks is 100% [86%, 100%] with the defense and "
        "0% [0%, 14%] without it (24 images, p < .001)."
    )
    assert ("Its own gradients are masked: they predict its margin on 0%" in str(result)) == hidden
    agreements = by_attack(table)["agreement"]
    assert agreements["white-box"] == 1 - hidden
    assert not hidden or agreements["BPDA (straight-through)"] == 1


@pytest.mark.parametrize("thorough", [False, True])
def test_without_a_defense_both_sides_are_equal_and_nothing_is_changed(thorough: bool) -> None:
    model, images, labels = fragile()
    fractions: list[float] = []
    with untouched(model, images, labels):
        table = evaluate_defense(
            model, model, images, labels, budget=Linf(0.02), steps=5, queries=20, thorough=thorough,
            progress=fractions.append,
        )  # fmt: skip
    expected = [*ATTACKS[:6], *(["ensemble"] if thorough else []), "square search, 20 queries"]
    assert table["attack"].tolist() == expected
    for bound in ("", "_low", "_high"):
        assert table[f"undefended{bound}"].tolist() == table[f"defended{bound}"].tolist()
    assert table["defended_only"].tolist() == table["undefended_only"].tolist() == [0] * len(table)
    assert verdict(table).status == "no protection"
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    # Another object that computes the same logits.
    twin = evaluate_defense(
        model, nn.Sequential(model).eval(), images, labels, budget=Linf(0.02), steps=5, queries=20
    )
    assert twin["undefended"].tolist() == table["undefended"].tolist()[: len(twin)]
    assert by_attack(twin)["defended"]["white-box"] == by_attack(table)["defended"]["white-box"]


def test_accuracy_only_decreases_and_the_order_of_images_does_not_matter() -> None:
    model, images, labels = fragile()
    judge = partial(
        evaluate_defense, model, neutralizing(model, fraction=0.1), budget=Linf(0.01), steps=5, queries=20
    )
    table = judge(images, labels)
    for side in ("undefended", "defended"):
        assert table[side].is_monotonic_decreasing
    pd.testing.assert_frame_equal(table, judge(images.flip(0), labels.flip(0)))


def test_both_sides_get_the_same_queries_which_double_until_they_take_little_more() -> None:
    table, _ = judged(ONE_HOT)
    assert table["attack"].tolist() == ATTACKS
    short, result = judged(ROBUST, queries=999)
    assert short["attack"].tolist() == ATTACKS[:-1]
    assert result.status == "cannot be judged"
    assert "the number of queries was never doubled (raise queries to at least 1000)" in str(result)


class OffGrid(nn.Module):
    """Wrong on every image that an 8-bit file cannot store, and robust on all others."""

    def forward(self, images: Tensor) -> Tensor:
        off = ((images * 255 - (images * 255).round()).abs() > 1e-3).flatten(1).any(1)
        logits: Tensor = ROBUST(images)
        return torch.where(off[:, None], -logits, logits)


def test_images_that_fool_only_between_8_bit_levels_do_not_count() -> None:
    table, _ = judged(OffGrid())
    assert float(table["defended"].iloc[-1]) == 1
    _, _, _, images, labels = planted()
    with pytest.raises(ValueError, match=r"budget must be at least 1/255 in L-infinity, got 0\.003"):
        evaluate_defense(FIRST, ROBUST, images, labels, budget=Linf(0.003))


def test_the_verdict_survives_a_file(tmp_path: Path) -> None:
    for defended in (ROBUST, DETACHED, ONE_HOT):
        table, result = judged(defended)
        table.to_csv(tmp_path / "defense.csv", index=False)
        assert verdict(pd.read_csv(tmp_path / "defense.csv")) == result


def test_a_random_defense_is_broken_by_averaging() -> None:
    undefended, second, _, images, labels = planted()
    defended = Shaking(second, 0.5, 8.0).eval()
    judge = partial(
        evaluate_defense, undefended, defended, images, labels, budget=Linf(9 / 255), steps=15, queries=5
    )  # fmt: skip
    before = torch.get_rng_state()
    once, averaged = (by_attack(judge(draws=draws))["defended"]["white-box"] for draws in (1, 64))
    assert torch.equal(torch.get_rng_state(), before)
    assert once >= 0.6
    assert averaged <= 0.1


class Coins(DrawnByImage):
    """A robust network on images with much noise, which depends on the image and the draw."""

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = ROBUST(by_hash(images + 0.1 * self.draw, 2.0))
        return logits


def test_draws_by_the_image_are_queried_until_one_errs_and_other_draws_are_not() -> None:
    by_image, _ = judged(Coins(), queries=500)
    assert by_image["defended"].iloc[-2] >= 0.3
    assert by_image["defended"].iloc[-1] <= 0.05
    at_every_call, _ = judged(
        Wrapped(ROBUST, lambda images: images + 2 * (torch.rand_like(images) - 0.5)), queries=500
    )
    assert at_every_call["defended"].iloc[-1] >= 0.3


def test_the_oracle_has_a_row_of_its_own_and_no_part_in_the_verdict() -> None:
    model, images, labels = fragile()
    with untouched(model, images):
        same = oracle_neutralized(model, images, images, fraction=0.1)
    torch.testing.assert_close(model(same), neutralizing(model, fraction=0.1)(images))
    judge = partial(
        evaluate_defense, model, neutralizing(model, fraction=0.1), images, labels,
        budget=Linf(0.01), steps=5, queries=5
    )  # fmt: skip
    plain = judge()
    with_oracle = judge(oracle=lambda attacked, clean: clean)
    assert with_oracle["attack"].tolist()[-1] == "oracle region"
    assert with_oracle["defended"].iloc[-1] == plain["undefended"].iloc[0]
    pd.testing.assert_frame_equal(plain, with_oracle.iloc[:-1], check_dtype=False)
    assert verdict(plain) == verdict(with_oracle)
    with pytest.raises(ValueError, match=r"clean must have the shape of images, .* got"):
        oracle_neutralized(model, images, images[:2])


def test_a_transfer_comes_from_the_substitute() -> None:
    undefended, second, _, images, labels = planted()
    judge = partial(evaluate_defense, undefended, second, images, labels, budget=BUDGET, steps=5, queries=1)
    assert by_attack(judge())["defended"]["transferred from the undefended model"] == 1
    assert by_attack(judge(substitute=second))["defended"]["transferred from the substitute"] == 0


class Tuple(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, ROBUST(images)


@pytest.mark.parametrize(
    "network", [Tuple(), nn.Sequential(LinearNetwork(ROBUST.weight.detach()), nn.Identity())]
)
def test_outputs_of_any_form_are_evaluated(network: nn.Module) -> None:
    assert judged(network)[1].status == "protects"


def test_other_norms_are_evaluated_too() -> None:
    undefended, second, robust, images, labels = planted()
    judge = partial(
        evaluate_defense, undefended, images=images, labels=labels, budget=L2(0.8), steps=10, queries=1000
    )
    assert verdict(judge(defended=robust)).status == "protects"
    assert verdict(judge(defended=Wrapped(second, detached).eval())).status == "no protection"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"draws": 0}, "draws must be"),
        ({"queries": 0}, "queries must be"),
        ({"fraction": 3}, "fraction must .* got 3"),
        ({"seed": 0.5}, "seed must .* got 0.5"),
        ({"budget": 0.1}, "budget must .* got 0.1"),
        ({"defended": len}, "defended must be a torch.nn.Module, got builtin_function_or_method"),
        ({"oracle": 5}, "oracle must be a function of attacked and clean images, got 5"),
        ({"oracle": lambda attacked, clean: None}, "oracle must return images of shape .*, got NoneType"),
        ({"oracle": lambda attacked, clean: attacked[:1]}, "oracle must return images of shape"),
        ({"seed": True}, "seed must .* got True"),
        ({"substitute": 3}, "substitute must be a torch.nn.Module, got int"),
        ({"labels": torch.full((12,), 9)}, "labels"),
        (
            {"defended": nn.Sequential(nn.Flatten(), nn.Linear(1200, 7)).eval()},
            "defended must have the 4 classes of model, got 7 logits",
        ),
        ({"defended": nn.Linear(3, 4).eval()}, "defended must take the images of model, of shape"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments: dict[str, Any], message: str) -> None:
    model, images, labels = fragile()
    given: dict[str, Any] = {
        "model": model,
        "defended": model,
        "images": images,
        "labels": labels,
    } | arguments
    with pytest.raises(ValueError, match=message):
        evaluate_defense(**given)


def test_a_model_that_returns_probabilities_causes_a_warning() -> None:
    model, images, labels = fragile()
    with pytest.warns(ModelWarning, match="as a softmax does"):
        evaluate_defense(
            model, Wrapped(model, after=lambda z: z.softmax(1)).eval(), images, labels, steps=1, queries=1
        )


def test_the_embedded_network_on_a_photograph() -> None:
    model = weakspot.load("efficientnet_lite0", device="cpu")
    images = weakspot.sample_images((112, 112))[0][:1]
    labels = model(images).argmax(1)
    table = evaluate_defense(
        model, neutralizing(model), images, labels, budget=Linf(4 / 255), steps=2, queries=2,
        oracle=partial(oracle_neutralized, model),
    )  # fmt: skip
    undefended = by_attack(table)["undefended"]
    assert undefended["clean"] == 1
    assert undefended["transferred from the undefended model"] == 0
    assert verdict(table).status == "cannot be judged"  # one image


def test_inference_mode_changes_no_result() -> None:
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    network = PoolingNetwork().eval()
    labels = network(images).argmax(1)
    options: dict[str, Any] = {"budget": Linf(1 / 255), "steps": 2, "queries": 4}
    expected = evaluate_defense(network, network, images, labels, **options)
    with torch.inference_mode():
        found = evaluate_defense(network, network, images * 1, labels * 1, **options)
    pd.testing.assert_frame_equal(found, expected)


@pytest.mark.parametrize("table", [5, pd.DataFrame(), pd.DataFrame({"attack": ["pgd"]})])
def test_a_verdict_needs_the_table_of_an_evaluation(table: Any) -> None:
    with pytest.raises(ValueError, match="table must be one that evaluate_defense returned, got"):
        verdict(table)


def test_copies_of_an_image_count_once() -> None:
    model, images, labels = fragile()
    judge = partial(evaluate_defense, model, model, budget=Linf(0.01), steps=2, queries=5)
    once = judge(images[:2], labels[:2])
    copies = judge(images[:2].repeat(15, 1, 1, 1), labels[:2].repeat(15))
    pd.testing.assert_frame_equal(once, copies)
    assert set(copies["images"]) == {2}


def test_a_random_model_without_a_defense_gives_the_same_table_whatever_was_drawn_before() -> None:
    model, images, labels, budget = linear()
    random = Shaking(model, 5.0, 30.0).eval()
    tables = []
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            tables.append(
                evaluate_defense(
                    random, random, images, labels, budget=budget, steps=2, draws=2, queries=5,
                    seed=np.int64(3),  # type: ignore[arg-type]
                )
            )  # fmt: skip
    pd.testing.assert_frame_equal(tables[0], tables[1])
