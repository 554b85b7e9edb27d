"""Unit sensitivity: which units does an attack move more than noise of the same size does?

The measure, change over spread, is after Xu et al. 2019 (arXiv 1904.02057). Signed changes cancel over classes, so
absolute changes are averaged. The control, noise of the size of the perturbation, the test against it and its
correction are ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from weakspot import _random
from weakspot._checks import check_count, check_fraction, check_seed, checked_batch_size
from weakspot.attribution.hooks import Place, fused_for, reading, spatial_layers
from weakspot.classifier import Classifier, default_batch, evaluating
from weakspot.explanations.analysis import batches_of, check_pairs, prepare_pairs
from weakspot.images import digests
from weakspot.pairs import Pairs
from weakspot.statistics import false_discovery
from weakspot.statistics.number_format import counted

if TYPE_CHECKING:
    import pandas as pd

PLACEMENTS = 16  # attempts for each draw of noise; the one that retains most of the size is taken
STREAM = 1_000_000  # separates these random streams from those of attacks
ROUNDING = 1e-6
NOISES = 4  # draws of noise for each pair
KEPT = 0.99  # fraction of the perturbation's L2 norm that every draw must retain for the pair to be tested
LEVEL = 0.05  # of the corrected p value


def equal_noise(pairs: Pairs, number: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The clean images with noise that has the L0, L1, L2 and L-infinity size of the perturbation.

    Whole pixels of the perturbation move to random sites and every value gets a random sign, or the other sign if this
    one leaves [0, 1]. Only values above .5 can fail to fit with either sign: they are clipped, and of up to 16
    placements the one that retains most is taken. If a perturbation is itself such noise, it is exchangeable with all
    draws.

    Args:
        pairs: N pairs.
        number: of the draw.
        seed: of the draws.

    Returns:
        (N, C, H, W) the noisy images, and (N,) the fraction of the perturbation's L2 norm that is retained, 1 if
        nothing was clipped.
    """
    clean, change = pairs.clean, pairs.perturbation.abs()
    channels, height, width = clean.shape[1:]
    # Keys of both images: two attacks on one image get different noise.
    keys = _random.keys(torch.cat([clean, pairs.adversarial], 1), seed)
    size = change.flatten(1).norm(dim=1)
    noisy, retained = clean.clone(), torch.full_like(size, -1.0)
    for attempt in range(PLACEMENTS):
        rows = (retained < 1 - ROUNDING).nonzero()[:, 0]
        if not len(rows):
            break
        # Two streams for each attempt at a draw: one orders the sites, the next one draws the signs.
        stream = STREAM + number * 2 * PLACEMENTS + 2 * attempt
        order = _random.uniform(keys[rows], stream, height * width).argsort(dim=1, stable=True)
        flipped = _random.uniform(keys[rows], stream + 1, channels, height, width) < 0.5
        moved = change[rows].flatten(2).gather(2, order[:, None].expand(-1, channels, -1))
        before = clean[rows]
        moved = moved.view_as(before)
        signed = torch.where(flipped, -moved, moved)
        # |x - .5| <= .5 is inside [0, 1]. Use the other sign only if this one does not fit and the other one does.
        fits, other_fits = ((before + sign * signed - 0.5).abs() <= 0.5 + ROUNDING for sign in (1, -1))
        attempted = (before + torch.where(~fits & other_fits, -signed, signed)).clamp(0, 1)
        fraction = (attempted - before).flatten(1).norm(dim=1) / size[rows].where(size[rows] > 0, 1)
        # Of no change nothing can be lost.
        fraction = fraction.where(size[rows] > 0, 1)
        better = fraction > retained[rows]
        noisy[rows[better]], retained[rows[better]] = attempted[better], fraction[better]
    return noisy, retained.clamp(max=1)


def unit_sensitivity(
    model: nn.Module,
    layer: str,
    pairs: Pairs | Iterable[Pairs],
    *,
    noises: int = NOISES,
    seed: int = 0,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """Measure how far an attack moves each unit of a layer, compared with noise of the same size.

    The change of a unit in one pair is the change of its mean activation over all sites. Its sensitivity is the mean
    over pairs of |change|, divided by the standard deviation of the unit over the clean images; changes of opposite
    sign do not cancel. `p` is that of a one-sided paired t test of |change| under the attack against its mean over
    draws of noise (`equal_noise`). It is never below (noises + 1) ** -images, the smallest p of a test that exchanges
    attack and noise. `p_value` is corrected for the number of units (Benjamini and Hochberg 1995, doi
    10.1111/j.2517-6161.1995.tb02031.x).

    Args:
        model: any classifier. It is not changed.
        layer: a module whose output is a map; the units of tokens are their channels.
        pairs: at least two pairs of different images, which p takes as independent; or an iterable of batches of them.
        noises: draws of noise for each pair.
        seed: of the noise.
        batch_size: pairs at once; changes no result.

    Returns:
        One row per unit: unit; change (mean over pairs, signed); excess (change minus the mean signed change under
        noise); spread (standard deviation of the clean activation); sensitivity; noise (the sensitivity to noise); p,
        p_value; direction_p (two-sided p that excess is not zero, corrected); mean_activation; images (pairs tested:
        those whose noise retains 99% of the perturbation's norm, which is all pairs up to an L-infinity size of .5).

    Raises:
        ValueError: if an argument is invalid; the message names it.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    >>> clean = torch.rand(8, 3, 16, 16)
    >>> table = unit_sensitivity(model.eval(), "1", Pairs.of(model, clean, (clean + 0.1).clamp(0, 1)))
    >>> list(table.columns)[:6]
    ['unit', 'change', 'excess', 'spread', 'sensitivity', 'noise']
    """
    import pandas as pd

    check_count("noises", noises)
    check_seed(seed)
    batch_size = checked_batch_size(batch_size)
    if not isinstance(layer, str):
        raise ValueError(f"layer must be the name of one layer, got {layer!r}")
    batches = batches_of(pairs)
    clean, adversarial, noisy, retained = _unit_means(
        model, layer, batches, noises=noises, seed=seed, batch_size=batch_size
    )
    if len(clean) < 2:
        raise ValueError(f"pairs must hold at least two pairs, for a spread, got {len(clean)}")
    change, noise = adversarial - clean, noisy - clean
    finite = np.isfinite(change) & np.isfinite(noise).all(0)
    if not finite.all():
        raise ValueError(
            f"layer {layer!r} must be finite, got NaN or infinity in pair {int((~finite).any(1).argmax())}"
        )
    spread, tested = clean.std(0, ddof=1), retained >= KEPT
    # With m draws of noise per image, the attack is the most extreme of m + 1 with probability 1 / (m + 1) each.
    least = float(noises + 1) ** -int(tested.sum())
    # The attack's |change| minus the mean |change| under noise, image by image.
    p = _paired_p((np.abs(change) - np.abs(noise).mean(0))[tested], "greater", least)
    signed = (change - noise.mean(0))[tested]
    direction = _paired_p(signed, "two-sided", min(1.0, 2 * least))
    return pd.DataFrame(
        {
            "unit": range(change.shape[1]),
            "change": change.mean(0),
            "excess": signed.mean(0) if len(signed) else np.nan,
            "spread": spread,
            "sensitivity": _over_spread(np.abs(change).mean(0), spread),
            "noise": _over_spread(np.abs(noise[:, tested]).mean((0, 1)), spread) if len(signed) else np.nan,
            "p": p,
            "p_value": false_discovery(p),
            "direction_p": false_discovery(direction),
            "mean_activation": clean.mean(0),
            "images": int(tested.sum()),
        }
    )


def sensitivity_sentence(table: pd.DataFrame, level: float = LEVEL) -> str:
    """How many units the attack moves more than noise of the same size does, from `unit_sensitivity`."""
    check_fraction(level, name="level")
    images, units = int(table["images"].iloc[0]), len(table)
    if images < 2:
        return "No unit was tested: noise with values as large as the perturbation's does not fit into the images."
    moved = int((table["p_value"] <= level).sum())
    basis = f"{images} images, {level:.0%} false discoveries"
    if not moved:
        return f"No unit clearly moves more than under noise of the same size ({counted(units, 'unit')}, {basis})."
    median, noise = (float(table[name].median()) for name in ("sensitivity", "noise"))
    medians = f"the median sensitivity is {median:.2g}, and {noise:.2g} under noise"
    if not (np.isfinite(median) and np.isfinite(noise)):
        medians = (
            "the median sensitivity is not defined, because too many units do not vary over the clean images"
        )
    return (
        f"The attack moves {moved} of {counted(units, 'unit')} more than noise of the same size does ({basis}); "
        f"{medians}."
    )


def _paired_p(differences: NDArray[np.floating], alternative: str, least: float) -> NDArray[np.float64]:
    """(U,) p values of a paired t test of (N, U) differences, none below `least`; 1 with fewer than two pairs."""
    from scipy.stats import ttest_1samp

    if len(differences) < 2:
        return np.ones(differences.shape[1])
    mean = differences.mean(0)
    # The same difference in every pair has no t. It is as certain as `least` allows, or nothing if it is zero.
    constant = np.ptp(differences, 0) <= ROUNDING * np.abs(differences).max(0)
    beyond = mean > 0 if alternative == "greater" else mean != 0
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.asarray(ttest_1samp(differences, 0, alternative=alternative).pvalue)
    return np.maximum(np.where(constant, np.where(beyond, 0.0, 1.0), p), least)


def _over_spread(sizes: NDArray[np.floating], spread: NDArray[np.floating]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sizes == 0, 0.0, sizes / spread)


def _unit_means(
    model: nn.Module, layer: str, batches: Iterable[Pairs], *, noises: int, seed: int, batch_size: int | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Mean activation of every unit in clean and adversarial images, (N, U) each, and noisy ones, (draws, N, U).

    The last array, (N,), is the smallest fraction of the perturbation's norm that a draw of noise retained.
    """
    means: list[Tensor] = []
    retained: list[Tensor] = []
    seen: dict[bytes, int] = {}  # the first pair of each image, by the image's content
    with evaluating(model) as classifier:
        for batch in batches:
            check_pairs(batch, model)
            pairs = prepare_pairs(classifier, batch)
            for number, content in enumerate(digests(pairs.clean), len(seen)):
                if seen.setdefault(content, number) != number:
                    raise ValueError(
                        f"pairs must be of different images, got one image in pairs {seen[content]} and {number} "
                        "(p takes images as independent)"
                    )
            sample = pairs.clean[:1]
            places = spatial_layers(classifier, sample, [layer])
            size = classifier.fixed_batch or batch_size or default_batch(sample)
            draws = [equal_noise(pairs, number, seed) for number in range(noises)]
            versions = [pairs.clean, pairs.adversarial, *(noisy for noisy, _ in draws)]
            with fused_for(classifier, sample, places), torch.no_grad():
                means.append(torch.stack([_means(classifier, places, one, size) for one in versions]))
            retained.append(torch.stack([fraction for _, fraction in draws]).amin(0))
    if not means:
        raise ValueError("pairs must hold at least two pairs, got none")
    clean, adversarial, *noisy = torch.cat(means, 1).double().cpu().numpy()
    return clean, adversarial, np.stack(noisy), torch.cat(retained).double().cpu().numpy()


def _means(classifier: Classifier, places: dict[str, Place], images: Tensor, size: int) -> Tensor:
    """(N, U) mean activation of every unit of the one place."""
    means: list[Tensor] = []
    for part in images.split(size):

        def visit(_name: str, maps: Tensor, count: int = len(part)) -> None:
            means.append(maps[:count].float().mean((2, 3)))

        with reading(classifier, places, visit):
            classifier(classifier.filled(part))
    return torch.cat(means)
