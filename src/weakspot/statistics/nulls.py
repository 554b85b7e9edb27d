"""Null distributions for "the attack acts where the network looks", and the sums over maps that they need.

Attacks and attention both concentrate in the middle of images. Shifting a map against its own image destroys this
common tendency together with the alignment, and so finds "alignment" between unrelated images. Only other images' maps
are a valid null (`other_image_test`, `run_test`); `shift_test` is descriptive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from weakspot._random import numpy_generator
from weakspot.statistics.significance import false_discovery

if TYPE_CHECKING:
    import pandas as pd


ROUNDING = 1e-9


def products_over_shifts(fixed: Tensor, shifted: Tensor) -> Tensor:
    """sum_i fixed_i * shifted_(i - s) for every circular shift s, (N, H, W) like both maps.

    Computed in float64 by Fourier transforms (the cross-correlation theorem).

    >>> products_over_shifts(torch.tensor([[[1.0, 3.0, 2.0]]]), torch.tensor([[[1.0, 0.0, 0.0]]])).round()
    tensor([[[1., 3., 2.]]], dtype=torch.float64)
    """
    # The conjugate turns the convolution into a correlation; shift s is at index s.
    spectra = torch.fft.rfft2(fixed.double()) * torch.fft.rfft2(shifted.double()).conj()
    products: Tensor = torch.fft.irfft2(spectra, s=fixed.shape[-2:])
    return products


def standardized(maps: Tensor) -> Tensor:
    """Maps (N, H, W) with mean 0 and standard deviation 1, float64; a constant map becomes NaN."""
    maps = maps.double()
    centered = maps - maps.mean((1, 2), keepdim=True)
    spread = centered.square().mean((1, 2), keepdim=True).sqrt()
    return centered / torch.where(
        spread > ROUNDING * maps.abs().amax((1, 2), keepdim=True), spread, torch.nan
    )


def ranks(maps: Tensor) -> Tensor:
    """Ranks (N, H, W) of the sites within each map; ties get their mean rank."""
    import pandas as pd

    # pandas ranks columns. The copy makes the transposed result contiguous, as `view_as` needs it.
    ranked = pd.DataFrame(maps.flatten(1).T.cpu().numpy()).rank().to_numpy().T
    return torch.from_numpy(ranked.copy()).to(maps.device).view_as(maps)


def queen_lag(maps: Tensor) -> Tensor:
    """Mean (N, H, W) of the up to eight neighbors of each site."""
    kernel = torch.ones(1, 1, 3, 3, dtype=torch.float64, device=maps.device)
    kernel[..., 1, 1] = 0
    # Zeros beyond the border add nothing to a sum; the sums of ones count the neighbors that exist.
    sums, counts = (
        torch.nn.functional.conv2d(tensor[:, None], kernel, padding=1)[:, 0]
        for tensor in (maps.double(), torch.ones_like(maps[:1], dtype=torch.float64))
    )
    return sums / counts.clamp(min=1)


# Other images for a p value of one image. The smallest two-sided p of a single image with n others is
# 2 / (n + 1): with fewer than 19 it is above .1, the level of a verdict (`agreement.LEVEL`). Several images are
# ranked in one pool and reach less.
LEAST_OTHERS = 19
LEAST_RUN = 10  # images for the p value of a whole run
LEAST_REGION = 40  # images for a verdict on a region or a class
PERMUTATIONS = 9999


@dataclass(frozen=True, repr=False)
class OtherImageTest:
    """A statistic of each attack with its own image's map, compared with other images' maps.

    Every field is (N,) and NaN if the statistic is not defined; all but `value` need 19 other images.

    Attributes:
        value: with the image's own map.
        null: mean over the other images' maps.
        p: two-sided, by the rank among the pooled values of all attacks.
        q: p adjusted for the N images (Benjamini and Hochberg).
        direction: 1 if the value is above `null` and in the upper tail, -1 if below and in the lower tail, else 0.
    """

    value: Tensor
    null: Tensor
    p: Tensor
    q: Tensor
    direction: Tensor

    def __repr__(self) -> str:
        return _summary(self)

    def columns(self, name: str) -> pd.DataFrame:
        """One row per image: name, name_null, name_p, name_q."""
        import pandas as pd

        fields = {"": self.value, "_null": self.null, "_p": self.p, "_q": self.q}
        return pd.DataFrame({f"{name}{suffix}": values.cpu().numpy() for suffix, values in fields.items()})


def other_image_test(matrix: Tensor) -> OtherImageTest:
    """Test each image's own value against the values with other images' maps.

    Values are standardized per attack to pool them over attacks: each value with another image's map by the mean and
    standard deviation of the attack's remaining ones, the own value by those of all of them. p ranks the own value in
    this pool.

    Args:
        matrix: (N, N + R), the statistic of attack j and map i: the own value at [j, j], values with the other images
            of the batch in the first N columns, values with reference images in the last R. NaN if not defined.
    """
    values = matrix.detach().double().cpu().numpy()
    count = len(values)
    own = values.diagonal().copy()
    others = values.copy()
    # Without the own values, row j holds what attack j has with other images' maps.
    np.fill_diagonal(others, np.nan)
    others[np.isnan(own)] = np.nan  # an attack without an own value does not contribute to the pool
    enough = np.isfinite(others).sum(1) >= LEAST_OTHERS
    null, p, tail = np.full(count, np.nan), np.full(count, np.nan), np.zeros(count)
    if enough.any():
        pool, scores = _standardized(np.where(enough[:, None], others, np.nan), own)
        null[enough] = np.nanmean(others[enough], axis=1)
        p[enough], tail[enough] = _pooled_rank(pool, scores[enough])
    # In a skewed pool a score can be above the mean and in the lower tail; it then has no direction.
    tail[tail != np.sign(np.nan_to_num(own - null))] = 0
    fields = (own, null, p, false_discovery(p), tail)
    return OtherImageTest(*(torch.from_numpy(field).to(matrix.device) for field in fields))


def _standardized(others: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standardized values of other images' maps (leave-one-out within the row), and of the own maps."""
    known = np.isfinite(others)
    number = known.sum(1, keepdims=True).astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.nansum(others, 1, keepdims=True) / number
        centered = others - mean
        squares = np.nansum(centered**2, 1, keepdims=True)
        scale = np.abs(np.where(known, others, 0)).max(1, keepdims=True)
        flat = squares <= (ROUNDING * scale) ** 2 * number  # all other maps have the same value
        # Leave one out: without x, the mean moves by -x / (n - 1), the sum of squares by -x^2 n / (n - 1).
        moved = centered * number / (number - 1)
        rest = np.maximum(squares - centered**2 * number / (number - 1), 0) / (number - 2)
        pool = np.where(flat, 0.0, moved / np.sqrt(rest))
        apart = own[:, None] - mean
        # If all other maps agree, an own value beside them is infinitely far from them.
        sign = np.where(np.abs(apart) <= ROUNDING * scale, 0.0, np.sign(apart) * np.inf)
        scores = np.where(flat, sign, apart / np.sqrt(squares / (number - 1)))
    return pool[known], scores[:, 0]


def _pooled_rank(pool: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two-sided p of every score in the pool and itself, and its tail: 1 upper, -1 lower, 0 neither."""
    ordered = np.sort(pool)
    slack = ROUNDING * np.abs(scores)
    slack[np.isinf(scores)] = 0.0
    # Values that differ by rounding count as ties in both tails: p can become larger, never smaller.
    above = len(ordered) - np.searchsorted(ordered, scores - slack, "left")
    below = np.searchsorted(ordered, scores + slack, "right")
    # The own score is one of the values that it is ranked among (+ 1), so p is never 0.
    p = np.minimum(1.0, 2 * (1 + np.minimum(above, below)) / (1 + len(ordered)))
    return p, np.sign(below - above)


@dataclass(frozen=True)
class RunTest:
    """Whether, on average over a run, attacks align with their own images' maps.

    Attributes:
        images: number of images with a statistic.
        value: mean of the statistic with the own map; NaN without images.
        null: mean over all assignments of maps to images.
        p: two-sided, by permuting the maps among the images; NaN with fewer than 10 images.
    """

    images: int
    value: float
    null: float
    p: float


def run_test(matrix: Tensor, *, seed: int = 0) -> RunTest:
    """Test whether attacks align with their own images' maps, by permuting the maps among the images.

    Args:
        matrix: (N, N), the statistic of attack j and map i; images whose own value is NaN are ignored.
        seed: of 9,999 permutations.
    """
    values = matrix.detach().double().cpu().numpy()
    defined = np.isfinite(values.diagonal())
    values = values[np.ix_(defined, defined)]
    count = len(values)
    if not count:
        return RunTest(0, np.nan, np.nan, np.nan)
    # An undefined value counts as the mean of its attack, which draws permutations neither up nor down.
    values = np.where(np.isfinite(values), values, np.nanmean(values, 1, keepdims=True))
    value, null = float(values.diagonal().mean()), float(values.mean())
    if count < LEAST_RUN:
        return RunTest(count, value, null, np.nan)
    rng = numpy_generator(seed)
    rows = np.arange(count)
    drawn = np.array([values[rows, rng.permutation(count)].mean() for _ in range(PERMUTATIONS)])
    slack = ROUNDING * np.abs(values).max()
    tails = (drawn >= value - slack).sum(), (drawn <= value + slack).sum()
    # The observed assignment is one of the permutations (+ 1).
    p = min(1.0, 2 * (1 + int(min(tails))) / (1 + PERMUTATIONS))
    return RunTest(count, value, null, p)


@dataclass(frozen=True, repr=False)
class ShiftTest:
    """A statistic of two maps, compared with its values for every circular shift of one of them.

    All H * W shifts are used, so nothing is sampled. If every shift were equally likely, p <= a would have probability
    at most a. It is not if both maps favor the middle of the image, so a low p does not show that the two maps belong
    together (see `other_image_test`). Every field is (N,) and NaN if not defined.

    Attributes:
        value: without a shift.
        null: mean over all shifts.
        p: two-sided.
    """

    value: Tensor
    null: Tensor
    p: Tensor

    def __repr__(self) -> str:
        return _summary(self)

    def columns(self, name: str) -> pd.DataFrame:
        """One row per image: name_shift_null, name_shift_p."""
        import pandas as pd

        fields = {"_shift_null": self.null, "_shift_p": self.p}
        return pd.DataFrame({f"{name}{suffix}": values.cpu().numpy() for suffix, values in fields.items()})


def shift_test(over_shifts: Tensor) -> ShiftTest:
    """Compare a statistic (N, H, W) at every shift with its value without a shift, at [:, 0, 0]."""
    values = over_shifts.flatten(1)
    observed = values[:, :1]
    slack = ROUNDING * values.abs().amax(1, keepdim=True)
    undefined = values.isnan().any(1)
    # The observed value is itself one of the shifts, so p is never 0.
    above = (values >= observed - slack).double().mean(1)
    below = (values <= observed + slack).double().mean(1)
    p = (2 * torch.minimum(above, below)).clamp(max=1).to(values.dtype)
    return ShiftTest(value=observed[:, 0], null=values.mean(1), p=torch.where(undefined, torch.nan, p))


def _summary(test: OtherImageTest | ShiftTest) -> str:
    below = int((test.p <= 0.05).sum())
    value, null = (float(field.nanmean()) for field in (test.value, test.null))
    return f"{type(test).__name__}({len(test.value)} images: mean {value:.3g}, null {null:.3g}, p <= .05 for {below})"
