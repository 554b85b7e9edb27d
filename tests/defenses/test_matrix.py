"""The matrix of trained networks against tests: its numbers are those of the attacks, and it goes on after a death."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.defenses.test_training import UNJUDGED, fresh, halves
from tests.networks import FlatNetwork, LinearNetwork, untouched
from weakspot import Linf, attacks
from weakspot.datasets import LabeledImages, from_tensors
from weakspot.training import TESTS, judged_images, matrix, outcomes, robustness_matrix, swap_backgrounds
from weakspot.training.outcomes import Judged


def make(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FlatNetwork()


def data(count: int) -> LabeledImages:
    return from_tensors(*halves(count))


def test_swapped_backgrounds_keep_the_object_and_come_from_somebody_else() -> None:
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
    with pytest.raises(ValueError, match="at least two"):
        swap_backgrounds(images[:1], masks[:1])


def test_outcomes_are_those_of_a_linear_network_by_its_closed_form() -> None:
    """An image stands while its lead is over what the budget can take from it inside the region."""
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
        found = outcomes(model, Judged(images, labels, masks), budget=Linf(3 / 255), steps=20, strongest=15)
    assert tuple(found) == tuple(TESTS)
    taken = {
        name: 3 / 255 * (weight.abs() * where).flatten(1).sum(1)
        for name, where in (("localized", masks), ("full", 1.0))
    }
    assert torch.equal(found["clean"], right)
    for name in ("localized", "full"):
        assert torch.equal(found[name], right & (lead.abs() > taken[name]))
    assert torch.equal(found["strongest"], found["full"][:15])
    assert 0 < int(found["full"].sum()) < int(found["localized"].sum()) < 35


def test_the_matrix_is_what_its_networks_do_and_says_what_differs(tmp_path: Path) -> None:
    rows: list[str] = []
    options: dict[str, Any] = {**UNJUDGED, "epochs": 3, "budget": Linf(0.05)}
    found = robustness_matrix(
        make, data(200), data(60), out=tmp_path, recipes=("standard", "full"), seeds=2, strongest=20,
        told=lambda name, _: rows.append(name), **options,
    )  # fmt: skip
    assert len(found.accuracy) == 2 * len(TESTS)
    assert len(found.differences) == 2 * len(TESTS)
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
        row: Any = found.accuracy.set_index(["recipe", "test"]).loc[(recipe, "full")]
        assert row["accuracy"] == pytest.approx(np.mean(each))
        assert row["spread"] == pytest.approx(max(each) - min(each))
        assert row["low"] <= row["accuracy"] <= row["high"]
    difference: Any = found.differences.set_index(["test", "recipe", "against"])["difference"]
    accuracy: Any = found.accuracy.set_index(["test", "recipe"])["accuracy"]
    gain = difference.loc[("full", "full", "standard")]
    assert gain == pytest.approx(accuracy.loc[("full", "full")] - accuracy.loc[("full", "standard")])
    assert gain == -difference.loc[("full", "standard", "full")]
    # Called again, everything is read: no epoch is told, and the numbers are the same.
    again: list[str] = []
    same = robustness_matrix(
        make, data(200), data(60), out=tmp_path, recipes=("standard", "full"), seeds=2, strongest=20,
        told=lambda name, row: again.append(name) if "epoch" in row else None, **options,
    )  # fmt: skip
    assert not again
    assert same.accuracy.equals(found.accuracy)
    assert rows.count("full-0") == 4  # three epochs and the result


def test_test_images_of_another_kind_are_told_before_anything_is_trained(tmp_path: Path) -> None:
    images, labels = halves(20)
    for test, said in (
        (from_tensors(images.repeat(1, 3, 1, 1), labels), r"test has images of \(3, 16, 12\)"),
        (from_tensors(images, labels + 1), "test holds class 2; the data has 2 classes"),
    ):
        with pytest.raises(ValueError, match=said):
            robustness_matrix(make, data(40), test, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_strongest_test_counts_every_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the ensemble fools is lost, and nothing comes back that PGD has fooled."""
    from weakspot.training import outcomes

    images, labels = halves(30)
    model = fresh().eval()
    with torch.no_grad():
        labels = model(images).argmax(1)
    asked: list[int] = []

    def fooling(_: nn.Module, given: Tensor, *rest: Any, **options: Any) -> Any:
        asked.append(len(given))
        fooled = torch.arange(len(given)) % 2 == 0
        return type("Made", (), {"fooled": fooled})()

    monkeypatch.setattr(outcomes, "ensemble", fooling)
    found = outcomes(model, Judged(images, labels, images > 0.4), budget=Linf(0.002), steps=2, strongest=20)
    standing = (found["full"] & found["localized"])[:20]
    assert asked == [int(standing.sum())]
    assert int(found["strongest"].sum()) == asked[0] // 2
    assert not bool((found["strongest"] & ~standing).any())


def test_differences_are_paired_by_image() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.rand(400, generator=generator) < 0.5
    other = one.clone()
    other[:8] = ~one[:8]
    found = {f"{name}-0": dict.fromkeys(TESTS, right) for name, right in (("standard", one), ("full", other))}
    rows = matrix._differences(found, ["standard", "full"], [0])
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


def test_kept_outcomes_of_other_weights_or_attacks_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[float] = []

    def counting(*arguments: Any, **options: Any) -> dict[str, Tensor]:
        calls.append(options["budget"].eps)
        return outcomes(*arguments, **options)

    monkeypatch.setattr(matrix, "outcomes", counting)
    tested = judged_images(data(20))
    model = fresh().eval()
    asked = {"budget": Linf(0.05), "steps": 2, "strongest": 2}
    for changed in ({}, {}, {"budget": Linf(0.06)}, {"steps": 3}):
        matrix._kept_outcomes(tmp_path, model, tested, {**asked, **changed}, None)
    matrix._kept_outcomes(tmp_path, make(5).eval(), tested, asked, None)
    for other in (
        {"images": tested.images + 0.01},
        {"labels": 1 - tested.labels},
        {"backgrounds": ~tested.backgrounds},
    ):
        matrix._kept_outcomes(tmp_path, model, tested._replace(**other), asked, None)
    assert calls == [0.05, 0.06, 0.05, 0.05, 0.05, 0.05, 0.05]


def test_backgrounds_cut_off_go_on_and_are_found_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weakspot.training import data as finding

    monkeypatch.setattr(finding, "CHUNK", 8)
    images = from_tensors(*halves(50))
    whole = finding.find_backgrounds(images)
    expected = torch.nn.functional.max_pool2d((images.images(torch.arange(50)) > 0.1).float(), 3, 1, 1) == 0
    told: list[float] = []

    def die(done: float) -> None:
        told.append(done)
        if done > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finding.find_backgrounds(images, cache=tmp_path, progress=die)
    (part,) = tmp_path.iterdir()
    with part.open("ab") as file:
        file.write(b"torn")
    again: list[float] = []
    found = finding.find_backgrounds(images, cache=tmp_path, progress=again.append)
    assert again[0] == pytest.approx(told[-1] + 8 / 50), "the first chunks are not found again"
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]
    rows = torch.tensor([49, 0, 17])
    for kept in (whole, found, finding.find_backgrounds(images, cache=tmp_path, progress=die)):
        assert torch.equal(kept.masks(rows), whole.masks(rows))
        assert kept.masks(torch.arange(50)).shape == expected.shape


def test_bad_arguments_are_told_in_one_sentence(tmp_path: Path) -> None:
    for arguments, said in (
        ({"recipes": ("standard", "fool")}, "recipe must be one of standard, localized.*got 'fool'"),
        ({"recipes": ()}, "recipes is empty"),
        ({"seeds": 0}, "seeds is 0"),
        ({"seeds": "2"}, "seeds is 2; accepted is a whole number"),
        ({"limit": 1}, "limit is 1 of 20 test images"),
        ({"strongest": 0}, "strongest is 0"),
    ):
        with pytest.raises(ValueError, match=said):
            robustness_matrix(make, data(40), data(20), out=tmp_path, **arguments)
