"""Overlap: a planted weakness is found, a model without one is not accused, numbers equal their definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import kstest, spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from tests.networks import NETWORKS, LinearNetwork, Made, PoolingNetwork, untouched
from weakspot.attacks import fgsm, pgd
from weakspot.attribution import class_activation, margin_drop
from weakspot.budgets import L2, Linf
from weakspot.explanations import Overlap, overlap
from weakspot.pairs import Pairs

TESTED = ("effect_in_roi", "jaccard", "spearman", "moran_i")


def attacked(model: nn.Module, images: Tensor) -> Pairs:
    with torch.no_grad():
        labels = model(images).argmax(1)
    return pgd(model, images, labels, budget=L2(1.5), steps=5)


def smooth_fields(count: int, size: int, seed: int) -> Tensor:
    """Random fields (N, 1, H, W) whose statistics are the same after any circular shift, within 0.2 to 0.8."""
    noise = torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(seed))
    down, across = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None]
    blurred = torch.fft.irfft2(
        torch.fft.rfft2(noise) * torch.exp(-60 * (down**2 + across**2)), s=(size, size)
    )
    low, high = blurred.amin((2, 3), keepdim=True), blurred.amax((2, 3), keepdim=True)
    fields: Tensor = 0.2 + 0.6 * (blurred - low) / (high - low)
    return fields


class WeakPatch(nn.Module):
    """Evidence for class 0 is brightness; class 1 is a linear function, with large weights on one small patch."""

    def __init__(self, patch: Tensor) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.gather = nn.Conv2d(3, 1, 1, bias=False)
        nn.init.constant_(self.gather.weight, 1 / 3)
        signs = torch.randn(3, *patch.shape[2:], generator=generator).sign()
        self.weight = nn.Parameter(signs * torch.where(patch[0, 0], 1.0, 0.005))
        self.offset = nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        evidence = 4 * F.relu(self.gather(images)).mean((1, 2, 3))
        weak = (self.weight * (images - 0.5)).sum((1, 2, 3)) / 10
        return torch.stack([evidence, weak], 1)


def planted(bright: bool, count: int = 4) -> tuple[nn.Module, Tensor, Tensor]:
    """A model with a weak patch, images where it says class 0, bright on the patch or elsewhere, and the patch."""
    patch = torch.zeros(1, 1, 24, 32, dtype=torch.bool)
    patch[..., 6:13, 18:27] = True
    lit = patch if bright else patch.roll((-2, -13), (2, 3))
    images = 0.15 + 0.02 * torch.rand(count, 3, 24, 32, generator=torch.Generator().manual_seed(1))
    images = images + 0.7 * lit
    return WeakPatch(patch).eval(), images, patch


def test_a_planted_weak_patch_on_the_evidence_is_found() -> None:
    model, images, patch = planted(bright=True)
    result = pgd(model, images, torch.zeros(4, dtype=torch.long), budget=Linf(0.1))
    assert bool(result.success.all())
    outcome = overlap(model, result, fraction=float(patch.float().mean()))
    for region in (outcome.roa, outcome.roi):
        common, either = (region & patch).sum((1, 2, 3)), (region | patch).sum((1, 2, 3))
        assert float((common / either).min()) > 0.9
    for name in TESTED:
        assert outcome.scores[f"{name}_shift_p"].max() < 0.04, name
        assert (outcome.scores[name] > outcome.scores[f"{name}_shift_null"]).all(), name
    assert (outcome.scores["roa_components"] == 1).all()


def test_a_planted_weak_patch_away_from_the_evidence_is_found() -> None:
    model, images, patch = planted(bright=False)
    result = pgd(model, images, torch.zeros(4, dtype=torch.long), budget=Linf(0.1))
    assert bool(result.success.all())
    outcome = overlap(model, result, fraction=float(patch.float().mean()))
    common, either = (outcome.roa & patch).sum((1, 2, 3)), (outcome.roa | patch).sum((1, 2, 3))
    assert float((common / either).min()) > 0.9
    assert not bool(outcome.contested.any())
    assert torch.equal(outcome.neutralizable, outcome.roa)
    assert (outcome.scores["effect_in_roi"] < 0.05).all()
    assert (outcome.scores["effect_in_roi_shift_p"] > 0.3).all()
    assert (outcome.scores["jaccard_shift_p"] == 1).all()


def test_a_weak_patch_shared_by_all_images_is_no_relation() -> None:
    """Every image is bright on the patch, as objects are in the middle: the shifts are fooled, other images are not."""
    model, images, patch = planted(bright=True, count=24)
    result = pgd(model, images, torch.zeros(24, dtype=torch.long), budget=Linf(0.1))
    scores = overlap(model, result, fraction=float(patch.float().mean())).scores
    assert scores["effect_in_roi_shift_p"].max() < 0.04
    assert (scores["effect_in_roi_p"] <= 0.05).mean() <= 0.1
    assert not scores["relation"].any()


@pytest.mark.parametrize("related", [True, False])
def test_given_importance_is_the_tested_importance(related: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.full((3, 20, 20), 0.01)
    weight[:, 4:9, 4:9] = 1
    model = LinearNetwork(weight * torch.randn(weight.shape, generator=generator).sign()).eval()
    images = 0.5 + 0.1 * torch.rand(3, 3, 20, 20, generator=generator)
    labels = model(images).argmax(1)
    given = torch.rand(3, 1, 20, 20, generator=generator)
    given[..., 4:9, slice(4, 9) if related else slice(12, 17)] += 2
    result = overlap(model, fgsm(model, images, labels), fraction=25 / 400, importance=given)
    assert torch.equal(result.importance, given)
    p = result.scores[[f"{name}_shift_p" for name in TESTED]].to_numpy()
    assert (p < 0.05).all() if related else (p > 0.1).all()


class Unrelated(nn.Module):
    """Evidence for class 0 is the red channel; class 1 is the product of green and blue.

    The attack's gradient on green is the blue field and the other way round; red is pushed everywhere alike. Where
    the fields are independent, so are evidence and vulnerability.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gather = nn.Conv2d(3, 1, 1, bias=False)
        self.gather.weight.data = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        evidence = 2 * F.relu(self.gather(images)).mean((1, 2, 3))
        attackable = 20 * ((images[:, 1] - 0.5) * (images[:, 2] - 0.5)).mean((1, 2))
        return torch.stack([evidence, attackable], 1)


@pytest.fixture(scope="module")
def unrelated() -> pd.DataFrame:
    """Scores of 240 images whose evidence has nothing to do with their weakness."""
    images = torch.cat([smooth_fields(240, 24, seed) for seed in (1, 2, 3)], 1)
    model, labels = Unrelated().eval(), torch.zeros(240, dtype=torch.long)
    return overlap(model, fgsm(model, images, labels, budget=Linf(0.1))).scores


@pytest.mark.parametrize("name", TESTED)
@pytest.mark.parametrize("null", ["", "_shift"])
def test_a_model_without_a_relation_is_not_accused(unrelated: pd.DataFrame, null: str, name: str) -> None:
    p = unrelated[f"{name}{null}_p"].to_numpy()
    assert kstest(p, "uniform").pvalue > 0.01
    assert 0.01 <= (p <= 0.05).mean() <= 0.1
    above = unrelated[name] > unrelated[f"{name}{null}_null"]
    for side in (above, ~above):
        assert (p[side] <= 0.05).mean() <= 0.12, "either tail"


def test_a_model_without_a_relation_has_no_verdict(unrelated: pd.DataFrame) -> None:
    assert (unrelated["relation"] != 0).mean() <= 0.01
    assert (unrelated["relation_p"] >= unrelated["effect_in_roi_p"]).all()


def related(count: int) -> tuple[nn.Module, Tensor]:
    """The same network, images whose weakness on blue follows green, which is as red, the evidence."""
    fields = smooth_fields(count, 24, 1)
    images = torch.cat([fields, fields, torch.full_like(fields, 0.5)], 1)
    return Unrelated().eval(), images


def test_the_test_has_power() -> None:
    model, images = related(40)
    labels, change = torch.zeros(40, dtype=torch.long), torch.tensor([0, 0, 0.1]).view(1, 3, 1, 1)
    result = overlap(model, Pairs(images, images + change, labels, 1 - labels)).scores
    for name in TESTED:
        # Where the green field is under one half the blue one helps class 0; red is then low as well.
        for null in ("", "_shift"):
            defined = result[f"{name}{null}_p"].dropna()
            assert len(defined) >= 10
            assert (defined <= 0.05).mean() > (0.6 if null else 0.9), name
    stated = result["relation"].dropna()
    assert (stated == 1).mean() > 0.8
    assert not (stated == -1).any()
    turned = overlap(model, Pairs(images.flip(0), images.flip(0) + change, labels, 1 - labels)).scores
    assert turned["relation"].tolist()[::-1] == pytest.approx(result["relation"].tolist(), nan_ok=True)


def test_noise_of_equal_size_is_never_where_the_network_looks() -> None:
    model, images = related(200)
    labels = torch.zeros(200, dtype=torch.long)
    noise = 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(3)).sign()
    result = overlap(model, Pairs(images, images + noise, labels, 1 - labels)).scores
    assert result["relation"].notna().sum() >= 20
    assert not (result["relation"] == 1).any()


@pytest.mark.parametrize("seed", [0, 1, 3])  # with 2 no class activation is positive
def test_random_weights_have_no_relation(seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = PoolingNetwork().eval()
    images = torch.cat([smooth_fields(60, 24, 3 * seed + k) for k in range(3)], 1)
    result = overlap(model, attacked(model, images)).scores
    assert result["relation"].notna().all()
    assert not (result["relation"] == 1).any()
    assert (
        (result["effect_in_roi_p"] <= 0.05) & (result["effect_in_roi"] > result["effect_in_roi_null"])
    ).mean() <= 0.1


def test_vulnerability_sums_to_the_margin_drop(any_model: Made) -> None:
    model, images = any_model
    pairs = attacked(model, images)
    result = overlap(model, pairs)
    total = result.scores["margin_drop"].to_numpy()
    np.testing.assert_allclose(result.vulnerability.double().sum((1, 2, 3)).numpy(), total, rtol=0.011)
    assert (result.scores["completeness_gap"] <= 0.01).all()
    labels, rivals = pairs.labels, second_best_where_failed(model, pairs)
    np.testing.assert_allclose(margins(model, pairs, labels, rivals), total, rtol=1e-3, atol=1e-6)


def second_best_where_failed(model: nn.Module, pairs: Pairs) -> Tensor:
    with torch.no_grad():
        second = model(pairs.adversarial).scatter(1, pairs.labels[:, None], -1e9).argmax(1)
    return torch.where(pairs.targets == pairs.labels, second, pairs.targets)


def margins(model: nn.Module, pairs: Pairs, labels: Tensor, rivals: Tensor) -> NDArray[np.float32]:
    """The margin of the clean less that of the adversarial images."""
    rows = torch.arange(len(labels))
    with torch.no_grad():
        clean, adversarial = model(pairs.clean), model(pairs.adversarial)
        drop = (clean - adversarial)[rows, labels] - (clean - adversarial)[rows, rivals]
    values: NDArray[np.float32] = drop.numpy()
    return values


@pytest.mark.parametrize("fraction", [0.0, 0.07, 0.2, 0.5, 1.0])
def test_regions_have_their_exact_area_and_the_four_parts_cover_the_image_once(
    any_model: Made, fraction: float
) -> None:
    model, images = any_model
    result = overlap(model, attacked(model, images), fraction=fraction)
    sites = images.shape[2] * images.shape[3]
    assert result.roi.dtype == result.roa.dtype == torch.bool
    assert result.roi.flatten(1).sum(1).tolist() == [round(fraction * sites)] * 3
    took = (result.vulnerability > 0).flatten(1).sum(1)
    assert result.roa.flatten(1).sum(1).tolist() == took.clamp(max=round(fraction * sites)).tolist()
    rest = ~(result.roi | result.roa)
    parts = result.essential.int() + result.contested.int() + result.neutralizable.int() + rest.int()
    assert torch.equal(parts, torch.ones_like(parts))
    assert torch.equal(result.essential | result.contested, result.roi)
    assert torch.equal(result.neutralizable | result.contested, result.roa)
    for scores, region in ((result.importance, result.roi), (result.vulnerability, result.roa)):
        for values, inside in zip(scores, region, strict=True):
            if bool(inside.any()) and not bool(inside.all()):
                assert float(values[inside].min()) >= float(values[~inside].max())


def neighbors_mean(field: NDArray[np.float64]) -> NDArray[np.float64]:
    result = np.empty_like(field)
    height, width = field.shape
    for y, x in np.ndindex(*field.shape):
        window = field[max(0, y - 1) : min(height, y + 2), max(0, x - 1) : min(width, x + 2)]
        result[y, x] = (window.sum() - field[y, x]) / (window.size - 1)
    return result


def by_definition(result: Overlap, index: int) -> dict[str, NDArray[np.float64]]:
    """Every statistic of one image at every shift of the attack, the one observed first, by loops."""
    importance, vulnerability, roi, roa = (
        maps[index, 0].double().numpy()
        for maps in (result.importance, result.vulnerability, result.roi, result.roa)
    )
    looked = (importance - importance.mean()) / importance.std()
    lagged = neighbors_mean((vulnerability - vulnerability.mean()) / vulnerability.std())
    rows: dict[str, list[float]] = {name: [] for name in TESTED}
    for move in np.ndindex(*importance.shape):
        moved_v, moved_roa, moved_lag = (np.roll(m, move, (0, 1)) for m in (vulnerability, roa, lagged))
        common = (roi * moved_roa).sum()
        rows["effect_in_roi"].append(moved_v[roi > 0].sum() / vulnerability.sum())
        rows["jaccard"].append(common / (roi.sum() + roa.sum() - common))
        rows["spearman"].append(float(spearmanr(importance.ravel(), moved_v.ravel()).statistic))
        rows["moran_i"].append((looked * moved_lag).mean())
    return {name: np.array(values) for name, values in rows.items()}


@pytest.mark.parametrize("network", ["flat, gray, two classes, not square", "linear"])
def test_scores_nulls_and_p_values_equal_loops_over_every_shift(network: str) -> None:
    model, images = NETWORKS[network]()
    result = overlap(model, attacked(model, images), fraction=0.3)
    for index in range(3):
        row = result.scores.loc[index]
        for name, values in by_definition(result, index).items():
            observed = values[0]
            assert row[name] == pytest.approx(observed, abs=1e-5)
            assert row[f"{name}_shift_null"] == pytest.approx(values.mean(), abs=1e-5)
            tails = (values >= observed - 1e-9).mean(), (values <= observed + 1e-9).mean()
            assert row[f"{name}_shift_p"] == pytest.approx(min(1, 2 * min(tails)), abs=1e-6)
            assert np.isnan(row[f"{name}_p"])  # two other images are no null


def test_plain_scores_equal_their_definitions() -> None:
    weight = torch.zeros(3, 16, 20)
    weight[:, 2:6, 3:8] = 1.0  # 20 sites
    weight[:, 6:9, 8:11] = 0.9  # 9 sites that touch those by a corner
    weight[:, 11:14, 15:18] = 0.8  # 9 sites by themselves
    weight[:, 14, 1] = 0.7  # a fragment
    model = LinearNetwork(weight).eval()
    images = torch.full((1, 3, 16, 20), 0.5)
    adversarial = images.clone()
    adversarial[:, :, weight[0] > 0] -= 0.1
    importance = torch.arange(320.0).flip(0).view(1, 1, 16, 20)  # the upper rows are looked at
    zero = torch.zeros(1, dtype=torch.long)
    result = overlap(
        model, Pairs(images, adversarial, zero, 1 - zero), fraction=39 / 320, importance=importance
    )
    assert torch.equal(result.roa[0, 0], weight[0] > 0)
    row = result.scores.loc[0]
    assert row["roa_components"] == 2
    assert row["roa_largest_fraction"] == pytest.approx(29 / 39)
    assert row["changed_fraction"] == pytest.approx(39 / 320)
    assert row["roi_fraction"] == pytest.approx(39 / 320)
    assert row["margin_drop"] == pytest.approx(2 * 0.1 * float(weight.sum()), rel=1e-4)
    assert row["margin_taken"] == pytest.approx(0.2)  # 0.1 of 0.5, everywhere where there is weight


def test_identical_images_claim_nothing(any_model: Made) -> None:
    model, images = any_model
    labels = model(images).argmax(1)
    result = overlap(model, Pairs(images, images.clone(), labels, labels))
    assert not bool(result.vulnerability.any())
    for name in TESTED:
        for column in result.scores.filter(regex=f"^({name}|relation)"):
            assert result.scores[column].isna().all(), column
    assert (result.scores["margin_drop"] == 0).all()
    assert (result.scores["changed_fraction"] == 0).all()
    assert (result.scores["margin_taken"] == 0).all()


@pytest.mark.parametrize("level", [0.0, 0.1, -3.0])
def test_constant_importance_claims_nothing(pooling: Made, level: float) -> None:
    model, images = pooling
    pairs = attacked(model, images)
    importance = torch.rand(3, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    expected = overlap(model, pairs, importance=importance).scores
    importance[1] = level
    result = overlap(model, pairs, importance=importance).scores
    for name in TESTED:
        assert np.isnan(result.loc[1, [name, f"{name}_shift_p"]].to_numpy(float)).all(), name
        assert not expected[[name, f"{name}_shift_p"]].isna().to_numpy().any(), name
        pd.testing.assert_series_equal(result.loc[[0, 2], name], expected.loc[[0, 2], name])


def test_a_margin_that_grew_has_no_effect_in_a_region(pooling: Made) -> None:
    model, images = pooling
    pairs = attacked(model, images)
    back = Pairs(pairs.adversarial, pairs.clean, pairs.labels, second_best_where_failed(model, pairs))
    result = overlap(model, back).scores
    assert (result["margin_drop"] < 0).all()
    assert result[["effect_in_roi", "effect_in_roi_p", "effect_in_roi_shift_p"]].isna().to_numpy().all()


def test_a_failed_untargeted_attack_is_explained_against_the_runner_up() -> None:
    model, images = NETWORKS["linear"]()
    labels = model(images).argmax(1)
    failed = pgd(model, images, labels, budget=Linf(1e-4))
    assert torch.equal(failed.targets, labels)
    result = overlap(model, failed)
    rivals = model(failed.adversarial).argsort(1, descending=True)[:, 1]
    np.testing.assert_allclose(
        result.scores["margin_drop"], margins(model, failed, labels, rivals), rtol=1e-2
    )
    expected = margin_drop(model, images, failed.adversarial, labels, rivals).sites
    torch.testing.assert_close(result.vulnerability, expected, rtol=0.05, atol=1e-6)


def test_the_runner_up_is_what_the_adversarial_image_came_closest_to() -> None:
    head = nn.Linear(3 * 4 * 4, 3)
    head.weight.data = torch.stack([torch.zeros(48), torch.zeros(48), torch.full((48,), 1 / 48)])
    head.bias.data = torch.tensor([3.0, 1.0, 0.4])
    model = nn.Sequential(nn.Flatten(), head).eval()
    images = torch.full((1, 3, 4, 4), 0.2)
    assert model(images).argsort(1).tolist() == [[2, 1, 0]]
    brighter = torch.full_like(images, 0.9)
    assert model(brighter).argsort(1).tolist() == [[1, 2, 0]]
    zero = torch.zeros(1, dtype=torch.long)
    assert overlap(model, Pairs(images, brighter, zero, zero)).scores.loc[0, "margin_drop"] == pytest.approx(
        0.7
    )


def test_a_mixed_batch_uses_the_target_of_each_image() -> None:
    model, images = NETWORKS["linear"]()
    labels = model(images).argmax(1)
    mixed = Pairs(
        images, 1 - images, labels, torch.stack([labels[0], (labels[1] + 1) % 3, (labels[2] + 2) % 3])
    )
    rivals = second_best_where_failed(model, mixed)
    assert rivals[1:].tolist() == mixed.targets[1:].tolist()
    np.testing.assert_allclose(
        overlap(model, mixed).scores["margin_drop"], margins(model, mixed, labels, rivals), rtol=1e-3
    )


def test_results_are_deterministic_and_independent_of_other_rows(any_model: Made) -> None:
    model, images = any_model
    pairs = attacked(model, images)
    result = overlap(model, pairs, seed=0)
    pd.testing.assert_frame_equal(overlap(model, pairs, seed=7).scores, result.scores)
    for index in (2, 0, 1):
        one = slice(index, index + 1)
        alone = overlap(
            model, Pairs(pairs.clean[one], pairs.adversarial[one], pairs.labels[one], pairs.targets[one])
        )
        torch.testing.assert_close(alone.vulnerability, result.vulnerability[one], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(alone.importance, result.importance[one], rtol=1e-3, atol=1e-5)
        for name in TESTED:
            assert alone.scores.loc[0, name] == pytest.approx(result.scores.loc[index, name], abs=0.02)


def test_importance_by_gradient_is_its_norm_over_channels(any_model: Made) -> None:
    model, images = any_model
    pairs = attacked(model, images)
    result = overlap(model, pairs, importance="gradient").importance
    for index in range(3):
        image = images[index : index + 1].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(image)[0, pairs.labels[index]], image)
        torch.testing.assert_close(
            result[index], gradient[0].square().sum(0, keepdim=True).sqrt(), rtol=1e-4, atol=1e-6
        )


def test_default_importance_is_the_aligned_class_activation_of_the_label(any_model: Made) -> None:
    model, images = any_model
    pairs = attacked(model, images)
    expected = class_activation(model, images, pairs.labels, alignment="effective")
    torch.testing.assert_close(overlap(model, pairs).importance, expected)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.MaxPool2d(3, 2, 1)], ids=repr)
def test_networks_with_pooling_layers_are_explained(pool: nn.Module) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, 1, 1), nn.ReLU(), pool, nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU(), pool, nn.Flatten()
        )
        model = model.append(nn.LazyLinear(3)).eval()
        images = torch.rand(2, 1, 16, 16)
        model(images)
    result = overlap(model, attacked(model, images))
    assert bool(result.importance.flatten(1).any(1).all())
    assert result.scores[[f"{name}_shift_p" for name in TESTED]].notna().to_numpy().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": -0.1}, "fraction must be between 0 and 1, got -0.1"),
        ({"fraction": 1.1}, "fraction must be between 0 and 1, got 1.1"),
        ({"importance": "camm"}, r"importance must .* got 'camm' \(did you mean 'cam'\?"),
        ({"importance": torch.rand(3, 20, 20)}, r"importance must have shape \(3, 1, 20, 20\), got"),
        ({"importance": torch.rand(3, 3, 20, 20)}, r"importance must have shape \(3, 1, 20, 20\), got"),
        ({"importance": torch.full((3, 1, 20, 20), torch.nan)}, "NaN or infinity"),
        (
            {"reference": torch.rand(2, 3, 9, 9)},
            r"reference must be images \(R, 3, 20, 20\), got \(2, 3, 9, 9\)",
        ),
        ({"reference": "photos"}, r"reference must be images \(R, 3, 20, 20\), got str"),
        (
            {"reference": torch.full((2, 3, 20, 20), torch.nan)},
            r"reference must .* NaN or infinity in reference\[0\]",
        ),
        ({"seed": 0.5}, r"seed must .* got 0\.5"),
        ({"pairs": (torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4))}, "pairs must be Pairs, got tuple"),
        ({"model": "resnet18"}, "model must be a torch.nn.Module that returns logits, got str"),
    ],
)
def test_invalid_arguments_are_errors_that_name_them(
    pooling: Made, options: dict[str, Any], message: str
) -> None:
    model, images = pooling
    arguments = {"model": model, "pairs": attacked(model, images), **options}
    with untouched(model), pytest.raises(ValueError, match=message):
        overlap(**arguments)


@pytest.mark.parametrize("name", ["labels", "targets"])
def test_unknown_classes_are_errors_that_name_the_argument(pooling: Made, name: str) -> None:
    model, images = pooling
    classes: dict[str, Any] = {"labels": torch.tensor([0, 1, 2]), "targets": torch.tensor([1, 2, 3])}
    classes[name] = torch.tensor([0, 1, 9])
    with pytest.raises(ValueError, match=r"(labels|targets|rivals|classes) must be classes .* got 9"):
        overlap(model, Pairs(images, 1 - images, **classes))


@pytest.mark.parametrize("importance", ["cam", "gradient"])
def test_model_and_pairs_are_unchanged_even_after_an_error(
    any_model: Made, importance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = any_model
    pairs = attacked(model, images)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    with untouched(model, pairs.clean, pairs.adversarial, pairs.labels, pairs.targets):
        overlap(model, pairs, importance=importance)

    def failing(*_: Any) -> Tensor:
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(type(model), "forward", failing_after(2, type(model).forward, failing))
    with untouched(model, pairs.clean), pytest.raises(RuntimeError, match="out of memory, say"):
        overlap(model, pairs, importance=importance)


def failing_after(allowed: int, first: Callable[..., Any], then: Callable[..., Any]) -> Callable[..., Any]:
    left = [first] * allowed

    def forward(*arguments: Any) -> Any:
        return (left.pop() if left else then)(*arguments)

    return forward


class Corner(nn.Module):
    """Reads nothing but the top right corner of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 2, 3, padding=1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        corner = torch.zeros_like(images[:, :1])
        corner[..., :6, 14:] = 1
        logits: Tensor = F.relu(self.head(images * corner)).mean((2, 3))
        return logits


def test_regions_do_not_include_ties_that_do_not_matter() -> None:
    """Ties in reading order would call the top rows important and attacked, and their overlap significant."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, images = Corner().eval(), torch.rand(3, 3, 16, 24)
    result = overlap(model, attacked(model, images))
    read = torch.zeros(16, 24, dtype=torch.bool)
    read[:9, 11:] = True  # the corner, the kernel's reach and the Gaussian's
    for region in (result.roi, result.roa):
        assert bool(region.any())
        assert not bool((region & ~read).any())


def test_untouched_sites_are_not_in_the_region_of_attack(pooling: Made) -> None:
    model, images = pooling
    region = torch.zeros(3, 1, 20, 20, dtype=torch.bool)
    region[..., 12:16, 3:6] = True
    result = overlap(model, pgd(model, images, model(images).argmax(1), region=region, steps=3))
    near = torch.zeros(20, 20, dtype=torch.bool)
    near[10:18, 1:8] = True
    assert not bool((result.roa & ~near).any())
    assert (result.scores["reached_fraction"] < 0.5).all()
    for name in TESTED:
        assert result.scores[name].notna().all(), name  # what it is, and nothing that it is tested against
        assert result.scores.filter(regex=f"^{name}_").isna().to_numpy().all(), name


@pytest.mark.parametrize("pixels", [1, 40])
def test_a_confined_attack_has_no_p_and_no_relation(pixels: int) -> None:
    """Confined to where the network looks, or sparse: where it acts follows from where it was put."""
    model, images = related(30)
    evidence = class_activation(model, images, torch.zeros(30, dtype=torch.long))
    best = torch.zeros(30, 576).scatter_(1, evidence.flatten(1).topk(pixels).indices, 1.0).view(30, 1, 24, 24)
    labels = torch.zeros(30, dtype=torch.long)
    pairs = Pairs(images, images - best * torch.tensor([0.1, 0, 0]).view(1, 3, 1, 1), labels, 1 - labels)
    result = overlap(model, pairs).scores
    assert result["effect_in_roi"].between(0.95, 1.05).all()
    assert result.filter(regex="_p$|_q$|_null$|^relation").isna().to_numpy().all()
