"""Promotion and suppression: which parts of a perturbation raise the target, and which lower the label.

After Xu et al. 2019 (arXiv 1904.02057). The floors, the inactive cells, the shares of negative effects, the gap of
additivity and the add-one variant are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weakspot._checks import check_choice, check_fraction
from weakspot.attribution import class_activation
from weakspot.classifier import Classifier, evaluating, predict, runner_up
from weakspot.edits import Edits, Prepared, cells, exchanged, grid, prepare, windowed
from weakspot.explanations.agreement import WHOLE, comparable, other_images, reached_fraction, tested
from weakspot.explanations.analysis import Analysis, Picture, check_pairs, competing_classes, prepare_pairs
from weakspot.pairs import Pairs
from weakspot.regions import top
from weakspot.statistics import other_image_test, products_over_shifts, shift_test, standardized

if TYPE_CHECKING:
    import pandas as pd

FLOOR = 1e-6  # of effects, so that their ratio exists
CLIP = 10.0  # of the ratio's logarithm
NOISE = 1e-5  # of the largest logit
ACTIVE = 0.001  # share of the whole change of the margin that a cell's larger effect must reach
SUPPRESSION, BALANCED, PROMOTION, INACTIVE = -1, 0, 1, -128
VARIANTS = ("leave_one_out", "add_one")
TYPES = {SUPPRESSION: "suppression-dominated", BALANCED: "balanced", PROMOTION: "promotion-dominated"}
KINDS = ("inactive", "suppresses the label", "both", "promotes the target")


@dataclass(frozen=True, eq=False)
class Promotion:
    """What each cell of a perturbation does to the two logits. Shapes are (N, rows, columns) of cells, or (N, 1, G).

    Attributes:
        promotion: by how much the cell raises the target's logit.
        suppression: by how much it lowers the label's.
        ratio: log2(promotion / suppression), both at least 1e-6, cut to -10 to 10; NaN where inactive.
        kind: int8: -1 suppression (ratio under -1), 0 balanced, 1 promotion (ratio over 1), -128 inactive: neither
            effect reaches 0.1% of the whole change of the margin.
        groups: (N, 1, H, W) the number of the cell, in reading order, or superpixel that each pixel belongs to.
        scores: one row per image; see `MEANINGS`. `perturbation_type` is that of the whole perturbation:
            "promotion-dominated", "suppression-dominated", "balanced" (neither effect is more than twice the other), or
            missing if it neither raises the target's logit nor lowers the label's.
    """

    promotion: Tensor
    suppression: Tensor
    ratio: Tensor
    kind: Tensor
    groups: Tensor
    scores: pd.DataFrame

    def on_pixels(self, values: Tensor) -> Tensor:
        """(N, 1, H, W): values (N, rows, columns) of cells at every pixel of them."""
        return values.flatten(1).gather(1, self.groups.flatten(1)).view(self.groups.shape)


MEANINGS = {
    "whole_promotion": "By how much the whole perturbation raises the target's logit.",
    "whole_suppression": "By how much the whole perturbation lowers the label's logit.",
    "promotion_log2_ratio": "log2 of the former over the latter, cut to -10 to 10: over 1 the perturbation is "
    "promotion-dominated, under -1 suppression-dominated, between them balanced.",
    "promoted": "By how much all parts of the perturbation, each alone, raise the target's logit.",
    "suppressed": "By how much all parts of the perturbation, each alone, lower the label's logit.",
    "promoting_fraction": "Share of the active cells that mainly promote the target.",
    "suppressing_fraction": "Share of the active cells that mainly suppress the label.",
    "active_fraction": "Share of the cells that do at least 0.1% of the whole change.",
    "negative_fraction": "Share of the cells that work against the attack on either logit.",
    "additivity_gap": "How far the cells' effects are from summing to the whole change, as a share of it; far from 0, "
    "cells act together and no cell's effect is its own.",
}


def promotion_suppression(
    model: nn.Module,
    pairs: Pairs,
    *,
    cell: int = 16,
    groups: Tensor | None = None,
    variant: str = "leave_one_out",
    batch_size: int | None = None,
) -> Promotion:
    """What each part of the perturbation does to the label's and to the target's logit, found by leaving it out.

    With x' the adversarial image and x'_i the same with part i as it was: promotion_i = z_target(x') - z_target(x'_i),
    suppression_i = z_label(x'_i) - z_label(x'). With `variant="add_one"` the clean image takes part i only. The scores
    also hold both effects of the whole perturbation, as of one part that covers the image; they give its type.

    Args:
        model: any classifier.
        pairs: N pairs; where an untargeted attack failed, the target is the class it came closest to.
        cell: side of the square cells in pixels; cells at the far borders may be smaller.
        groups: (N, 1, H, W) numbers of superpixels, from `regions.superpixels`, in place of cells.
        variant: "leave_one_out" or "add_one".
        batch_size: edits at once; changes no result.

    Raises:
        ValueError: when an argument does not fit, naming it.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2, bias=False)).eval()
    >>> pairs = Pairs.of(model, torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4))
    >>> promotion_suppression(model, pairs, cell=2).promotion.shape
    torch.Size([1, 2, 2])
    """
    import pandas as pd

    check_pairs(pairs, model)
    check_choice("variant", variant, VARIANTS)
    with evaluating(model) as classifier:
        pairs = prepare_pairs(classifier, pairs)
        every, shape, side = _groups_of(pairs, cell, groups)
        prepared = prepare(classifier, pairs.clean[:1])
        both = torch.stack([pairs.labels, competing_classes(classifier, pairs)], 1)
        clean, adversarial = (
            predict(classifier, images).gather(1, both).double()
            for images in (pairs.clean, pairs.adversarial)
        )
        effects = [
            _effects(classifier, pairs, number, both, every, side, variant, prepared, batch_size)
            for number in range(len(pairs))
        ]
    size = max(len(one) for one in effects)
    padded = torch.stack(
        [torch.nn.functional.pad(one, (0, 0, 0, size - len(one)), value=torch.nan) for one in effects]
    )
    suppression, promotion = padded.unbind(2)
    # With one cell for the whole image, x' without it is x: the definition of a cell holds for the perturbation too.
    whole = (clean - adversarial)[:, 0], (adversarial - clean)[:, 1]
    change = whole[0] + whole[1]
    ratio = _log2_ratio(promotion, suppression)
    # What rounding makes of logits this large is no effect.
    noise = NOISE * torch.maximum(clean.abs().amax(1), adversarial.abs().amax(1))
    change = change.where(change.abs() > noise, 0)
    larger = torch.maximum(promotion, suppression)
    inactive = ~((larger >= ACTIVE * change.abs()[:, None]) & (larger > noise[:, None]))
    ratio = ratio.masked_fill(inactive, torch.nan)
    kind = (
        ((ratio > 1) * PROMOTION + (ratio < -1) * SUPPRESSION).masked_fill(inactive, INACTIVE).to(torch.int8)
    )
    rows = shape or (1, size)
    return Promotion(
        promotion.float().view(-1, *rows),
        suppression.float().view(-1, *rows),
        ratio.float().view(-1, *rows),
        kind.view(-1, *rows),
        every,
        pd.concat(
            [_whole_scores(*whole, noise), _scores(promotion, suppression, kind, change, noise)], axis=1
        ),
    )


def _log2_ratio(promotion: Tensor, suppression: Tensor) -> Tensor:
    return (promotion.clamp(min=FLOOR) / suppression.clamp(min=FLOOR)).log2().clamp(-CLIP, CLIP)


def _whole_scores(suppression: Tensor, promotion: Tensor, noise: Tensor) -> pd.DataFrame:
    """The two effects (N,) of the whole perturbation, their ratio, and its type; none if it has neither effect."""
    import pandas as pd

    ratio = _log2_ratio(promotion, suppression)
    ratio = ratio.where(torch.maximum(promotion, suppression) > noise, torch.nan)
    kinds = (ratio > 1) * PROMOTION + (ratio < -1) * SUPPRESSION
    return pd.DataFrame(
        {
            "whole_promotion": promotion.cpu().numpy(),
            "whole_suppression": suppression.cpu().numpy(),
            "promotion_log2_ratio": ratio.cpu().numpy(),
            "perturbation_type": [
                TYPES[kind] if known else None
                for kind, known in zip(kinds.tolist(), ratio.isfinite().tolist(), strict=True)
            ],
        }
    )


def _groups_of(
    pairs: Pairs, cell: int, groups: Tensor | None
) -> tuple[Tensor, tuple[int, int] | None, int | None]:
    """Numbers (N, 1, H, W), rows and columns where they are cells, and the cells' side."""
    height, width = pairs.clean.shape[2:]
    shape = (len(pairs), 1, height, width)
    if groups is not None:
        if (
            not isinstance(groups, Tensor)
            or groups.is_floating_point()
            or groups.shape != shape
            or bool(((groups < 0) | (groups >= height * width)).any())
        ):
            what = (
                f"{tuple(groups.shape)} {groups.dtype}"
                if isinstance(groups, Tensor)
                else type(groups).__name__
            )
            raise ValueError(
                f"groups is {what}; accepted is an integer tensor {shape} of numbers from 0 to "
                f"{height * width - 1}"
            )
        return groups.to(pairs.clean.device, torch.long), None, None
    if not isinstance(cell, int) or cell < 1:
        raise ValueError(f"cell is {cell!r}; accepted is a whole number of pixels from 1")
    numbers = cells(height, width, cell).to(pairs.clean.device)
    return numbers.expand(shape), grid(height, width, cell), cell


def _effects(
    classifier: Classifier,
    pairs: Pairs,
    number: int,
    both: Tensor,
    groups: Tensor,
    side: int | None,
    variant: str,
    prepared: Prepared,
    batch_size: int | None,
) -> Tensor:
    """(G, 2) suppression and promotion of each group of one pair."""
    clean, adversarial = pairs.clean[number : number + 1], pairs.adversarial[number : number + 1]
    whole, part = (adversarial, clean) if variant == "leave_one_out" else (clean, adversarial)
    edits = Edits(classifier, whole, prepared, batch_size=batch_size)
    edited = exchanged(edits, part, windowed(groups[number, 0], side))[:, both[number]].double()
    before = edits.clean_logits()[:, both[number]].double()
    without, with_it = (edited, before) if variant == "leave_one_out" else (before, edited)
    touched = torch.zeros(len(edited), dtype=torch.bool, device=edited.device)
    touched[groups[number, 0][(clean != adversarial).any(1)[0]]] = True
    change = (with_it - without).where(
        touched[:, None] | edited.isnan(), 0
    )  # else rounding would be an effect
    return torch.stack([-change[:, 0], change[:, 1]], 1)


def _scores(
    promotion: Tensor, suppression: Tensor, kind: Tensor, change: Tensor, noise: Tensor
) -> pd.DataFrame:
    import pandas as pd

    there = promotion.isfinite()
    number = there.sum(1).double()
    active = (there & (kind != INACTIVE)).sum(1).double()
    promoted, suppressed = promotion.nansum(1), suppression.nansum(1)
    against = (promotion < -noise[:, None]) | (suppression < -noise[:, None])
    negative = (there & against).sum(1) / number
    return pd.DataFrame(
        {
            name: values.cpu().numpy()
            for name, values in {
                "promoted": promoted,
                "suppressed": suppressed,
                "promoting_fraction": (kind == PROMOTION).sum(1) / active,
                "suppressing_fraction": (kind == SUPPRESSION).sum(1) / active,
                "active_fraction": active / number,
                "negative_fraction": negative,
                "additivity_gap": (promoted + suppressed - change) / change.where(change != 0, torch.nan),
            }.items()
        }
    )


def interpretability_score(
    model: nn.Module, pairs: Pairs, *, fraction: float = 0.3, of: str = "label"
) -> Tensor:
    """(N,) share of the perturbation's length that lies where the network sees a class: ||B * d||_2 / ||d||_2.

    B is the top `fraction` share of the class activation of label or target in the clean image (Xu et al. 2019, arXiv
    1904.02057). A perturbation spread evenly has sqrt(fraction), .548 for .3, by its area alone, and one confined to a
    region has what that region leaves it: `interpretability_test` says what is more. NaN where nothing is perturbed.

    Args:
        model: any classifier.
        pairs: N pairs.
        fraction: share of the image in B.
        of: "label" or "target".

    Raises:
        ValueError: when an argument does not fit, naming it.
    """
    scores = interpretability_test(model, pairs, fraction=fraction, of=of, compare=False)
    return torch.tensor(scores[f"interpretability_{of}"].to_numpy(), dtype=torch.float32)


def interpretability_test(
    model: nn.Module,
    pairs: Pairs,
    *,
    fraction: float = 0.3,
    of: str = "label",
    reference: Tensor | None = None,
    compare: bool = True,
) -> pd.DataFrame:
    """`interpretability_score` beside its values with the class activation of other images.

    Args:
        model: any classifier.
        pairs: N pairs.
        fraction: share of the image in B.
        of: "label" or "target"; of a reference image the predicted class and the runner-up.
        reference: (R, C, H, W) other images of the same source, beside those of the batch.
        compare: False leaves out the columns that depend on other images.

    Returns:
        One row per pair, columns interpretability_OF, and after it _null, _p and _q by other images (p needs 19 of
        them), _shift_null and _shift_p by shifting B over the image. Attacks that did not reach the whole image are
        tested against nothing.

    Raises:
        ValueError: when an argument does not fit, naming it.
    """
    check_pairs(pairs, model)
    check_fraction(fraction)
    check_choice("of", of, ("label", "target"))
    with evaluating(model) as classifier:
        pairs = prepare_pairs(classifier, pairs)
        others = other_images(classifier, pairs, reference if compare else None)
        images = torch.cat([pairs.clean, others])
        classes = pairs.labels if of == "label" else competing_classes(classifier, pairs)
        if len(others):
            logits = predict(classifier, others)
            first = logits.argmax(1)
            classes = torch.cat([classes, first if of == "label" else runner_up(logits, first)[1]])
        evidence = class_activation(classifier, images, classes, registration="effective")
    energy = pairs.perturbation.double().square().sum(1)
    confined = reached_fraction(pairs) < WHOLE
    test = None
    if compare:
        matrix = interpretability_matrix(evidence, energy, fraction=fraction)
        allowed = comparable(pairs.clean, others, confined)
        test = other_image_test(matrix.masked_fill(~allowed, torch.nan))
    own = evidence[: len(pairs)]
    total = energy.sum((1, 2), keepdim=True)
    shares = products_over_shifts(top(own, fraction)[:, 0], energy) / total.where(
        total > 0, torch.nan
    ) + _blank(own)
    shares = shares.where(~(shares < 1e-12), 0)  # what Fourier transforms leave of nothing
    return tested(f"interpretability_{of}", test, shift_test(shares.clamp(0, 1).sqrt()), confined)


def interpretability_matrix(evidence: Tensor, energy: Tensor, *, fraction: float) -> Tensor:
    """(N, M) the score of every perturbation, its squares summed over channels (N, H, W), with maps (M, 1, H, W)."""
    region = (top(evidence, fraction).double() + _blank(evidence)[:, None]).flatten(1)
    total = energy.sum((1, 2))
    return (energy.flatten(1) @ region.T / total.where(total > 0, torch.nan)[:, None]).clamp(0, 1).sqrt()


def _blank(evidence: Tensor) -> Tensor:
    """(N, 1, 1) zero, NaN of evidence without contrast: it has no top share, and nothing is said of one."""
    return 0 * standardized(evidence[:, 0]).mean((1, 2), keepdim=True)


def analyze_promotion(
    model: nn.Module,
    pairs: Pairs,
    *,
    seed: int = 0,
    reference: Tensor | None = None,
    compare: bool = True,
) -> Analysis:
    """Promotion and suppression in cells of a fourteenth of the image, and how well the perturbation fits the CAM."""
    import pandas as pd

    del seed
    side = max(1, round(min(pairs.clean.shape[2:]) / 14))
    found = promotion_suppression(model, pairs, cell=side)
    alone = promotion_suppression(model, pairs, cell=side, variant="add_one")
    columns = [
        interpretability_test(model, pairs, of=of, reference=reference, compare=compare)
        for of in ("label", "target")
    ]
    gap = alone.scores[["additivity_gap"]].add_suffix("_add_one")
    ordered = (found.kind.long() + 2).clamp(min=0)
    return Analysis(
        scores=pd.concat([found.scores, gap, *columns], axis=1),
        maps={
            "promotion": found.on_pixels(found.promotion)[:, :1],
            "suppression": found.on_pixels(found.suppression)[:, :1],
            "effect_kind": found.on_pixels(ordered),
        },
        meanings={
            **MEANINGS,
            "additivity_gap_add_one": "The same with each cell of the perturbation added alone to the clean image.",
            "interpretability_label": "Share of the perturbation's length in the 30% of the image that matter most for "
            "the label; by area alone it would be .548.",
            "interpretability_target": "Likewise for the target.",
        },
        pictures={
            "promotion": Picture(
                "Raises {target}",
                kind="signed",
                scale="logit effect",
                meaning="By how much the logit of {target} falls when this cell of the perturbation is taken out.",
            ),
            "suppression": Picture(
                "Lowers {label}",
                kind="signed",
                scale="logit effect",
                meaning="By how much the logit of {label} rises when this cell of the perturbation is taken out.",
            ),
            "effect_kind": Picture(
                "Promotion or suppression",
                kind="category",
                categories=KINDS,
                meaning="Which of the two effects is more than twice the other, cell by cell.",
            ),
        },
    )
