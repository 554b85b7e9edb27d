"""Statistics against loops over every shift, and p values that keep their promise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weakspot.statistics import (
    ShiftTest,
    mean_interval,
    mean_intervals,
    products_over_shifts,
    queen_lag,
    ranks,
    share_interval,
    shift_test,
    sign_flip_test,
    standardized,
)

LAW = settings(deadline=None, derandomize=True)  # the same cases in every run


@st.composite
def maps(draw: st.DrawFn, *, least: int = 1) -> Tensor:
    """Maps (N, H, W), of which some have many ties."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(least, 5)), draw(st.integers(least, 6)))
    values = draw(st.sampled_from([2, 5, 10_000]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return torch.randint(-values, values, shape, generator=generator) / 3


@LAW
@given(maps(), st.integers(0, 2**32))
def test_products_at_a_shift_pair_each_site_with_the_other_map_rolled_by_it(fixed: Tensor, seed: int) -> None:
    shifted = torch.randn(fixed.shape, generator=torch.Generator().manual_seed(seed))
    found = products_over_shifts(fixed, shifted)
    for image, (first, second) in enumerate(zip(fixed.numpy(), shifted.numpy(), strict=True)):
        for down, across in np.ndindex(*first.shape):
            expected = (first.astype(float) * np.roll(second, (down, across), (0, 1))).sum()
            assert float(found[image, down, across]) == pytest.approx(expected, rel=1e-6, abs=1e-4)


def test_products_take_masks_and_do_not_take_the_opposite_shift() -> None:
    fixed, shifted = torch.zeros(1, 4, 5, dtype=torch.bool), torch.zeros(1, 4, 5, dtype=torch.bool)
    fixed[0, 1, 3], shifted[0, 0, 1] = True, True
    found = products_over_shifts(fixed, shifted).round()
    assert found.nonzero().tolist() == [[0, 1, 2]]  # down by one and right by two brings one onto the other


@LAW
@given(maps())
def test_the_shift_test_counts_shifts(values: Tensor) -> None:
    found = shift_test(values.double())
    for image, table in enumerate(values.double().numpy()):
        observed = table[0, 0]
        assert float(found.value[image]) == observed
        assert float(found.null[image]) == pytest.approx(table.mean(), abs=1e-9)
        assert float(found.p[image]) == pytest.approx((table >= observed).mean())
        assert float(found.p_less[image]) == pytest.approx((table <= observed).mean())
        low, high = np.quantile(table, [0.025, 0.975])
        assert float(found.low[image]) == pytest.approx(low)
        assert float(found.high[image]) == pytest.approx(high)


@LAW
@given(maps())
def test_over_all_alignments_p_is_below_any_level_in_at_most_that_share(values: Tensor) -> None:
    """The guarantee behind every p: whatever the table, if alignment is arbitrary then P(p <= a) <= a."""
    table = values[0].double()
    moves = list(np.ndindex(*table.shape))
    found = shift_test(torch.stack([table.roll((-down, -across), (0, 1)) for down, across in moves]))
    for p in (found.p, found.p_less):
        for level in p.unique():
            assert float((p <= level).double().mean()) <= float(level) + 1e-12


def test_rounding_noise_between_equal_values_does_not_lower_p() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 1e-15 * torch.randn(4, 5, 5, generator=generator, dtype=torch.float64)
    found = shift_test(3.0 + noise)
    assert found.p.tolist() == [1.0] * 4
    assert found.p_less.tolist() == [1.0] * 4


def test_an_undefined_statistic_has_no_test_and_spoils_no_neighbour() -> None:
    values = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alone = shift_test(values)
    values[1] = torch.nan
    found = shift_test(values)
    for name in ("value", "null", "low", "high", "p", "p_less"):
        column, expected = getattr(found, name), getattr(alone, name)
        assert bool(column[1].isnan())
        assert torch.equal(column[[0, 2]], expected[[0, 2]])


def test_columns_are_named_after_the_statistic() -> None:
    one, two, three, four, five, six = torch.arange(6.0)[:, None].unbind(0)
    found = ShiftTest(value=one, null=two, low=three, high=four, p=five, p_less=six).columns("jaccard")
    assert found.to_dict("records") == [
        {"jaccard": 0, "jaccard_null": 1, "jaccard_null_low": 2, "jaccard_null_high": 3, "jaccard_p": 4}
    ]


@LAW
@given(maps(least=2))
def test_standardized_maps_have_mean_zero_and_deviation_one(values: Tensor) -> None:
    for original, found in zip(values, standardized(values), strict=True):
        if float(original.double().std(unbiased=False)) > 0:
            expected = (original.double().numpy() - original.double().numpy().mean()) / (
                original.double().numpy().std()
            )
            np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)
        else:
            assert bool(found.isnan().all())


@pytest.mark.parametrize("constant", [0.0, 0.1, -1e-20, 1e10])
def test_a_constant_map_cannot_be_standardized_and_spoils_no_neighbour(constant: float) -> None:
    values = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(0))
    values[0] = constant
    found = standardized(values)
    assert bool(found[0].isnan().all())
    assert torch.equal(found[1:], standardized(values[1:]))


@LAW
@given(maps())
def test_ranks_count_smaller_sites_and_share_ties(values: Tensor) -> None:
    for original, found in zip(values.flatten(1), ranks(values).flatten(1), strict=True):
        for value, rank in zip(original, found, strict=True):
            expected = int((original < value).sum()) + (int((original == value).sum()) + 1) / 2
            assert float(rank) == expected


@LAW
@given(maps())
def test_queen_lag_is_the_mean_of_the_neighbours_there_are(values: Tensor) -> None:
    found = queen_lag(values)
    height, width = values.shape[1:]
    for image, y, x in np.ndindex(*values.shape):
        around = [
            float(values[image, j, i])
            for j in range(max(0, y - 1), min(height, y + 2))
            for i in range(max(0, x - 1), min(width, x + 2))
            if (j, i) != (y, x)
        ]
        expected = sum(around) / len(around) if around else 0.0
        assert float(found[image, y, x]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("hits", "count"), [(0, 1), (1, 1), (0, 12), (5, 12), (12, 12), (199, 200)])
def test_the_interval_of_a_share_is_wilsons(hits: int, count: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(hits, count).proportion_ci(method="wilson")
    share, low, high = share_interval(np.arange(count) < hits)
    assert share == hits / count
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert 0 <= low <= share <= high <= 1


def test_no_cases_have_no_share() -> None:
    assert np.isnan(share_interval(np.zeros(0, dtype=bool))).all()


def test_the_interval_of_many_values_is_that_of_drawing_them() -> None:
    rng = np.random.default_rng(0)
    values = rng.choice([-1.0, 0.0, 1.0], 3000, p=[0.1, 0.7, 0.2])
    mean, low, high = mean_interval(values)
    means = [rng.choice(values, 3000).mean() for _ in range(4000)]
    drawn = np.quantile(means, [0.025, 0.975])
    assert mean == pytest.approx(values.mean())
    assert [low, high] == pytest.approx(drawn, abs=0.1 * (high - low))


def test_a_tables_intervals_are_those_of_its_columns() -> None:
    rng = np.random.default_rng(0)
    table = np.stack([rng.normal(size=200), rng.integers(0, 2, 200), rng.exponential(size=200)], 1)
    for column, found in zip(table.T, mean_intervals(table), strict=True):
        alone = np.array(mean_interval(column))
        width = alone[2] - alone[1]
        np.testing.assert_allclose(found, alone, atol=0.03 * width)


def test_a_tables_intervals_leave_out_what_is_missing() -> None:
    rng = np.random.default_rng(1)
    whole = rng.normal(size=120)
    table = np.full((150, 4), np.nan)
    table[:120, 0], table[:1, 1], table[:, 3] = whole, 2.0, 5.0
    found = mean_intervals(table)
    np.testing.assert_allclose(found[0], mean_interval(whole), atol=0.02)
    assert found[1, 0] == 2.0
    assert np.isnan(found[1, 1:]).all()
    assert np.isnan(found[2]).all()
    assert found[3].tolist() == [5.0, 5.0, 5.0]
    assert mean_intervals(np.empty((0, 2))).shape == (2, 3)


def test_beyond_many_images_the_normal_interval_is_the_bootstraps() -> None:
    rng = np.random.default_rng(2)
    values = rng.exponential(size=4000)
    drawn = [values[rng.integers(0, 4000, 4000)].mean() for _ in range(4000)]
    wanted = np.array([values.mean(), *np.quantile(drawn, [0.025, 0.975])])
    for found in (mean_intervals(values[:, None])[0], mean_interval(values)):
        np.testing.assert_allclose(found, wanted, atol=0.05 * (wanted[2] - wanted[1]))


def test_sign_flips_of_yes_and_no_are_the_exact_binomial_test() -> None:
    from scipy.stats import binomtest

    for ups, downs, ties in ((9, 2, 5), (0, 7, 0), (30, 28, 100), (400, 300, 0), (1, 0, 0), (4, 4, 1)):
        differences = np.array([1.0] * ups + [-1.0] * downs + [0.0] * ties)
        assert sign_flip_test(differences) == pytest.approx(binomtest(ups, ups + downs).pvalue)


def test_few_sign_flips_are_all_tried() -> None:
    differences = np.array([0.5, 1.5, -0.25, 2.0])
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
            for signs in itertools.product((1, -1), repeat=4)]  # fmt: skip
    assert sign_flip_test(differences) == np.mean([total >= 3.75 for total in sums])


@pytest.mark.parametrize("count", [30, 3000])
def test_where_signs_are_chance_p_below_a_level_is_no_likelier_than_the_level(count: int) -> None:
    rng = np.random.default_rng(3)
    found = np.array([sign_flip_test(rng.normal(size=count), seed) for seed in range(200)])
    assert (found < 0.05).mean() < 0.10
    assert 0.35 < (found < 0.5).mean() < 0.65
    assert sign_flip_test(rng.normal(size=count) + 1) < 0.001


def test_no_differences_tell_nothing() -> None:
    assert (
        sign_flip_test(np.zeros(5)) == sign_flip_test(np.empty(0)) == sign_flip_test(np.full(3, np.nan)) == 1
    )
