"""Relation: does an attack act where the network looks, however importance and vulnerability are measured?

A single setting decides nothing: path points, the alignment of class activation and the fraction that counts as
important each turn some verdicts over. So the same test is made in eight settings, and a relation is stated only if
all agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weakspot.attacks import draws
from weakspot.attribution.path import MarginDrop, sampled_drop
from weakspot.classifier import Classifier
from weakspot.explanations.agreement import effect_in_roi
from weakspot.pairs import Pairs
from weakspot.statistics import OtherImageTest, false_discovery, other_image_test

if TYPE_CHECKING:
    import pandas as pd

FRACTIONS = (0.15, 0.3)
LEVEL = 0.1  # of p and of q, in every setting


def second_path(
    classifier: Classifier, pairs: Pairs, rivals: Tensor, drop: MarginDrop, rows: Tensor, *, seed: int
) -> Tensor:
    """(n, 1, H, W) the margin drop of some pairs by site, from half as many points, at random places of the path.

    One point is drawn in each of equal parts of the path (stratified, so that the mean gradient stays unbiased).

    Args:
        classifier: in eval mode, gradients on.
        pairs: N pairs.
        rivals: (N,).
        drop: of all pairs, by quadrature.
        rows: (n,) numbers of the pairs.
        seed: of the places.
    """
    keys = draws.keys(pairs.clean[rows], seed)
    counts = (drop.points[rows] // 2).tolist()
    places = [
        (torch.arange(count, device=keys.device) + draws.uniform(key[None], 0, count)[0]) / count
        for key, count in zip(keys, counts, strict=True)
    ]
    return sampled_drop(
        classifier, pairs.clean[rows], pairs.adversarial[rows], pairs.labels[rows], rivals[rows], places
    )


def setting_tests(
    importances: Sequence[Tensor], vulnerabilities: Sequence[Tensor], allowed: Tensor
) -> list[OtherImageTest]:
    """The test of the effect in the region of importance in every combination of maps and `FRACTIONS`.

    Args:
        importances: (N + R, 1, H, W) under each alignment.
        vulnerabilities: (N, 1, H, W) from each path.
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
    """What all tests, the reported one first, say of each image: columns relation, relation_p, relation_q.

    p is the largest two-sided p of all tests for one direction; a test that points the other way has p = 1. q is the
    largest share of images, among those that a test has in the same direction at this p or below, which are expected
    there by chance (Benjamini and Hochberg, over the images in each direction). relation is 1 (where the network
    looks) or -1 (away from it) if both are at most `LEVEL`, 0 if not, and NaN where the reported test has no p.
    """
    import pandas as pd

    reported = tests[0].p
    worst = {}
    for sign in (1, -1):
        ps, qs = [], []
        for test in tests:
            p = test.p.where((test.direction == sign) | test.p.isnan(), 1.0)
            one_sided = torch.where(test.direction == sign, p / 2, p)
            q = torch.from_numpy(false_discovery(one_sided.cpu().numpy())).to(p)
            ps.append(p.nan_to_num(1))
            qs.append(q.nan_to_num(1))
        worst[sign] = torch.stack(ps).amax(0), torch.stack(qs).amax(0)
    up = worst[1][0] <= worst[-1][0]
    p, q = (torch.where(up, worst[1][k], worst[-1][k]) for k in (0, 1))
    direction = torch.where(up, 1.0, -1.0).to(p)
    stated = torch.where((p <= LEVEL) & (q <= LEVEL), direction, 0.0)
    columns = {"relation": stated, "relation_p": p, "relation_q": q}
    return pd.DataFrame(
        {
            name: values.masked_fill(reported.isnan(), torch.nan).cpu().numpy()
            for name, values in columns.items()
        }
    )
