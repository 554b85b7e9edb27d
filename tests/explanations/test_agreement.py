"""Agreement: every attack with every importance map equals loops, and only another image is another image."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from tests.networks import NETWORKS, PoolingNetwork
from weakspot.attacks import pgd
from weakspot.budgets import L2
from weakspot.explanations import overlap
from weakspot.explanations.agreement import STATISTICS, agreement, comparable, effect_in_roi, reached_fraction
from weakspot.pairs import Pairs
from weakspot.regions import top


def fields(count: int, seed: int, size: tuple[int, int] = (7, 9)) -> Tensor:
    return torch.randn(count, 1, *size, generator=torch.Generator().manual_seed(seed))


def neighbors_mean(field: np.ndarray) -> np.ndarray:
    result = np.empty_like(field)
    for y, x in np.ndindex(*field.shape):
        window = field[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
        result[y, x] = (window.sum() - field[y, x]) / (window.size - 1)
    return result


def by_definition(importance: Tensor, vulnerability: Tensor, fraction: float) -> dict[str, float]:
    """The four statistics of one map (1, H, W) and one attack."""
    looked, worked = (maps[0].double().numpy() for maps in (importance, vulnerability))
    roi = top(importance[None], fraction)[0, 0].numpy()
    roa = top(vulnerability[None], fraction)[0, 0].numpy() & (worked > 0)
    placed = abs(worked.sum()) > 0.05 * abs(worked).sum() and worked.sum() > 0
    standard = [(values - values.mean()) / values.std() for values in (looked, worked)]
    return {
        "effect_in_roi": worked[roi].sum() / worked.sum() if placed else math.nan,
        "jaccard": (roi & roa).sum() / (roi | roa).sum(),
        "spearman": float(spearmanr(looked.ravel(), worked.ravel()).statistic),
        "moran_i": float((standard[0] * neighbors_mean(standard[1])).mean()),
    }


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_agreement_equals_loops_over_attacks_and_maps(
    fraction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weakspot.explanations.agreement.CHUNK", 3)
    importance, vulnerability = fields(7, 0), fields(5, 1) + 0.3
    matrices = agreement(importance, vulnerability, fraction=fraction)
    assert tuple(matrices) == STATISTICS
    for j, i in np.ndindex(5, 7):
        for name, value in by_definition(importance[i], vulnerability[j], fraction).items():
            assert float(matrices[name][j, i]) == pytest.approx(value, abs=1e-6, nan_ok=True), name
    alone = effect_in_roi(importance, vulnerability, fraction=fraction)
    assert torch.equal(alone.nan_to_num(9), matrices["effect_in_roi"].nan_to_num(9))


def test_maps_without_contrast_have_no_statistics() -> None:
    importance, vulnerability = fields(3, 0), fields(3, 1) + 0.3
    importance[1], vulnerability[2] = 0.7, 0.1
    for matrix in (
        *agreement(importance, vulnerability).values(),
        effect_in_roi(importance, vulnerability, fraction=0.2),
    ):
        assert matrix[:, 1].isnan().all()
        assert matrix[2].isnan().all()
        assert matrix[:2][:, [0, 2]].isfinite().all()


def test_copies_of_an_image_are_not_other_images() -> None:
    images = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    images[2] = images[0]  # attacked twice
    references = torch.cat([images[1:2], torch.rand(2, 3, 5, 5), torch.zeros(1, 3, 5, 5)])
    references[2] = references[1]
    allowed = comparable(images, references, torch.tensor([False, False, False, True])).int()
    assert allowed.tolist() == [
        [1, 1, 0, 1, 0, 1, 0, 1],
        [1, 1, 0, 1, 0, 1, 0, 1],
        [0, 1, 1, 1, 0, 1, 0, 1],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]


@pytest.mark.parametrize(("size", "radius"), [((24, 32), 1), ((150, 200), 3)])
def test_reached_sites_lie_within_a_fiftieth_of_the_shorter_side(size: tuple[int, int], radius: int) -> None:
    clean = torch.zeros(2, 3, *size)
    adversarial = clean.clone()
    adversarial[0, 1, 10, 12] = 0.5
    zero = torch.zeros(2, dtype=torch.long)
    share = (2 * radius + 1) ** 2 / (size[0] * size[1])
    assert reached_fraction(Pairs(clean, adversarial, zero, zero)).tolist() == pytest.approx([share, 0])


def attacked(count: int, seed: int = 0) -> tuple[nn.Module, Pairs]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = PoolingNetwork().eval()
        images = torch.rand(count, 3, 20, 20)
    return model, pgd(model, images, model(images).argmax(1), budget=L2(1.5), steps=3)


def part(pairs: Pairs, rows: slice) -> Pairs:
    return Pairs(pairs.clean[rows], pairs.adversarial[rows], pairs.labels[rows], pairs.targets[rows])


P_VALUES = [f"{name}_p" for name in STATISTICS]


def test_p_needs_nineteen_other_images_from_batch_and_reference() -> None:
    model, pairs = attacked(21)
    others = torch.rand(19, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    for rows, reference, given in (
        (slice(0, 19), None, False),
        (slice(0, 20), None, True),
        (slice(0, 2), others[:17], False),
        (slice(0, 2), others[:18], True),
        (slice(0, 1), others, True),
        (slice(0, 1), others[:1].expand(19, -1, -1, -1), False),
        (slice(0, 1), pairs.clean[0:19], False),
        (slice(0, 1), pairs.clean[0:20], True),
    ):
        scores = overlap(model, part(pairs, rows), reference=reference).scores
        assert scores[[*P_VALUES, "relation", "relation_p"]].notna().all(axis=None) == given
        assert scores[[*P_VALUES, "relation", "relation_p"]].isna().all(axis=None) != given


def test_an_image_among_its_own_references_changes_nothing() -> None:
    model, pairs = attacked(3)
    others = torch.rand(20, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    expected = overlap(model, pairs, reference=others).scores
    result = overlap(model, pairs, reference=torch.cat([pairs.clean[1:2], others, others[:5]])).scores
    pd.testing.assert_frame_equal(result, expected)


def test_one_image_attacked_twenty_times_has_no_p() -> None:
    model, pairs = attacked(1)
    many = Pairs(
        pairs.clean.expand(20, -1, -1, -1),
        (pairs.adversarial + torch.linspace(0, 0.05, 20).view(-1, 1, 1, 1)).clamp(0, 1),
        pairs.labels.expand(20),
        pairs.targets.expand(20),
    )
    assert overlap(model, many).scores[[*P_VALUES, "relation"]].isna().all(axis=None)


def test_without_comparison_parts_have_the_scores_of_the_whole() -> None:
    model, pairs = attacked(24)
    whole = overlap(model, pairs, compare=False).scores
    assert not whole.filter(regex="(?<!_shift)(_null|_p|_q)$|^relation").size
    halves = [overlap(model, part(pairs, rows), compare=False).scores for rows in (slice(0, 5), slice(5, 24))]
    pd.testing.assert_frame_equal(pd.concat(halves, ignore_index=True), whole, rtol=1e-3, atol=1e-3)
    compared = overlap(model, pairs).scores
    pd.testing.assert_frame_equal(compared[list(whole)], whole)


def test_given_scores_are_compared_with_reference_scores() -> None:
    model, pairs = attacked(2)
    given, others = fields(2, 0, (20, 20)), fields(30, 1, (20, 20))
    scores = overlap(model, pairs, importance=given, reference=others).scores
    assert scores[[*P_VALUES, "relation"]].notna().all(axis=None)
    with pytest.raises(ValueError, match=r"reference must be scores \(R, 1, 20, 20\), got \(30, 3, 20, 20\)"):
        overlap(model, pairs, importance=given, reference=others.expand(-1, 3, -1, -1))


@pytest.mark.parametrize("importance", ["gradient", "occlusion"])
def test_gradient_importance_states_no_relation(importance: Any) -> None:
    model, images = NETWORKS["pooling"]()
    others = torch.rand(20, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    pairs = pgd(model, images, model(images).argmax(1), budget=L2(1.5), steps=3)
    scores = overlap(model, pairs, importance=importance, reference=others).scores
    assert scores["effect_in_roi_p"].notna().all()
    assert scores["relation"].isna().all() == (importance == "gradient")
