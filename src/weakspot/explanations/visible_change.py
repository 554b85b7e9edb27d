"""Alignment: does the visible change of an attack lie where the network looks?

The SSIM map of a perturbation against the class activation map, after Pochimireddy et al. 2021 (arXiv 2106.12731),
re-specified from the abstract: the statistics, their nulls and the controls are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from weakspot._checks import check_seed
from weakspot.attribution.cam import class_activation
from weakspot.classifier import evaluating, predict
from weakspot.explanations.agreement import WHOLE, comparable, other_images, reached_fraction
from weakspot.explanations.alignment_controls import (
    describe,
    margin_gradient,
    meanings,
    pgd_of_equal_ssim,
    variance_gradient,
    with_shuffled_weights,
)
from weakspot.explanations.analysis import Analysis, Picture, check_pairs, competing_classes, prepare_pairs
from weakspot.pairs import AttackResult, Pairs
from weakspot.similarity import ssim_map
from weakspot.statistics import RunTest, other_image_test, ranks, run_test, standardized

if TYPE_CHECKING:
    import pandas as pd

STATISTICS = ("ssim_pointing", "ssim_concentration", "ssim_spearman")
TESTED = "ssim_concentration"  # the statistic that sentences are about
CHUNK = 64  # maps at once: memory does not grow with the square of their number
INVISIBLE = 1e-5  # 1 - SSIM below which a change is rounding
ALPHA, FALSE_DISCOVERIES = 0.05, 0.1  # p and q up to which something is stated
# How many times the null and each control a concentration must be. Gradients pass only where units are active, so that
# networks with random weights exceed other images' maps, too, up to 1.12 times in 18 runs of 40 images.
FLOOR = 1.25


@dataclass(frozen=True, eq=False)
class SsimAlignment:
    """The visible change of each pair beside the class activation of its label, and what controls give.

    Attributes:
        change: (N, 1, H, W) 1 - SSIM of the pair.
        importance: (N, 1, H, W) class activation of the label in the clean image.
        scores: one row per image: ssim_pointing, ssim_concentration and ssim_spearman, each with _null, _p and _q from
            other images' maps (NaN below 19 of them), and each of them with a suffix for every control, such as
            ssim_spearman_pgd. ssim_concentration_over_pgd is the difference from that control, with _null, _p and _q.
        runs: control ("other images" first) to the test over all images of ssim_concentration, or of its difference
            from that control. p is NaN below 10 images. Empty without comparison.
        why_not: one text per image, why it has no statistics; empty where it has.
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
        """(N,) whether the change lies where the network looks, beyond other images and beyond every control.

        p <= .05 and q <= .1 against other images' maps, p <= .05 for the difference from each control, and the value at
        least 1.25 times the null and each control's.
        """
        scores = self.scores
        if not self.runs:
            return np.zeros(len(scores), dtype=bool)
        value = scores[TESTED]
        passed = (scores[f"{TESTED}_p"] <= ALPHA) & (scores[f"{TESTED}_q"] <= FALSE_DISCOVERIES)
        passed &= value >= FLOOR * scores[f"{TESTED}_null"]
        for control in self.controls:
            over = f"{TESTED}_over_{control}"
            passed &= (scores[f"{over}_p"] <= ALPHA) & (scores[over] > scores[f"{over}_null"])
            passed &= value >= FLOOR * scores[f"{TESTED}_{control}"]
        return np.asarray(passed, dtype=bool)

    @property
    def exceeded(self) -> list[str]:
        """Which of `runs` the changes exceed on the mean: p <= .05, above the null, and 1.25 times the control.

        Of "other images" null and control are the same.
        """
        found = []
        for name, test in self.runs.items():
            level = test.null if name == "other images" else self.control_level(name)
            lead = test.value - test.null if name == "other images" else test.value
            if test.p <= ALPHA and test.value > test.null and lead >= (FLOOR - 1) * level:
                found.append(name)
        return found

    def control_level(self, control: str) -> float:
        """The mean of a control's ssim_concentration over the images of its test."""
        compared = self.scores[f"{TESTED}_over_{control}"].notna()
        return float(self.scores[f"{TESTED}_{control}"][compared].mean())

    @property
    def aligned_overall(self) -> bool:
        """Whether the changes lie where the network looks on the mean over at least 10 images, beyond every control."""
        return bool(self.runs) and len(self.exceeded) == len(self.runs)

    @property
    def sentences(self) -> tuple[str, ...]:
        """What holds of all images: the finding, then one sentence for other images and for each control."""
        return describe(self)

    def __repr__(self) -> str:
        return f"SsimAlignment of {len(self.scores)} images. {self.sentences[0]}"


def ssim_alignment(
    model: nn.Module,
    pairs: Pairs,
    *,
    reference: Tensor | None = None,
    random_weights: bool = False,
    compare: bool = True,
    seed: int = 0,
) -> SsimAlignment:
    """Whether the visible change of each pair, 1 - SSIM, lies where the class activation of its label is strong.

    Three statistics of the two maps:

    - ssim_pointing, the pointing game (Zhang et al. 2016, arXiv 1608.00507): 1 if the most changed site lies where the
      activation exceeds half its maximum, 0 if not; without the tolerance of the paper.
    - ssim_concentration: how much denser the change is in that area than in the whole image, its share of the change
      over its share of the sites; 1 is no concentration.
    - ssim_spearman: rank correlation of the two maps over all sites.

    Photographs share their habits, and so do attacks. p is the pooled rank among other images' activation maps, from 19
    other images on (`statistics.other_image_test`), and by permutation of the maps over the whole batch from 10 images
    on (`statistics.run_test`). Controls take the place of the attack's map: "variance_gradient", local variance x
    gradient energy at the clean image, which is 1 - SSIM to first order for any attack bounded in SSIM; "pgd", the map
    of an L-infinity PGD attack with the same target and the same mean SSIM; and on request "random_weights", where the
    activation of the network with permuted weights, for the class that it predicts, takes the place of the network's.
    Alignment is stated only if it exceeds other images' maps and every control, with p <= .05 and by a quarter.

    Not defined (NaN) where the activation is nowhere positive, where nothing changed visibly, and for attacks with the
    budget `SSIM(..., mode="local")`, which spend it in every patch, whatever the network does. Nor for an attack that
    did not reach the whole image: where it acts follows from where it was allowed to.

    Args:
        model: any classifier; left as it was.
        pairs: N pairs. Only an `AttackResult` says that its budget was local.
        reference: (R, C, H, W) other images of the same source; their activation is of the predicted class.
        random_weights: whether to add the control of that name. Costs a copy of the network.
        compare: False leaves out everything that depends on the other images of the batch.
        seed: of the random start of PGD, of the permuted weights and of permutations.

    Raises:
        ValueError: if an argument does not fit, naming it.

    >>> from weakspot.attacks import pgd
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    >>> result = pgd(net.eval(), torch.rand(2, 3, 16, 16), torch.tensor([0, 1]), steps=2)
    >>> bool(ssim_alignment(net, result).scores["ssim_concentration_p"].isna().all())  # two images have no p
    True
    """
    check_pairs(pairs, model)
    check_seed(seed)
    with evaluating(model) as classifier:
        pairs = prepare_pairs(classifier, pairs)
        targets = competing_classes(classifier, pairs)
        change = 1 - ssim_map(pairs.clean, pairs.adversarial)
        others = other_images(classifier, pairs, reference if compare else None)
        wanted = torch.cat(
            [pairs.labels, predict(classifier, others).argmax(1) if len(others) else pairs.labels[:0]]
        )
        images = torch.cat([pairs.clean, others])
        maps = class_activation(classifier, images, wanted, registration="effective")
        gradient = margin_gradient(classifier, pairs.clean, pairs.labels, targets)
        loss = change.mean((1, 2, 3))
        controls = {
            "variance_gradient": (variance_gradient(pairs.clean, gradient), maps),
            "pgd": (
                pgd_of_equal_ssim(classifier, pairs.clean, pairs.labels, targets, gradient, loss, seed=seed),
                maps,
            ),
        }
        if random_weights:
            shuffled = with_shuffled_weights(classifier, seed)
            classes = predict(shuffled, images).argmax(1)
            unlearned = class_activation(shuffled, images, classes, registration="effective")
            controls["random_weights"] = (change, unlearned)
    local = isinstance(pairs, AttackResult) and pairs.ssim_local_budget_spent is not None
    own = maps[: len(pairs)]
    confined = reached_fraction(pairs) < WHOLE
    why_not = tuple(_why_not(local, *row) for row in zip(change, own, confined.tolist(), strict=True))
    unseen = change.amax((1, 2, 3), keepdim=True) <= INVISIBLE
    shown = change.masked_fill(unseen | local | confined[:, None, None, None], torch.nan)
    allowed = comparable(pairs.clean, others, confined)
    scores, runs = _scored(shown, maps, controls, allowed, compare=compare, seed=seed)
    return SsimAlignment(change, own, scores, runs, why_not)


def _scored(
    change: Tensor,
    maps: Tensor,
    controls: Mapping[str, tuple[Tensor, Tensor]],
    allowed: Tensor,
    *,
    compare: bool,
    seed: int,
) -> tuple[pd.DataFrame, dict[str, RunTest]]:
    """Columns of the scores, and the tests over all images."""
    import pandas as pd

    count = len(change)
    paired = slice(None) if compare else slice(0, count)
    found = alignment(change, maps[paired])
    parts, runs = [], {}
    for name, matrix in found.items():
        if compare:
            parts.append(other_image_test(matrix.masked_fill(~allowed, torch.nan)).columns(name))
        else:
            parts.append(pd.DataFrame({name: matrix.diagonal().cpu().numpy()}))
    # Over all images an image counts once, however many copies of it there are.
    among = allowed[:, :count]
    counted = among & (among & ~torch.eye(count, dtype=torch.bool, device=among.device)).any(0)[:, None]
    if compare:
        runs["other images"] = run_test(found[TESTED][:, :count].masked_fill(~counted, torch.nan), seed=seed)
    for control, (shown, against) in controls.items():
        beside = alignment(shown, against[paired])
        for name in STATISTICS:
            # Where the attack has no statistic, its control has none either.
            value = beside[name].diagonal() + 0 * found[name].diagonal()
            parts.append(pd.DataFrame({f"{name}_{control}": value.cpu().numpy()}))
        if compare:
            excess = (found[TESTED] - beside[TESTED]).masked_fill(~allowed, torch.nan)
            parts.append(other_image_test(excess).columns(f"{TESTED}_over_{control}"))
            runs[control] = run_test(excess[:, :count].masked_fill(~counted, torch.nan), seed=seed)
    return pd.concat(parts, axis=1), runs


def alignment(change: Tensor, importance: Tensor) -> dict[str, Tensor]:
    """The three statistics for every change with every importance map.

    Args:
        change: (N, 1, H, W) not negative; NaN where it is not known.
        importance: (M, 1, H, W).

    Returns:
        Name to (N, M) float64; NaN where not defined: where nothing changed or everything alike, and where importance
        is nowhere positive or everywhere above half its maximum.
    """
    rows = []
    for changes in change.split(CHUNK):
        parts = [_block(changes, maps) for maps in importance.split(CHUNK)]
        rows.append({name: torch.cat([part[name] for part in parts], 1) for name in STATISTICS})
    return {name: torch.cat([row[name] for row in rows]) for name in STATISTICS}


def half_maximum(importance: Tensor) -> Tensor:
    """Bool (N, 1, H, W): where importance exceeds half its maximum; nowhere if no value is positive."""
    most = importance.amax((1, 2, 3), keepdim=True)
    return (importance > most / 2) & (most > 0)


def _block(change: Tensor, importance: Tensor) -> dict[str, Tensor]:
    visible = change.flatten(1).double().clamp(min=0)
    region = half_maximum(importance).flatten(1).double()
    ranked = [standardized(ranks(maps[:, 0].double())).flatten(1) for maps in (change, importance)]
    # Constant maps have no ranks: they are NaN here and in every statistic.
    defined = 0 * (ranked[0][:, :1] @ ranked[1][:, :1].T)
    area = region.mean(1)
    area = torch.where((area > 0) & (area < 1), area, torch.nan)
    peak = (visible == visible.amax(1, keepdim=True)).double()
    return {
        "ssim_pointing": peak @ region.T / peak.sum(1, keepdim=True) + 0 * area + defined,
        "ssim_concentration": visible @ region.T / visible.sum(1, keepdim=True) / area + defined,
        "ssim_spearman": ranked[0] @ ranked[1].T / visible.shape[1] + 0 * area,
    }


def _why_not(local: bool, change: Tensor, importance: Tensor, confined: bool) -> str:
    """Why an image has no statistics; empty if it has."""
    if local:
        return "the attack's budget bounds SSIM in every patch, and is spent in every patch"
    if float(change.max()) <= INVISIBLE:
        return "nothing changed visibly"
    if float(importance.max()) <= 0:
        return "the class activation is nowhere positive, so no region matters most"
    if bool((importance > importance.max() / 2).all()):
        return "the class activation is alike everywhere"
    if float(change.max() - change.min()) <= INVISIBLE:
        return "the change is equally visible everywhere"
    return "the attack changed only a part of the image" if confined else ""


def analyze_ssim(
    model: nn.Module, pairs: Pairs, *, seed: int = 0, reference: Tensor | None = None, compare: bool = True
) -> Analysis:
    """SSIM maps, their means and minima, and `ssim_alignment` as the report shows it."""
    import pandas as pd

    found = ssim_alignment(model, pairs, reference=reference, compare=compare, seed=seed)
    similarity = (1 - found.change).flatten(1)
    windowed = {"ssim_windowed": similarity.mean(1), "ssim_windowed_min": similarity.amin(1)}
    plain = pd.DataFrame({name: values.cpu().numpy() for name, values in windowed.items()})
    scores = pd.concat([plain, found.scores], axis=1)
    meaning = "Where the two images look different to the eye: 0 is no visible change."
    return Analysis(
        scores=scores,
        maps={"ssim": found.change},
        meanings=meanings([str(name) for name in scores], found),
        pictures={
            "ssim": Picture(
                "Visible change (1 - SSIM)",
                meaning=f"{meaning} {found.sentences[0]}" if compare else meaning,
            )
        },
    )
