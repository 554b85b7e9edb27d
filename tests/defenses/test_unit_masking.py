"""Masked units: the masked network, and whether masking helps against an attacker who knows it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.dissection.test_units import planted, seeing
from tests.networks import NETWORKS, PoolingNetwork, untouched
from weakspot import Classifier, LocalEdits, Pairs, attacks, dissect, unit_sensitivity
from weakspot.budgets import Linf
from weakspot.defenses import mask_units, masking, masking_sentence, neutralizing

LAYERS = {"pooling": "stem.0", "tokens, not square": "encoder.layers.0", "normalized": "network.branch"}


def by_hand(model: nn.Module, layer: str, units: list[int], images: Tensor, axis: int) -> Tensor:
    def mask(_m: nn.Module, _i: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output.index_fill_(axis, torch.tensor(units), 0)
        return output

    handle = model.get_submodule(layer).register_forward_hook(mask)
    with torch.no_grad():
        logits: Tensor = model(images)
    handle.remove()
    return logits


def test_one_of_two_pooled_units_is_masked_on_a_portrait() -> None:
    # One by one cells with two channels have nearly the aspect ratio of the image.
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)).eval()
    images = torch.rand(2, 3, 64, 48)
    masked = mask_units(Classifier.wrap(model, input_size=(64, 48)), "1", [1])
    torch.testing.assert_close(masked(images).detach(), by_hand(model, "1", [1], images, 1))


@pytest.mark.parametrize("kind", LAYERS)
def test_the_masked_network_is_the_network_with_these_units_at_zero(kind: str) -> None:
    model, images = NETWORKS[kind]()
    with untouched(model, images):
        masked = mask_units(model, LAYERS[kind], [1, 3])
        result = masked(images).detach()
    expected = by_hand(model, LAYERS[kind], [1, 3], images, 2 if "tokens" in kind else 1)
    torch.testing.assert_close(result, expected)
    assert not torch.allclose(result, model(images))
    torch.testing.assert_close(mask_units(model, LAYERS[kind], [])(images), model(images))


def test_names_of_defended_models_say_how_much() -> None:
    model, _ = NETWORKS["pooling"]()
    assert mask_units(model, "stem.0", [1]).name.endswith(" without 1 unit of stem.0")
    assert mask_units(model, "stem.0", [1, 2]).name.endswith(" without 2 units of stem.0")
    assert neutralizing(model, randomness=0.004).name.endswith("(mean, 0.4% random)")


def test_rows_of_features_can_be_masked_too() -> None:
    model, images = NETWORKS["pooling"]()
    result = mask_units(model, "head", [2])(images)
    torch.testing.assert_close(result[:, [0, 1, 3]], model(images)[:, [0, 1, 3]])
    assert not result[:, 2].any()


def test_gradients_fused_passes_edits_and_copies_see_the_mask() -> None:
    model, images = NETWORKS["pooling"]()
    masked = mask_units(model, "stem.0", [0, 2, 5])
    labels = masked(images).argmax(1)
    result = attacks.pgd(masked, images, labels, budget=Linf(0.2), steps=5)
    with torch.no_grad():
        assert torch.equal(masked(result.adversarial).argmax(1) != labels, result.success)
        edits = LocalEdits(masked, images[:1]).logits(
            torch.tensor([3]), torch.tensor([4]), torch.ones(1, 3, 2, 2)
        )
        edited = images[:1].clone()
        edited[:, :, 3:5, 4:6] = 1
        torch.testing.assert_close(edits, masked(edited), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(copy.deepcopy(masked)(images), masked(images))
    point = images.clone().requires_grad_()
    masked(point).sum().backward()
    unmasked = images.clone().requires_grad_()
    model(unmasked).sum().backward()
    assert point.grad is not None
    assert unmasked.grad is not None
    assert not torch.allclose(point.grad, unmasked.grad)


def test_normalization_names_and_size_stay() -> None:
    model = Classifier.wrap(
        PoolingNetwork().eval(),
        mean=[0.5, 0.4, 0.3],
        std=[0.2, 0.3, 0.25],
        input_size=(18, 26),
        class_names=list("abcd"),
    )
    masked = mask_units(model, "branch", [0])
    assert masked.input_size == (18, 26)
    assert list(masked.class_names) == list("abcd")
    assert torch.equal(masked.mean, model.mean)


class Leaky(nn.Module):
    """Unit 0 sees the class in the first channel; unit 1 is a loud detector of the second, which attacks use."""

    def __init__(self) -> None:
        super().__init__()
        self.look, self.head = nn.Conv2d(2, 2, 1, bias=False), nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.look.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 20.0]])[:, :, None, None])
            self.head.weight.copy_(torch.tensor([[-8.0, 1.0], [8.0, -1.0]]))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.look(images - 0.5).mean((2, 3)))
        return logits


def leaky() -> tuple[nn.Module, Tensor, Tensor]:
    labels = torch.arange(20) % 2
    images = torch.full((20, 2, 8, 8), 0.5)
    images[:, 0] += ((labels.float() - 0.5) * 0.6)[:, None, None]
    images[:, 0] += 0.01 * torch.randn(20, 8, 8, generator=torch.Generator().manual_seed(0))
    return Classifier.wrap(Leaky().eval(), input_size=(8, 8)), images, labels


def by_pgd(model: nn.Module, images: Tensor, labels: Tensor) -> Any:
    return attacks.pgd(model, images, labels, budget=Linf(0.2), steps=10)


class Leaking(nn.Module):
    """As `Leaky`, with six quiet units beside that carry nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.look, self.head = nn.Conv2d(2, 8, 1, bias=False), nn.Linear(8, 2, bias=False)
        with torch.no_grad():
            self.look.weight.zero_()
            self.head.weight.zero_()
            self.look.weight[:2] = Leaky().look.weight
            self.head.weight[:, :2] = Leaky().head.weight

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.look(images - 0.5).mean((2, 3)))
        return logits


def test_masking_the_unit_that_attacks_use_helps_against_an_attacker_who_knows() -> None:
    _, images, labels = leaky()
    images[:, 1] -= 0.05  # so that unit 1 is not the most active one
    table = masking(Leaking().eval(), "look", [1], images, labels, attack=by_pgd)
    rows = table.set_index("masked")
    controls = [name for name in rows.index if name not in {"none", "these units"}]
    assert len(controls) >= 2
    assert rows["attacked_again"]["none"] == 0
    assert rows["clean"]["these units"] == rows["attacked_again"]["these units"] == 1
    assert rows["units"].to_dict() == {"none": 0, "these units": 1, **dict.fromkeys(controls, 1)}
    assert (rows["gain"][["none", *controls]] == 1).all()
    assert rows["p"].drop("these units").to_numpy() == pytest.approx(2.0**-19)  # 20 of 20 on one side
    assert rows["p"]["these units"] == 1
    # Wilson's interval of 20 of 20.
    assert rows["attacked_again_low"]["these units"] == pytest.approx(0.8316, abs=1e-3)
    helps = "Masking 1 unit helps, and more than masking as many other units"
    assert masking_sentence(table).startswith(f"{helps} ({', '.join(controls)}; p at most .001)")
    # The sentence compares with nothing that was not masked.
    without = masking_sentence(table[table["masked"] != "most active units"])
    assert without.startswith(f"{helps} (random units 1")
    assert "most active" not in without


def test_masking_a_unit_that_attacks_do_not_use_does_not_help_against_a_new_attack() -> None:
    model, images, labels = leaky()
    table = masking(model, "look", [0], images, labels, attack=by_pgd)
    rows = table.set_index("masked")
    assert rows["attacked_again"]["these units"] == 0
    assert masking_sentence(table).startswith(
        "Masking 1 unit is not shown to change robustness: under a new attack"
    )
    assert masking_sentence(table).endswith(" A smaller budget could tell more.")
    assert masking_sentence(table.replace({"attacked_again": {0: 1}})).endswith(
        " A larger budget could tell more."
    )
    for other in (table.assign(clean=0.0), table.assign(attacked_again=0.5)):
        assert "budget could" not in masking_sentence(other)
    for name in ("clean", "transfer", "attacked_again"):
        assert (table[f"{name}_low"] <= table[name]).all()
        assert (table[name] <= table[f"{name}_high"]).all()


def test_units_that_help_no_more_than_any_others_are_reported_so() -> None:
    """Every network without two of these units is as robust as one without any other two."""
    model, images, labels = Alike().eval(), torch.full((20, 3, 4, 4), 0.45), torch.ones(20, dtype=torch.long)
    images[:, 0, 0, 0] += torch.arange(20) / 1000  # twenty different images
    table = masking(model, "look", [0, 1], images, labels, attack=by_pgd).set_index("masked")
    assert table["gain"]["none"] == 1
    assert table["p"]["none"] < 1e-5
    assert "is not shown to help more than masking as many other units (random units 1" in masking_sentence(
        table.reset_index()
    )


class Alike(nn.Module):
    """Six equal units that see brightness; the bias of the head outweighs four of them and not six."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Conv2d(3, 6, 1, bias=False)
        with torch.no_grad():
            self.look.weight.fill_(1 / 3)

    def forward(self, images: Tensor) -> Tensor:
        lead = self.look(images).mean((2, 3)).sum(1) - 3
        return torch.stack([lead, -lead], 1)


def test_masking_a_unit_that_the_network_needs_makes_it_weaker() -> None:
    model, images, labels = leaky()
    weak = attacks.pgd(model, images, labels, budget=Linf(1 / 255), steps=2)
    assert not bool(weak.success.any())
    table = masking(
        model, "look", [0], images, labels,
        attack=lambda network, batch, wanted: attacks.pgd(network, batch, wanted, budget=Linf(1 / 255), steps=2),
    )  # fmt: skip
    assert masking_sentence(table).startswith("Masking 1 unit makes the network weaker")


def test_layers_and_units_that_do_not_exist_are_named() -> None:
    model, _ = NETWORKS["normalized"]()
    with pytest.raises(ValueError, match=r"got .* .did you mean 'branch'"):
        mask_units(model, "brunch", [0])
    with pytest.raises(ValueError, match="units must be integers of at least 0"):
        mask_units(model, "branch", [-1])
    with pytest.raises(ValueError, match="units must be between 0 and 7, the units of 'branch', got 9"):
        mask_units(model, "branch", [9])


class Aside(nn.Module):
    """Has a part that no image reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aside = PoolingNetwork(), nn.Conv2d(3, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.body(images)
        return logits


def test_a_mask_that_would_mask_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing would be masked"):
        mask_units(Classifier.wrap(Aside().eval(), input_size=(16, 16)), "aside", [0])
    traced = torch.jit.trace(PoolingNetwork().eval(), torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="nothing would be masked"):
        mask_units(Classifier.wrap(traced, input_size=(16, 16)), "branch", [0])


@pytest.mark.parametrize("units", [torch.zeros(8, dtype=torch.bool), [1.7], "12", 3, [True], torch.tensor(1)])
def test_values_that_are_not_units_are_refused(units: Any) -> None:
    model, _ = NETWORKS["pooling"]()
    with pytest.raises(ValueError, match="units must be integers of at least 0"):
        mask_units(model, "branch", units)


def test_other_analyses_see_the_masked_units() -> None:
    model, images = NETWORKS["pooling"]()
    pairs = Pairs.of(model, images, 1 - images)
    masked = mask_units(model, "branch", [0])
    for layer in ("branch", "network.branch"):
        table = unit_sensitivity(masked, layer, pairs)
        assert table["mean_activation"][0] == table["change"][0] == 0
        assert (table["change"][1:] != 0).all()


def test_caches_distinguish_masked_networks(tmp_path: Path) -> None:
    dataset = planted(tmp_path / "set")
    model = seeing((32, 32))
    tables = [
        dissect(mask_units(model, "look", units), "look", dataset, quantile=0.07, cache=tmp_path / "cache")
        for units in ([0], [1])
    ]
    assert tables[0]["concept"].isna()[0]
    assert tables[1]["concept"][0] == "red"


def test_units_may_be_a_tensor_and_must_be_as_many_as_the_layer_has() -> None:
    model, images, labels = leaky()
    table = masking(model, "head", torch.tensor([1, 1]), images, labels, attack=by_pgd)
    assert table["units"].tolist()[:2] == [0, 1]
    with pytest.raises(ValueError, match="must be 1 to 2 units, as many as 'look' has, got 3"):
        masking(model, "look", [0, 1, 2], images, labels, attack=by_pgd)


def test_an_attack_that_is_no_function_is_refused() -> None:
    model, images, labels = leaky()
    with pytest.raises(
        ValueError, match=r"attack must be a function of model, images and labels .*got 'pgd'"
    ):
        masking(model, "head", [0], images, labels, attack="pgd")  # type: ignore[arg-type]


def test_copies_of_an_image_count_once() -> None:
    model, images, labels = leaky()
    few = masking(model, "look", [0], images[:2], labels[:2], attack=by_pgd)
    copies = masking(model, "look", [0], images[:2].repeat(15, 1, 1, 1), labels[:2].repeat(15), attack=by_pgd)
    assert copies.equals(few)
    assert set(copies["images"]) == {2}


@pytest.mark.parametrize(
    "attack",
    [
        lambda model, images, labels: images,
        lambda model, images, labels: by_pgd(model, images, labels)[:3],
        lambda model, images, labels: None,
    ],
    ids=["images", "fewer pairs", "nothing"],
)
def test_an_attack_that_returns_no_pairs_of_the_images_is_refused(attack: Any) -> None:
    model, images, labels = leaky()
    with pytest.raises(ValueError, match=r"^attack must return Pairs of the 20 images, got"):
        masking(model, "look", [0], images, labels, attack=attack)
    with pytest.raises(ValueError, match="labels must be classes between 0 and 1, got 7"):
        masking(model, "look", [0], images, labels * 0 + 7, attack=by_pgd)


def test_any_seed_that_is_documented_draws_units() -> None:
    model, images, labels = leaky()
    table = masking(model, "look", [0], images[:4], labels[:4], attack=by_pgd, seed=-1)
    assert len(table) >= 3
