"""The statistics and the result of `ssim_alignment`, and its sentences: the finding, other images, each control."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weakspot.explanations.agreement import every_pairing
from weakspot.statistics import LEAST_RUN, RunTest, ranks, standardized
from weakspot.statistics.number_format import counted, p_value, signed

if TYPE_CHECKING:
    import pandas as pd

STATISTICS = ("ssim_pointing", "ssim_concentration", "ssim_spearman")
TESTED = "ssim_concentration"  # the statistic of the sentences
ALPHA, FALSE_DISCOVERIES = 0.05, 0.1  # the largest p and q at which alignment is stated
# A concentration must be this many times the null and each control. Gradients pass only through active units, so even
# networks with random weights exceed other images' maps: by up to 1.12 times in 18 runs of 40 images.
FLOOR = 1.25

MEANINGS = {
    "ssim_windowed": "Mean structural similarity of the two images over sliding windows (11 x 11, Gaussian); 1 means "
    "that they look the same. An SSIM budget bounds another quantity, which records call ssim_budget_spent.",
    "ssim_windowed_min": "Structural similarity in the window where it is lowest, where the change is most visible.",
    "ssim_pointing": "Pointing game: 1 if the most visibly changed site lies where the label's class activation "
    "exceeds half its maximum.",
    "ssim_concentration": "How many times denser the visible change is where the label's class activation exceeds half "
    "its maximum than in the whole image; 1 means no concentration.",
    "ssim_spearman": "Rank correlation of the visible change and the label's class activation over all sites.",
}
CONTROL_MEANINGS = {
    "ssim_pointing": "The pointing game for {}.",
    "ssim_concentration": "The same density for {}.",
    "ssim_spearman": "The same rank correlation for {}.",
}
CONTROLS = {
    "variance_gradient": "local variance x gradient energy, which any SSIM-bounded attack follows to first order: it "
    "is {:.2f} times as dense where the class activation exceeds half its maximum",
    "pgd": "an L-infinity PGD attack with the same mean SSIM: its change is {:.2f} times as dense where the class "
    "activation exceeds half its maximum",
    "random_weights": "the network with permuted weights: the attack's change is {:.2f} times as dense where this "
    "network's class activation exceeds half its maximum",
}
SHORT = {
    "other images": "other images' class activations",
    "variance_gradient": "local variance x gradient energy",
    "pgd": "PGD with the same mean SSIM",
    "random_weights": "the network with permuted weights",
}


@dataclass(frozen=True, eq=False)
class SsimAlignment:
    """The visible change of each pair compared with the class activation of its label, and with controls.

    Attributes:
        change: (N, 1, H, W) 1 - SSIM of the pair.
        importance: (N, 1, H, W) class activation of the label in the clean image.
        scores: one row per image: ssim_pointing, ssim_concentration and ssim_spearman, each with _null, _p and _q from
            other images' maps (NaN with fewer than 19 of them), and each again with the name of every control as a
            suffix, such as ssim_spearman_pgd. ssim_concentration_over_pgd is the difference from that control, with
            _null, _p and _q.
        runs: control ("other images" first) to the test over all images of ssim_concentration, or of its difference
            from that control. p is NaN with fewer than 10 images. Empty if the images were not compared.
        why_not: one text per image: why it has no statistics. Empty if it has them.
    """

    change: Tensor
    importance: Tensor
    scores: pd.DataFrame
    runs: Mapping[str, RunTest] = field(default_factory=dict)
    why_not: tuple[str, ...] = ()

    @property
    def controls(self) -> list[str]:
        """Names of the controls."""
        return [name for name in self.runs if name != "other images"]

    @property
    def aligned(self) -> NDArray[np.bool_]:
        """(N,) whether the change lies where the network looks, more than with other images and every control.

        This needs p <= .05 and q <= .1 against other images' maps, p <= .05 for the difference from each control, and
        a value of at least 1.25 times the null and 1.25 times each control.
        """
        scores = self.scores
        if not self.runs:
            return np.zeros(len(scores), dtype=bool)
        value = scores[TESTED]
        passed = (scores[f"{TESTED}_p"] <= ALPHA) & (scores[f"{TESTED}_q"] <= FALSE_DISCOVERIES)
        # Significance alone is not enough: random networks pass it by less than the floor.
        passed &= value >= FLOOR * scores[f"{TESTED}_null"]
        for control in self.controls:
            over = f"{TESTED}_over_{control}"
            passed &= (scores[f"{over}_p"] <= ALPHA) & (scores[over] > scores[f"{over}_null"])
            passed &= value >= FLOOR * scores[f"{TESTED}_{control}"]
        return np.asarray(passed, dtype=bool)

    @property
    def exceeded(self) -> list[str]:
        """The entries of `runs` that the changes exceed on average: p <= .05, above the null, 1.25 times the control.

        For "other images" the null is the control.
        """
        names = []
        for name, test in self.runs.items():
            level = test.null if name == "other images" else self.control_level(name)
            # The value of a control's test is already a difference; that of other images is not.
            excess = test.value - test.null if name == "other images" else test.value
            if test.p <= ALPHA and test.value > test.null and excess >= (FLOOR - 1) * level:
                names.append(name)
        return names

    def control_level(self, control: str) -> float:
        """The mean ssim_concentration of a control over the images of its test."""
        compared = self.scores[f"{TESTED}_over_{control}"].notna()
        return float(self.scores[f"{TESTED}_{control}"][compared].mean())

    @property
    def aligned_overall(self) -> bool:
        """Whether the changes lie where the network looks on average over at least 10 images, beyond every control."""
        return bool(self.runs) and len(self.exceeded) == len(self.runs)

    @property
    def sentences(self) -> tuple[str, ...]:
        """The finding over all images, then one sentence for other images and for each control."""
        left_out = [
            f"{counted(count)} {'is' if count == 1 else 'are'} left out: {reason}."
            for reason, count in Counter(self.why_not).most_common()
            if reason
        ]
        return (_finding(self), *control_sentences(self).values(), *_single_images(self), *left_out)

    def __repr__(self) -> str:
        return f"SsimAlignment of {counted(len(self.scores))}. {self.sentences[0]}"


def alignment(change: Tensor, importance: Tensor) -> dict[str, Tensor]:
    """The three statistics of every change with every importance map.

    Args:
        change: (N, 1, H, W) not negative; NaN if unknown.
        importance: (M, 1, H, W).

    Returns:
        Name to (N, M) float64. NaN if undefined: if nothing changed or everything changed alike, and if importance is
        nowhere positive or everywhere above half its maximum.
    """
    return every_pairing(_block, change, importance)


def half_maximum(importance: Tensor) -> Tensor:
    """Bool (N, 1, H, W): where importance exceeds half its maximum; empty if no value is positive."""
    most = importance.amax((1, 2, 3), keepdim=True)
    return (importance > most / 2) & (most > 0)


def _block(change: Tensor, importance: Tensor) -> dict[str, Tensor]:
    visible = change.flatten(1).double().clamp(min=0)
    region = half_maximum(importance).flatten(1).double()
    ranked = [standardized(ranks(maps[:, 0].double())).flatten(1) for maps in (change, importance)]
    # Constant maps have no ranks: they are NaN here and, by adding 0 * NaN, in every statistic.
    defined = 0 * (ranked[0][:, :1] @ ranked[1][:, :1].T)
    # Concentration is (change inside / change) / (area inside / area); an empty or full region has none.
    area = region.mean(1)
    area = torch.where((area > 0) & (area < 1), area, torch.nan)
    peak = (visible == visible.amax(1, keepdim=True)).double()  # several sites can share the maximum
    return {
        "ssim_pointing": peak @ region.T / peak.sum(1, keepdim=True) + 0 * area + defined,
        "ssim_concentration": visible @ region.T / visible.sum(1, keepdim=True) / area + defined,
        "ssim_spearman": ranked[0] @ ranked[1].T / visible.shape[1] + 0 * area,
    }


def column_meanings(columns: Sequence[str], result: SsimAlignment) -> dict[str, str]:
    """Column to its meaning, followed by the result of its test over all images; tests' own columns are left out."""
    meanings = dict(MEANINGS)
    for control in CONTROLS:
        for name, text in CONTROL_MEANINGS.items():
            meanings[f"{name}_{control}"] = text.format(SHORT[control])
        meanings[f"{TESTED}_over_{control}"] = (
            f"Density of the visible change minus that for {SHORT[control]}. The change is aligned beyond this control "
            "if the difference is above 0 and above its value with other images' class activations."
        )
    for name, sentence in control_sentences(result).items():
        meanings[TESTED if name == "other images" else f"{TESTED}_over_{name}"] += f" {sentence}"
    return {name: meanings[name] for name in columns if name in meanings}


def control_sentences(result: SsimAlignment) -> dict[str, str]:
    """One sentence for other images and one for each control; empty if no image can be compared."""
    if not result.runs or not result.runs["other images"].images:
        return {}
    sentences = {}
    for name, test in result.runs.items():
        end = f" ({p_value(test.p)})." if test.images >= LEAST_RUN else "."
        if name == "other images":
            sentences[name] = (
                f"Over {counted(test.images)}, the change is {test.value:.2f} times as dense where the class "
                f"activation exceeds half its maximum as in the whole image; with other images' class activations, it "
                f"is {test.null:.2f} times as dense{end}"
            )
        elif not test.images:
            sentences[name] = f"Control, {SHORT[name]}: no image could be compared."
        else:
            sentences[name] = (
                f"Control, {CONTROLS[name].format(result.control_level(name))} ({counted(test.images)}). The attack "
                f"minus this control: {signed(test.value)}; with other images' class activations: "
                f"{signed(test.null)}{end}"
            )
    return sentences


def _finding(result: SsimAlignment) -> str:
    if not result.runs:
        return "The images were not compared with each other."
    images = result.runs["other images"].images
    if not images:
        return "No image can be compared."
    if images < LEAST_RUN:
        return (
            f"At least {LEAST_RUN} images are needed to say whether the visible change lies where the network looks; "
            f"{images} can be compared."
        )
    if result.aligned_overall:
        return (
            f"The visible change lies where the network looks, on average over {images} images: it clearly exceeds "
            f"{_listed([SHORT[name] for name in result.runs], 'and')}."
        )
    short_of = [SHORT[name] for name in result.runs if name not in result.exceeded]
    return (
        f"There is not enough evidence that the visible change lies where the network looks ({images} images): it does "
        f"not clearly exceed {_listed(short_of, 'or')}."
    )


def _single_images(result: SsimAlignment) -> list[str]:
    tested = int(result.scores[f"{TESTED}_p"].notna().sum()) if result.runs else 0
    if not tested:
        return []
    aligned = int(result.aligned.sum())
    found = f"{aligned} of {counted(tested)} {'shows' if aligned == 1 else 'show'}"
    return [f"Tested individually, {found} a visible change that lies where the network looks."]


def _listed(parts: Sequence[str], word: str) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {word} {parts[-1]}"
