"""The robustness matrix: its numbers are those of the attacks, and it resumes after a crash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.networks import FlatNetwork, LinearNetwork, untouched
from tests.training.tiny import QUICK, fresh, halves
from weakspot import Linf, attacks
from weakspot.datasets import LabeledImages, from_tensors
from weakspot.training import (
    RECIPES,
    TESTS,
    Judged,
    TestConfig,
    judged_images,
    matrix,
    outcomes,
    robust_accuracy,
    robustness_matrix,
    swap_backgrounds,
    train,
)

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore:.*lightning.*")]


def make(seed: int) -> nn.Module:
    return fresh(FlatNetwork, seed)


def data(count: int) -> LabeledImages:
    return from_tensors(*halves(count))


def test_swapped_backgrounds_keep_the_object_and_come_from_another_image() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(9, 3, 8, 6, generator=generator)
    masks = torch.rand(9, 1, 8, 6, generator=generator) < 0.5
    swapped = swap_backgrounds(images, masks)
    assert torch.equal(swapped.masked_select(~masks), images.masked_select(~masks))
    givers = []
    for number in range(9):
        both = masks[number] & masks
        same = ((swapped[number] == images) | ~both).flatten(1).all(1)
        assert int(same.sum()) == 1, "what lies behind is the background of one other image"
        giver = int(same.nonzero())
        assert giver != number
        givers.append(giver)
        hidden = masks[number] & ~masks[giver]
        mean = images[giver].masked_select(masks[giver].expand(3, -1, -1)).view(3, -1).mean(1)
        torch.testing.assert_close(
            swapped[number].masked_select(hidden).view(3, -1), mean[:, None].expand(3, int(hidden.sum()))
        )
    assert sorted(givers) == list(range(9))
    assert torch.equal(swapped, swap_backgrounds(images, masks))
    with pytest.raises(ValueError, match="images must be at least two, to swap backgrounds, got 1"):
        swap_backgrounds(images[:1], masks[:1])


def test_outcomes_are_those_of_a_linear_network_by_its_closed_form() -> None:
    """An image withstands while its margin exceeds what the budget can take from it inside the region."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 6, 5, generator=generator)
    weight -= weight.mean()
    # Pictures of 8 bits and a budget of whole levels, so that rounding changes nothing.
    images = ((torch.rand(40, 1, 6, 5, generator=generator) * 0.2 + 0.4) * 255).round() / 255
    masks = torch.rand(40, 1, 6, 5, generator=generator) < 0.4
    model = LinearNetwork(weight).eval()
    lead = torch.einsum("nchw,chw->n", images, weight)
    labels = (lead < 0).long()
    labels[:5] = 1 - labels[:5]
    right = torch.arange(40) >= 5
    with untouched(model, images, labels):
        result = outcomes(model, Judged(images, labels, masks), TestConfig(Linf(3 / 255), 20, strongest=15))
    assert tuple(result) == tuple(TESTS)
    taken = {
        name: 3 / 255 * (weight.abs() * where).flatten(1).sum(1)
        for name, where in (("localized", masks), ("full", 1.0))
    }
    assert torch.equal(result["clean"], right)
    for name in ("localized", "full"):
        assert torch.equal(result[name], right & (lead.abs() > taken[name]))
    assert torch.equal(result["strongest"], result["full"][:15])
    assert 0 < int(result["full"].sum()) < int(result["localized"].sum()) < 35


def test_the_matrix_is_what_its_networks_do(tmp_path: Path) -> None:
    rows: list[str] = []
    config = replace(QUICK, epochs=3, budget=Linf(0.05), held_out=0)
    options: dict[str, Any] = {"out": tmp_path, "recipes": ("standard", "full"), "seeds": 2, "strongest": 4}
    result = robustness_matrix(
        make, data(200), data(60), config, on_epoch=lambda name, _: rows.append(name), **options
    )
    assert len(result.accuracy) == 2 * len(TESTS)
    assert len(result.differences) == 2 * len(TESTS)
    images, labels = halves(60)
    from safetensors.torch import load_file

    for recipe in ("standard", "full"):
        each = []
        for seed in range(2):
            model = fresh().eval()
            model.load_state_dict(load_file(tmp_path / f"{recipe}-{seed}" / "model.safetensors"))
            right = model(images).argmax(1) == labels
            made = attacks.pgd(model, images, labels, budget=Linf(0.05), steps=40, stop_early=True)
            each.append(float((right & ~made.success).double().mean()))
        row: Any = result.accuracy.set_index(["recipe", "test"]).loc[(recipe, "full")]
        assert row["accuracy"] == pytest.approx(np.mean(each))
        assert row["spread"] == pytest.approx(max(each) - min(each))
        assert row["low"] <= row["accuracy"] <= row["high"]
    difference: Any = result.differences.set_index(["test", "recipe", "against"])["difference"]
    accuracy: Any = result.accuracy.set_index(["test", "recipe"])["accuracy"]
    gain = difference.loc[("full", "full", "standard")]
    assert gain == pytest.approx(accuracy.loc[("full", "full")] - accuracy.loc[("full", "standard")])
    assert gain == -difference.loc[("full", "standard", "full")]
    # Called again, everything is loaded: no epoch is trained, and the numbers are the same.
    again: list[str] = []
    same = robustness_matrix(
        make, data(200), data(60), config,
        on_epoch=lambda name, row: again.append(name) if "epoch" in row else None, **options,
    )  # fmt: skip
    assert not again
    assert same.accuracy.equals(result.accuracy)
    assert rows.count("full-0") == 4  # three epochs and the result
    assert repr(result).splitlines()[0] == "Matrix(2 recipes, 5 tests)"
    assert repr(result).splitlines()[1].startswith("  standard: clean ")


@pytest.mark.parametrize("recipe", RECIPES)
def test_passes_are_those_that_a_training_makes(recipe: str) -> None:
    """Counted in the network: images that pass forward and back, during an epoch."""
    images, labels = halves(24)
    model = fresh()
    counted = [0]

    def count(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        counted[0] += len(inputs[0]) if torch.is_grad_enabled() else 0

    config = replace(QUICK, recipe=recipe, epochs=1, batch_size=8, steps=3, held_out=0, budget=Linf(0.05))
    model.register_forward_hook(count)
    train(model, (images, labels), config)
    assert counted[0] / 24 == config.resolved(1).passes


def test_at_equal_passes_cheap_recipes_have_more_epochs(tmp_path: Path) -> None:
    epochs: dict[str, int] = {}

    def note(name: str, row: Mapping[str, float]) -> None:
        epochs[name] = max(epochs.get(name, 0), int(row.get("epoch", 0)))

    config = replace(QUICK, epochs=2, batch_size=20, steps=3, attacked_fraction=0.5, held_out=0)
    options: dict[str, Any] = {"recipes": ("standard", "full", "fast"), "strongest": 2, "on_epoch": note}
    robustness_matrix(make, data(20), data(8), config, out=tmp_path / "passes", equal_passes=True, **options)
    assert epochs == {"standard-0": 5, "full-0": 2, "fast-0": 3}  # 5, 5 and 4.5 passes an image
    epochs.clear()
    robustness_matrix(make, data(20), data(8), config, out=tmp_path / "epochs", **options)
    assert epochs == {"standard-0": 2, "full-0": 2, "fast-0": 2}


def test_test_images_of_another_kind_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    images, labels = halves(20)
    for test, message in (
        (
            from_tensors(images.repeat(1, 3, 1, 1), labels),
            r"test must have images of \(1, 16, 12\).* got \(3, 16, 12\)",
        ),
        (from_tensors(images, labels + 1), "test must have the 2 classes of data, got class 2"),
    ):
        with pytest.raises(ValueError, match=message):
            robustness_matrix(make, data(40), test, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_strongest_test_counts_every_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the ensemble fools is lost, and nothing comes back that PGD has fooled."""
    images, labels = halves(30)
    model = fresh().eval()
    with torch.no_grad():
        labels = model(images).argmax(1)
    asked: list[int] = []

    def fooling(_: nn.Module, given: Tensor, *rest: Any, **options: Any) -> Any:
        asked.append(len(given))
        fooled = torch.arange(len(given)) % 2 == 0
        return type("Made", (), {"fooled": fooled})()

    monkeypatch.setattr(robust_accuracy, "ensemble", fooling)
    result = outcomes(model, Judged(images, labels, images > 0.4), TestConfig(Linf(0.002), 2, strongest=20))
    standing = (result["full"] & result["localized"])[:20]
    assert asked == [int(standing.sum())]
    assert int(result["strongest"].sum()) == asked[0] // 2
    assert not bool((result["strongest"] & ~standing).any())


def test_differences_are_paired_by_image() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.rand(400, generator=generator) < 0.5
    other = one.clone()
    other[:8] = ~one[:8]
    result = {
        f"{name}-0": dict.fromkeys(TESTS, right) for name, right in (("standard", one), ("full", other))
    }
    rows = matrix.difference_table(result, ["standard", "full"], [0])
    width = float((rows["high"] - rows["low"]).max())
    assert width < 0.04, "unpaired it would be 0.14"
    assert float((rows["low"] - rows["difference"]).max()) <= 0


def test_backgrounds_are_those_of_the_very_images() -> None:
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(12, 1, 16, 12, generator=generator) > 0.9).float()
    tested = judged_images(from_tensors(images, torch.arange(12) % 2), limit=9)
    from weakspot.regions import background

    assert torch.equal(tested.images, images[:9])
    assert torch.equal(tested.backgrounds, background(images[:9]))
    assert repr(tested).startswith("Judged(9 images of (1, 16, 12), ")


def test_stored_outcomes_of_other_weights_images_or_attacks_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[float] = []

    def counting(model: nn.Module, test: Judged, tests: TestConfig, **options: Any) -> dict[str, Tensor]:
        calls.append(tests.budget.eps)  # type: ignore[attr-defined]
        return outcomes(model, test, tests, **options)

    monkeypatch.setattr(matrix, "outcomes", counting)
    tested = judged_images(data(20))
    model = fresh().eval()
    tests = TestConfig(Linf(0.05), 2, strongest=2)
    for changed in ({}, {}, {"budget": Linf(0.06)}, {"steps": 3}):
        matrix.stored_outcomes(tmp_path, model, tested, replace(tests, **changed))
    matrix.stored_outcomes(tmp_path, make(5).eval(), tested, tests)
    for other in (
        {"images": tested.images + 0.01},
        {"labels": 1 - tested.labels},
        {"backgrounds": ~tested.backgrounds},
    ):
        matrix.stored_outcomes(tmp_path, model, replace(tested, **other), tests)
    assert calls == [0.05, 0.06, 0.05, 0.05, 0.05, 0.05, 0.05]


def test_arguments_that_do_not_fit_are_named(tmp_path: Path) -> None:
    for arguments, message in (
        ({"recipes": ("standard", "fool")}, "recipe must be one of standard, .*, got 'fool'"),
        ({"recipes": ()}, "recipes must have at least one name, got none"),
        ({"seeds": 0}, "seeds must be an integer of at least 1, got 0"),
        ({"seeds": "2"}, "seeds must be .* got '2'"),
        ({"limit": 1}, "limit must be an integer of at least 2, got 1"),
        ({"strongest": 0}, "strongest must be .* got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            robustness_matrix(make, data(40), data(20), out=tmp_path, **arguments)
    with pytest.raises(ValueError, match="test must have at least two images, to swap backgrounds, got 1"):
        judged_images(data(1))
