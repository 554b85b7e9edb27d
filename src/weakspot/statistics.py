"""Statistics: what chance would have given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

ROUNDING = 1e-9
RESAMPLES = 10_000  # of the bootstrap
DRAWS = 10_000_000  # at once: memory does not grow with the number of images
MANY, FEW = 2000, 100  # more values than that with no more distinct ones are counted instead of drawn
NORMAL = 1.959964  # half the width of a normal law's middle 95%
EXACT = 12  # differences of which all signs are tried


@dataclass(frozen=True)
class ShiftTest:
    """A statistic of two maps, beside its values when one is shifted, wrapping around, by every possible amount.

    Shifting keeps each map's own texture and breaks only their alignment. As all H * W shifts are taken, the one
    by zero among them, nothing is drawn and p is exact: were alignment arbitrary, p <= a would happen with
    probability at most a. Every field is (N,).

    Attributes:
        value: as observed.
        null: mean over all shifts.
        low: 2.5% quantile over all shifts.
        high: 97.5% quantile over all shifts.
        p: share of shifts with a value at least as large.
        p_less: share of shifts with a value at most as large.
    """

    value: Tensor
    null: Tensor
    low: Tensor
    high: Tensor
    p: Tensor
    p_less: Tensor

    def columns(self, name: str) -> pd.DataFrame:
        """One row per image: name, name_null, name_null_low, name_null_high, name_p."""
        import pandas as pd

        fields = {
            "": self.value,
            "_null": self.null,
            "_null_low": self.low,
            "_null_high": self.high,
            "_p": self.p,
        }
        return pd.DataFrame({f"{name}{suffix}": values.cpu().numpy() for suffix, values in fields.items()})


def shift_test(over_shifts: Tensor) -> ShiftTest:
    """The test of a statistic (N, H, W) known at every shift, [:, 0, 0] being the one observed.

    Where the statistic is not defined (NaN), so is all of its test.
    """
    values = over_shifts.flatten(1)
    observed = values[:, :1]
    slack = ROUNDING * values.abs().amax(1, keepdim=True)
    undefined = values.isnan().any(1)
    quantiles = np.quantile(values.cpu().numpy(), [0.025, 0.975], axis=1)
    low, high = torch.from_numpy(quantiles).to(values).unbind(0)

    def share(counted: Tensor) -> Tensor:
        return torch.where(undefined, torch.nan, counted.double().mean(1).to(values.dtype))

    return ShiftTest(
        value=observed[:, 0],
        null=values.mean(1),
        low=low,
        high=high,
        p=share(values >= observed - slack),
        p_less=share(values <= observed + slack),
    )


def mean_interval(values: NDArray[np.floating], seed: int = 0) -> tuple[float, float, float]:
    """The mean and its 95% interval by the percentile bootstrap over images; of one value, or none, no interval.

    Beyond `MANY` images the normal interval is taken, which the bootstrap's has become.

    >>> mean_interval(np.array([0.0, 1.0, 1.0, 0.0]))
    (0.5, 0.0, 1.0)
    """
    if len(values) == 0:
        return np.nan, np.nan, np.nan
    if len(values) == 1:
        return float(values[0]), np.nan, np.nan
    rng = np.random.default_rng(seed)
    distinct, counts = np.unique(values, return_counts=True)
    if len(values) > MANY and len(distinct) <= FEW:
        # The same distribution in a thousandth of the time: how often each distinct value comes up is multinomial.
        means = rng.multinomial(len(values), counts / len(values), RESAMPLES) @ distinct / len(values)
    elif len(values) > MANY:
        half = NORMAL * float(values.std(ddof=1)) / len(values) ** 0.5
        return float(values.mean()), float(values.mean()) - half, float(values.mean()) + half
    else:
        rows = max(1, DRAWS // len(values))
        means = np.concatenate(
            [
                values[rng.integers(0, len(values), (min(rows, RESAMPLES - start), len(values)))].mean(1)
                for start in range(0, RESAMPLES, rows)
            ]
        )
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def mean_intervals(values: NDArray[np.floating], seed: int = 0) -> NDArray[np.float64]:
    """(columns, 3) mean, low and high of every column of (images, columns): `mean_interval` for a whole table.

    All columns share their resamples, which makes a table cost hardly more than a column. Missing values (NaN) are
    left out of their column.

    >>> mean_intervals(np.array([[0.0, 2.0], [1.0, np.nan], [1.0, 2.0], [0.0, 2.0]])).tolist()
    [[0.5, 0.0, 1.0], [2.0, 2.0, 2.0]]
    """
    count, columns = values.shape
    known = np.isfinite(values)
    held = np.where(known, values, 0.0).astype(np.float64)
    counts = known.sum(0)
    some = np.maximum(counts, 1)
    means = held.sum(0) / some
    if count > MANY:
        spread = np.sqrt((np.where(known, held - means, 0) ** 2).sum(0) / np.maximum(counts - 1, 1) / some)
        bounds = np.stack([means - NORMAL * spread, means + NORMAL * spread])
    else:
        drawn = np.zeros((RESAMPLES, columns))
        rng = np.random.default_rng(seed)
        rows = max(1, DRAWS // max(count, 1))
        for start in range(0, RESAMPLES, rows) if count else ():
            size = min(rows, RESAMPLES - start)
            weights = rng.multinomial(count, np.full(count, 1 / count), size).astype(np.float64)
            with np.errstate(invalid="ignore"):  # a resample may hold none of a column's images
                drawn[start : start + size] = (weights @ held) / (weights @ known)
        drawn[:, counts == 0] = 0.0  # of nothing; what comes of it is not told
        bounds = np.nanquantile(drawn, [0.025, 0.975], axis=0)
    found = np.stack([means, *bounds], 1)
    found[counts == 0] = np.nan
    found[counts == 1, 1:] = np.nan
    return found


def sign_flip_test(differences: NDArray[np.floating], seed: int = 0) -> float:
    """The p value, two-sided, of paired differences (images,) whose signs are a matter of chance.

    Exact where the differences that are not zero have one size, as of yes and no they have (McNemar's exact test), or
    are few; else by 10,000 draws, themselves among them, so that p is never below what could have been seen; of more
    than `MANY` by the normal law. None of them, or none but zeros, gives 1.

    >>> sign_flip_test(np.array([1.0, 1.0, 1.0, 1.0, 1.0, 0.0]))
    0.0625
    """
    from scipy.stats import binom, norm

    sizes = differences[np.isfinite(differences) & (differences != 0)]
    count, observed = len(sizes), abs(sizes.sum())
    if not count:
        return 1.0
    slack = ROUNDING * np.abs(sizes).sum()
    if np.ptp(np.abs(sizes)) <= slack / count:
        # As many signs alike as seen, or more, on either side.
        ups = max(int((sizes > 0).sum()), int((sizes < 0).sum()))
        return float(min(1.0, 2 * binom.sf(ups - 1, count, 0.5)))
    if count <= EXACT:
        signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
        return float((np.abs(signs @ sizes) >= observed - slack).mean())
    if count > MANY:
        return float(2 * norm.sf(observed / np.sqrt((sizes**2).sum())))
    rng = np.random.default_rng(seed)
    reached = 0
    rows = max(1, DRAWS // count)
    for start in range(0, RESAMPLES, rows):
        flips = rng.integers(0, 2, (min(rows, RESAMPLES - start), count), dtype=np.int8) * 2.0 - 1
        reached += int((np.abs(flips @ sizes) >= observed - slack).sum())
    return (reached + 1) / (RESAMPLES + 1)


def share_interval(hits: NDArray[np.bool_]) -> tuple[float, float, float]:
    """The share of hits and its 95% interval (Wilson 1927, doi 10.1080/01621459.1927.10502953).

    Unlike the bootstrap it says how little few cases tell when all of them, or none, are hits.

    >>> tuple(round(bound, 3) for bound in share_interval(np.array([True] * 4)))
    (1.0, 0.51, 1.0)
    """
    count, squared = len(hits), NORMAL**2
    if not count:
        return np.nan, np.nan, np.nan
    share = float(hits.mean())
    centre = (share + squared / (2 * count)) / (1 + squared / count)
    half = (
        squared**0.5 / (1 + squared / count) * (share * (1 - share) / count + squared / (4 * count**2)) ** 0.5
    )
    # The formula's ends are the share itself where all or none are hits, but for rounding.
    return share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def products_over_shifts(fixed: Tensor, shifted: Tensor) -> Tensor:
    """sum_i fixed_i * shifted_(i - s) for every circular shift s: (N, H, W) each, and so is the result.

    One Fourier transform each instead of H * W sums (the cross-correlation theorem); float64.

    >>> products_over_shifts(torch.tensor([[[1.0, 3.0, 2.0]]]), torch.tensor([[[1.0, 0.0, 0.0]]])).round()
    tensor([[[1., 3., 2.]]], dtype=torch.float64)
    """
    spectra = torch.fft.rfft2(fixed.double()) * torch.fft.rfft2(shifted.double()).conj()
    products: Tensor = torch.fft.irfft2(spectra, s=fixed.shape[-2:])
    return products


def standardized(maps: Tensor) -> Tensor:
    """(N, H, W) less their mean over their deviation, float64; a constant map has none and becomes NaN."""
    maps = maps.double()
    centred = maps - maps.mean((1, 2), keepdim=True)
    spread = centred.square().mean((1, 2), keepdim=True).sqrt()
    return centred / torch.where(spread > ROUNDING * maps.abs().amax((1, 2), keepdim=True), spread, torch.nan)


def ranks(maps: Tensor) -> Tensor:
    """(N, H, W) ranks of the sites of each map, ties sharing their mean rank."""
    import pandas as pd

    ranked = pd.DataFrame(maps.flatten(1).T.cpu().numpy()).rank().to_numpy().T
    return torch.from_numpy(ranked.copy()).to(maps.device).view_as(maps)


def queen_lag(maps: Tensor) -> Tensor:
    """(N, H, W) mean of each site's neighbours, diagonal ones included; at the border of those there are."""
    kernel = torch.ones(1, 1, 3, 3, dtype=torch.float64, device=maps.device)
    kernel[..., 1, 1] = 0
    sums, counts = (
        torch.nn.functional.conv2d(tensor[:, None], kernel, padding=1)[:, 0]
        for tensor in (maps.double(), torch.ones_like(maps[:1], dtype=torch.float64))
    )
    return sums / counts.clamp(min=1)


def false_discovery(p: NDArray[np.floating]) -> NDArray[np.float64]:
    """P values corrected for their number so that rejecting below a level keeps that share of false discoveries.

    Benjamini and Hochberg 1995, doi 10.1111/j.2517-6161.1995.tb02031.x.

    >>> false_discovery(np.array([0.01, 0.04, 0.03])).round(3).tolist()
    [0.03, 0.04, 0.04]
    """
    from scipy.stats import false_discovery_control

    return np.asarray(false_discovery_control(p), dtype=np.float64) if len(p) else np.zeros(0)


def mcnemar_greater(only_first: int, only_second: int) -> float:
    """The exact one-sided p value that the first of two paired yes/no outcomes is yes more often than the second.

    Cases where both agree say nothing; each of the others falls to either side with probability one half
    (McNemar 1947, doi 10.1007/BF02295996).

    Args:
        only_first: number of cases where only the first is yes.
        only_second: number of cases where only the second is yes.

    >>> mcnemar_greater(6, 1)
    0.0625
    """
    from scipy.stats import binom

    return float(binom.sf(only_first - 1, only_first + only_second, 0.5))
