"""P values: equal to enumeration where that is possible, uniform where there is nothing, small where there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from weakspot.statistics import false_discovery, mcnemar, mean_interval, mean_test, region_test


def test_mcnemar_is_the_binomial_test_of_the_pairs_that_differ() -> None:
    from scipy.stats import binomtest

    for ups, downs, ties in ((9, 2, 5), (0, 7, 0), (30, 28, 100), (1, 0, 0), (4, 4, 1)):
        first = np.array([True] * ups + [False] * downs + [True] * ties)
        second = np.array([False] * ups + [True] * downs + [True] * ties)
        for alternative in ("two-sided", "greater"):
            expected = binomtest(ups, ups + downs, alternative=alternative).pvalue
            assert mcnemar(first, second, alternative=alternative) == pytest.approx(expected)
        assert mean_test(first.astype(float) - second) == pytest.approx(mcnemar(first, second))
    assert mcnemar(np.ones(3, bool), np.ones(3, bool)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("count", [20, 50])
@pytest.mark.parametrize("law", ["normal", "lognormal"])
def test_a_mean_of_zero_is_rejected_no_more_often_than_the_interval_fails(law: str, count: int) -> None:
    rng = np.random.default_rng(3)
    drawn = (
        rng.normal(size=(400, count)) if law == "normal" else rng.lognormal(size=(400, count)) - np.exp(0.5)
    )
    p = np.array([mean_test(values, seed) for seed, values in enumerate(drawn)])
    assert (p < 0.05).mean() <= 0.11  # 400 draws of .08 or less
    assert mean_test(drawn[0] + 5) < 0.001


def test_a_mean_test_agrees_with_its_interval() -> None:
    rng = np.random.default_rng(0)
    for shift in np.linspace(0, 0.8, 9):
        values = rng.exponential(size=40) - 1 + shift
        _, low, high = mean_interval(values)
        p = mean_test(values)
        if abs(p - 0.05) > 0.005:
            assert (p < 0.05) == (not low <= 0 <= high)


def test_few_images_have_no_p() -> None:
    rng = np.random.default_rng(0)
    assert np.isnan(mean_test(rng.normal(size=19)))
    assert np.isnan(mean_test(np.full(30, 0.5)))
    assert np.isnan(mean_test(np.empty(0)))
    assert mean_test(np.zeros(5)) == 1


def test_the_region_test_of_booleans_equals_enumeration() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        own, others = rng.integers(0, 2, 4).astype(float), rng.integers(0, 2, (4, 2)).astype(float)
        others[rng.random((4, 2)) < 0.2] = np.nan
        others[:, 0] = np.nan_to_num(others[:, 0])
        choices = [[own[i], *others[i][np.isfinite(others[i])]] for i in range(4)]
        sums = np.array([sum(ways) for ways in itertools.product(*choices)])
        weights = np.full(len(sums), 1 / len(sums))
        observed = own.sum()
        above = weights[sums > observed].sum() + weights[sums == observed].sum() / 2
        expected = min(1, 2 * min(above, 1 - above))
        assert region_test(own, others) == pytest.approx(expected)


def test_the_region_test_of_a_measure_approximates_enumeration() -> None:
    rng = np.random.default_rng(1)
    own, others = rng.normal(size=6) + 0.8, rng.normal(size=(6, 2))
    others[0, 1] = np.nan
    rows = [[own[i], *others[i][np.isfinite(others[i])]] for i in range(6)]
    sums = np.array(
        [sum(ways) for ways in itertools.product(*(np.array(row) - np.mean(row) for row in rows))]
    )
    observed = sum(row[0] - np.mean(row) for row in rows)
    expected = min(1, 2 * min((sums >= observed - 1e-9).mean(), (sums <= observed + 1e-9).mean()))
    assert region_test(own, others) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("count", [40, 200])
def test_a_region_unrelated_to_its_image_is_not_significant(count: int) -> None:
    """Images differ in how easily they fall, which is no matter of the region."""
    rng = np.random.default_rng(4)
    ease = rng.beta(0.5, 0.5, (500, count, 1))
    fell = (rng.random((500, count, 6)) < ease).astype(float)
    p = np.array([region_test(one[:, 0], one[:, 1:]) for one in fell])
    assert (p <= 0.05).mean() <= 0.075
    assert 0.4 < (p <= 0.5).mean() < 0.6


def test_a_planted_weak_region_is_found() -> None:
    rng = np.random.default_rng(5)
    ease = rng.beta(2, 2, (100, 200, 1))
    fell = (rng.random((100, 200, 6)) < ease).astype(float)
    fell[..., 0] = rng.random((100, 200)) < np.minimum(1, ease[..., 0] + 0.15)
    p = np.array([region_test(one[:, 0], one[:, 1:]) for one in fell])
    assert (p <= 0.05).mean() > 0.9


def test_an_image_without_a_control_is_left_out() -> None:
    own, others = np.array([1.0, 1.0, np.nan]), np.array([[0.0], [np.nan], [1.0]])
    assert region_test(own, others) == region_test(own[:1], others[:1])
    assert np.isnan(region_test(own[2:], others[2:]))


def test_false_discovery_ignores_what_is_missing() -> None:
    p = np.array([0.01, np.nan, 0.04, 0.03])
    np.testing.assert_allclose(false_discovery(p), [0.03, np.nan, 0.04, 0.04])
    assert np.isnan(false_discovery(np.array([np.nan]))).all()
    assert len(false_discovery(np.empty(0))) == 0
