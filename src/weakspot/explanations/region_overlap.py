"""Overlap: is the attack's work done where the network looks?

Region of importance (RoI) and region of attack (RoA) after Chattopadhyay et al. 2020 (arXiv 2011.10794), re-specified
from the abstract: how both are computed, and every parameter, is ours.
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
    tested,
    top_region,
)
from weakspot.explanations.analysis import Analysis, Picture, check_pairs, competing_classes, prepare_pairs
from weakspot.pairs import Pairs
from weakspot.similarity import gaussian
from weakspot.statistics import OtherImageTest, other_image_test

if TYPE_CHECKING:
    import pandas as pd


FRAGMENT = 4  # pixels; smaller components are speckle, not regions
IMPORTANCES = ("cam", "gradient", "occlusion")
PARTITION = ("rest", "essential: looked at only", "contested: both", "neutralizable: attacked only")


@dataclass(frozen=True, eq=False)
class Overlap:
    """Where the network looks, where the attack works, and what they share.

    Attributes:
        importance: (N, 1, H, W) evidence for the label in the clean image.
        vulnerability: (N, 1, H, W) what each site of the perturbation took from the margin; sums to the drop.
        roi: bool (N, 1, H, W), the top share of importance; fewer sites where many tie at the cut.
        roa: bool (N, 1, H, W), the top share of vulnerability; fewer where many tie or nothing was taken.
        scores: one row per image; see `MEANINGS`. effect_in_roi, jaccard, spearman and moran_i come with _null, _p
            and _q from other images' importance maps, NaN below 19 of them and where the attack did not reach the
            whole image, and with _shift_null and _shift_p from shifting the attack within its image. relation,
            relation_p and relation_q are what all settings agree on, NaN where there is no p.
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
        """Attacked and not looked at, which could be blocked out: roa & ~roi."""
        return self.roa & ~self.roi


MEANINGS = {
    "effect_in_roi": "Share of the lost margin that was lost inside the region of importance.",
    "jaccard": "Overlap of the two regions: their intersection over their union.",
    "spearman": "Rank correlation of importance and vulnerability over all sites.",
    "moran_i": "Bivariate Moran's I: correlation of importance with the vulnerability of neighboring sites.",
    "relation": "1: the attack acts where the network looks; -1: away from there; 0: no clear relation. p is the "
    "largest of eight settings, which all have to agree.",
    "margin_drop": "How much of the label's logit lead over its rival the perturbation took.",
    "margin_taken": "The same as a share of the lead that the label had; from 1 on nothing of it is left.",
    "completeness_gap": "How far the vulnerability map is from summing to that drop, as a share of it.",
    "roa_components": "Connected parts of the region of attack; fragments under 4 pixels are left out.",
    "roa_largest_fraction": "Share of the region of attack that lies in its largest connected part.",
    "changed_fraction": "Share of the pixels that the attack changed at all.",
    "reached_fraction": "Share of the image near a changed pixel; under 95% nothing is said of where the "
    "attack acts, which then follows from where it changed anything.",
    "roi_fraction": "Share of the image in the region of importance.",
}


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
    """Region of importance and region of attack, what they share, and what they share in unrelated images.

    Importance is the class activation of the label in the clean image. Vulnerability is what each site of the
    perturbation took from the margin z_label - z_target: integrated gradients from the clean to the adversarial
    image, which sum to the whole drop, spread by a Gaussian of 1/64 of the image's shorter side. Either region
    is the top `fraction` share of its map. The null is the same attack with the importance maps of the other images of
    the batch, and of `reference`: p is the pooled rank of the own map among them, from 19 other images on, and q is p
    corrected over the batch. They must come from the same source as the images: maps of other photographs do not
    share the habits of these. An attack that did not reach the whole image has no p, as where it acts follows from
    where it was allowed to.

    `relation` says whether the attack acts where the network looks (1), away from it (-1) or neither clearly (0): the
    effect in the region of importance is tested again in eight settings, {all points of the path, half as many at
    places drawn by `seed`} x {class activation aligned by gradients, resized} x {15%, 30% of the image}, and 1 or -1
    needs p <= .1 and q <= .1 in one direction in all of them and in the reported one. It costs half as many gradients
    again, where there is a p at all. Gradients as importance are stated of nothing: vulnerability is made of them.

    If an untargeted attack failed, the target is the class it came closest to. A class activation that is nowhere
    positive, as may be with tokens, has no region that matters most: it is taken as zero, its region is empty and its
    statistics are NaN.

    Args:
        model: any classifier.
        pairs: N pairs.
        fraction: share of the image in either region, 0 to 1.
        seed: of the second path; changes relation, relation_p and relation_q alone.
        importance: "cam", "gradient" (norm of the gradient of the label's logit), "occlusion" (fall of that logit where
            a cell, a fourteenth of the image, is covered), or scores (N, 1, H, W).
        reference: (R, C, H, W) other images of the same source; their importance is of the predicted class. With
            scores given as `importance`, scores (R, 1, H, W) of other images.
        compare: False leaves out every column that depends on the other images.

    Raises:
        ValueError: when an argument does not fit, naming it.
    """
    import pandas as pd

    check_pairs(pairs, model)
    check_fraction(fraction)
    check_seed(seed)
    with evaluating(model) as classifier:
        pairs = pairs.to(classifier.mean.device)
        others = other_images(
            classifier, pairs, reference if compare else None, scores=isinstance(importance, Tensor)
        )
        pairs, losing = prepare_pairs(classifier, pairs), competing_classes(classifier, pairs)
        every = _importances(classifier, pairs, importance, others)
        drop = margin_drop(classifier, pairs.clean, pairs.adversarial, pairs.labels, losing)
        important, vulnerable = every[: len(pairs)], spread(drop.sites)
        roi, roa = top_region(important, fraction), attack_region(vulnerable, fraction)
        confined = reached_fraction(pairs) < WHOLE
        tests: dict[str, OtherImageTest] = {}
        related = pd.DataFrame(index=range(len(pairs)))
        if compare:
            allowed = comparable(pairs.clean, others, confined)
            for name, matrix in agreement(every, vulnerable, fraction=fraction).items():
                tests[name] = other_image_test(matrix.masked_fill(~allowed, torch.nan))
            first = tests["effect_in_roi"]
            related = agreed([first])
            rows = first.p.isfinite().nonzero()[:, 0]
            if importance == "gradient":
                related[:] = np.nan
            elif len(rows):
                again = torch.full_like(vulnerable, torch.nan)
                again[rows] = spread(second_path(classifier, pairs, losing, drop, rows, seed=seed))
                aligned = [every]
                if importance == "cam":
                    aligned.append(_importances(classifier, pairs, importance, others, registration="resize"))
                related = agreed([first, *setting_tests(aligned, [vulnerable, again], allowed)])
    shifted = shift_tests(important[:, 0], vulnerable[:, 0], roi[:, 0], roa[:, 0])
    columns = [tested(name, tests.get(name), shifted[name], confined) for name in shifted]
    plain = _plain_scores(pairs, drop, roi, roa)
    return Overlap(important, vulnerable, roi, roa, pd.concat([*columns, related, plain], axis=1))


def spread(sites: Tensor) -> Tensor:
    """A map (N, 1, H, W) under a Gaussian of 1/64 of the shorter side: gradients are speckle, pixel by pixel."""
    sigma = min(sites.shape[2:]) / 64
    return gaussian(sites.double(), sigma, max(1, round(4 * sigma))).float()


def _importances(
    classifier: Classifier,
    pairs: Pairs,
    importance: str | Tensor,
    others: Tensor,
    *,
    registration: str = "effective",
) -> Tensor:
    """(N + R, 1, H, W) importance of the labels in the clean images and of the predicted classes in the others."""
    if isinstance(importance, Tensor):
        wanted = pairs.clean[:, :1].shape
        if importance.shape != wanted:
            raise ValueError(f"importance has shape {tuple(importance.shape)}; accepted is {tuple(wanted)}")
        return torch.cat([importance.to(pairs.clean), others])
    images, classes = pairs.clean, pairs.labels
    if len(others):
        images = torch.cat([images, others])
        classes = torch.cat([classes, predict(classifier, others).argmax(1)])
    if importance == "cam":
        maps = class_activation(classifier, images, classes, registration=registration)
        # Where nothing speaks for the class no region matters most: a map without contrast has no statistics.
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
    components, largest = zip(*(_isolation(region) for region in roa[:, 0].cpu().numpy()), strict=True)
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


def _isolation(region: NDArray[np.bool_]) -> tuple[int, float]:
    """How many 8-connected parts of at least 4 pixels there are, and the largest one's share of the region."""
    from skimage.measure import label as connected_components

    sizes = np.bincount(connected_components(region, connectivity=2).ravel())[1:]
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
    found = overlap(model, pairs, seed=seed, reference=reference, compare=compare)
    partition = found.essential * 1 + found.contested * 2 + found.neutralizable * 3
    return Analysis(
        scores=found.scores,
        maps={"partition": partition, "vulnerability": found.vulnerability, "importance": found.importance},
        meanings=MEANINGS,
        pictures={
            "partition": Picture(
                "Looked at, attacked, or both",
                kind="category",
                categories=PARTITION,
                meaning="The fifth of the image that matters most for {label} against the fifth where the attack "
                "takes most of its lead; less where fewer places matter.",
            ),
            "vulnerability": Picture(
                "Where the attack works",
                kind="signed",
                meaning="What each place of the perturbation took from the lead of {label} over {target}; the "
                "values sum to the whole loss.",
            ),
            "importance": Picture(
                "Where the network looks",
                meaning="Evidence for {label} in the clean image (class activation map).",
            ),
        },
    )
