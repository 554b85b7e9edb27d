"""Agreement: four statistics of an importance map and an attack, for every attack with every image's map.

The own pairs are the diagonal; all the others say what the statistics are for images that have nothing to do with
each other, which `statistics.other_image_test` and `statistics.run_test` make p values of.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weakspot.regions import top
from weakspot.statistics import queen_lag, ranks, standardized

STATISTICS = ("effect_in_roi", "jaccard", "spearman", "moran_i")
CANCELLED = 0.05  # a drop smaller than this fraction of all gains and losses has no place
ARBITRARY = 0.9  # a region of which less than this fraction is above a tie has no right to its size
CHUNK = 64  # maps at once: memory does not grow with the square of their number


def top_region(scores: Tensor, fraction: float) -> Tensor:
    """The top fraction of sites of scores (N, 1, H, W), without a tie at its edge that fills over a tenth of it."""
    chosen = top(scores, fraction)
    left_out = torch.where(chosen, -torch.inf, scores).flatten(1).amax(1).view(-1, 1, 1, 1)
    above = chosen & (scores > left_out)
    sizes = [region.flatten(1).sum(1).view(-1, 1, 1, 1) for region in (above, chosen)]
    return torch.where(sizes[0] < ARBITRARY * sizes[1], above, chosen)


def attack_region(vulnerability: Tensor, fraction: float) -> Tensor:
    """The top fraction of sites of a vulnerability map (N, 1, H, W), of those that lost any margin."""
    return top_region(vulnerability, fraction) & (vulnerability > 0)


def lost_margin(vulnerability: Tensor) -> Tensor:
    """(N, 1, 1) sum of maps (N, H, W), float64; NaN where no margin was lost or gains and losses cancel.

    Only of a margin that was lost can a fraction have been lost somewhere.
    """
    total = vulnerability.double().sum((1, 2), keepdim=True)
    moved = vulnerability.double().abs().sum((1, 2), keepdim=True)
    return torch.where((total > 1e-6) & (total > CANCELLED * moved), total, torch.nan)


def agreement(importance: Tensor, vulnerability: Tensor, *, fraction: float = 0.2) -> dict[str, Tensor]:
    """The four statistics for every attack with every importance map.

    Args:
        importance: (M, 1, H, W).
        vulnerability: (N, 1, H, W).
        fraction: of the image in the region of importance and in that of attack.

    Returns:
        Name to (N, M) float64: [j, i] is attack j with importance map i; NaN where it is not defined, as it is of
        maps without contrast.
    """
    rows: list[dict[str, Tensor]] = []
    for attacks in vulnerability.split(CHUNK):
        parts = [_block(maps, attacks, fraction) for maps in importance.split(CHUNK)]
        rows.append({name: torch.cat([part[name] for part in parts], 1) for name in STATISTICS})
    return {name: torch.cat([row[name] for row in rows]) for name in STATISTICS}


def _block(importance: Tensor, vulnerability: Tensor, fraction: float) -> dict[str, Tensor]:
    important, vulnerable = importance[:, 0], vulnerability[:, 0]
    roi = top_region(importance, fraction)[:, 0].double()
    roa = attack_region(vulnerability, fraction)[:, 0].double()
    looked, worked = standardized(important), standardized(vulnerable)
    # A map without any contrast has no top fraction: nothing that is said of it would mean anything.
    blank = 0 * _products(worked[:, :1, :1], looked[:, :1, :1])
    common = _products(roa, roi)
    union = roa.sum((1, 2))[:, None] + roi.sum((1, 2)) - common
    sites = important[0].numel()
    return {
        "effect_in_roi": _products(vulnerable.double(), roi) / lost_margin(vulnerable)[:, 0] + blank,
        "jaccard": common / union + blank,
        "spearman": _products(standardized(ranks(vulnerable)), standardized(ranks(important))) / sites,
        "moran_i": _products(queen_lag(worked), looked) / sites,
    }


def _products(first: Tensor, second: Tensor) -> Tensor:
    """(N, M) sums over sites of every product of maps (N, H, W) and (M, H, W)."""
    return first.flatten(1) @ second.flatten(1).T
