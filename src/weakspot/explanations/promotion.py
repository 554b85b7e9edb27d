"""Promotion and suppression: which parts of a perturbation raise the target, and which lower the label?

After Xu et al. 2019 (arXiv 1904.02057): suppression s_i = z_label(x' without part i) - z_label(x'), promotion
p_i = z_target(x') - z_target(x' without part i). The floors, inactive cells, negative fractions, additivity gap and the
add-one variant are ours. The control is the additivity gap: far from 0, no cell's effect is its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weakspot._checks import check_choice, check_count
from weakspot.classifier import Classifier, evaluating, predict
from weakspot.edits import Edits, Prepared, cells, exchanged, grid, prepare, windowed
from weakspot.explanations.analysis import Analysis, Picture, check_pairs, competing_classes, prepare_pairs
from weakspot.explanations.class_evidence import interpretability_test
from weakspot.pairs import Pairs
from weakspot.statistics.number_format import counted

if TYPE_CHECKING:
    import pandas as pd

FLOOR = 1e-6  # of effects, so that their ratio exists
CLIP = 10.0  # of log2 of the ratio
NOISE = 1e-5  # of the largest logit; smaller effects are rounding
ACTIVE = 0.001  # fraction of the whole change of the margin that a cell's larger effect must reach
SUPPRESSION, BALANCED, PROMOTION, INACTIVE = -1, 0, 1, -128
VARIANTS = ("leave_one_out", "add_one")
TYPES = {SUPPRESSION: "suppression-dominated", BALANCED: "balanced", PROMOTION: "promotion-dominated"}
KINDS = ("inactive", "suppresses the label", "both", "promotes the target")
MEANINGS = {
    "whole_promotion": "By how much the whole perturbation raises the target's logit.",
    "whole_suppression": "By how much the whole perturbation lowers the label's logit.",
    "promotion_log2_ratio": "log2 of whole promotion over whole suppression, clipped to -10 to 10. Above 1 the "
    "perturbation is promotion-dominated, below -1 suppression-dominated, in between balanced. Missing if the "
    "perturbation does not reduce the margin.",
    "promoted": "By how much all parts of the perturbation, each alone, raise the target's logit.",
    "suppressed": "By how much all parts of the perturbation, each alone, lower the label's logit.",
    "promoting_fraction": "Fraction of the active cells that mainly promote the target.",
    "suppressing_fraction": "Fraction of the active cells that mainly suppress the label.",
    "active_fraction": "Fraction of the cells that do at least 0.1% of the whole change.",
    "negative_fraction": "Fraction of the cells that work against the attack on either logit.",
    "additivity_gap": "How far the sum of the cells' effects is from the whole change, as a fraction of it. Far from "
    "0, cells act together and no cell's effect is its own.",
    # .548 is the square root of .3: lengths go by the square root of areas.
    "interpretability_label": "Fraction of the perturbation's length in the 30% of the image that matter most for "
    "the label; by area alone it would be .548.",
    "interpretability_target": "Fraction of the perturbation's length in the 30% of the image that matter most for "
    "the target.",
}


@dataclass(frozen=True, eq=False)
class Promotion:
    """The effect of each cell of a perturbation on two logits, in shape (N, rows, columns), or (N, 1, G) for groups.

    Attributes:
        promotion: by how much the cell raises the target's logit.
        suppression: by how much it lowers the label's logit.
        ratio: log2(promotion / suppression), both at least 1e-6, clipped to -10 to 10; NaN if inactive.
        kind: int8: -1 suppression (ratio below -1), 0 balanced, 1 promotion (ratio above 1), -128 inactive (neither
            effect reaches 0.1% of the whole change of the margin).
        groups: (N, 1, H, W) the number of each pixel's cell, in reading order, or superpixel.
        scores: one row per image; see `MEANINGS`. `perturbation_type` is that of the whole perturbation:
            "promotion-dominated", "suppression-dominated", "balanced" (neither effect is more than twice the other), or
            missing if it does not reduce the lead of the label over the target.
    """

    promotion: Tensor
    suppression: Tensor
    ratio: Tensor
    kind: Tensor
    groups: Tensor
    scores: pd.DataFrame

    def on_pixels(self, values: Tensor) -> Tensor:
        """(N, 1, H, W): values (N, rows, columns) of cells, at every pixel of their cell."""
        return values.flatten(1).gather(1, self.groups.flatten(1)).view(self.groups.shape)

    def __repr__(self) -> str:
        count, rows, columns = self.promotion.shape
        types = self.scores["perturbation_type"]
        numbers = ", ".join(f"{int((types == name).sum())} {name}" for name in TYPES.values())
        means = ", ".join(
            f"{name.replace('_', ' ')} {round(float(self.scores[name].mean()), 2) + 0.0:.2f}"
            for name in ("promoting_fraction", "suppressing_fraction", "active_fraction", "additivity_gap")
        )
        return (
            f"Promotion of {counted(count, 'perturbation')} in {rows} x {columns} cells\n"
            f"  types: {numbers}\n"
            f"  means: {means}"
        )


def promotion_suppression(
    model: nn.Module,
    pairs: Pairs,
    *,
    cell: int = 16,
    groups: Tensor | None = None,
    variant: str = "leave_one_out",
    batch_size: int | None = None,
) -> Promotion:
    """Measure what each part of the perturbation does to the logits of label and target, by leaving it out.

    Let x' be the adversarial image and x'_i the same image with part i restored to its clean pixels. Then
    promotion_i = z_target(x') - z_target(x'_i) and suppression_i = z_label(x'_i) - z_label(x'). With
    `variant="add_one"`, the clean image receives part i only. The scores also hold both effects of the whole
    perturbation, as of one part that covers the image; they give its type.

    Args:
        model: any classifier. It is not changed.
        pairs: N pairs. If an untargeted attack failed, the target is the class it came closest to.
        cell: side of the square cells in pixels; cells at the right and bottom borders may be smaller.
        groups: (N, 1, H, W) numbers of superpixels, from `regions.superpixels`, instead of cells.
        variant: "leave_one_out" or "add_one".
        batch_size: edits at once; changes no result.

    Raises:
        ValueError: if an argument is invalid; the message names it.

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
        side = cell if groups is None else None
        groups = _groups(pairs, cell, groups)
        both = torch.stack([pairs.labels, competing_classes(classifier, pairs)], 1)
        clean, adversarial = (
            predict(classifier, images).gather(1, both).double()
            for images in (pairs.clean, pairs.adversarial)
        )
        effects = _Effects(classifier, prepare(classifier, pairs.clean[:1]), side, variant, batch_size)
        parts = [
            effects.of(pairs.clean[i : i + 1], pairs.adversarial[i : i + 1], groups[i, 0], both[i])
            for i in range(len(pairs))
        ]
    size = max(len(part) for part in parts)  # images can have different numbers of superpixels
    # (N, G, 2), with NaN for the groups that an image lacks.
    padded = torch.stack(
        [torch.nn.functional.pad(part, (0, 0, 0, size - len(part)), value=torch.nan) for part in parts]
    )
    suppression, promotion = padded.unbind(2)
    # For one cell as large as the image, x' without it is x: the definition of a cell also covers the perturbation.
    whole_suppression, whole_promotion = (clean - adversarial)[:, 0], (adversarial - clean)[:, 1]
    change = whole_suppression + whole_promotion  # of the margin z_label - z_target
    # r_i = log2(p_i / s_i): above 1 promotion is more than twice suppression, below -1 the other way round.
    ratio = _log2_ratio(promotion, suppression)
    # Logits are float32 sums: differences below this fraction of the largest logit are rounding, not an effect.
    noise = NOISE * torch.maximum(clean.abs().amax(1), adversarial.abs().amax(1))
    change = change.where(change.abs() > noise, 0)
    # A cell is inactive if neither effect reaches 0.1% of the whole change or rises above rounding.
    larger = torch.maximum(promotion, suppression)
    # Negated, so that NaN counts as inactive.
    inactive = ~((larger >= ACTIVE * change.abs()[:, None]) & (larger > noise[:, None]))
    ratio = ratio.masked_fill(inactive, torch.nan)
    kind = ((ratio > 1) * PROMOTION + (ratio < -1) * SUPPRESSION).masked_fill(inactive, INACTIVE)
    kind = kind.to(torch.int8)
    layout = (1, size) if side is None else grid(pairs.clean.shape[2], pairs.clean.shape[3], side)
    scores = [
        _whole_scores(whole_suppression, whole_promotion, change),
        _cell_scores(promotion, suppression, kind, change, noise),
    ]
    return Promotion(
        promotion.float().view(-1, *layout),
        suppression.float().view(-1, *layout),
        ratio.float().view(-1, *layout),
        kind.view(-1, *layout),
        groups,
        pd.concat(scores, axis=1),
    )


def _groups(pairs: Pairs, cell: int, groups: Tensor | None) -> Tensor:
    """(N, 1, H, W) the numbers of cells, or the groups after validation."""
    height, width = pairs.clean.shape[2:]
    shape = (len(pairs), 1, height, width)
    if groups is None:
        check_count("cell", cell)
        return cells(height, width, cell).to(pairs.clean.device).expand(shape)
    if (
        not isinstance(groups, Tensor)
        or groups.is_floating_point()
        or groups.shape != shape
        or bool(((groups < 0) | (groups >= height * width)).any())
    ):
        got = f"{tuple(groups.shape)} {groups.dtype}" if isinstance(groups, Tensor) else type(groups).__name__
        raise ValueError(
            f"groups must be an integer tensor {shape} of numbers from 0 to {height * width - 1}, got {got}"
        )
    return groups.to(pairs.clean.device, torch.long)


@dataclass(frozen=True)
class _Effects:
    """The effects of the parts of one pair at a time.

    Attributes:
        classifier: in eval mode.
        prepared: the classifier's recording.
        cell: side of the cells, or None for superpixels.
        variant: one of `VARIANTS`.
        batch_size: edits at once.
    """

    classifier: Classifier
    prepared: Prepared
    cell: int | None
    variant: str
    batch_size: int | None

    def of(self, clean: Tensor, adversarial: Tensor, groups: Tensor, both: Tensor) -> Tensor:
        """(G, 2) suppression and promotion of each group of one pair.

        Args:
            clean: (1, C, H, W).
            adversarial: (1, C, H, W).
            groups: (H, W) numbers.
            both: (2,) label and target.
        """
        # Leave one out: x' with clean pixels in the part. Add one: x with adversarial pixels in the part.
        leave_out = self.variant == "leave_one_out"
        whole, part = (adversarial, clean) if leave_out else (clean, adversarial)
        edits = Edits(self.classifier, whole, self.prepared, batch_size=self.batch_size)
        edited = exchanged(edits, part, windowed(groups, self.cell))[:, both].double()
        before = edits.clean_logits()[:, both].double()
        without, with_part = (edited, before) if leave_out else (before, edited)
        touched = torch.zeros(len(edited), dtype=torch.bool, device=edited.device)
        touched[groups[(clean != adversarial).any(1)[0]]] = True
        # An untouched group has exactly no effect; what is left of the difference is rounding.
        change = (with_part - without).where(touched[:, None] | edited.isnan(), 0)
        # The part changes z_label by -s_i and z_target by +p_i.
        return torch.stack([-change[:, 0], change[:, 1]], 1)


def _log2_ratio(promotion: Tensor, suppression: Tensor) -> Tensor:
    # Effects in the wrong direction count as the floor; negative_fraction reports how many there are.
    return (promotion.clamp(min=FLOOR) / suppression.clamp(min=FLOOR)).log2().clamp(-CLIP, CLIP)


def _whole_scores(suppression: Tensor, promotion: Tensor, change: Tensor) -> pd.DataFrame:
    """The two effects (N,) of the whole perturbation, their ratio and its type: None unless the margin falls."""
    import pandas as pd

    ratio = _log2_ratio(promotion, suppression)
    ratio = ratio.where(change > 0, torch.nan)
    kinds = (ratio > 1) * PROMOTION + (ratio < -1) * SUPPRESSION
    return pd.DataFrame(
        {
            "whole_promotion": promotion.cpu().numpy(),
            "whole_suppression": suppression.cpu().numpy(),
            "promotion_log2_ratio": ratio.cpu().numpy(),
            "perturbation_type": [
                TYPES[kind] if defined else None
                for kind, defined in zip(kinds.tolist(), ratio.isfinite().tolist(), strict=True)
            ],
        }
    )


def _cell_scores(
    promotion: Tensor, suppression: Tensor, kind: Tensor, change: Tensor, noise: Tensor
) -> pd.DataFrame:
    import pandas as pd

    # NaN pads images with fewer superpixels than the others.
    exists = promotion.isfinite()
    number = exists.sum(1).double()
    # Without active cells, the fractions among them are 0 / 0, which is NaN.
    active = (exists & (kind != INACTIVE)).sum(1).double()
    promoted, suppressed = promotion.nansum(1), suppression.nansum(1)
    against = (promotion < -noise[:, None]) | (suppression < -noise[:, None])
    columns = {
        "promoted": promoted,
        "suppressed": suppressed,
        "promoting_fraction": (kind == PROMOTION).sum(1) / active,
        "suppressing_fraction": (kind == SUPPRESSION).sum(1) / active,
        "active_fraction": active / number,
        "negative_fraction": (exists & against).sum(1) / number,
        "additivity_gap": (promoted + suppressed - change) / change.where(change != 0, torch.nan),
    }
    return pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})


def analyze_promotion(
    model: nn.Module,
    pairs: Pairs,
    *,
    seed: int = 0,  # noqa: ARG001 - the contract's signature
    reference: Tensor | None = None,
    compare: bool = True,
) -> Analysis:
    """Promotion and suppression in cells of 1/14 of the image, and the interpretability score of both classes."""
    import pandas as pd

    side = max(1, round(min(pairs.clean.shape[2:]) / 14))
    result = promotion_suppression(model, pairs, cell=side)
    interpretability = [
        interpretability_test(model, pairs, of=of, reference=reference, compare=compare)
        for of in ("label", "target")
    ]
    category = (result.kind.long() + 2).clamp(min=0)  # -128, -1, 0, 1 become the positions in KINDS
    return Analysis(
        scores=pd.concat([result.scores, *interpretability], axis=1),
        maps={
            "promotion": result.on_pixels(result.promotion)[:, :1],
            "suppression": result.on_pixels(result.suppression)[:, :1],
            "effect_kind": result.on_pixels(category),
        },
        meanings=MEANINGS,
        pictures={
            "promotion": Picture(
                "Raises {target}",
                kind="signed",
                scale="logit effect",
                meaning="By how much the logit of {target} falls if this cell of the perturbation is removed.",
            ),
            "suppression": Picture(
                "Lowers {label}",
                kind="signed",
                scale="logit effect",
                meaning="By how much the logit of {label} rises if this cell of the perturbation is removed.",
            ),
            "effect_kind": Picture(
                "Promotion or suppression",
                kind="category",
                categories=KINDS,
                meaning="Which of the two effects is more than twice the other, cell by cell.",
            ),
        },
    )
