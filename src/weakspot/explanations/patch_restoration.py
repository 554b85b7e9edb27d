"""Restoration: which parts of a perturbation are needed, and which are enough?

A causal test, not a heat map: parts of the perturbation are removed or inserted and the decision is observed. Deletion
and insertion curves are after Petsiuk et al. 2018 (arXiv 1806.07421), applied to the perturbation; the greedy search
for small sets is ours. The curves are their own control: with no cell removed the attack works, with all it is undone.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weakspot._checks import check_count
from weakspot.classifier import Classifier, evaluating
from weakspot.edits import Edits, Prepared, cells, exchanged, prepare, windowed
from weakspot.edits.cell_windows import Windowed
from weakspot.explanations.analysis import Analysis, Picture, check_pairs, prepare_pairs
from weakspot.fusion import fused
from weakspot.logits import margin
from weakspot.pairs import Pairs
from weakspot.statistics.number_format import number

if TYPE_CHECKING:
    import pandas as pd

AT_ONCE = 4  # cells that are tried at once, at first
POINTS = 32  # of a curve, at most, after its start
PARTS = (
    "neither",
    "in the set that is enough",
    "in the set that is needed",
    "in both",
    "no set, because the attack did not succeed or the image was misclassified already",
)
MEANINGS = {
    "deletion_auc": "Mean margin of the label while the changed cells are removed, the most harmful first, as a "
    "fraction of the way from the adversarial to the clean margin. The nearer to 1, the fewer cells carry the attack.",
    "insertion_auc": "Mean loss of margin while the changed cells are put into the clean image, the most harmful "
    "first, as a fraction of the whole loss. The nearer to 1, the fewer cells carry the attack.",
    "necessary_fraction": "Fraction of the changed cells in a small set without which the attack fails.",
    "sufficient_fraction": "Fraction of the changed cells in a small set that fools the model alone.",
}


@dataclass(frozen=True, eq=False)
class Restoration:
    """What removing or inserting parts of the perturbation does to the decision.

    Attributes:
        fraction: (N, P) fraction of the changed cells, from 0 to 1, that are exchanged at each point of a curve. Only
            changed cells count, so an attack confined to a few cells is not concentrated for that reason.
        deletion: (N, P) margin of the label while cells are removed from the perturbation, in the order of how much
            each alone raises the margin.
        insertion: (N, P) margin while cells are put into the clean image, in the order of how much each alone lowers
            the margin.
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

    def __repr__(self) -> str:
        count, points = self.fraction.shape
        means = ", ".join(f"{name} {number(float(self.scores[name].mean()))}" for name in self.scores)
        return f"Restoration of {count} perturbations, curves of {points} points\n  means: {means}"


def restoration(
    model: nn.Module, pairs: Pairs, *, cell: int = 16, batch_size: int | None = None
) -> Restoration:
    """Deletion and insertion curves of the perturbation, and small causal sets of cells.

    Sets are found greedily. Cells are exchanged in the order of what each does alone until the decision flips. Then,
    starting with the weakest, a cell is put back if the decision stays flipped without it. So each cell of a set is
    needed in it; the sets are small, but not proven smallest. If the attack does not fool the model, there are none.

    Args:
        model: any classifier. It is not changed.
        pairs: N pairs.
        cell: side of the square cells in pixels.
        batch_size: edits at once; changes no result.

    Raises:
        ValueError: if an argument is invalid; the message names it.
    """
    check_pairs(pairs, model)
    check_count("cell", cell)
    with evaluating(model) as classifier:
        pairs = prepare_pairs(classifier, pairs)
        groups = cells(pairs.clean.shape[2], pairs.clean.shape[3], cell).to(pairs.clean.device)
        prepared = prepare(classifier, pairs.clean[:1])
        # Once for the many single passes; a recording is of the fused network already.
        with nullcontext() if prepared.recording else fused(classifier, pairs.clean[:1]):
            search = _CellSearch(classifier, groups, windowed(groups, cell), prepared, batch_size)
            results = [search.of(pairs, number) for number in range(len(pairs))]
    counts, deletion, insertion, necessary, sufficient = (
        torch.stack(parts) for parts in zip(*results, strict=True)
    )
    changed = counts[:, -1:].double().clamp(min=1)
    fraction = counts / changed
    set_fractions = [chosen.sum(1) / changed[:, 0] for chosen in (necessary, sufficient)]
    return Restoration(
        fraction,
        deletion,
        insertion,
        # By cell (N, G), indexed by the (H, W) numbers of the cells: (N, H, W).
        necessary[:, groups][:, None],
        sufficient[:, groups][:, None],
        _scores(fraction, deletion, insertion, *set_fractions),
    )


@dataclass(frozen=True)
class _CellSearch:
    """Greedy search for small sets of cells.

    Attributes:
        classifier: in eval mode.
        groups: (H, W) numbers of the G cells.
        windows: the cells, by the size of their windows.
        prepared: the classifier's recording.
        batch_size: edits at once.
    """

    classifier: Classifier
    groups: Tensor
    windows: list[Windowed]
    prepared: Prepared
    batch_size: int | None

    def of(self, pairs: Pairs, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One pair: the number of exchanged cells at each point (P,), both curves (P,), both sets of cells (G,)."""
        clean, adversarial = pairs.clean[number : number + 1], pairs.adversarial[number : number + 1]
        label = pairs.labels[number]
        total = int(self.groups.max()) + 1
        unchanged = torch.ones(total, dtype=torch.bool, device=clean.device)
        unchanged[self.groups[(clean != adversarial).any(1)[0]]] = False
        # The points of both curves, from no exchanged cell to all cells that the attack changed.
        points = min(total, POINTS) + 1
        counts = torch.linspace(0, int((~unchanged).sum()), points, device=clean.device).round().long()
        attacked, intact = self._edits(adversarial), self._edits(clean)
        # Unchanged cells go last: they do nothing.
        removal = self._alone(attacked, clean, label).masked_fill(unchanged, -torch.inf)
        removal = removal.argsort(descending=True, stable=True)
        entry = self._alone(intact, adversarial, label).masked_fill(unchanged, torch.inf)
        entry = entry.argsort(stable=True)
        deletion = self._along(attacked, clean, removal, counts, label)
        insertion = self._along(intact, adversarial, entry, counts, label)
        none = torch.zeros_like(unchanged)
        if not bool(
            (deletion[0] < 0) & (deletion[-1] >= 0)
        ):  # the attack must fool, the clean image must not
            return counts, deletion, insertion, none, none
        # Where each curve first crosses zero; argmax of a 0/1 curve is its first 1.
        removed, entered = (int(counts[curve.long().argmax()]) for curve in (deletion >= 0, insertion < 0))
        necessary = self._pruned(adversarial, clean, removal[:removed], label, correct=True)
        sufficient = self._pruned(clean, adversarial, entry[:entered], label, correct=False)
        return counts, deletion, insertion, necessary, sufficient

    def _edits(self, image: Tensor) -> Edits:
        return Edits(self.classifier, image, self.prepared, batch_size=self.batch_size)

    def _alone(self, edits: Edits, other: Tensor, label: Tensor, chosen: Tensor | None = None) -> Tensor:
        """(G,) margins of the image with each chosen cell, alone, taken from the other; NaN for cells not chosen."""
        logits = exchanged(edits, other, self.windows, chosen)
        return margin(logits, label.expand(len(logits)))

    def _along(self, edits: Edits, other: Tensor, order: Tensor, counts: Tensor, label: Tensor) -> Tensor:
        """(P,) margins of the image while the first `counts` cells in this order are taken from the other."""
        # ranks[order[i]] = i: the inverse permutation.
        ranks = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        counts, places = counts.unique_consecutive(return_inverse=True)  # few changed cells repeat counts
        chosen = ranks < counts[:, None]
        logits = edits.whole(torch.where(chosen[:, self.groups][:, None], other, edits.images))
        return margin(logits, label.expand(len(logits)))[places]

    def _pruned(
        self, image: Tensor, other: Tensor, flipping: Tensor, label: Tensor, *, correct: bool
    ) -> Tensor:
        """(G,) bool: of the cells that flip the decision, strongest first, those that are needed for it.

        Cells are put back in turns, the weakest first, and again from the first one on, because putting one back can
        make another superfluous, until all were tried since the last one that stayed back. Most cells are needed, so
        several are tried at once, each alone; those behind the first superfluous one are then tried again.

        Args:
            image: (1, C, H, W) that the cells are put into.
            other: (1, C, H, W) that they are taken from.
            flipping: (F,) numbers of the cells.
            label: the class of the clean image.
            correct: whether the flipped decision is the label.
        """
        chosen = torch.zeros(int(self.groups.max()) + 1, dtype=torch.bool, device=flipping.device)
        chosen[flipping] = True
        kept, start, untried, at_once = flipping.flip(0), 0, len(flipping), AT_ONCE
        mixed = self._edits(torch.where(chosen[self.groups], other, image))
        while untried:
            tried = kept[start : start + min(at_once, untried)]
            alone = torch.zeros_like(chosen).index_fill_(0, tried, True)
            # Flipped means that the label wins if `correct`, and that it loses if not.
            stays_flipped = (self._alone(mixed, image, label, alone)[tried] >= 0) == correct
            if bool(stays_flipped.any()):
                # Only the first: whether those behind it are superfluous depends on it.
                superfluous = start + int(stays_flipped.long().argmax())
                chosen[kept[superfluous]] = False
                kept = torch.cat([kept[:superfluous], kept[superfluous + 1 :]])
                start, untried, at_once = superfluous, len(kept), AT_ONCE
                mixed = self._edits(torch.where(chosen[self.groups], other, image))
            else:
                # All of them are needed, so twice as many are tried next.
                start, untried, at_once = start + len(tried), untried - len(tried), 2 * at_once
            if start >= len(kept):
                start = 0
        return chosen


def _scores(
    fraction: Tensor, deletion: Tensor, insertion: Tensor, necessary: Tensor, sufficient: Tensor
) -> pd.DataFrame:
    import pandas as pd

    lost = (deletion[:, -1] - deletion[:, 0]).double()
    lost = lost.where(
        (lost > 1e-6) & (deletion[:, -1] >= 0), torch.nan
    )  # only a lead that existed can be lost
    # Areas between each curve and its start, as a fraction of the whole change of the margin.
    regained = torch.trapezoid(deletion.double() - deletion[:, :1], fraction, dim=1) / lost
    taken = torch.trapezoid(insertion[:, :1] - insertion.double(), fraction, dim=1) / lost
    # An empty set means that there was nothing to search, not that no cell is needed.
    sets = [chosen.masked_fill(necessary == 0, torch.nan) for chosen in (necessary, sufficient)]
    return pd.DataFrame(
        {name: values.cpu().numpy() for name, values in zip(MEANINGS, (regained, taken, *sets), strict=True)}
    )


def analyze_restoration(
    model: nn.Module,
    pairs: Pairs,
    *,
    seed: int = 0,  # noqa: ARG001 - the contract's signature
) -> Analysis:
    """`restoration` in cells of 1/8 of the image: the search goes cell by cell, so there are few of them."""
    result = restoration(model, pairs, cell=max(1, round(min(pairs.clean.shape[2:]) / 8)))
    parts = result.sufficient * 1 + result.necessary * 2
    untried = ~parts.any(dim=(1, 2, 3), keepdim=True)  # a successful attack has a set of each kind
    return Analysis(
        scores=result.scores,
        maps={"causal_cells": parts.masked_fill(untried, len(PARTS) - 1)},
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
