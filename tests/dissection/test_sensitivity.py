"""Unit sensitivity: a planted unit ranks first, changes do not cancel, and noise is not taken for an attack."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from scipy.stats import kstest, ttest_1samp
from torch import Tensor, nn

from tests.data.test_real_networks import networks  # noqa: F401 - a fixture
from tests.networks import NETWORKS, PoolingNetwork, TokenNetwork, untouched
from weakspot import Classifier, Linf, Pairs, attacks
from weakspot.classifier import predict
from weakspot.dissection import sensitivity_sentence, unit_sensitivity
from weakspot.dissection.sensitivity import equal_noise


class Planted(nn.Module):
    """Sixteen units that look at colors in their own way; `planted` lets number 5 look at blue alone."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Conv2d(3, 16, 3, padding=1)
        self.head = nn.Linear(16, 2)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.look(images).mean((2, 3)))
        return logits


def planted() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Planted().eval()
    with torch.no_grad():
        model.look.weight[5] = 0
        model.look.weight[5, 2] = 1
    return model


def noise(count: int, seed: int, side: int = 12) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def pairs_of(clean: Tensor, adversarial: Tensor) -> Pairs:
    zeros = torch.zeros(len(clean), dtype=torch.long)
    return Pairs(clean, adversarial, zeros, zeros)


def test_a_planted_responsive_unit_ranks_first() -> None:
    clean = 0.4 + 0.2 * noise(30, 1)
    adversarial = clean.clone()
    adversarial[:, 2] += 0.3
    adversarial[:, :2] -= 0.01
    table = unit_sensitivity(planted(), "look", pairs_of(clean, adversarial))
    assert table["sensitivity"].idxmax() == 5
    assert table["change"][5] > 0
    assert table["p_value"][5] < 1e-6
    assert table["direction_p"][5] < 1e-6
    assert table["excess"][5] == pytest.approx(table["change"][5], rel=0.1)


def test_changes_of_opposite_sign_do_not_cancel() -> None:
    """What a signed mean misses: blue goes up in one half of the images and down in the other."""
    clean = 0.4 + 0.2 * noise(30, 1)
    adversarial = clean.clone()
    adversarial[:15, 2] += 0.3
    adversarial[15:, 2] -= 0.3
    table = unit_sensitivity(planted(), "look", pairs_of(clean, adversarial))
    assert abs(table["change"][5]) < 1e-6
    assert table["sensitivity"].idxmax() == 5
    assert table["p_value"][5] < 1e-6
    assert table["direction_p"][5] > 0.05


def test_the_columns_equal_brute_force() -> None:
    model, clean = planted(), noise(9, 1)
    adversarial = (clean + 0.1 * noise(9, 2)).clamp(0, 1)
    table = unit_sensitivity(model, "look", pairs_of(clean, adversarial), batch_size=4)
    with torch.no_grad():
        first, second = (
            model.get_submodule("look")(images).double().mean((2, 3)) for images in (clean, adversarial)
        )
    pairs = pairs_of(clean, adversarial)
    with torch.no_grad():
        drawn = torch.stack([equal_noise(pairs, number)[0] for number in range(4)])
        noisy = torch.stack([model.get_submodule("look")(one).double().mean((2, 3)) for one in drawn])
    change, noises = (second - first).numpy(), (noisy - first).numpy()
    spread = first.numpy().std(0, ddof=1)
    assert table["change"].to_numpy() == pytest.approx(change.mean(0), abs=1e-6)
    assert table["excess"].to_numpy() == pytest.approx((change - noises.mean(0)).mean(0), abs=1e-6)
    assert table["spread"].to_numpy() == pytest.approx(spread, rel=1e-4)
    assert table["sensitivity"].to_numpy() == pytest.approx(abs(change).mean(0) / spread, rel=1e-3)
    assert table["noise"].to_numpy() == pytest.approx(abs(noises).mean((0, 1)) / spread, rel=1e-3)
    p = ttest_1samp(abs(change) - abs(noises).mean(0), 0, alternative="greater").pvalue
    assert table["p"].to_numpy() == pytest.approx(p.clip(5.0**-9), rel=1e-3)
    assert table["mean_activation"].to_numpy() == pytest.approx(first.mean(0).numpy(), abs=1e-6)
    assert (table["p_value"] >= table["p"] - 1e-12).all()
    assert (table["images"] == 9).all()


def attacked_by_noise(clean: Tensor, seed: int, size: float = 0.1) -> Pairs:
    """Pairs whose perturbation is itself noise of the kind that the test draws."""
    change = size * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    return pairs_of(clean, equal_noise(pairs_of(clean, (clean + change).clamp(0, 1)), 0, seed)[0])


def test_noise_gives_uniform_p_values_and_moves_no_unit() -> None:
    model, p, accused = planted(), [], 0
    for seed in range(60):
        table = unit_sensitivity(model, "look", attacked_by_noise(noise(20, seed), 1000 + seed))
        p.append(float(table["p"][seed % 16]))
        accused += bool((table["p_value"] <= 0.05).any())
    assert kstest(p, "uniform").pvalue > 0.01
    assert accused / 60 <= 0.1
    assert "No unit clearly moves more" in sensitivity_sentence(table)


@pytest.mark.parametrize("size", [8 / 255, 0.4])
def test_noise_has_the_size_of_the_perturbation_and_stays_in_range(size: float) -> None:
    clean = noise(6, 1)
    pairs = pairs_of(clean, (clean + size * noise(6, 2).sub(0.5).sign()).clamp(0, 1))
    noisy, kept = equal_noise(pairs, 0)
    change = noisy - clean
    assert float(noisy.min()) >= 0
    assert float(noisy.max()) <= 1
    assert kept.tolist() == pytest.approx([1] * 6, abs=1e-4)
    ordered = [values.abs().flatten(1).sort(1).values for values in (change, pairs.perturbation)]
    torch.testing.assert_close(*ordered, atol=1e-5, rtol=0)
    again = equal_noise(pairs, 1)[0] - clean
    assert float((again - change).abs().max()) > size / 2
    one = equal_noise(pairs_of(clean[3:4], pairs.adversarial[3:4]), 0)[0]
    assert torch.equal(one, noisy[3:4])


def test_noise_of_one_pixel_is_one_pixel_that_fits() -> None:
    clean = noise(5, 1)
    clean[:, :, 0, 0], clean[0] = 0.0, 0.5
    adversarial = clean.clone()
    adversarial[:, :, 0, 0] = 1.0
    noisy, kept = equal_noise(pairs_of(clean, adversarial), 0)
    assert ((noisy != clean).any(1).flatten(1).sum(1) == 1).all()
    table = unit_sensitivity(planted(), "look", pairs_of(clean, adversarial))
    assert (table["images"] == int((kept > 0.99).sum())).all()
    only = unit_sensitivity(planted(), "look", pairs_of(clean[1:], (clean[1:] < 0.5).float()))
    assert (
        only["p_value"] == 1
    ).all()  # full contrast has no equal elsewhere: nothing is tested, nothing claimed
    assert "No unit was tested" in sensitivity_sentence(only)


def test_units_that_do_not_vary_have_no_median_sensitivity() -> None:
    model = planted()
    with torch.no_grad():
        model.get_parameter("look.weight")[:, 1] = 0
    clean = noise(3, 1).mul(0.2).add(0.4)
    clean[:, [0, 2]] = clean[:1, [0, 2]]  # they differ in green alone, which no unit sees
    adversarial = clean.clone()
    adversarial[:, 2] += 0.1
    table = unit_sensitivity(model, "look", pairs_of(clean, adversarial))
    sentence = sensitivity_sentence(table)
    assert "inf" not in sentence
    one = table[table["p_value"] <= 0.05].head(1)
    assert "moves 1 of 1 unit more" in sensitivity_sentence(one)
    assert sentence.endswith("is not defined, because too many units do not vary over the clean images.")


def test_pairs_without_a_difference_move_nothing() -> None:
    clean = noise(5, 1)
    table = unit_sensitivity(planted(), "look", pairs_of(clean, clean))
    assert (table["sensitivity"] == 0).all()
    assert (table["noise"] == 0).all()
    assert (table["p_value"] == 1).all()


def test_p_is_bounded_by_the_number_of_pairs() -> None:
    clean = torch.full((2, 3, 12, 12), 0.4)
    clean[1] = 0.5
    table = unit_sensitivity(planted(), "look", pairs_of(clean, clean + 0.3))
    assert (table["p"] >= 5.0**-2).all()


def test_several_batches_equal_one_batch_and_the_model_is_unchanged() -> None:
    model, clean = planted(), noise(9, 1)
    adversarial = (clean + 0.1 * noise(9, 2)).clamp(0, 1)
    whole = unit_sensitivity(model, "look", pairs_of(clean, adversarial))
    with untouched(model, clean, adversarial):
        batches = (pairs_of(*both) for both in zip(clean.split(4), adversarial.split(4), strict=True))
        streamed = unit_sensitivity(model, "look", batches)
    assert streamed.to_numpy(float) == pytest.approx(whole.to_numpy(float), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(("kind", "layer"), [("pooling", "stem"), ("tokens, not square", "encoder.layers.0")])
def test_every_kind_of_network_has_sensitivities(kind: str, layer: str) -> None:
    model, images = NETWORKS[kind]()
    table = unit_sensitivity(model, layer, pairs_of(images, images.flip(3)))
    assert len(table) == {"stem": 8, "encoder.layers.0": 16}[layer]
    assert isinstance(model, PoolingNetwork | TokenNetwork)


def test_invalid_input_is_an_error() -> None:
    model, clean = planted(), noise(3, 1)
    with pytest.raises(ValueError, match="at least two pairs, for a spread, got 1"):
        unit_sensitivity(model, "look", pairs_of(clean[:1], clean[:1]))
    with pytest.raises(ValueError, match="did you mean 'look'"):
        unit_sensitivity(model, "lok", pairs_of(clean, clean))
    with pytest.raises(ValueError, match="noises must be an integer of at least 1, got 0"):
        unit_sensitivity(model, "look", pairs_of(clean, clean), noises=0)
    with pytest.raises(ValueError, match="at least two pairs, got none"):
        unit_sensitivity(model, "look", [])
    again = [pairs_of(clean, clean), pairs_of(clean[1:2], clean[:1])]
    with pytest.raises(
        ValueError, match=r"pairs must be of different images, got one image in pairs 1 and 3 "
    ):
        unit_sensitivity(model, "look", again)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("layer", ["body.layer2", "body.layer3"])
def test_an_attack_moves_more_units_of_a_trained_network_than_noise(networks: ModuleType, layer: str) -> None:  # noqa: F811
    images, labels = networks.cifar10("test", 110)
    model = Classifier.wrap(networks.network("cifar10_resnet20"))
    right = predict(model, images).argmax(1) == labels
    images, labels = images[right][:100], labels[right][:100]
    pairs = attacks.pgd(model, images, labels, budget=Linf(2 / 255), steps=10)
    fake = Pairs(images, equal_noise(pairs, 0, seed=5)[0], labels, labels)
    moved = [(unit_sensitivity(model, layer, one)["p_value"] <= 0.05).mean() for one in (pairs, fake)]
    assert moved[0] > 0.9
    assert moved[1] <= 0.05
