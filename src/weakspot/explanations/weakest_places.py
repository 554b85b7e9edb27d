"""Where an image is weak, whatever its attack did: an estimate for each cell, and a small square that is enough."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weakspot._checks import ModelWarning, quiet
from weakspot.budgets import Linf
from weakspot.classifier import evaluating, predict
from weakspot.explanations.analysis import Analysis, Picture
from weakspot.pairs import Pairs
from weakspot.vulnerability import SmallestSquare, smallest_square, weak_spots
from weakspot.vulnerability.square import enough, needless, unfound

if TYPE_CHECKING:
    import pandas as pd

GRID = 7
LEVEL = 1 / 255
MEANINGS = {
    "smallest_square_side": "Side in pixels of the smallest square found inside which this pair's largest change, "
    "anew, is enough to change the decision. Smaller ones may exist. Missing if not found.",
    "smallest_square_fraction": "Area of that square as a fraction of the image.",
    "smallest_square_top": "First row of that square.",
    "smallest_square_left": "First column of that square.",
    "smallest_square_budget": "By how much values may change in the square: this pair's largest change, at least one "
    "gray level.",
    "weakest_cell": f"Smallest estimate of a cell of a {GRID} x {GRID} grid: by how much its values must change to "
    "change the decision, from gradients alone.",
}


def analyze_weak_spots(model: nn.Module, pairs: Pairs, *, seed: int = 0) -> Analysis:
    """The weak-spot map of each clean image, and the smallest square at the largest change of its pair.

    A pair without a change has no budget, and an image that is misclassified without a change needs none: their squares
    have no scores. One in which no square was found has only `smallest_square_budget`.
    """
    import pandas as pd

    clean, labels = pairs.clean, pairs.labels
    cells = weak_spots(model, clean, labels, grid=GRID, effort="estimate").first_order
    budgets = pair_budgets(pairs)
    scores = {name: torch.full((len(pairs),), torch.nan, dtype=torch.float64) for name in MEANINGS}
    scores["smallest_square_budget"] = budgets.double().cpu()
    scores["weakest_cell"] = cells.flatten(1).amin(1).double().cpu()
    masks = torch.zeros_like(clean[:, :1], dtype=torch.long)
    reached = [""] * len(pairs)
    with evaluating(model) as classifier:
        # Images with equal changes share a search, because a search has one budget.
        for eps in budgets[budgets > 0].unique().tolist():
            rows = (budgets == eps).nonzero()[:, 0]
            with quiet(ModelWarning):  # `weak_spots` has warned of what it would warn of again
                result = smallest_square(classifier, clean[rows], labels[rows], budget=Linf(eps), seed=seed)
            classes = predict(classifier, result.pairs.adversarial).argmax(1)
            _note(scores, result, rows)
            masks[rows] = result.masks().long()
            for row, side, index in zip(rows.tolist(), result.side.tolist(), classes.tolist(), strict=True):
                reached[row] = classifier.class_name(index) if side else ""
    columns: dict[str, object] = {name: values.numpy() for name, values in scores.items()}
    # Where no change of a cell is enough, its estimate is infinite; it is drawn as the whole range.
    estimate = F.interpolate(cells[:, None].clamp(max=1), clean.shape[2:], mode="nearest")
    return Analysis(
        scores=pd.DataFrame(columns | {"smallest_square_class": reached}),
        maps={"first_order": estimate, "smallest_square": masks},
        meanings=MEANINGS,
        pictures={
            "first_order": Picture(
                "Change needed in each cell, estimated",
                meaning="By how much the values of one cell must change, if only these may, for {label} to lose to "
                "another class. From gradients alone; 1 is the whole range from black to white, or more.",
            ),
            "smallest_square": Picture(
                "Smallest square found",
                kind="category",
                categories=("outside", "inside the smallest square found"),
                meaning="A change inside this square is enough. Smaller squares may be enough, too.",
            ),
        },
    )


def square_finding(row: pd.Series) -> str | None:
    """The sentence on the smallest square of one pair, from its row of scores; None if it was not looked for."""
    budget = float(row.get("smallest_square_budget", 0))
    if not budget > 0:
        return None
    if row["read_clean_as"] != row["label"]:
        return needless(str(row["label"]), str(row["read_clean_as"]))
    side, fraction = row["smallest_square_side"], row["smallest_square_fraction"]
    if math.isnan(side):
        return unfound(Linf(budget), str(row["label"]))
    return enough(
        int(side), float(fraction), Linf(budget), (str(row["label"]), str(row["smallest_square_class"]))
    )


def pair_budgets(pairs: Pairs) -> Tensor:
    """(N,) the largest change of any value of each pair, at least one gray level; 0 for a pair without a change.

    Sizes within a thousandth of a whole number of gray levels are that number: they differ by rounding.
    """
    largest = pairs.perturbation.abs().flatten(1).amax(1).double()
    levels = 255 * largest
    whole = levels.round()
    levels = torch.where((levels - whole).abs() < 1e-3, whole, levels)
    return torch.where(largest > 0, levels.clamp(1, 255) * LEVEL, 0)


def _note(scores: dict[str, Tensor], result: SmallestSquare, rows: Tensor) -> None:
    """Enter the squares that were found."""
    found = result.side > 0
    chosen = rows[found].cpu()
    for name in ("side", "fraction", "top", "left"):
        scores[f"smallest_square_{name}"][chosen] = getattr(result, name)[found].double().cpu()
