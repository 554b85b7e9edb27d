"""95% intervals over images, each with a coverage of at least .92 in tests/statistics/test_intervals.py, or none.

The percentile bootstrap is not used: for a proportion of ten images it covers .62 instead of .95.
"""

import numpy as np
from numpy.typing import NDArray

from weakspot._random import numpy_generator

LEVEL = 0.95
LEAST_IMAGES = 20  # for a mean; with fewer, no interval covers skewed data
LEAST_VARIED = 5  # images that differ from the most common value; with fewer, the spread is not known
LEAST_PAIRS = 5  # for a paired difference of proportions
BOOTSTRAP_TAIL = 0.02  # per side; the coverage for twenty lognormal values is .94, and .93 with .025
RESAMPLES = 10_000  # of the bootstrap
MANY = 2000  # images beyond which the bootstrap interval equals Student's
ROUNDING = 1e-9

Interval = tuple[float, float, float]


def proportion_interval(hits: NDArray[np.bool_]) -> Interval:
    """The proportion of hits and its exact 95% interval (Clopper and Pearson 1934, doi 10.1093/biomet/26.4.404).

    Wilson's interval is shorter by a twelfth, but covers only .83 if hits are rare (1 in 50, ten images).

    Args:
        hits: (images,) bool.

    Returns:
        Proportion, low and high; NaN without images.

    >>> tuple(round(bound, 3) for bound in proportion_interval(np.array([True] * 4)))
    (1.0, 0.398, 1.0)
    """
    return rate_interval(np.asarray(hits, dtype=np.float64))


def rate_interval(rates: NDArray[np.floating]) -> Interval:
    """The mean of rates between 0 and 1 and its 95% interval.

    This is `proportion_interval` with the sum of the rates as the number of hits. Rates vary no more than outcomes of 0
    or 1 with the same mean, so the interval is not too narrow for any number of images.

    Args:
        rates: (images,) from 0 to 1.

    Returns:
        Mean, low and high; NaN without images.

    >>> tuple(round(bound, 3) for bound in rate_interval(np.array([0.5, 0.5, 1.0, 1.0])))
    (0.75, 0.194, 0.994)
    """
    from scipy.special import betaincinv

    count = len(rates)
    if not count:
        return np.nan, np.nan, np.nan
    # Quantiles of the beta distribution are the exact bounds of the binomial, here for a sum that may be fractional.
    total = float(np.sum(rates))
    tail = (1 - LEVEL) / 2
    low = float(betaincinv(total, count - total + 1, tail)) if total > 0 else 0.0
    high = float(betaincinv(total + 1, count - total, 1 - tail)) if total < count else 1.0
    return total / count, low, high


def paired_proportion_interval(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Interval:
    """The difference of two proportions on the same images, first - second, and its 95% interval.

    Adjusted Wald interval of Bonett and Price (2012, doi 10.3102/1076998611411915), with Student's quantile in place
    of the normal one: with the normal one, ten images in which every pair disagrees are covered .89 of the time.

    Args:
        first: (images,) bool.
        second: (images,) bool, of the same images.

    Returns:
        Difference, low and high; NaN for low and high with fewer than 5 images.

    >>> yes, no = np.array([True] * 5), np.array([False] * 5)
    >>> tuple(round(bound, 3) for bound in paired_proportion_interval(yes, no))
    (1.0, -0.02, 1.0)
    """
    from scipy.special import stdtrit

    first, second = np.asarray(first, bool), np.asarray(second, bool)
    count = len(first)
    if not count:
        return np.nan, np.nan, np.nan
    difference = float(first.mean() - second.mean())
    if count < LEAST_PAIRS:
        return difference, np.nan, np.nan
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    # One pair is added to each discordant count, and two to the number of pairs.
    up, down = (only_first + 1) / (count + 2), (only_second + 1) / (count + 2)
    half = stdtrit(count - 1, (1 + LEVEL) / 2) * ((up + down - (up - down) ** 2) / (count + 2)) ** 0.5
    return difference, max(-1.0, float(up - down - half)), min(1.0, float(up - down + half))


def mean_interval(values: NDArray[np.floating], seed: int = 0) -> Interval:
    """The mean and its 95% interval over images: `mean_intervals` of one column.

    >>> mean_interval(np.arange(10.0))
    (4.5, nan, nan)
    """
    mean, low, high = mean_intervals(np.asarray(values, dtype=np.float64)[:, None], seed)[0]
    return float(mean), float(low), float(high)


def fraction_interval(values: NDArray[np.floating], seed: int = 0) -> Interval:
    """`mean_interval` of values between 0 and 1, cut off there."""
    mean, low, high = mean_interval(values, seed)
    # NaN stays NaN.
    return mean, float(np.clip(low, 0, 1)), float(np.clip(high, 0, 1))


def mean_intervals(values: NDArray[np.floating], seed: int = 0) -> NDArray[np.float64]:
    """Mean and 95% interval of every column of a table; missing values (NaN) are ignored.

    A column of 0 and 1 is a proportion and gets `proportion_interval`; a column of -1, 0 and 1 is a difference of two
    proportions and gets `paired_proportion_interval`. Any other column gets the wider of Student's interval and the
    bootstrap-t interval (Efron 1981, doi 10.2307/3314608): the first is correct for heavy tails, the second for skewed
    values. It needs at least 20 values, 5 of which differ from the most common one; with fewer, the interval is NaN.
    No interval covers an extreme so rare that none of the images shows it.

    Args:
        values: (images, columns).
        seed: of the bootstrap. All columns share their resamples.

    Returns:
        (columns, 3): mean, low and high.
    """
    table: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    table = np.where(np.isfinite(table), table, np.nan)  # an infinite value has no part in a mean
    intervals = np.full((table.shape[1], 3), np.nan)
    general = []  # columns that are not proportions
    for number, column in enumerate(table.T):
        values = column[np.isfinite(column)]
        if not len(values):
            continue
        intervals[number, 0] = values.mean()
        distinct, counts = np.unique(values, return_counts=True)
        if len(distinct) > 1 and np.isin(distinct, (0, 1)).all():
            intervals[number] = proportion_interval(values == 1)
        elif len(distinct) > 1 and np.isin(distinct, (-1, 0, 1)).all():
            intervals[number] = paired_proportion_interval(values == 1, values == -1)
        elif len(values) >= LEAST_IMAGES and len(values) - counts.max() >= LEAST_VARIED:
            general.append(number)
    if general:
        low, high = _studentized(table[:, general], seed)
        intervals[general, 1], intervals[general, 2] = low, high
    return intervals


def _studentized(values: NDArray[np.float64], seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Low and high of every column; on each side the farther bound of Student's and the bootstrap-t interval."""
    from scipy.special import stdtrit

    tail = (1 - LEVEL) / 2
    mean, error, count = _moments(values)
    half = stdtrit(count - 1, 1 - tail) * error
    low, high = mean - half, mean + half
    short = count <= MANY
    if short.any():
        drawn = _bootstrap_t(values[:, short], seed)
        upper, lower = np.quantile(drawn, [1 - BOOTSTRAP_TAIL, BOOTSTRAP_TAIL], axis=0)
        # Bootstrap-t exchanges the tails: the upper quantile gives the lower bound.
        # fmin and fmax ignore NaN, which a quantile between two infinite statistics gives.
        low[short] = np.fmin(low[short], mean[short] - upper * error[short])
        high[short] = np.fmax(high[short], mean[short] - lower * error[short])
    return low, high


def _moments(
    values: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Mean, standard error and count of every column."""
    count = np.isfinite(values).sum(0)
    mean = np.nanmean(values, axis=0)
    return mean, np.nanstd(values, axis=0, ddof=1) / np.sqrt(count), count


def _bootstrap_t(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """(resamples, columns) of (mean* - mean) / standard error*, with images drawn with replacement."""
    known = np.isfinite(values)
    # A missing value is 0 after centering, so it adds nothing to any sum.
    centered = np.where(known, values - np.nanmean(values, axis=0), 0.0)
    spread = np.nanstd(values, axis=0)
    rng = numpy_generator(seed)
    images = len(values)
    drawn = np.empty((RESAMPLES, values.shape[1]))
    rows = max(1, 4_000_000 // images)  # at once, so that memory does not grow with the number of images
    for start in range(0, RESAMPLES, rows):
        size = min(rows, RESAMPLES - start)
        # How often each image is drawn: one matrix product then sums over a resample for all columns.
        weights = rng.multinomial(images, np.full(images, 1 / images), size).astype(np.float64)
        counts = np.maximum(weights @ known, 2)  # a resample may hold one or none of a column's images
        shift = weights @ centered / counts
        # The variance is the mean square times n / (n - 1), and that of a mean is the n-th part: the two n cancel.
        error = np.sqrt(np.maximum(weights @ centered**2 / counts - shift**2, 0) / (counts - 1))
        # A resample of equal values has no standard error: its statistic lies beyond all others.
        flat = error <= ROUNDING * spread
        with np.errstate(divide="ignore", invalid="ignore"):
            studentized = np.where(flat, np.where(shift == 0, 0.0, np.sign(shift) * np.inf), shift / error)
        drawn[start : start + size] = studentized
    return drawn
