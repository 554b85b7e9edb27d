"""Restoration: which parts of a perturbation are needed, and which are enough. A causal test, not a heat map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weakspot.classifier import Classifier, evaluating, margin, predict
from weakspot.edits import Edits, Prepared, cells, exchanged, prepare, windowed
from weakspot.edits.cells import Windowed
from weakspot.explanations.analysis import Analysis, Picture, check_pairs, prepare_pairs
from weakspot.fusion import fused
from weakspot.pairs import Pairs

if TYPE_CHECKING:
    import pandas as pd


POINTS = 32  # of a curve, at most, after its beginning
PARTS = ("neither", "in the set that is enough", "in the set that is needed", "in both")


@dataclass(frozen=True, eq=False)
class Restoration:
    """What taking parts of the perturbation out, or putting them in, does to the decision.

    Attributes:
        fraction: (N, P) of the cells that the perturbation changed, from 0 to 1, those that have gone over at each
            point
            of a curve. An attack confined to a few cells is not concentrated for that.
        deletion: (N, P) margin of the label while cells are taken out of the perturbation, those that raise the margin
            most, each alone, first.
        insertion: (N, P) margin while cells are put into the clean image, those that lower it most first.
        necessary: bool (N, 1, H, W), a small set of cells without which the attack fails.
        sufficient: bool (N, 1, H, W), a small set of cells that fools the model alone.
        scores: one row per image; see `MEANINGS`.
    """

    fraction: Tensor
    deletion: Tensor
    insertion: Tensor
    necessary: Tensor
    sufficient: Tensor
    scores: pd.DataFrame


MEANINGS = {
    "deletion_auc": "Mean lead of the label while the changed cells are taken out, the most harmful first, as "
    "a share of the way from the adversarial to the clean lead; the nearer to 1, the fewer cells carry the attack.",
    "insertion_auc": "Mean loss of the lead while the changed cells are put into the clean image, the most harmful "
    "first, as a share of the whole loss; the nearer to 1, the fewer cells carry the attack.",
    "necessary_fraction": "Share of the changed cells in a small set without which the attack fails.",
    "sufficient_fraction": "Share of the changed cells in a small set that fools the model alone.",
}


def restoration(
    model: nn.Module, pairs: Pairs, *, cell: int = 16, batch_size: int | None = None
) -> Restoration:
    """Deletion and insertion of the perturbation (after Petsiuk et al. 2018, arXiv 1806.07421), and small causal sets.

    Sets are found greedily: cells go over in the order of what each does alone until the decision flips; then, from the
    least of them on, every one goes back without which the decision stays flipped. So each cell of a set is needed in
    it; the sets are small, not proven smallest. Where the attack does not fool the model there are none.

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
        pairs = prepare_pairs(classifier, pairs)
        groups = cells(pairs.clean.shape[2], pairs.clean.shape[3], cell).to(pairs.clean.device)
        with fused(classifier, pairs.clean[:1]):  # once for the many single passes
            prepared = prepare(classifier, pairs.clean[:1])
            search = _Search(classifier, groups, windowed(groups, cell), prepared, batch_size)
            found = [search.of(pairs, number) for number in range(len(pairs))]
    counts, deletion, insertion, necessary, sufficient = (
        torch.stack(parts) for parts in zip(*found, strict=True)
    )
    changed = counts[:, -1:].double().clamp(min=1)
    fraction = counts / changed
    return Restoration(
        fraction,
        deletion,
        insertion,
        necessary[:, groups][:, None],
        sufficient[:, groups][:, None],
        _scores(
            fraction,
            deletion,
            insertion,
            *(cells.sum(1) / changed[:, 0] for cells in (necessary, sufficient)),
        ),
    )


@dataclass(frozen=True)
class _Search:
    """Greedy search for small sets of cells.

    Attributes:
        classifier: in eval mode.
        groups: (H, W) numbers of the cells.
        lots: their windows.
        prepared: the classifier's recording.
        batch_size: edits at once.
    """

    classifier: Classifier
    groups: Tensor
    lots: list[Windowed]
    prepared: Prepared
    batch_size: int | None

    def of(self, pairs: Pairs, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of one pair: how many cells have gone over at each point (P,), both curves (P,), both sets of cells (G,)."""
        clean, adversarial = pairs.clean[number : number + 1], pairs.adversarial[number : number + 1]
        label = pairs.labels[number]
        total = int(self.groups.max()) + 1
        same = torch.ones(total, dtype=torch.bool, device=clean.device)
        same[self.groups[(clean != adversarial).any(1)[0]]] = False
        counts = (
            torch.linspace(0, int((~same).sum()), min(total, POINTS) + 1, device=clean.device).round().long()
        )
        # Cells without a change go last; they do nothing.
        out = self._alone(adversarial, clean, label).masked_fill(same, -torch.inf)
        out = out.argsort(descending=True, stable=True)
        into = self._alone(clean, adversarial, label).masked_fill(same, torch.inf).argsort(stable=True)
        deletion = self._along(adversarial, clean, out, counts, label)
        insertion = self._along(clean, adversarial, into, counts, label)
        none = torch.zeros_like(same)
        if not bool((deletion[0] < 0) & (deletion[-1] >= 0)):
            return counts, deletion, insertion, none, none
        firsts = (int(counts[curve.long().argmax()]) for curve in (deletion >= 0, insertion < 0))
        necessary = self._pruned(adversarial, clean, out, next(firsts), label, wanted=1)
        sufficient = self._pruned(clean, adversarial, into, next(firsts), label, wanted=-1)
        return counts, deletion, insertion, necessary, sufficient

    def _alone(self, image: Tensor, other: Tensor, label: Tensor) -> Tensor:
        """(G,) margins of the image with each cell, alone, from the other."""
        edits = Edits(self.classifier, image, self.prepared, batch_size=self.batch_size)
        logits = exchanged(edits, other, self.lots)
        return margin(logits, label.expand(len(logits)))

    def _mixed(self, image: Tensor, other: Tensor, chosen: Tensor) -> Tensor:
        """(M, C, H, W): the image with chosen cells (M, G) from the other."""
        return torch.where(chosen[:, self.groups][:, None], other, image)

    def _margins(self, images: Tensor, label: Tensor) -> Tensor:
        logits = predict(self.classifier, images, self.batch_size)
        return margin(logits, label.expand(len(images)))

    def _along(self, image: Tensor, other: Tensor, order: Tensor, counts: Tensor, label: Tensor) -> Tensor:
        """(P,) margins while so many cells go over to the other in this order."""
        return self._margins(self._mixed(image, other, _ranks(order) < counts[:, None]), label)

    def _pruned(
        self, image: Tensor, other: Tensor, order: Tensor, first: int, label: Tensor, *, wanted: int
    ) -> Tensor:
        """(G,) bool, of the first cells in this order, which flip the decision, those that it takes."""
        chosen = _ranks(order) < first
        before = -1
        while before != int(chosen.sum()):  # what one cell's going makes superfluous goes in another pass
            before = int(chosen.sum())
            for number in order[:first].flip(0)[chosen[order[:first].flip(0)]].tolist():
                chosen[number] = False
                margins = self._margins(self._mixed(image, other, chosen[None]), label)
                if not bool(margins[0] >= 0 if wanted > 0 else margins[0] < 0):
                    chosen[number] = True
        return chosen


def _ranks(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _scores(
    fraction: Tensor, deletion: Tensor, insertion: Tensor, necessary: Tensor, sufficient: Tensor
) -> pd.DataFrame:
    import pandas as pd

    lost = (deletion[:, -1] - deletion[:, 0]).double()
    lost = lost.where((lost > 1e-6) & (deletion[:, -1] >= 0), torch.nan)  # of a lead that was there
    regained = torch.trapezoid(deletion.double() - deletion[:, :1], fraction, dim=1) / lost
    taken = torch.trapezoid(insertion[:, :1] - insertion.double(), fraction, dim=1) / lost
    fractions = [chosen.masked_fill(necessary == 0, torch.nan) for chosen in (necessary, sufficient)]
    return pd.DataFrame(
        {
            name: values.cpu().numpy()
            for name, values in zip(MEANINGS, (regained, taken, *fractions), strict=True)
        }
    )


def analyze_restoration(model: nn.Module, pairs: Pairs, *, seed: int = 0) -> Analysis:
    """`restoration` in cells of an eighth of the image: a search cell by cell, so few of them."""
    del seed
    found = restoration(model, pairs, cell=max(1, round(min(pairs.clean.shape[2:]) / 8)))
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
