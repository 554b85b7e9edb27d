"""P values over images: paired proportions, means, regions against other images' regions, many tests at once."""

import numpy as np
from numpy.typing import NDArray

from weakspot._random import numpy_generator
from weakspot.statistics.intervals import (
    BOOTSTRAP_TAIL,
    LEAST_IMAGES,
    LEAST_VARIED,
    LEVEL,
    MANY,
    ROUNDING,
    _bootstrap_t,
    _moments,
)

PERMUTATIONS = 9999


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_], *, alternative: str = "two-sided") -> float:
    """McNemar's exact test (1947, doi 10.1007/BF02295996) of two proportions on the same images.

    Args:
        first: (images,) bool.
        second: (images,) bool, of the same images.
        alternative: "two-sided", or "greater": first holds more often than second.

    Returns:
        p; 1 if first and second agree on every image.

    >>> mcnemar(np.array([True] * 5 + [False]), np.array([False] * 6))
    0.0625
    """
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    return mcnemar_counts(int((first & ~second).sum()), int((second & ~first).sum()), alternative=alternative)


def mcnemar_counts(only_first: int, only_second: int, *, alternative: str = "two-sided") -> float:
    """`mcnemar` from the number of images where only the first is true and where only the second is true.

    >>> mcnemar_counts(6, 1, alternative="greater")
    0.0625
    """
    from scipy.stats import binomtest

    apart = only_first + only_second
    return float(binomtest(only_first, apart, alternative=alternative).pvalue) if apart else 1.0


def mean_test(differences: NDArray[np.floating], seed: int = 0) -> float:
    """The two-sided p value of paired differences whose mean is zero.

    For differences of -1, 0 and 1 it is McNemar's; for others it matches `mean_interval`, which excludes zero exactly
    if p is below .05. A sign-flip test is not used: on skewed differences it rejects 10 to 16% at .05.

    Args:
        differences: (images,); NaN is ignored.
        seed: of the bootstrap.

    Returns:
        p; NaN if `mean_interval` gives no interval.
    """
    from scipy.stats import t

    values = np.asarray(differences, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return np.nan
    distinct, counts = np.unique(values, return_counts=True)
    if np.isin(distinct, (-1, 0, 1)).all():
        return mcnemar(values == 1, values == -1)
    if len(values) < LEAST_IMAGES or len(values) - counts.max() < LEAST_VARIED:
        return np.nan
    (mean,), (error,), (count,) = _moments(values[:, None])
    observed = mean / error
    student = float(2 * t.sf(abs(observed), count - 1))
    if count > MANY:
        return student
    drawn = _bootstrap_t(values[:, None], seed)[:, 0]
    slack = ROUNDING * abs(observed)
    tails = (drawn >= observed - slack).sum(), (drawn <= observed + slack).sum()
    # Scaled so that p = .05 where the statistic reaches the bounds at BOOTSTRAP_TAIL.
    bootstrap = (1 + int(min(tails))) / (1 + len(drawn)) * (1 - LEVEL) / BOOTSTRAP_TAIL
    return max(student, min(1.0, bootstrap))


def region_test(own: NDArray[np.floating], others: NDArray[np.floating], *, seed: int = 0) -> float:
    """The two-sided p value of outcomes in a region against outcomes in regions made for other images.

    Under the null hypothesis, each of an image's K + 1 outcomes is equally likely to be the one of its own region. For
    outcomes of 0 and 1 the distribution of the sum is known (Poisson-binomial) and p is exact, as mid-p (Lancaster
    1961, doi 10.1080/01621459.1961.10482105); for other outcomes it is sampled.

    Args:
        own: (images,) outcomes in the image's own region: 1 and 0, or any measure.
        others: (images, K) outcomes of the same image in other images' regions; NaN if there is none.
        seed: of the samples.

    Returns:
        p; NaN if no image has an own and another outcome.

    >>> region_test(np.ones(3), np.zeros((3, 1)))
    0.125
    """
    outcomes = np.column_stack([own, others]).astype(np.float64)
    outcomes = outcomes[np.isfinite(outcomes[:, 0]) & np.isfinite(outcomes[:, 1:]).any(1)]
    if not len(outcomes):
        return np.nan
    finite = np.isfinite(outcomes)
    if np.isin(outcomes[finite], (0, 1)).all():
        return _poisson_binomial_p(outcomes, finite)
    filled = np.where(finite, outcomes, 0.0)
    # Centering moves the observed sum and every sampled one alike: p is the same, and sums stay small.
    centered = np.where(finite, filled - filled.sum(1, keepdims=True) / finite.sum(1, keepdims=True), 0.0)
    # Finite outcomes first, so that an index below their number selects one of them.
    packed = np.take_along_axis(centered, np.argsort(~finite, axis=1, kind="stable"), axis=1)
    rng = numpy_generator(seed)
    observed = centered[:, 0].sum()
    sums = np.zeros(PERMUTATIONS)
    for row, count in zip(packed, finite.sum(1), strict=True):
        # In every sample, one of the image's outcomes is drawn as that of its own region.
        sums += row[rng.integers(0, count, PERMUTATIONS)]
    slack = ROUNDING * np.abs(centered).sum()
    tails = (sums >= observed - slack).sum(), (sums <= observed + slack).sum()
    return min(1.0, 2 * (1 + int(min(tails))) / (1 + PERMUTATIONS))


def _poisson_binomial_p(outcomes: NDArray[np.float64], finite: NDArray[np.bool_]) -> float:
    """Two-sided mid-p of the sum of own outcomes, each drawn from its image's outcomes with equal probability."""
    from scipy.stats import binom

    chances = np.nansum(outcomes, 1) / finite.sum(1)
    law = np.ones(1)  # distribution of the sum: one binomial per distinct probability, convolved
    for chance, images in zip(*np.unique(chances, return_counts=True), strict=True):
        law = np.convolve(law, binom.pmf(np.arange(images + 1), images, chance))
    observed = int(outcomes[:, 0].sum())
    # Mid-p: the observed sum itself counts half in each tail.
    tie = law[observed] / 2
    return float(min(1.0, 2 * min(law[observed + 1 :].sum() + tie, law[:observed].sum() + tie)))


def false_discovery(p: NDArray[np.floating]) -> NDArray[np.float64]:
    """P values adjusted so that rejecting below a level bounds the fraction of false discoveries by that level.

    Benjamini and Hochberg 1995, doi 10.1111/j.2517-6161.1995.tb02031.x. NaN stays NaN and does not count.

    >>> false_discovery(np.array([0.01, np.nan, 0.04, 0.03])).round(3).tolist()
    [0.03, nan, 0.04, 0.04]
    """
    p = np.asarray(p, dtype=np.float64)
    adjusted = np.full(len(p), np.nan)
    finite = np.isfinite(p)
    if finite.any():
        from scipy.stats import false_discovery_control  # takes .8 s to import

        adjusted[finite] = false_discovery_control(p[finite])
    return adjusted
