"""Promotion and suppression: closed forms on a linear model, brute force on any, nulls that are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tests.networks import PoolingNetwork, TokenNetwork
from weakspot import Pairs, class_activation, interpretability_score, promotion_suppression, regions
from weakspot.explanations import interpretability_test
from weakspot.explanations.class_evidence import interpretability_matrix


class Three(nn.Module):
    """Linear, three classes: what each pixel does to each logit is its weight."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, *shape))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = torch.einsum("nchw,kchw->nk", images, self.weight)
        return logits


def pairs_of(model: nn.Module, shape: tuple[int, ...], labels: list[int], targets: list[int]) -> Pairs:
    clean = torch.rand(shape)
    return Pairs(clean, torch.rand(shape), torch.tensor(labels), torch.tensor(targets))


def in_cells(effects: Tensor, cell: int) -> Tensor:
    """(N, H, W) summed over cells, smaller ones at the far borders among them."""
    rows = [part.sum(1, keepdim=True) for part in effects.split(cell, 1)]
    return torch.cat([part.sum(2, keepdim=True) for part in torch.cat(rows, 1).split(cell, 2)], 2)


@pytest.mark.parametrize("variant", ["leave_one_out", "add_one"])
@pytest.mark.parametrize("size", [(8, 8), (9, 14)])
def test_a_linear_model_has_its_weights_as_effects(variant: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = Three((3, *size)).eval()
    pairs = pairs_of(model, (2, 3, *size), [0, 1], [1, 2])
    result = promotion_suppression(model, pairs, cell=4, variant=variant)
    effects = torch.einsum("nchw,kchw->nkhw", pairs.perturbation, model.weight.detach())
    raised = in_cells(effects[torch.arange(2), pairs.targets], 4)
    lowered = in_cells(-effects[torch.arange(2), pairs.labels], 4)
    torch.testing.assert_close(result.promotion, raised, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(result.suppression, lowered, atol=1e-4, rtol=1e-4)
    assert result.scores["additivity_gap"].abs().max() < 1e-4
    ratio = (raised.clamp(min=1e-6) / lowered.clamp(min=1e-6)).log2().clamp(-10, 10)
    change = (raised + lowered).sum((1, 2), keepdim=True).abs()
    active = torch.maximum(raised, lowered) >= 0.001 * change
    assert torch.equal(result.ratio.isnan(), ~active)
    torch.testing.assert_close(result.ratio[active], ratio[active], atol=1e-2, rtol=1e-2)
    clear = active & ((ratio.abs() - 1).abs() > 0.01)
    assert torch.equal(result.kind[clear], ((ratio > 1).byte() - (ratio < -1).byte()).to(torch.int8)[clear])
    assert bool((result.kind[~active] == -128).all())
    negative = ((raised < 0) | (lowered < 0)).flatten(1).double().mean(1)
    assert result.scores["negative_fraction"].tolist() == pytest.approx(negative.tolist())


class Moved(nn.Module):
    """Linear: the first channel feeds the label's logit, the second the target's, the third nothing."""

    def forward(self, images: Tensor) -> Tensor:
        label, target, _ = images.mean((2, 3)).unbind(1)
        return torch.stack([6 * label, 6 * target - 1, torch.full_like(label, -9)], 1)


@pytest.mark.parametrize(
    ("change", "expected", "ratio"),
    [
        ((-0.3, 0.0, 0.2), "suppression-dominated", -10.0),
        ((0.0, 0.3, 0.2), "promotion-dominated", 10.0),
        ((-0.1, 0.1, 0.2), "balanced", 0.0),
        ((-0.1, 0.19, 0.0), "balanced", math.log2(1.9)),
        ((-0.1, 0.21, 0.0), "promotion-dominated", math.log2(2.1)),
        ((-0.21, 0.1, 0.0), "suppression-dominated", -math.log2(2.1)),
        ((0.1, 0.3, 0.0), "promotion-dominated", 10.0),  # the label's logit rises as well
        ((0.3, 0.1, 0.0), None, math.nan),  # the margin grows
        ((-0.1, -0.3, 0.0), None, math.nan),
        ((0.1, -0.1, 0.0), None, math.nan),  # works against the attack on both
        ((0.0, 0.0, 0.2), None, math.nan),
    ],
)
def test_the_type_of_a_perturbation_follows_from_its_logits(
    change: tuple[float, float, float], expected: str | None, ratio: float
) -> None:
    clean = torch.full((1, 3, 6, 5), 0.5)
    pairs = Pairs(
        clean, clean + torch.tensor(change)[None, :, None, None], torch.tensor([0]), torch.tensor([1])
    )
    row = promotion_suppression(Moved().eval(), pairs, cell=2).scores.iloc[0]
    assert row["perturbation_type"] == expected
    assert row["promotion_log2_ratio"] == pytest.approx(ratio, abs=1e-3, nan_ok=True)
    assert row["whole_suppression"] == pytest.approx(-6 * change[0], abs=1e-5)
    assert row["whole_promotion"] == pytest.approx(6 * change[1], abs=1e-5)


def test_the_whole_perturbation_is_one_cell_that_covers_the_image() -> None:
    torch.manual_seed(1)
    for model, size in ((PoolingNetwork().eval(), (18, 13)), (TokenNetwork().eval(), (16, 24))):
        clean, adversarial = torch.rand(4, 3, *size), torch.rand(4, 3, *size)
        pairs = Pairs(clean, adversarial, torch.tensor([0, 1, 2, 0]), torch.tensor([2, 0, 1, 1]))
        for variant in ("leave_one_out", "add_one"):
            one = promotion_suppression(model, pairs, cell=24, variant=variant)
            whole = promotion_suppression(model, pairs, cell=5, variant=variant).scores
            assert one.promotion.flatten().tolist() == pytest.approx(
                whole["whole_promotion"].tolist(), abs=1e-4
            )
            assert one.suppression.flatten().tolist() == pytest.approx(
                whole["whole_suppression"].tolist(), abs=1e-4
            )
            # A cell has a kind also if the margin grows, and the whole perturbation has none then.
            names = {-1: "suppression-dominated", 0: "balanced", 1: "promotion-dominated", -128: None}
            falls = (one.promotion + one.suppression).flatten() > 0
            types = [
                names[kind] if fell else None
                for kind, fell in zip(one.kind.flatten().tolist(), falls.tolist(), strict=True)
            ]
            assert [kind if isinstance(kind, str) else None for kind in whole["perturbation_type"]] == types


def test_effects_equal_leaving_out_cells_one_by_one() -> None:
    torch.manual_seed(1)
    for model, size in ((PoolingNetwork().eval(), (18, 13)), (TokenNetwork().eval(), (16, 24))):
        clean, adversarial = torch.rand(2, 3, *size), torch.rand(2, 3, *size)
        pairs = Pairs(clean, adversarial, torch.tensor([0, 1]), torch.tensor([2, 0]))
        result = promotion_suppression(model, pairs, cell=5)
        with torch.no_grad():
            base = model(adversarial)
            for row in range(result.promotion.shape[1]):
                for column in range(result.promotion.shape[2]):
                    where = (
                        slice(None),
                        slice(None),
                        slice(5 * row, 5 * row + 5),
                        slice(5 * column, 5 * column + 5),
                    )
                    edited = adversarial.clone()
                    edited[where] = clean[where]
                    change = base - model(edited)
                    raised = change.gather(1, pairs.targets[:, None])[:, 0]
                    lowered = -change.gather(1, pairs.labels[:, None])[:, 0]
                    torch.testing.assert_close(result.promotion[:, row, column], raised, atol=2e-5, rtol=1e-3)
                    torch.testing.assert_close(
                        result.suppression[:, row, column], lowered, atol=2e-5, rtol=1e-3
                    )


def test_superpixels_replace_cells() -> None:
    torch.manual_seed(2)
    model = Three((3, 12, 15)).eval()
    pairs = pairs_of(model, (2, 3, 12, 15), [0, 1], [1, 2])
    groups = regions.superpixels(pairs.clean, count=9)
    result = promotion_suppression(model, pairs, groups=groups)
    effects = torch.einsum("nchw,kchw->nkhw", pairs.perturbation, model.weight.detach())
    for number in range(2):
        raised = effects[number, pairs.targets[number]]
        for group in range(int(groups[number].max()) + 1):
            inside = groups[number, 0] == group
            torch.testing.assert_close(
                result.promotion[number, 0, group], raised[inside].sum(), atol=1e-4, rtol=1e-4
            )
            on_pixels = result.on_pixels(result.promotion)[number, 0][inside]
            assert bool((on_pixels == result.promotion[number, 0, group]).all())
    assert result.promotion.shape[2] == int(groups.max()) + 1


def test_no_perturbation_has_no_effect_and_no_kind() -> None:
    model = PoolingNetwork().eval()
    images = torch.rand(1, 3, 16, 16)
    result = promotion_suppression(model, Pairs(images, images, torch.tensor([0]), torch.tensor([1])), cell=8)
    assert bool((result.promotion.abs() < 1e-5).all())
    assert result.scores["additivity_gap"].isna().all() or abs(result.scores["additivity_gap"][0]) < 1e3


def test_invalid_arguments_are_errors() -> None:
    model, images = PoolingNetwork().eval(), torch.rand(1, 3, 8, 8)
    pairs = Pairs(images, images, torch.tensor([0]), torch.tensor([1]))
    with pytest.raises(ValueError, match="cell must be an integer of at least 1, got 0"):
        promotion_suppression(model, pairs, cell=0)
    with pytest.raises(ValueError, match="did you mean 'add_one'"):
        promotion_suppression(model, pairs, variant="add_on")
    with pytest.raises(ValueError, match=r"groups must be an integer tensor .* got \(1, 8, 8\)"):
        promotion_suppression(model, pairs, groups=torch.zeros(1, 8, 8, dtype=torch.long))
    with pytest.raises(ValueError, match=r"of must .* got 'labels' .did you mean 'label'"):
        interpretability_score(model, pairs, of="labels")


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.75])
def test_an_even_perturbation_scores_the_root_of_the_area(fraction: float) -> None:
    torch.manual_seed(3)
    model = PoolingNetwork().eval()
    clean = torch.rand(2, 3, 20, 20) * 0.5
    pairs = Pairs(clean, clean + 0.1, torch.tensor([0, 1]), torch.tensor([1, 0]))
    score = interpretability_score(model, pairs, fraction=fraction)
    torch.testing.assert_close(score, torch.full((2,), math.sqrt(fraction)), atol=0.01, rtol=0)
    test = interpretability_test(model, pairs, fraction=fraction)
    assert test["interpretability_label_shift_null"].tolist() == pytest.approx(score.tolist())


def evidence_of(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """The 30% of each image that the score is about."""
    return regions.top(class_activation(model, images, classes, alignment="effective"), 0.3)


def test_a_perturbation_inside_the_evidence_scores_one_without_p() -> None:
    """It was confined to the region that the score is about."""
    torch.manual_seed(4)
    model = PoolingNetwork().eval()
    clean = torch.rand(24, 3, 20, 20) * 0.5
    labels = torch.arange(24) % 4
    inside = evidence_of(model, clean, labels)
    pairs = Pairs(clean, clean + 0.2 * inside, labels, (labels + 1) % 4)
    assert interpretability_score(model, pairs).tolist() == pytest.approx([1] * 24)
    tests = interpretability_test(model, pairs)
    assert tests.drop(columns="interpretability_label").isna().all(axis=None)
    outside = Pairs(clean, clean + 0.2 * ~inside, labels, (labels + 1) % 4)
    assert interpretability_score(model, outside).tolist() == pytest.approx([0] * 24)


@pytest.mark.parametrize("of", ["label", "target"])
def test_a_perturbation_on_its_own_evidence_is_found(of: str) -> None:
    torch.manual_seed(4)
    model = PoolingNetwork().eval()
    clean = torch.rand(40, 3, 20, 20) * 0.5
    labels = torch.arange(40) % 4
    targets = (labels + 1) % 4
    inside = evidence_of(model, clean, labels if of == "label" else targets)
    leaning = Pairs(clean, clean + 0.1 + 0.1 * inside, labels, targets)
    tests = interpretability_test(model, leaning, of=of)
    name = f"interpretability_{of}"
    assert (tests[f"{name}_p"] <= 0.01).all()
    assert (tests[name] > tests[f"{name}_null"]).all()
    even = Pairs(clean, clean + 0.1 + 0.1 * inside.roll(1, 0), labels, targets)
    assert (interpretability_test(model, even, of=of)[f"{name}_p"] <= 0.05).mean() <= 0.1


def test_every_score_of_every_perturbation_with_every_map_equals_its_definition() -> None:
    torch.manual_seed(5)
    evidence, change = torch.randn(4, 1, 7, 9), torch.randn(3, 2, 7, 9)
    change[1] = 0
    evidence[2] = 1.5
    result = interpretability_matrix(evidence, change.double().square().sum(1), fraction=0.4)
    for j in range(3):
        for i in range(4):
            inside = regions.top(evidence[i : i + 1], 0.4)[0]
            expected = (change[j] * inside).norm() / change[j].norm()
            assert float(result[j, i]) == pytest.approx(
                math.nan if i == 2 else float(expected), nan_ok=True, abs=1e-6
            )


def test_references_count_as_other_images_for_interpretability() -> None:
    torch.manual_seed(6)
    model = PoolingNetwork().eval()
    clean = torch.rand(2, 3, 20, 20) * 0.5
    pairs = Pairs(clean, clean + 0.1 * torch.rand(2, 3, 20, 20), torch.tensor([0, 1]), torch.tensor([1, 0]))
    assert interpretability_test(model, pairs)["interpretability_label_p"].isna().all()
    for of in ("label", "target"):
        tests = interpretability_test(model, pairs, of=of, reference=torch.rand(18, 3, 20, 20))
        assert tests.notna().all(axis=None)
    alone = interpretability_test(model, pairs, compare=False)
    assert list(alone) == [f"interpretability_label{end}" for end in ("", "_shift_null", "_shift_p")]


def test_no_perturbation_has_no_score() -> None:
    images = torch.rand(1, 3, 16, 16)
    pairs = Pairs(images, images, torch.tensor([0]), torch.tensor([1]))
    assert bool(interpretability_score(PoolingNetwork().eval(), pairs).isnan().all())
