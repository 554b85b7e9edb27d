"""Locality by radius: how often a moved pixel still fools, beside random sites of the image and failed attacks.

After Vargas and Su 2019 (arXiv 1902.02947); rings, intervals and the control by failed attacks are ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from weakspot.statistics import mean_interval, rate_interval

if TYPE_CHECKING:
    import pandas as pd


RADII = (1, 2, 3, 4, 6, 8)  # Chebyshev rings around the attack's pixel
RANDOM = "fools_at_random_site"
FEWEST = 20  # images, for the interval of a difference of means
LEVEL = 0.025  # one-sided
RATES = ("rate", "low", "high")


def ring_score(radius: int) -> str:
    """The score that holds an image's rate in one ring."""
    return f"fools_at_radius_{radius}"


MEANINGS = {
    **{
        ring_score(
            radius
        ): f"Share of the sites {radius} pixel{'s' if radius > 1 else ''} away where the attack's "
        "pixel value changes the class from the label."
        for radius in RADII
    },
    RANDOM: "The same of all other sites of the image.",
}


def locality_table(
    scores: pd.DataFrame, fooled: NDArray[np.bool_], failed: NDArray[np.bool_]
) -> pd.DataFrame:
    """How often the moved pixel fools, by its distance from where the attack put it.

    Args:
        scores: one row per image with the columns of `MEANINGS`; rows without them are left out.
        fooled: (images,) whether the attack changed a correct class.
        failed: (images,) whether it left a correct class as it was.

    Returns:
        One row per radius and one, "random site", of all other sites: radius; images, rate, low, high (of attacks that
        fooled); excess, excess_low, excess_high (mean over images of the rate less the image's own rate at random
        sites; an interval from 20 images up); p (of a one-sided paired t test that the rate is larger); failed_images,
        failed_rate, failed_low, failed_high (of attacks that failed, whose pixel is moved in the same way).
    """
    import pandas as pd

    known = scores[[*MEANINGS]].notna().any(axis=1).to_numpy()
    random = scores[RANDOM].to_numpy(float)
    rows = []
    for name, column in [*((radius, ring_score(radius)) for radius in RADII), ("random site", RANDOM)]:
        values = scores[column].to_numpy(float)
        there = known & np.isfinite(values)
        row: dict[str, object] = {"radius": name, "images": int((there & fooled).sum())}
        row |= dict(zip(RATES, rate_interval(values[there & fooled]), strict=True))
        difference = (values - random)[there & fooled]
        mean, low, high = mean_interval(difference)
        if np.isnan(low):  # the images differ in nothing, which says more than that nothing is known
            _, low, high = (2 * bound - 1 for bound in rate_interval((difference + 1) / 2))
        if len(difference) < FEWEST:
            low, high = np.nan, np.nan
        if column == RANDOM:
            mean, low, high = (np.nan,) * 3
        row |= {"excess": mean, "excess_low": low, "excess_high": high, "p": _greater_p(difference)}
        row["failed_images"] = int((there & failed).sum())
        found = rate_interval(values[there & failed])
        rows.append(row | {f"failed_{part}": value for part, value in zip(RATES, found, strict=True)})
    return pd.DataFrame(rows)


def locality_of(scores: pd.DataFrame) -> pd.DataFrame | None:
    """The table of an explanation's scores; None where no pair differs in exactly one pixel."""
    if RANDOM not in scores:
        return None
    right = (scores["margin_clean"] > 0).to_numpy()
    fooled = (scores["margin_adversarial"] < 0).to_numpy()
    return locality_table(scores, right & fooled, right & ~fooled)


def locality_sentence(table: pd.DataFrame) -> str:
    """Whether neighbors share the weakness: a claim only if their lead over random sites is beyond doubt."""
    near, random = table.iloc[0], table.iloc[-1]
    images = int(near["images"])
    if not images:
        return "No image was fooled by one pixel: there is nothing to move."
    figures = (
        f"moved to the neighboring sites, the pixel that fooled ({_counted(images)}) still fools at {_ranged(near)} of "
        f"them, at other sites of the image at {_ranged(random)}"
    )
    if near["failed_images"]:
        figures += (
            f"; after a failed attack ({_counted(int(near['failed_images']))}) it fools at "
            f"{_ranged(near, 'failed_')} of the neighboring sites"
        )
    if images < FEWEST:
        return f"{figures[0].upper()}{figures[1:]}. Fewer than {FEWEST} images: no claim is made."
    if near["excess_low"] > 0 and near["p"] <= LEVEL:
        return f"Neighboring sites share the weakness: {figures}."
    return f"It is not shown that neighboring sites share the weakness: {figures}."


def _greater_p(differences: NDArray[np.floating]) -> float:
    """NaN of fewer images than an interval needs. Skewed to the right, as rates are, the t test is conservative."""
    from scipy.stats import ttest_1samp

    if len(differences) < FEWEST or np.ptp(differences) == 0:
        return 0.0 if len(differences) >= FEWEST and differences[0] > 0 else np.nan
    return float(ttest_1samp(differences, 0, alternative="greater").pvalue)


def _counted(images: int) -> str:
    return f"{images} image{'' if images == 1 else 's'}"


def _ranged(row: pd.Series, prefix: str = "") -> str:
    rate, low, high = (float(row[f"{prefix}{part}"]) for part in RATES)
    return f"{rate:.0%} [{low:.0%}, {high:.0%}]"
