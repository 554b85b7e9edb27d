"""Overlap: is the attack's work done where the network looks?

Region of importance (RoI) and region of attack (RoA) after Chattopadhyay et al. 2020 (arXiv 2011.10794), re-specified
from the abstract: how both are computed, and every parameter, is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from weakspot.attribution.cam import class_activation, logit_gradient
from weakspot.attribution.occlusion import occlusion
from weakspot.attribution.path import MarginDrop, margin_drop
from weakspot.checks import check_share, closest
from weakspot.classifier import Classifier, evaluating, predict
from weakspot.explanations.agreement import agreement, attack_region, lost_margin, top_region
from weakspot.explanations.analysis import Analysis, Picture, check_pairs, rivals
from weakspot.pairs import Pairs
from weakspot.smoothing import gaussian
from weakspot.statistics import (
    ShiftTest,
    other_image_test,
    products_over_shifts,
    queen_lag,
    ranks,
    shift_test,
    standardized,
)

if TYPE_CHECKING:
    import pandas as pd

REACH = 1 / 50  # of the shorter side: how far from a changed pixel a site counts as reached by the attack
FRAGMENT = 4  # pixels; smaller components are speckle, not regions
WHOLE = 0.95  # fraction of the image near changed pixels from which an attack counts as free to act anywhere
CHUNK = 8  # images whose shifts are in memory at once
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
            whole image, and with _shift_null and _shift_p from shifting the attack within its image.
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
    "moran_i": "Bivariate Moran's I: correlation of importance with the vulnerability of neighbouring sites.",
    "margin_drop": "How much of the label's logit lead over its rival the perturbation took.",
    "completeness_gap": "How far the vulnerability map is from summing to that drop, as a share of it.",
    "roa_components": "Connected parts of the region of attack; fragments under 4 pixels are left out.",
    "roa_largest_share": "Share of the region of attack that lies in its largest connected part.",
    "changed_share": "Share of the pixels that the attack changed at all.",
    "reached_share": "Share of the image near a changed pixel; under 95% the attack is taken to have been confined.",
    "changed_in_roi": "Share of the changed pixels that lie in the region of importance.",
}


def overlap(
    model: nn.Module,
    pairs: Pairs,
    *,
    keep: float = 0.2,
    seed: int = 0,
    importance: str | Tensor = "cam",
    reference: Tensor | None = None,
) -> Overlap:
    """Region of importance and region of attack, what they share, and what they share in unrelated images.

    Importance is the class activation of the label in the clean image. Vulnerability is what each site of the
    perturbation took from the margin z_label - z_target: integrated gradients from the clean to the adversarial
    image, which sum to the whole drop, spread by a Gaussian of 1/64 of the image's shorter side. Either region
    is the top `keep` share of its map. The null is the same attack with the importance maps of the other images of
    the batch, and of `reference`: p is the pooled rank of the own map among them, from 19 other images on, and q is p
    corrected over the batch. They must come from the same source as the images: maps of other photographs do not
    share the habits of these. An attack that did not reach the whole image has no p, as where it acts follows from
    where it was allowed to.

    If an untargeted attack failed, the target is the class it came closest to. A class activation that is nowhere
    positive, as may be with tokens, has no region that matters most: it is taken as zero, its region is empty and its
    statistics are NaN.

    Args:
        model: any classifier.
        pairs: N pairs.
        keep: share of the image in either region, 0 to 1.
        seed: taken by every analysis; here nothing is random.
        importance: "cam", "gradient" (norm of the gradient of the label's logit), "occlusion" (fall of that logit where
            a cell, a fourteenth of the image, is covered), or scores (N, 1, H, W).
        reference: (R, C, H, W) other images of the same source; their importance is of the predicted class. With
            scores given as `importance`, scores (R, 1, H, W) of other images.

    Raises:
        ValueError: when an argument does not fit, naming it.
    """
    import pandas as pd

    del seed
    check_pairs(pairs, model)
    check_share(keep)
    with evaluating(model) as classifier:
        pairs = pairs.to(classifier.mean.device)
        drop = margin_drop(
            classifier, pairs.clean, pairs.adversarial, pairs.labels, rivals(classifier, pairs)
        )
        important = _importance(classifier, pairs.clean, pairs.labels, importance)
        others = _reference_importance(classifier, pairs, importance, reference)
    sigma = min(drop.sites.shape[2:]) / 64
    vulnerable = gaussian(drop.sites.double(), sigma, max(1, round(4 * sigma))).float()
    roi, roa = top_region(important, keep), attack_region(vulnerable, keep)
    plain = _plain_scores(pairs, drop, roi, roa)
    confined = torch.tensor((plain["reached_share"] < WHOLE).tolist()).to(vulnerable.device)
    agreed = agreement(torch.cat([important, others]), vulnerable, fraction=keep)
    columns = []
    for name, shifted in _shift_tests(important[:, 0], vulnerable[:, 0], roi[:, 0], roa[:, 0]).items():
        tested = torch.where(confined[:, None], torch.nan, agreed[name])
        columns.append(replace(other_image_test(tested), value=shifted.value).columns(name))
        columns.append(shifted.columns(name))
        columns[-1].loc[confined.cpu().numpy()] = np.nan
    return Overlap(important, vulnerable, roi, roa, pd.concat([*columns, plain], axis=1))


def _importance(classifier: Classifier, images: Tensor, classes: Tensor, importance: str | Tensor) -> Tensor:
    if isinstance(importance, Tensor):
        if importance.shape != images[:, :1].shape:
            raise ValueError(
                f"importance has shape {tuple(importance.shape)}; accepted is {tuple(images[:, :1].shape)}"
            )
        return importance.to(images)
    if importance == "cam":
        maps = class_activation(classifier, images, classes, registration="effective")
        # Where nothing speaks for the class no region matters most: a map without contrast has no statistics.
        return torch.where(maps.amax((1, 2, 3), keepdim=True) > 0, maps, 0)
    if importance == "gradient":
        return logit_gradient(classifier, images, classes)
    if importance == "occlusion":
        side = max(1, round(min(images.shape[2:]) / 14))
        return occlusion(classifier, images, classes, cell=side)
    raise ValueError(
        f"importance is {importance!r}; {closest(importance, IMPORTANCES)}, or a tensor of scores"
    )


def _reference_importance(
    classifier: Classifier, pairs: Pairs, importance: str | Tensor, reference: Tensor | None
) -> Tensor:
    """(R, 1, H, W), R = 0 without references."""
    if reference is None:
        return pairs.clean[:0, :1]
    given = isinstance(importance, Tensor)
    wanted = (1 if given else pairs.clean.shape[1], *pairs.clean.shape[2:])
    if not isinstance(reference, Tensor) or tuple(reference.shape[1:]) != wanted:
        got = tuple(reference.shape) if isinstance(reference, Tensor) else type(reference).__name__
        raise ValueError(
            f"reference must be {'scores' if given else 'images'} (R, {', '.join(map(str, wanted))}), got {got}"
        )
    reference = reference.to(pairs.clean)
    if isinstance(importance, Tensor):
        return reference
    return _importance(classifier, reference, predict(classifier, reference).argmax(1), importance)


def _shift_tests(important: Tensor, vulnerable: Tensor, roi: Tensor, roa: Tensor) -> dict[str, ShiftTest]:
    """Statistics of the two maps (N, H, W) and their regions, tested against every shift."""
    sites = important[0].numel()
    over_shifts: dict[str, list[Tensor]] = {
        name: [] for name in ("effect_in_roi", "jaccard", "spearman", "moran_i")
    }
    for i, v, region_i, region_v in zip(
        *(x.split(CHUNK) for x in (important, vulnerable, roi, roa)), strict=True
    ):
        common = products_over_shifts(region_i, region_v).round()
        union = region_i.sum((1, 2), keepdim=True) + region_v.sum((1, 2), keepdim=True) - common
        scattered, worked = standardized(i), standardized(v)
        # A map without any contrast has no top share: nothing that is said of it would mean anything.
        blank = 0 * (scattered + worked).mean((1, 2), keepdim=True)
        over_shifts["effect_in_roi"].append(products_over_shifts(region_i, v) / lost_margin(v) + blank)
        over_shifts["jaccard"].append(common / union + blank)
        over_shifts["spearman"].append(
            products_over_shifts(standardized(ranks(i)), standardized(ranks(v))) / sites
        )
        over_shifts["moran_i"].append(products_over_shifts(scattered, queen_lag(worked)) / sites)
    return {name: shift_test(torch.cat(parts)) for name, parts in over_shifts.items()}


def _plain_scores(pairs: Pairs, drop: MarginDrop, roi: Tensor, roa: Tensor) -> pd.DataFrame:
    import pandas as pd

    changed = (pairs.perturbation != 0).any(1, keepdim=True)
    area = changed.flatten(1).float().mean(1)
    radius = max(2, round(REACH * min(changed.shape[2:])))
    reached = F.max_pool2d(changed.float(), 2 * radius + 1, 1, radius).flatten(1).mean(1)
    inside = (changed & roi).flatten(1).float().mean(1)
    components, largest = zip(*(_isolation(region) for region in roa[:, 0].cpu().numpy()), strict=True)
    return pd.DataFrame(
        {
            "margin_drop": drop.total.cpu().numpy(),
            "completeness_gap": drop.gap.cpu().numpy(),
            "roa_components": components,
            "roa_largest_share": largest,
            "changed_share": area.cpu().numpy(),
            "reached_share": reached.cpu().numpy(),
            "changed_in_roi": (inside / area).cpu().numpy(),
        }
    )


def _isolation(region: NDArray[np.bool_]) -> tuple[int, float]:
    """How many 8-connected parts of at least 4 pixels there are, and the largest one's share of the region."""
    from skimage.measure import label as connected_components

    sizes = np.bincount(connected_components(region, connectivity=2).ravel())[1:]
    regions = sizes[sizes >= FRAGMENT]
    return len(regions), float(regions.max() / region.sum()) if len(regions) else 0.0


def analyse(model: nn.Module, pairs: Pairs, *, seed: int = 0) -> Analysis:
    """`overlap` as the report shows it."""
    found = overlap(model, pairs, seed=seed)
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
