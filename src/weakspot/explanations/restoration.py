"""Restoration: which parts of a perturbation are needed, and which are enough. A causal test, not a heat map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weakspot.classifier import Classifier, evaluating, margin, predict
from weakspot.edits import Edits, Prepared, cells, exchanged, prepare, windowed
from weakspot.edits.groups import Windowed
from weakspot.explanations.analysis import Analysis, Picture, check_pairs
from weakspot.pairs import Pairs

if TYPE_CHECKING:
    import pandas as pd

ROUNDS = 20  # of the greedy search: so many times the rest is judged anew
PARTS = ("neither", "in the set that is enough", "in the set that is needed", "in both")


@dataclass(frozen=True, eq=False)
class Restoration:
    """What taking parts of the perturbation out, or putting them in, does to the decision.

    Attributes:
        deletion: (N, G + 1) margin of the label after the first 0 to G cells were taken out of the perturbation, those
            that raise the margin most, each alone, first.
        insertion: (N, G + 1) margin after as many were put into the clean image, those that lower it most first.
        necessary: bool (N, 1, H, W), a small set of cells without which the attack fails.
        sufficient: bool (N, 1, H, W), a small set of cells that fools the model alone.
        scores: one row per image; see `MEANINGS`.
    """

    deletion: Tensor
    insertion: Tensor
    necessary: Tensor
    sufficient: Tensor
    scores: pd.DataFrame


MEANINGS = {
    "deletion_auc": "Mean lead of the label while cells of the perturbation are taken out, the most harmful first, as "
    "a share of the way from the adversarial to the clean lead; the nearer to 1, the fewer cells carry the attack.",
    "insertion_auc": "Mean loss of the lead while cells are put into the clean image, the most harmful first, as a "
    "share of the whole loss; the nearer to 1, the fewer cells carry the attack.",
    "necessary_share": "Share of the cells in a small set without which the attack fails.",
    "sufficient_share": "Share of the cells in a small set that fools the model alone.",
}


def restoration(
    model: nn.Module, pairs: Pairs, *, cell: int = 16, batch_size: int | None = None
) -> Restoration:
    """Deletion and insertion of the perturbation (after Petsiuk et al. 2018, arXiv 1806.07421), and small causal sets.

    Sets are found greedily: the cells that change the margin most, given those already chosen, are added a twentieth
    at a time until the decision flips, and then left out again one by one where the decision stays flipped. They are
    small, not proven smallest. Where the attack does not fool the model there are none.

    Args:
        model: any classifier.
        pairs: N pairs.
        cell: side of the square cells in pixels.
        batch_size: edits at once; changes no result.

    Raises:
        ValueError: when an argument does not fit, naming it.
    """
    check_pairs(pairs, model)
    if not isinstance(cell, int) or cell < 1:
        raise ValueError(f"cell is {cell!r}; accepted is a whole number of pixels from 1")
    with evaluating(model) as classifier:
        pairs = pairs.to(classifier.mean.device)
        groups = cells(pairs.clean.shape[2], pairs.clean.shape[3], cell).to(pairs.clean.device)
        search = _Search(
            classifier, groups, windowed(groups, cell), prepare(classifier, pairs.clean[:1]), batch_size
        )
        found = [search.of(pairs, number) for number in range(len(pairs))]
    deletion, insertion, necessary, sufficient = (torch.stack(parts) for parts in zip(*found, strict=True))
    return Restoration(
        deletion,
        insertion,
        necessary[:, groups][:, None],
        sufficient[:, groups][:, None],
        _scores(deletion, insertion, necessary, sufficient),
    )


def analyse(model: nn.Module, pairs: Pairs, *, seed: int = 0) -> Analysis:
    """`restoration` in cells of a fourteenth of the image."""
    del seed
    found = restoration(model, pairs, cell=max(1, round(min(pairs.clean.shape[2:]) / 14)))
    return Analysis(
        scores=found.scores,
        maps={"causal_cells": found.sufficient * 1 + found.necessary * 2},
        meanings=MEANINGS,
        pictures={
            "causal_cells": Picture(
                "What is enough, what is needed",
                kind="category",
                categories=PARTS,
                meaning="Cells that together fool the model alone, and cells without which the attack fails; small "
                "sets, found greedily.",
            )
        },
    )
