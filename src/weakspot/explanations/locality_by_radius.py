"""Locality by radius: how often a moved pixel still fools, compared with random sites and failed attacks.

After Vargas and Su 2019 (arXiv 1902.02947). The rings, the intervals and the control by failed attacks are ours. The
table is made from scores per image, so an explanation and a whole audit use the same code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from weakspot.statistics import mean_interval, rate_interval
from weakspot.statistics.number_format import counted, with_interval

if TYPE_CHECKING:
    import pandas as pd

RADII = (1, 2, 3, 4, 6, 8)  # Chebyshev rings around the attack's pixel
RANDOM = "fools_at_random_site"
FEWEST = 20  # images for the interval of a difference of means
LEVEL = 0.025  # one-sided
RATES = ("rate", "low", "high")


def ring_score(radius: int) -> str:
    """The name of the score that holds an image's rate in one ring."""
    return f"fools_at_radius_{radius}"


MEANINGS = {
    **{
        ring_score(
            radius
        ): f"Fraction of the sites {counted(radius, 'pixel')} away where the attack's pixel value "
        "changes the class from the label."
        for radius in RADII
    },
    RANDOM: "The same for all other sites of the image.",
}


def locality_table(
    scores: pd.DataFrame, fooled: NDArray[np.bool_], failed: NDArray[np.bool_]
) -> pd.DataFrame:
    """How often the moved pixel fools the model, by its distance from where the attack put it.

    Args:
        scores: one row per image with the columns of `MEANINGS`; rows without them are left out.
        fooled: (images,) whether the attack changed a correct class.
        failed: (images,) whether the attack left a correct class as it was.

    Returns:
        One row per radius, and one of all other sites with radius "random site": radius; images, rate, low, high (of
        attacks that fooled the model); excess, excess_low, excess_high (mean over images of the rate minus the image's
        own rate at random sites, with an interval from 20 images on); p (of a one-sided paired t test that the rate is
        larger); failed_images, failed_rate, failed_low, failed_high (of attacks that failed, whose pixel is moved in
        the same way).
    """
    import pandas as pd

    moved = scores[[*MEANINGS]].notna().any(axis=1).to_numpy()
    random = scores[RANDOM].to_numpy(float)
    rows = []
    for name, column in [*((radius, ring_score(radius)) for radius in RADII), ("random site", RANDOM)]:
        values = scores[column].to_numpy(float)
        usable = moved & np.isfinite(values)
        row: dict[str, object] = {"radius": name, "images": int((usable & fooled).sum())}
        row |= dict(zip(RATES, rate_interval(values[usable & fooled]), strict=True))
        # Each image is its own control: rate in the ring minus rate at random sites of the same image.
        difference = (values - random)[usable & fooled]
        mean, low, high = mean_interval(difference)
        if np.isnan(low):
            # The differences spread too little for t. Map them from [-1, 1] to rates in [0, 1] and back.
            _, low, high = (2 * bound - 1 for bound in rate_interval((difference + 1) / 2))
        if len(difference) < FEWEST:
            low, high = np.nan, np.nan
        # Random sites are the control and have no excess over themselves.
        if column == RANDOM:
            mean, low, high = (np.nan,) * 3
        row |= {"excess": mean, "excess_low": low, "excess_high": high, "p": _greater_p(difference)}
        row["failed_images"] = int((usable & failed).sum())
        failed_rates = rate_interval(values[usable & failed])
        rows.append(row | {f"failed_{part}": value for part, value in zip(RATES, failed_rates, strict=True)})
    return pd.DataFrame(rows)


def locality_of(scores: pd.DataFrame, images: NDArray[np.int_]) -> pd.DataFrame | None:
    """The table for the scores of an explanation; None if no pair differs in exactly one pixel.

    Args:
        scores: one row per pair.
        images: (pairs,) the number of each pair's clean image (`first_copies`). Pairs of one image are no independent
            observations, so their rates are averaged before images are counted.
    """
    if RANDOM not in scores:
        return None
    correct, fooled = scores["margin_clean"] > 0, scores["margin_adversarial"] < 0
    means = scores[[*MEANINGS]].groupby([images, correct, fooled], sort=False).mean()
    kept, changed = (means.index.get_level_values(level).to_numpy(bool) for level in (1, 2))
    return locality_table(means, kept & changed, kept & ~changed)


def locality_sentence(table: pd.DataFrame) -> str:
    """Whether neighboring sites share the weakness: claimed only if their excess over random sites is beyond doubt."""
    near, random = table.iloc[0], table.iloc[-1]
    images = int(near["images"])
    if not images:
        return "No image was fooled by one pixel, so there is no successful pixel to move."
    elsewhere = f", and moved to other sites of the image at {_interval(random)}" if random["images"] else ""
    numbers = (
        f"moved to a neighboring site, the pixel of a successful attack ({counted(images)}) still fools the model at "
        f"{_interval(near)} of these sites{elsewhere}"
    )
    if near["failed_images"]:
        numbers += (
            f"; the pixel of a failed attack ({counted(int(near['failed_images']))}) fools it at "
            f"{_interval(near, 'failed_')} of the neighboring sites"
        )
    if not random["images"]:  # an image of a few pixels has no sites beyond the neighboring ones
        return f"{numbers[0].upper()}{numbers[1:]}. There are no other sites to compare with, so no claim is made."
    if images < FEWEST:
        return f"{numbers[0].upper()}{numbers[1:]}. With fewer than {FEWEST} images, no claim is made."
    if near["excess_low"] > 0 and near["p"] <= LEVEL:
        return f"Neighboring sites share the weakness: {numbers}."
    return f"There is not enough evidence that neighboring sites share the weakness: {numbers}."


def _greater_p(differences: NDArray[np.floating]) -> float:
    """One-sided p of a t test; NaN with fewer than 20 images. The test is conservative for right-skewed values."""
    from scipy.stats import ttest_1samp

    # Equal differences have no t; if they are positive, nothing speaks against an excess.
    if len(differences) < FEWEST or np.ptp(differences) == 0:
        return 0.0 if len(differences) >= FEWEST and differences[0] > 0 else np.nan
    return float(ttest_1samp(differences, 0, alternative="greater").pvalue)


def _interval(row: pd.Series, prefix: str = "") -> str:
    rate, low, high = (float(row[f"{prefix}{part}"]) for part in RATES)
    return with_interval(rate, low, high)
