"""The units of a layer under attack: which change more than under noise, and does masking them help?

After Xu et al. 2019 (arXiv 1904.02057); the tests and controls are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from weakspot._progress import Progress, part
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

LEAST_PAIRS = 2  # whose noise is as large as the perturbation, for a test
FRACTION = 0.2  # of a layer's units that are masked, if no number is given


@dataclass(frozen=True, eq=False)
class UnitStudy:
    """The units of one layer under attack.

    Attributes:
        layer: its name.
        units: one row per unit, the columns of `unit_sensitivity` and of `dissect`.
        sentences: the results.
        masked: the units that were masked. Empty if masking was not requested, or no unit changes more than under
            noise.
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
    dissection: Dissection,
    pairs: Pairs,
    *,
    mask: int | Sequence[int] | None = None,
    attack: Attack = pgd,
    seed: int = 0,
    progress: Progress | None = None,
) -> UnitStudy:
    """Measure the sensitivity of a dissected layer's units, its association with IoU, and the effect of masking them.

    Args:
        model: the classifier that was dissected and attacked.
        dissection: of one layer.
        pairs: at least two pairs.
        mask: a list of units to mask; or how many of the most sensitive units, among those that change more than under
            noise (0: a fifth of the layer), which are chosen on every other pair and evaluated on the rest. Default: no
            masking.
        attack: that is made on the masked network.
        seed: of the noise and the random units.
        progress: called with the fraction done.

    Raises:
        ValueError: if an argument does not fit.
    """
    table = join(unit_sensitivity(model, dissection.layer, pairs, seed=seed), dissection.units)
    if progress is not None:
        progress(0.3 if mask is not None else 1.0)
    sentences = [sensitivity_sentence(table)]
    if table["images"].iloc[0] >= LEAST_PAIRS:  # of what was not tested, nothing is said
        sentences.append(concept_sentence(moved_concepts(table)))
    sentences += association_sentences(table)
    if mask is None:
        return UnitStudy(dissection.layer, table, sentences)
    masked, images, labels = _chosen(model, dissection.layer, pairs, mask, count=len(table), seed=seed)
    if not masked:
        sentences.append(
            "No unit was shown to change more than under noise in the images that units are chosen on, so nothing is "
            "masked."
        )
        return UnitStudy(dissection.layer, table, sentences)

    later = part(progress, 0.3, 1)
    table_of_masking = masking(
        model, dissection.layer, masked, images, labels, attack=attack, seed=seed, progress=later
    )
    return UnitStudy(
        dissection.layer, table, [*sentences, masking_sentence(table_of_masking)], masked, table_of_masking
    )


def association_sentences(table: pd.DataFrame) -> list[str]:
    """Sentences on sensitivity and IoU at equal activation, for the attack and for noise of equal size.

    Args:
        table: from `join`, of one layer or, with a column layer, of several.
    """
    finite = np.isfinite(table[list(COLUMNS)].to_numpy(float)).all(1)
    if finite.sum() < FEWEST:
        return [
            f"Fewer than {FEWEST} units vary over the images: their sensitivity is not compared with IoU."
        ]
    association = associate(table)
    sentences = [association.sentence]
    # If units that change under noise show the same association, the attack is not its reason.
    noise = table.assign(sensitivity=table["noise"])
    if association.units >= ENOUGH and np.isfinite(noise["sensitivity"]).sum() >= ENOUGH:
        of_noise = associate(noise)
        found = f"it is {of_noise.partial:.2f} [{of_noise.low:.2f}, {of_noise.high:.2f}]"
        found = "nothing is left to correlate" if np.isnan(of_noise.partial) else found
        sentences.append(f"For sensitivity to noise of the same size, {found}.")
    return sentences


def _chosen(
    model: nn.Module, layer: str, pairs: Pairs, mask: int | Sequence[int], *, count: int, seed: int
) -> tuple[list[int], Tensor, Tensor]:
    """The units to mask, and the images and labels that they were not chosen on."""
    if not isinstance(mask, int):
        return list(mask), pairs.clean, pairs.labels
    if mask < 0 or isinstance(mask, bool) or mask > count:
        raise ValueError(
            f"mask must be a number of units from 0 to {count}, or a list of units, got {mask!r}"
        )
    if len(pairs) < 4:
        raise ValueError(
            f"pairs must be at least 4 to choose units on one half and judge them on the other, got {len(pairs)}"
        )
    # Every other pair, so that classes stored in blocks are in both halves.
    choosing, judging = pairs[::2], pairs[1::2]
    ranked = unit_sensitivity(model, layer, choosing, seed=seed)
    moved = ranked[ranked["p_value"] <= LEVEL].sort_values("sensitivity", ascending=False, kind="stable")
    chosen = mask or max(1, round(FRACTION * count))
    return moved["unit"].head(chosen).tolist(), judging.clean, judging.labels
