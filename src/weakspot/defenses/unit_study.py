"""A layer's units under attack: which move beyond noise, whether concepts go with it, and whether masking them helps.

After Xu et al. 2019 (arXiv 1904.02057); the tests and controls are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from weakspot.attacks import pgd
from weakspot.defenses.unit_masking import Attack, masking, masking_sentence
from weakspot.dissection import (
    Dissection,
    associate,
    concept_sentence,
    join,
    moved_concepts,
    sensitivity_sentence,
    unit_sensitivity,
)
from weakspot.dissection.association import COLUMNS, ENOUGH, FEWEST
from weakspot.dissection.sensitivity import LEVEL
from weakspot.pairs import Pairs

if TYPE_CHECKING:
    import pandas as pd

FRACTION = 0.2  # of a layer's units are masked at most, where no number is given


@dataclass(frozen=True, eq=False)
class UnitStudy:
    """One layer's units under attack.

    Attributes:
        layer: its name.
        units: one row per unit, the columns of `unit_sensitivity` and of `dissect`.
        sentences: what is shown, and what is not.
        masked: the units that were masked; none if masking was not asked for, or no unit moves beyond noise.
        masking: the table of `masking`, or None.
    """

    layer: str
    units: pd.DataFrame
    sentences: Sequence[str]
    masked: Sequence[int] = ()
    masking: pd.DataFrame | None = None

    def __repr__(self) -> str:
        return f"UnitStudy({self.layer!r}, {len(self.units)} units, {len(self.masked)} masked)"


def unit_study(
    model: nn.Module,
    found: Dissection,
    pairs: Pairs,
    *,
    mask: int | Sequence[int] | None = None,
    attack: Attack = pgd,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> UnitStudy:
    """Sensitivity of a dissected layer's units, its association with IoU, and the test of masking them.

    Args:
        model: the classifier that was dissected and attacked.
        found: one layer's dissection.
        pairs: at least two pairs.
        mask: masks these units; or so many of the most sensitive ones among those that move beyond noise (0 for a
            fifth of the layer's), which are chosen on every other pair and judged on the rest; None for no masking.
        attack: made anew on the masked network.
        seed: of the noise and the random units.
        progress: called with the fraction done.

    Raises:
        ValueError: if an argument does not fit, naming it.
    """
    table = join(unit_sensitivity(model, found.layer, pairs, seed=seed), found.units)
    if progress is not None:
        progress(0.3 if mask is not None else 1.0)
    sentences = [
        sensitivity_sentence(table),
        concept_sentence(moved_concepts(table)),
        *association_sentences(table),
    ]
    if mask is None:
        return UnitStudy(found.layer, table, sentences)
    masked, images, labels = _chosen(model, found.layer, pairs, table, mask, seed)
    if not masked:
        sentences.append("No unit moves beyond noise in the images it would be chosen on: nothing is masked.")
        return UnitStudy(found.layer, table, sentences)

    def later(fraction: float) -> None:
        if progress is not None:
            progress(0.3 + 0.7 * fraction)

    table_of_masking = masking(
        model, found.layer, masked, images, labels, attack=attack, seed=seed, progress=later
    )
    return UnitStudy(
        found.layer, table, [*sentences, masking_sentence(table_of_masking)], masked, table_of_masking
    )


def association_sentences(table: pd.DataFrame) -> list[str]:
    """Sensitivity against IoU at equal activation, and the same of sensitivity to noise; nothing of too few units.

    Args:
        table: from `join`, of one layer or, with a column layer, of several.
    """
    finite = np.isfinite(table[list(COLUMNS)].to_numpy(float)).all(1)
    if finite.sum() < FEWEST:
        return [
            f"Fewer than {FEWEST} units vary over the images: their sensitivity is not compared with IoU."
        ]
    found = associate(table)
    sentences = [found.sentence]
    noise = table.assign(sensitivity=table["noise"])
    if found.units >= ENOUGH and np.isfinite(noise["sensitivity"]).sum() >= ENOUGH:
        of_noise = associate(noise)
        sentences.append(
            f"For sensitivity to noise of the same size, {of_noise.partial:.2f} "
            f"[{of_noise.low:.2f}, {of_noise.high:.2f}] is left."
        )
    return sentences


def _chosen(
    model: nn.Module, layer: str, pairs: Pairs, table: pd.DataFrame, mask: int | Sequence[int], seed: int
) -> tuple[list[int], Tensor, Tensor]:
    """The units to mask, and images and labels that had no part in choosing them."""
    if not isinstance(mask, int):
        return list(mask), pairs.clean, pairs.labels
    if mask < 0 or isinstance(mask, bool) or mask > len(table):
        raise ValueError(
            f"mask must be a number of units from 0 to {len(table)}, or a list of units, got {mask!r}"
        )
    if len(pairs) < 4:
        raise ValueError(
            f"pairs must be at least 4 to choose units on one half and judge them on the other, got {len(pairs)}"
        )
    halves = [
        Pairs(*(part[start::2] for part in (pairs.clean, pairs.adversarial, pairs.labels, pairs.targets)))
        for start in (0, 1)
    ]
    ranked = unit_sensitivity(model, layer, halves[0], seed=seed)
    moved = ranked[ranked["p_value"] <= LEVEL].sort_values("sensitivity", ascending=False, kind="stable")
    count = mask or max(1, round(FRACTION * len(table)))
    return moved["unit"].head(count).tolist(), halves[1].clean, halves[1].labels
