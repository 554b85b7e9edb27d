"""Agreement: does an attack act where the network looks?

Four statistics compare the vulnerability map of each attack with the importance map of every image. An image's own map
is the diagonal; all other entries say what the statistics are for unrelated images, which
`statistics.other_image_test` and `statistics.run_test` turn into p values.

No single setting decides: the points of the path, the alignment of the class activation and the fraction that counts
as important each change some results. So the test is repeated in eight settings, and a relation is stated only if all
of them agree (`agreed`). The statistics and their tests are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from weakspot import _random
from weakspot.attribution.integrated_gradients import MarginDrop, sampled_drop
from weakspot.classifier import Classifier, check_images
from weakspot.images import first_copies
from weakspot.pairs import Pairs
from weakspot.regions import top
from weakspot.statistics import (
    OtherImageTest,
    ShiftTest,
    false_discovery,
    other_image_test,
    products_over_shifts,
    queen_lag,
    ranks,
    shift_test,
    standardized,
)

if TYPE_CHECKING:
    import pandas as pd

STATISTICS = ("effect_in_roi", "jaccard", "spearman", "moran_i")
REACH = 1 / 50  # of the shorter side: sites within this distance of a changed pixel count as reached
WHOLE = 0.95  # reached fraction of the image from which an attack counts as free to act anywhere
SHIFTED = 8  # images whose shifts are in memory at once
CANCELED = 0.05  # a drop below this fraction of all gains and losses has no location
ARBITRARY = 0.9  # a region is cut at its tie if less than this fraction of it lies above the tie
CHUNK = 64  # maps at once, so that memory does not grow with the square of their number
FRACTIONS = (0.15, 0.3)  # of the image in the region of importance, in the eight settings
LEVEL = 0.1  # the largest p and q, in every setting


def top_region(scores: Tensor, fraction: float) -> Tensor:
    """The top fraction of the sites of scores (N, 1, H, W), without a tie at its edge that fills over a tenth of it."""
    # Ties are broken by position, so a large tie at the edge would put an arbitrary part of it into the region.
    chosen = top(scores, fraction)
    highest_outside = torch.where(chosen, -torch.inf, scores).flatten(1).amax(1).view(-1, 1, 1, 1)
    # Without the sites that tie with the best one left out.
    above = chosen & (scores > highest_outside)
    above_size, size = (region.flatten(1).sum(1).view(-1, 1, 1, 1) for region in (above, chosen))
    return torch.where(above_size < ARBITRARY * size, above, chosen)


def attack_region(vulnerability: Tensor, fraction: float) -> Tensor:
    """The top fraction of the sites of a vulnerability map (N, 1, H, W) that also lost margin."""
    return top_region(vulnerability, fraction) & (vulnerability > 0)


def lost_margin(vulnerability: Tensor) -> Tensor:
    """(N, 1, 1) sums of maps (N, H, W), float64; NaN if no margin was lost or gains and losses cancel.

    Only a margin that was lost has a fraction that was lost in a region.
    """
    total = vulnerability.double().sum((1, 2), keepdim=True)
    moved = vulnerability.double().abs().sum((1, 2), keepdim=True)
    return torch.where((total > 1e-6) & (total > CANCELED * moved), total, torch.nan)


def every_pairing(
    statistics: Callable[[Tensor, Tensor], Mapping[str, Tensor]], first: Tensor, second: Tensor
) -> dict[str, Tensor]:
    """Statistics of every map of one batch with every map of another, computed in blocks.

    Args:
        statistics: maps (n, 1, H, W) and (m, 1, H, W) to a dict of name to (n, m).
        first: (N, 1, H, W).
        second: (M, 1, H, W).

    Returns:
        Name to (N, M).
    """
    rows: list[dict[str, Tensor]] = []
    for some in first.split(CHUNK):
        parts = [statistics(some, others) for others in second.split(CHUNK)]
        rows.append({name: torch.cat([part[name] for part in parts], 1) for name in parts[0]})
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def agreement(importance: Tensor, vulnerability: Tensor, *, fraction: float = 0.2) -> dict[str, Tensor]:
    """The four statistics of every attack with every importance map.

    Args:
        importance: (M, 1, H, W).
        vulnerability: (N, 1, H, W).
        fraction: of the image in the region of importance and in the region of attack.

    Returns:
        Name to (N, M) float64: [j, i] is attack j with importance map i. NaN if undefined, as for maps without
        contrast.
    """

    def block(attacks: Tensor, maps: Tensor) -> dict[str, Tensor]:
        important, vulnerable = maps[:, 0], attacks[:, 0]
        roi = top_region(maps, fraction)[:, 0].double()
        roa = attack_region(attacks, fraction)[:, 0].double()
        looked, worked = standardized(important), standardized(vulnerable)
        blank = _blank(looked, worked)
        # |A and B| for every pair of regions, and |A| + |B| - |A and B|.
        common = _products(roa, roi)
        union = roa.sum((1, 2))[:, None] + roi.sum((1, 2)) - common
        sites = important[0].numel()
        return {
            # lost_margin is (n, 1, 1); its [:, 0] divides row j by what attack j took.
            "effect_in_roi": _products(vulnerable.double(), roi) / lost_margin(vulnerable)[:, 0] + blank,
            "jaccard": common / union + blank,
            # Pearson's correlation is the mean product of standardized maps; of ranks, it is Spearman's.
            "spearman": _products(standardized(ranks(vulnerable)), standardized(ranks(important))) / sites,
            # Bivariate Moran's I: importance with the mean vulnerability of the eight neighbors.
            "moran_i": _products(queen_lag(worked), looked) / sites,
        }

    return every_pairing(block, vulnerability, importance)


def effect_in_roi(importance: Tensor, vulnerability: Tensor, *, fraction: float) -> Tensor:
    """(N, M) the first of the four statistics alone, equal to that of `agreement`."""
    vulnerable = vulnerability[:, 0]
    columns = []
    for maps in importance.split(CHUNK):
        roi = top_region(maps, fraction)[:, 0].double()
        effect = _products(vulnerable.double(), roi) / lost_margin(vulnerable)[:, 0]
        columns.append(effect + _blank(standardized(maps[:, 0]), standardized(vulnerable)))
    return torch.cat(columns, 1)


def shift_tests(important: Tensor, vulnerable: Tensor, roi: Tensor, roa: Tensor) -> dict[str, ShiftTest]:
    """The four statistics of maps (N, H, W) and their regions, tested against every shift of the attack."""
    sites = important[0].numel()
    over_shifts: dict[str, list[Tensor]] = {name: [] for name in STATISTICS}
    for i, v, region_i, region_v in zip(
        *(x.split(SHIFTED) for x in (important, vulnerable, roi, roa)), strict=True
    ):
        common = products_over_shifts(region_i, region_v).round()  # counts, which the Fourier transform blurs
        union = region_i.sum((1, 2), keepdim=True) + region_v.sum((1, 2), keepdim=True) - common
        looked, worked = standardized(i), standardized(v)
        # 0 or NaN: a map without contrast has no top fraction, so no statistic of it is defined.
        blank = 0 * (looked + worked).mean((1, 2), keepdim=True)
        over_shifts["effect_in_roi"].append(products_over_shifts(region_i, v) / lost_margin(v) + blank)
        over_shifts["jaccard"].append(common / union + blank)
        over_shifts["spearman"].append(
            products_over_shifts(standardized(ranks(i)), standardized(ranks(v))) / sites
        )
        over_shifts["moran_i"].append(products_over_shifts(looked, queen_lag(worked)) / sites)
    return {name: shift_test(torch.cat(parts)) for name, parts in over_shifts.items()}


def _products(first: Tensor, second: Tensor) -> Tensor:
    """(N, M) sums over sites of every product of maps (N, H, W) and (M, H, W)."""
    return first.flatten(1) @ second.flatten(1).T


def _blank(looked: Tensor, worked: Tensor) -> Tensor:
    """(N, M) 0, or NaN if one of the standardized maps has no contrast: it has no top fraction, nothing is defined."""
    return 0 * _products(worked[:, :1, :1], looked[:, :1, :1])


def reached_fraction(pairs: Pairs) -> Tensor:
    """(N,) fraction of each image that lies near a changed pixel."""
    # A dilation by a square: max pooling of the changed pixels.
    changed = (pairs.perturbation != 0).any(1, keepdim=True).float()
    radius = max(1, round(REACH * min(changed.shape[2:])))
    return F.max_pool2d(changed, 2 * radius + 1, 1, radius).flatten(1).mean(1)


def comparable(images: Tensor, references: Tensor, confined: Tensor) -> Tensor:
    """Which importance maps each attack may be compared with: its own, and one of every other image.

    A second copy of an image, in the batch or among the references, is not another image, and several copies of
    another image count once. An attack that did not reach the whole image (`confined`) is compared with nothing, not
    even its own map: where it acts follows from where it was allowed to act.

    Args:
        images: (N, ...) the content that identifies each image.
        references: (R, ...) the same of the reference images.
        confined: bool (N,).

    Returns:
        bool (N, N + R).
    """
    group, count = first_copies(images, references), len(images)
    # Of each group of copies only the first may represent it, and never for another copy of the same image.
    allowed = (group[:count, None] != group) & (group == np.arange(len(group)))
    allowed[np.arange(count), np.arange(count)] = True
    return torch.from_numpy(allowed).to(confined.device) & ~confined[:, None]


def other_images(
    classifier: Classifier, pairs: Pairs, reference: Tensor | None, *, scores: bool = False
) -> Tensor:
    """(R, C, H, W) reference images of the pairs' size, or (R, 1, H, W) `scores` of them; R = 0 if there are none.

    Raises:
        ValueError: if `reference` is anything else.
    """
    shape = (1 if scores else pairs.clean.shape[1], *pairs.clean.shape[2:])
    if reference is None:
        return torch.zeros(0, *shape).to(classifier.mean)
    if not isinstance(reference, Tensor) or tuple(reference.shape[1:]) != shape:
        got = tuple(reference.shape) if isinstance(reference, Tensor) else type(reference).__name__
        raise ValueError(
            f"reference must be {'scores' if scores else 'images'} (R, {', '.join(map(str, shape))}), got {got}"
        )
    if scores or not len(reference):
        return reference.detach().to(classifier.mean)
    return check_images(reference, classifier, name="reference")


def tested_columns(
    name: str, other: OtherImageTest | None, shifted: ShiftTest, confined: Tensor
) -> pd.DataFrame:
    """A statistic and its tests: name, name_null, name_p, name_q, name_shift_null, name_shift_p.

    Args:
        name: of the statistic.
        other: its test by other images; None omits the columns of that test.
        shifted: its test by shifts.
        confined: bool (N,), the attacks that are not tested.
    """
    import pandas as pd

    columns = pd.DataFrame({name: shifted.value.cpu().numpy()})
    if other is not None:
        columns = replace(other, value=shifted.value).columns(name)
    null, p = (values.masked_fill(confined, torch.nan) for values in (shifted.null, shifted.p))
    return pd.concat([columns, ShiftTest(shifted.value, null, p).columns(name)], axis=1)


def second_path(
    classifier: Classifier, pairs: Pairs, competing: Tensor, drop: MarginDrop, rows: Tensor, *, seed: int
) -> Tensor:
    """(n, 1, H, W) the margin drop of some pairs by site, from half as many points at random places of the path.

    The path is divided into equal parts and one point is drawn in each (stratified, so the mean gradient is unbiased).

    Args:
        classifier: in eval mode, gradients on.
        pairs: N pairs.
        competing: (N,) from `competing_classes`.
        drop: the margin drop of all pairs by quadrature.
        rows: (n,) numbers of the pairs.
        seed: of the places.
    """
    # One uniform number in each of `count` equal parts of [0, 1].
    keys = _random.keys(pairs.clean[rows], seed)
    counts = (drop.points[rows] // 2).tolist()
    places = [
        (torch.arange(count, device=keys.device) + _random.uniform(key[None], 0, count)[0]) / count
        for key, count in zip(keys, counts, strict=True)
    ]
    classes = torch.stack([pairs.labels[rows], competing[rows]], 1)
    return sampled_drop(classifier, pairs.clean[rows], pairs.adversarial[rows], classes, places)


def setting_tests(
    importances: Sequence[Tensor], vulnerabilities: Sequence[Tensor], allowed: Tensor
) -> list[OtherImageTest]:
    """The test of the effect in the region of importance for every combination of maps and `FRACTIONS`.

    Args:
        importances: (N + R, 1, H, W) for each alignment of the class activation.
        vulnerabilities: (N, 1, H, W) for each path.
        allowed: bool (N, N + R), from `comparable`.
    """
    return [
        other_image_test(
            effect_in_roi(importance, vulnerability, fraction=fraction).masked_fill(~allowed, torch.nan)
        )
        for importance in importances
        for vulnerability in vulnerabilities
        for fraction in FRACTIONS
    ]


def agreed(tests: Sequence[OtherImageTest]) -> pd.DataFrame:
    """What all tests agree on, the reported test first: columns relation, relation_p, relation_q.

    relation_p is the largest two-sided p of all tests for one direction; a test that points the other way has p = 1.
    relation_q is the largest expected fraction of false discoveries among the images with this p or a smaller one in
    that direction (Benjamini and Hochberg over the images, in each direction), at least p. relation is 1 (where the
    network looks) or -1 (away from it) if both are at most `LEVEL`, 0 if not, and NaN if the reported test has no p.
    """
    import pandas as pd

    reported = tests[0].p
    worst = {}
    # For each direction, the weakest evidence over all settings.
    for sign in (1, -1):
        ps, qs = [], []
        for test in tests:
            p = test.p.where((test.direction == sign) | test.p.isnan(), 1.0)
            # Benjamini-Hochberg runs in one direction, so on the one-sided half of a two-sided p.
            one_sided = torch.where(test.direction == sign, p / 2, p)
            q = torch.from_numpy(false_discovery(one_sided.cpu().numpy())).to(p)
            # The correction leaves NaN out; afterward an undefined p speaks for no direction.
            ps.append(p.nan_to_num(1))
            qs.append(q.nan_to_num(1))
        worst[sign] = torch.stack(ps).amax(0), torch.stack(qs).amax(0)
    # The direction with the smaller worst p is reported.
    up = worst[1][0] <= worst[-1][0]
    p, q = (torch.where(up, worst[1][k], worst[-1][k]) for k in (0, 1))
    q = torch.maximum(p, q)  # of few images, halves of p may be corrected to less than p
    direction = torch.where(up, 1.0, -1.0).to(p)
    stated = torch.where((p <= LEVEL) & (q <= LEVEL), direction, 0.0)
    columns = {"relation": stated, "relation_p": p, "relation_q": q}
    return pd.DataFrame(
        {
            name: values.masked_fill(reported.isnan(), torch.nan).cpu().numpy()
            for name, values in columns.items()
        }
    )
