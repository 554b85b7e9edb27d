"""Nulls: p values are uniform for unrelated maps, whatever habit all maps share, and small for planted alignment."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weakspot.explanations.agreement import LEVEL
from weakspot.statistics import (
    LEAST_OTHERS,
    other_image_test,
    products_over_shifts,
    run_test,
    shift_test,
    standardized,
)

LAW = settings(deadline=None, derandomize=True)  # the same cases in every run


@st.composite
def maps(draw: st.DrawFn) -> Tensor:
    """Maps (N, H, W), of which some have many ties."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 6)))
    values = draw(st.sampled_from([2, 5, 10_000]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return torch.randint(-values, values, shape, generator=generator) / 3


def unrelated(count: int, seed: int, *, law: str = "normal") -> Tensor:
    """A matrix whose rows and columns differ, as attacks and images do, and whose diagonal is like the rest."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, 1)) + rng.normal(size=(1, count)) / 2 + rng.normal(size=(count, count))
    return torch.from_numpy(np.exp(values) if law == "lognormal" else values)


@pytest.mark.parametrize("law", ["normal", "lognormal"])
@pytest.mark.parametrize("count", [20, 40, 100])
def test_unrelated_images_have_uniform_p(count: int, law: str) -> None:
    found = [other_image_test(unrelated(count, seed, law=law)) for seed in range(4000 // count)]
    p = torch.cat([one.p for one in found])
    assert float((p <= 0.05).double().mean()) <= 0.07
    assert 0.4 < float((p <= 0.5).double().mean()) < 0.6
    any_q = torch.tensor([bool((one.q <= 0.1).any()) for one in found])
    assert float(any_q.double().mean()) <= 0.2


def test_own_maps_that_differ_are_detected() -> None:
    matrix = unrelated(40, 0)
    matrix[:20].diagonal().add_(6)
    found = other_image_test(matrix)
    assert float((found.p[:20] <= 0.05).double().mean()) > 0.9
    assert float((found.q[:20] <= 0.1).double().mean()) > 0.9
    assert float((found.p[20:] <= 0.05).double().mean()) < 0.2
    below = other_image_test(-matrix)  # p is two-sided
    assert torch.allclose(found.p, below.p)


def test_the_null_is_the_mean_over_other_images_and_p_is_a_rank() -> None:
    matrix = unrelated(25, 3)
    found = other_image_test(matrix)
    table = matrix.numpy()
    scores, pool = [], []
    for j, row in enumerate(table):
        others = np.delete(row, j)
        assert float(found.null[j]) == pytest.approx(others.mean())
        scores.append((row[j] - others.mean()) / others.std(ddof=1))
        for i in range(len(others)):
            rest = np.delete(others, i)
            pool.append((others[i] - rest.mean()) / rest.std(ddof=1))
    for score, p in zip(scores, found.p, strict=True):
        tails = [np.mean([*(np.array(pool) >= score), True]), np.mean([*(np.array(pool) <= score), True])]
        assert float(p) == pytest.approx(min(1, 2 * min(tails)))


def test_fewer_than_nineteen_other_images_have_no_p() -> None:
    for count, references, given_ in (
        (19, 0, False),
        (20, 0, True),
        (4, 15, False),
        (4, 16, True),
        (1, 19, True),
    ):
        matrix = torch.cat([unrelated(count, 0), torch.randn(count, references).double()], 1)
        found = other_image_test(matrix)
        assert bool(found.p.isfinite().all()) == given_
        assert bool(found.p.isnan().all()) != given_
        assert torch.equal(found.value, matrix.diagonal())
        assert bool(found.null.isfinite().all()) == given_


def test_nineteen_other_images_are_the_fewest_with_which_a_single_image_gets_a_verdict() -> None:
    assert 2 / (LEAST_OTHERS + 1) <= LEVEL < 2 / LEAST_OTHERS
    alone = torch.cat([torch.full((1, 1), 100.0), torch.arange(19.0)[None]], 1)
    assert other_image_test(alone).p.tolist() == [pytest.approx(0.1)]
    # Together, 20 images are ranked among 380 values.
    together = other_image_test(unrelated(20, 0) + 100 * torch.eye(20))
    assert float(together.p.max()) == pytest.approx(2 / 381)


def test_an_undefined_attack_spoils_no_other() -> None:
    matrix = unrelated(30, 1)
    broken = torch.cat([matrix, torch.randn(30, 1).double()], 1)
    broken = torch.cat([broken, torch.full((1, 31), torch.nan)])
    broken[:, 30] = torch.nan  # nor does a map of which nothing is defined
    whole, found = other_image_test(matrix), other_image_test(broken)
    assert torch.equal(found.p[:30], whole.p)
    assert bool(found.p[30].isnan())


def test_maps_that_are_all_alike_are_no_evidence() -> None:
    found = other_image_test(torch.full((25, 25), 0.3))
    assert found.p.tolist() == [1.0] * 25
    rounding = 0.3 + 1e-15 * torch.randn(25, 25, dtype=torch.float64)
    assert float(other_image_test(rounding).p.min()) > 0.02


def test_unrelated_runs_are_not_accused_and_aligned_ones_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weakspot.statistics.nulls.PERMUTATIONS", 999)
    p = np.array([run_test(unrelated(20, seed), seed=seed).p for seed in range(100)])
    assert (p <= 0.05).mean() <= 0.11  # 100 draws of .05
    planted = unrelated(20, 0)
    planted.diagonal().add_(1.5)
    assert run_test(planted).p <= 0.01
    assert run_test(-planted).p == run_test(planted).p


def test_the_run_test_permutes_maps() -> None:
    matrix = unrelated(4, 2)
    table = matrix.numpy()
    means = [np.mean([table[j, ways[j]] for j in range(4)]) for ways in itertools.permutations(range(4))]
    found = run_test(matrix)
    assert found.images == 4
    assert found.value == pytest.approx(table.diagonal().mean())
    assert found.null == pytest.approx(np.mean(means))
    assert np.isnan(found.p)  # below ten images
    large = unrelated(12, 5)
    large.diagonal().add_(0.7)
    rng = np.random.default_rng(9)
    drawn = [large.numpy()[np.arange(12), rng.permutation(12)].mean() for _ in range(20_000)]
    tail = np.mean(np.array(drawn) >= run_test(large).value)
    assert run_test(large).p == pytest.approx(2 * tail, abs=0.02)


def test_a_run_leaves_out_images_without_a_statistic() -> None:
    matrix = unrelated(12, 0)
    matrix[3, 3] = torch.nan
    kept = [i for i in range(12) if i != 3]
    assert run_test(matrix) == run_test(matrix[kept][:, kept])
    assert run_test(torch.full((3, 3), torch.nan)).images == 0


def test_a_common_tendency_misleads_shifts_and_not_other_images() -> None:
    """Importance and attack of unrelated images that both favor the center: the defect this module exists for."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(16.0) - 7.5
    center = torch.exp(-(rows[:, None] ** 2 + rows**2) / 30).double()
    importance = standardized(center + 0.4 * torch.rand(40, 16, 16, generator=generator).double())
    attack = standardized(center + 0.4 * torch.rand(40, 16, 16, generator=generator).double())
    matrix = attack.flatten(1) @ importance.flatten(1).T / 256
    assert float((other_image_test(matrix).p <= 0.05).double().mean()) <= 0.1
    assert run_test(matrix).p > 0.05
    shifted = shift_test(products_over_shifts(importance, attack) / 256)
    assert float((shifted.p <= 0.05).double().mean()) > 0.5


@LAW
@given(maps())
def test_the_shift_test_counts_shifts(values: Tensor) -> None:
    found = shift_test(values.double())
    for image, table in enumerate(values.double().numpy()):
        observed = table[0, 0]
        assert float(found.value[image]) == observed
        assert float(found.null[image]) == pytest.approx(table.mean(), abs=1e-9)
        expected = min(1, 2 * min((table >= observed).mean(), (table <= observed).mean()))
        assert float(found.p[image]) == pytest.approx(expected)


@LAW
@given(maps())
def test_over_all_alignments_p_is_below_any_level_in_at_most_that_fraction(values: Tensor) -> None:
    """The guarantee behind the p of shifts: if alignment within the image is arbitrary then P(p <= a) <= a."""
    table = values[0].double()
    moves = list(np.ndindex(*table.shape))
    found = shift_test(torch.stack([table.roll((-down, -across), (0, 1)) for down, across in moves]))
    for level in found.p.unique():
        assert float((found.p <= level).double().mean()) <= float(level) + 1e-12


def test_rounding_noise_between_equal_values_does_not_lower_p() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 1e-15 * torch.randn(4, 5, 5, generator=generator, dtype=torch.float64)
    assert shift_test(3.0 + noise).p.tolist() == [1.0] * 4


def test_an_undefined_statistic_has_no_test_and_spoils_no_neighbor() -> None:
    values = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alone = shift_test(values)
    values[1] = torch.nan
    found = shift_test(values)
    for name in ("value", "null", "p"):
        column, expected = getattr(found, name), getattr(alone, name)
        assert bool(column[1].isnan())
        assert torch.equal(column[[0, 2]], expected[[0, 2]])


def test_columns_are_named_after_the_statistic_and_its_null() -> None:
    matrix = unrelated(20, 0)
    assert list(other_image_test(matrix).columns("jaccard")) == [
        "jaccard",
        "jaccard_null",
        "jaccard_p",
        "jaccard_q",
    ]
    assert list(shift_test(torch.rand(2, 3, 3)).columns("jaccard")) == [
        "jaccard_shift_null",
        "jaccard_shift_p",
    ]
