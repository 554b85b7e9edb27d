"""Overlap: does the attack act where the network looks?

Region of importance (RoI) and region of attack (RoA) after Chattopadhyay et al. 2020 (arXiv 2011.10794), re-specified
from the abstract: how both are computed, and every parameter, is ours. Attacks and attention both favor the center of
an image, so the control is other images' importance maps, not chance (`agreement`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from weakspot._checks import check_fraction, check_seed, unknown_choice
from weakspot.attribution.cam import class_activation, logit_gradient
from weakspot.attribution.integrated_gradients import MarginDrop, margin_drop
from weakspot.attribution.occlusion_map import occlusion
from weakspot.classifier import Classifier, evaluating, predict
from weakspot.explanations.agreement import (
    WHOLE,
    agreed,
    agreement,
    attack_region,
    comparable,
    other_images,
    reached_fraction,
    second_path,
    setting_tests,
    shift_tests,
    tested_columns,
    top_region,
)
from weakspot.explanations.analysis import Analysis, Picture, check_pairs, competing_classes, prepare_pairs
from weakspot.pairs import Pairs
from weakspot.similarity import gaussian
from weakspot.statistics import OtherImageTest, other_image_test
from weakspot.statistics.number_format import counted

if TYPE_CHECKING:
    import pandas as pd

FRAGMENT = 4  # pixels; smaller components are speckle, not regions
IMPORTANCES = ("cam", "gradient", "occlusion")
PARTITION = ("rest", "essential: looked at only", "contested: both", "neutralizable: attacked only")
MEANINGS = {
    "effect_in_roi": "Fraction of the lost margin that was lost inside the region of importance.",
    "jaccard": "Overlap of the two regions: their intersection over their union.",
    "spearman": "Rank correlation of importance and vulnerability over all sites.",
    "moran_i": "Bivariate Moran's I: correlation of importance with the vulnerability of neighboring sites.",
    "relation": "1: the attack acts where the network looks. -1: it acts away from there. 0: no clear relation. p is "
    "the largest of eight settings, which all have to agree.",
    "margin_drop": "How much of the label's logit lead over the competing class the perturbation took.",
    "margin_taken": "The same as a fraction of the lead that the label had; from 1 on, nothing of the lead is left.",
    "completeness_gap": "How far the sum of the vulnerability map is from that drop, as a fraction of it.",
    "roa_components": "Connected parts of the region of attack, without fragments under 4 pixels.",
    "roa_largest_fraction": "Fraction of the region of attack that lies in its largest connected part.",
    "changed_fraction": "Fraction of the pixels that the attack changed at all.",
    "reached_fraction": "Fraction of the image near a changed pixel. Below 95%, nothing is stated about where the "
    "attack acts, because that follows from where it changed anything.",
    "roi_fraction": "Fraction of the image in the region of importance.",
}


@dataclass(frozen=True, eq=False)
class Overlap:
    """Where the network looks, where the attack acts, and what the two regions have in common.

    Attributes:
        importance: (N, 1, H, W) evidence for the label in the clean image.
        vulnerability: (N, 1, H, W) what each site of the perturbation took from the margin; sums to the drop.
        roi: bool (N, 1, H, W), the top fraction of importance; fewer sites if many tie at the cut.
        roa: bool (N, 1, H, W), the top fraction of vulnerability; fewer sites if many tie or nothing was taken.
        scores: one row per image; see `MEANINGS`. effect_in_roi, jaccard, spearman and moran_i come with _null, _p
            and _q from other images' importance maps (NaN with fewer than 19 of them, and if the attack did not reach
            the whole image), and with _shift_null and _shift_p from shifting the attack within its image. relation,
            relation_p and relation_q say what all settings agree on; they are NaN if there is no p.
    """

    importance: Tensor
    vulnerability: Tensor
    roi: Tensor
    roa: Tensor
    scores: pd.DataFrame

    @property
    def essential(self) -> Tensor:
        """Looked at and not attacked: roi & ~roa."""
        return self.roi & ~self.roa

    @property
    def contested(self) -> Tensor:
        """Looked at and attacked: roi & roa."""
        return self.roi & self.roa

    @property
    def neutralizable(self) -> Tensor:
        """Attacked and not looked at, so that it could be blocked out: roa & ~roi."""
        return self.roa & ~self.roi

    def __repr__(self) -> str:
        count, _, height, width = self.roi.shape
        effect, jaccard = (float(self.scores[name].mean()) for name in ("effect_in_roi", "jaccard"))
        relation = self.scores.get("relation", np.zeros(0))
        directed = (
            f"{int((relation > 0).sum())} where the network looks, {int((relation < 0).sum())} away from it"
        )
        return (
            f"Overlap of {counted(count)} of {height} x {width}\n"
            f"  region of importance: {float(self.roi.float().mean()):.0%} of the image, "
            f"region of attack: {float(self.roa.float().mean()):.0%}\n"
            f"  mean effect in the region of importance: {effect:.2f}, mean Jaccard index: {jaccard:.2f}\n"
            f"  stated relations: {directed}"
        )


def overlap(
    model: nn.Module,
    pairs: Pairs,
    *,
    fraction: float = 0.2,
    seed: int = 0,
    importance: str | Tensor = "cam",
    reference: Tensor | None = None,
    compare: bool = True,
) -> Overlap:
    """Compute the region of importance and the region of attack, and test whether they agree more than unrelated ones.

    Importance is the class activation of the label in the clean image. Vulnerability is what each site of the
    perturbation took from the margin z_label - z_target: integrated gradients along the straight path from the clean
    to the adversarial image, which sum to the whole drop, smoothed by a Gaussian of 1/64 of the image's shorter side.
    Each region is the top `fraction` of its map.

    The null hypothesis is the same attack with the importance maps of the other images of the batch and of
    `reference`: p is the pooled rank of the own map among them, with at least 19 other images, and q is p corrected
    over the batch. The other images must come from the same source: maps of other photographs do not share the habits
    of these. An attack that did not reach the whole image has no p, because where it acts follows from where it was
    allowed to act.

    `relation` says whether the attack acts where the network looks (1), away from it (-1), or neither clearly (0). The
    effect in the region of importance is tested again in eight settings: {all points of the path, half as many at
    places drawn by `seed`} x {class activation aligned by gradients, resized} x {15%, 30% of the image}. A relation of
    1 or -1 needs p <= .1 and q <= .1 in the same direction in all of them and in the reported setting. If there is a
    p, this costs half as many gradients again. With gradients as importance no relation is stated, because
    vulnerability is itself made of gradients.

    If an untargeted attack failed, the target is the class it came closest to. A class activation that is nowhere
    positive, which happens with tokens, has no region that matters most: it is replaced by zero, its region is empty
    and its statistics are NaN.

    Args:
        model: any classifier. It is not changed.
        pairs: N pairs.
        fraction: of the image in each region, 0 to 1.
        seed: of the second path; changes only relation, relation_p and relation_q.
        importance: "cam", "gradient" (norm of the gradient of the label's logit), "occlusion" (fall of that logit if
            a cell of 1/14 of the image is covered), or scores (N, 1, H, W).
        reference: (R, C, H, W) other images from the same source. Their importance is that of the predicted class. If
            `importance` is scores, scores (R, 1, H, W) of the other images.
        compare: False omits every column that depends on the other images.

    Raises:
        ValueError: if an argument is invalid; the message names it.
    """
    import pandas as pd

    check_pairs(pairs, model)
    check_fraction(fraction)
    check_seed(seed)
    if not isinstance(importance, str | Tensor):
        raise ValueError(
            f"importance must be one of {', '.join(IMPORTANCES)}, or a tensor of scores, got "
            f"{type(importance).__name__}"
        )
    with evaluating(model) as classifier:
        scores = isinstance(importance, Tensor)
        others = other_images(classifier, pairs, reference if compare else None, scores=scores)
        pairs = prepare_pairs(classifier, pairs)
        competing = competing_classes(classifier, pairs)
        maps = _importances(classifier, pairs, importance, others)
        # Integrated gradients of z_label - z_target along x -> x': the sites sum to the whole drop (completeness).
        drop = margin_drop(classifier, pairs.clean, pairs.adversarial, pairs.labels, competing)
        important, vulnerable = maps[: len(pairs)], spread(drop.sites)
        roi, roa = top_region(important, fraction), attack_region(vulnerable, fraction)
        # Such an attack acts where it was allowed to act, so it is not tested.
        confined = reached_fraction(pairs) < WHOLE
        tests: dict[str, OtherImageTest] = {}
        related = pd.DataFrame(index=range(len(pairs)))
        if compare:
            allowed = comparable(pairs.clean, others, confined)
            for name, matrix in agreement(maps, vulnerable, fraction=fraction).items():
                tests[name] = other_image_test(matrix.masked_fill(~allowed, torch.nan))
            reported = tests["effect_in_roi"]
            related = agreed([reported])
            # Only images with a p need the second path, which costs gradients.
            rows = reported.p.isfinite().nonzero()[:, 0]
            # Vulnerability is made of gradients, so it would agree with gradient importance for any attack.
            if importance == "gradient":
                related[:] = np.nan
            elif len(rows):
                again = torch.full_like(vulnerable, torch.nan)
                again[rows] = spread(second_path(classifier, pairs, competing, drop, rows, seed=seed))
                aligned = [maps]
                if importance == "cam":
                    aligned.append(_importances(classifier, pairs, importance, others, alignment="resize"))
                related = agreed([reported, *setting_tests(aligned, [vulnerable, again], allowed)])
    shifted = shift_tests(important[:, 0], vulnerable[:, 0], roi[:, 0], roa[:, 0])
    columns = [tested_columns(name, tests.get(name), shifted[name], confined) for name in shifted]
    plain = _plain_scores(pairs, drop, roi, roa)
    return Overlap(important, vulnerable, roi, roa, pd.concat([*columns, related, plain], axis=1))


def spread(sites: Tensor) -> Tensor:
    """A map (N, 1, H, W) smoothed by a Gaussian of 1/64 of the shorter side: single-pixel gradients are speckle."""
    sigma = min(sites.shape[2:]) / 64
    return gaussian(sites.double(), sigma, max(1, round(4 * sigma))).float()


def _importances(
    classifier: Classifier,
    pairs: Pairs,
    importance: str | Tensor,
    others: Tensor,
    *,
    alignment: str = "effective",
) -> Tensor:
    """(N + R, 1, H, W) importance of the labels in the clean images and of the predicted classes in the others."""
    if isinstance(importance, Tensor):
        expected = pairs.clean[:, :1].shape
        if importance.shape != expected:
            raise ValueError(f"importance must have shape {tuple(expected)}, got {tuple(importance.shape)}")
        if not bool(importance.isfinite().all()):
            raise ValueError("importance must be finite, got NaN or infinity")
        return torch.cat([importance.to(pairs.clean), others])
    images, classes = pairs.clean, pairs.labels
    if len(others):
        images = torch.cat([images, others])
        classes = torch.cat([classes, predict(classifier, others).argmax(1)])
    if importance == "cam":
        maps = class_activation(classifier, images, classes, alignment=alignment)
        # Without any evidence for the class no region matters most: a constant map has no statistics.
        return torch.where(maps.amax((1, 2, 3), keepdim=True) > 0, maps, 0)
    if importance == "gradient":
        return logit_gradient(classifier, images, classes)
    if importance == "occlusion":
        side = max(1, round(min(images.shape[2:]) / 14))
        return occlusion(classifier, images, classes, cell=side)
    raise ValueError(
        unknown_choice("importance", importance, IMPORTANCES, remedy="or give a tensor of scores")
    )


def _plain_scores(pairs: Pairs, drop: MarginDrop, roi: Tensor, roa: Tensor) -> pd.DataFrame:
    import pandas as pd

    changed = (pairs.perturbation != 0).any(1)
    components, largest = zip(*(_components(region) for region in roa[:, 0].cpu().numpy()), strict=True)
    return pd.DataFrame(
        {
            "margin_drop": drop.total.cpu().numpy(),
            "margin_taken": (drop.total / drop.before.where(drop.before > 0, torch.nan)).cpu().numpy(),
            "completeness_gap": drop.gap.cpu().numpy(),
            "roa_components": components,
            "roa_largest_fraction": largest,
            "changed_fraction": changed.flatten(1).float().mean(1).cpu().numpy(),
            "reached_fraction": reached_fraction(pairs).cpu().numpy(),
            "roi_fraction": roi.flatten(1).float().mean(1).cpu().numpy(),
        }
    )


def _components(region: NDArray[np.bool_]) -> tuple[int, float]:
    """The number of 8-connected parts of at least 4 pixels, and the largest one's fraction of the region."""
    import cv2

    count, parts = cv2.connectedComponents(region.astype(np.uint8), connectivity=8)
    sizes = np.bincount(parts.ravel(), minlength=count)[1:]  # 0 is the background
    regions = sizes[sizes >= FRAGMENT]
    return len(regions), float(regions.max() / region.sum()) if len(regions) else 0.0


def analyze_overlap(
    model: nn.Module,
    pairs: Pairs,
    *,
    seed: int = 0,
    reference: Tensor | None = None,
    compare: bool = True,
) -> Analysis:
    """`overlap` as the report shows it."""
    result = overlap(model, pairs, seed=seed, reference=reference, compare=compare)
    # The three parts are disjoint, so the sum is a position in PARTITION.
    partition = result.essential * 1 + result.contested * 2 + result.neutralizable * 3
    return Analysis(
        scores=result.scores,
        maps={
            "partition": partition,
            "vulnerability": result.vulnerability,
            "importance": result.importance,
        },
        meanings=MEANINGS,
        pictures={
            "partition": Picture(
                "Looked at, attacked, or both",
                kind="category",
                categories=PARTITION,
                meaning="The fifth of the image that matters most for {label}, and the fifth where the attack takes "
                "most of its lead; less if fewer places matter.",
            ),
            "vulnerability": Picture(
                "Where the attack acts",
                kind="signed",
                meaning="What each place of the perturbation took from the margin of {label} over {target}; the "
                "values sum to the whole loss.",
            ),
            "importance": Picture(
                "Where the network looks",
                meaning="Evidence for {label} in the clean image (class activation map).",
            ),
        },
    )
