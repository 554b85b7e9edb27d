"""Coverage of every interval: exact for proportions, simulated for means, at least .92 or no interval at all."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import cycle

import numpy as np
import pytest
from numpy.typing import NDArray

from weakspot.statistics import (
    mean_interval,
    mean_intervals,
    paired_proportion_interval,
    proportion_interval,
    rate_interval,
)

SIZES = (5, 10, 20, 50)
COVERAGE = 0.92
Draw = Callable[[np.random.Generator, tuple[int, int]], NDArray[np.float64]]


@pytest.mark.parametrize("count", [1, 2, *SIZES, 200])
def test_the_interval_of_a_proportion_covers(count: int) -> None:
    from scipy.stats import binom

    ends = np.array([proportion_interval(np.arange(count) < hits) for hits in range(count + 1)])
    shares = np.linspace(0.0005, 0.9995, 1999)
    law = binom.pmf(np.arange(count + 1)[:, None], count, shares)
    covered = (law * ((ends[:, 1:2] <= shares) & (shares <= ends[:, 2:]))).sum(0)
    assert covered.min() >= 0.95 - 1e-9
    assert (ends[:, 0] == np.arange(count + 1) / count).all()
    assert (ends[:, 1] <= ends[:, 0]).all()
    assert (ends[:, 0] <= ends[:, 2]).all()


def test_the_interval_of_a_proportion_is_not_too_wide() -> None:
    from scipy.stats import binom

    law = binom.pmf(np.arange(51), 50, 0.3)
    ends = np.array([proportion_interval(np.arange(50) < hits) for hits in range(51)])
    assert (law * ((ends[:, 1] <= 0.3) & (ends[:, 2] >= 0.3))).sum() < 0.98


def test_no_images_have_no_proportion() -> None:
    assert np.isnan(proportion_interval(np.zeros(0, dtype=bool))).all()
    assert np.isnan(paired_proportion_interval(np.zeros(0, bool), np.zeros(0, bool))).all()


@pytest.mark.parametrize("count", SIZES)
def test_the_interval_of_a_paired_difference_covers_every_pair_of_fractions(count: int) -> None:
    """Exactly, over all tables of discordant pairs and a grid of their probabilities, the edges among them."""
    from scipy.special import gammaln

    tables = [(up, down) for up in range(count + 1) for down in range(count + 1 - up)]
    ends = np.array(
        [
            paired_proportion_interval(
                np.arange(count) < up, (np.arange(count) >= up) & (np.arange(count) < up + down)
            )[1:]
            for up, down in tables
        ]
    )
    up, down = np.array(tables).T
    ways = gammaln(count + 1) - gammaln(up + 1) - gammaln(down + 1) - gammaln(count - up - down + 1)
    shares = np.array([0, 0.005, 0.02, *np.linspace(0.05, 1, 20)])
    for first in shares:
        for second in shares[shares <= 1 - first + 1e-9]:
            rest = max(0.0, 1 - first - second)
            law = np.exp(ways) * first**up * second**down * rest ** (count - up - down)
            apart = first - second
            covered = law[(ends[:, 0] <= apart + 1e-9) & (apart - 1e-9 <= ends[:, 1])].sum()
            assert covered >= COVERAGE, (first, second)


def test_a_paired_difference_of_few_images_has_no_interval() -> None:
    difference, low, high = paired_proportion_interval(np.ones(4, bool), np.zeros(4, bool))
    assert difference == 1
    assert np.isnan([low, high]).all()


LAWS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, shape: rng.normal(size=shape), 0.0),
    "uniform": (lambda rng, shape: rng.random(shape), 0.5),
    "exponential": (lambda rng, shape: rng.exponential(size=shape), 1.0),
    "lognormal": (lambda rng, shape: rng.lognormal(size=shape), float(np.exp(0.5))),
    "skewed to the left": (lambda rng, shape: -rng.lognormal(size=shape), -float(np.exp(0.5))),
    "t with 3 degrees": (lambda rng, shape: rng.standard_t(3, size=shape), 0.0),
    "t with 2 degrees": (lambda rng, shape: rng.standard_t(2, size=shape), 0.0),
    "Pareto, 3": (lambda rng, shape: rng.pareto(3, shape), 0.5),
    "mostly zero": (lambda rng, shape: rng.exponential(size=shape) * (rng.random(shape) < 0.2), 0.2),
    "yes and no": (lambda rng, shape: (rng.random(shape) < 0.1).astype(float), 0.1),
    "rare yes": (lambda rng, shape: (rng.random(shape) < 0.02).astype(float), 0.02),
    "paired yes and no": (
        lambda rng, shape: (rng.random(shape) < 0.3).astype(float) - (rng.random(shape) < 0.1),
        0.2,
    ),
    "region against five others": (
        lambda rng, shape: (rng.random(shape) < 0.3) - rng.binomial(5, 0.3, shape) / 5,
        0.0,
    ),
}


# Every law at the least number of images that has an interval, and at one other number.
@pytest.mark.parametrize(
    ("name", "count"),
    [*((name, 20) for name in LAWS), *zip(LAWS, cycle([50, 5, 10]))],
)
def test_the_interval_of_a_mean_covers_or_is_not_given(
    name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weakspot.statistics.intervals.RESAMPLES", 2000)
    draw, mean = LAWS[name]
    drawn = draw(np.random.default_rng(1), (count, 2000))
    means, low, high = mean_intervals(drawn).T
    np.testing.assert_allclose(means, drawn.mean(0), atol=1e-12)
    given = np.isfinite(low)
    assert (given == np.isfinite(high)).all()
    if "yes" not in name and "five others" not in name:
        assert not given.any() if count < 20 else given.mean() > 0.3
    missed = given & ~((low <= mean) & (mean <= high))
    assert missed.mean() <= 1 - COVERAGE + 0.006  # 2,000 draws: .006 is their standard error


RATES: dict[str, tuple[Draw, float]] = {
    "even": (lambda rng, shape: rng.random(shape), 0.5),
    "all or nothing": (lambda rng, shape: rng.beta(0.2, 0.2, shape), 0.5),
    "mostly none": (lambda rng, shape: rng.random(shape) * (rng.random(shape) < 0.1), 0.05),
    "rare": (lambda rng, shape: rng.beta(0.05, 2, shape), 0.05 / 2.05),
    "of three networks": (lambda rng, shape: rng.binomial(3, 0.9, shape) / 3, 0.9),
}


@pytest.mark.parametrize("count", [1, *SIZES])
@pytest.mark.parametrize("name", RATES)
def test_the_interval_of_a_rate_covers(name: str, count: int) -> None:
    draw, mean = RATES[name]
    drawn = draw(np.random.default_rng(2), (count, 1000))
    ends = np.array([rate_interval(column)[1:] for column in drawn.T])
    assert ((ends[:, 0] <= mean) & (mean <= ends[:, 1])).mean() >= COVERAGE


def test_a_single_outlier_is_no_spread() -> None:
    """Nineteen equal values and another: what the mean of many would be is not known."""
    values = np.array([0.0] * 19 + [7.0])
    assert np.isnan(mean_interval(values)[1:]).all()
    assert np.isfinite(mean_interval(np.concatenate([values, np.arange(5.0)]))).all()


def test_a_tables_intervals_are_those_of_its_columns_and_leave_out_what_is_missing() -> None:
    rng = np.random.default_rng(0)
    table = np.full((150, 6), np.nan)
    table[:, 0] = rng.normal(size=150)
    table[:120, 1] = rng.exponential(size=120)
    table[:, 2] = rng.integers(0, 2, 150)
    table[:1, 3], table[:, 4] = 2.0, 5.0
    found = mean_intervals(table)
    for place in (0, 1, 2):
        alone = np.array(mean_interval(table[:, place][np.isfinite(table[:, place])]))
        np.testing.assert_allclose(found[place], alone, atol=0.05 * (alone[2] - alone[1]))
    assert found[3:5, 0].tolist() == [2.0, 5.0]
    assert np.isnan(found[3:5, 1:]).all()
    assert np.isnan(found[5]).all()
    assert mean_intervals(np.empty((0, 2))).shape == (2, 3)


def test_an_interval_does_not_depend_on_the_scale() -> None:
    values = np.random.default_rng(0).lognormal(size=30)
    small = np.array(mean_interval(values)) * 1e-9
    np.testing.assert_allclose(mean_interval(values * 1e-9), small)


def test_for_many_images_the_interval_is_students() -> None:
    values = np.random.default_rng(2).exponential(size=4000)
    half = 1.96 * values.std(ddof=1) / 4000**0.5
    np.testing.assert_allclose(
        mean_interval(values)[1:], [values.mean() - half, values.mean() + half], rtol=1e-3
    )
    below = values[:1990]
    half = 1.96 * below.std(ddof=1) / 1990**0.5
    np.testing.assert_allclose(
        mean_interval(below)[1:], [below.mean() - half, below.mean() + half], rtol=0.02
    )


def test_an_infinite_value_has_no_part_in_a_mean() -> None:
    values = np.random.default_rng(0).normal(size=59)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (interval,) = mean_intervals(np.append(values, np.inf)[:, None])
    np.testing.assert_allclose(interval, mean_intervals(np.append(values, np.nan)[:, None])[0])
    assert np.isfinite(interval).all()
