"""How far perturbations travel: successes beside their controls, attacks that fail and random edits of the same size.

After Vargas and Su 2019 (arXiv 1902.02947). The controls and intervals are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from weakspot import _random
from weakspot._checks import check_batch_size, check_seed
from weakspot.attribution.hooks import default_layers, fused_for, spatial_layers
from weakspot.classifier import evaluating
from weakspot.explanations.analysis import Analysis, Series, check_pairs, find_renderer, prepare_pairs
from weakspot.explanations.feature_propagation import (
    ActivationChange,
    Read,
    propagations,
    reach_of,
    spread_of,
    stream,
)
from weakspot.pairs import Pairs
from weakspot.statistics import mean_interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


PLACEMENTS = 64  # draws of sites for a random edit, at most
GROUPS = ("successes", "failures", "random edits")


@dataclass(frozen=True, eq=False)
class PropagationStudy:
    """How far attacks that succeed travel, beside attacks that fail and random edits of the same size.

    Attributes:
        layers: names, in the order in which they are computed.
        table: one row for each layer and group ("successes", "failures", "random edits"): layer, depth (0 for the
            first, 1 for the last), group, spread, spread_low, spread_high, reach, reach_low, reach_high, images: means
            over images with 95% intervals. See `Propagation.spread` and `.reach`.
        maximum: group to layer to (h, w): mean over its images of `Propagation.maximum`.
    """

    layers: Sequence[str]
    table: pd.DataFrame
    maximum: Mapping[str, Mapping[str, Tensor]]

    def figure(self) -> Figure:
        """Spread and reach over depth, one line with its interval for each group."""
        return cast("Figure", find_renderer("depth_figure")(self))


def propagation_study(
    model: nn.Module,
    pairs: Pairs | Iterable[Pairs],
    *,
    layers: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> PropagationStudy:
    """Propagation over many pairs in one stream, with its controls; no map of a single pair is kept.

    A pair succeeds where the clean image is read as its label and the adversarial one is not; it fails where both are.
    A random edit is a pair's own perturbation with its pixels put elsewhere (`random_edits`), of the pairs that
    succeed, or of all where none does.

    Args:
        model: any classifier.
        pairs: N pairs, or several lots of them one after the other.
        layers: as for `propagation`.
        seed: of the random edits.
        batch_size: pairs at once; changes no result.
        progress: called with the share done where `pairs` are one lot.

    Raises:
        ValueError: when an argument does not fit, naming it, or there are no pairs.
    """
    check_seed(seed)
    check_batch_size(batch_size)
    lots = [pairs] if isinstance(pairs, Pairs) else pairs
    told = progress if isinstance(pairs, Pairs) else None
    tallies: dict[str, _Tally] | None = None
    with evaluating(model) as classifier:
        for lot in lots:
            check_pairs(lot, model)
            lot = prepare_pairs(classifier, lot)  # noqa: PLW2901 - the same pairs, on the model's device
            if tallies is None:
                shape = lot.clean.shape[1:]
                places = spatial_layers(classifier, lot.clean[:1], layers)
                tallies = {name: _Tally() for name in places}
            if lot.clean.shape[1:] != shape:
                raise ValueError(
                    f"pairs hold images of {tuple(shape)} and of {tuple(lot.clean.shape[1:])}; accepted is one shape"
                )
            others = [lot.adversarial, random_edits(lot, seed)]
            with fused_for(classifier, lot.clean[:1], places):
                for read in stream(classifier, places, lot.clean, others, batch_size):
                    fooled, failed = _outcomes(read, lot.labels[read.rows])
                    for name, gaps in read.gaps.items():
                        tallies[name].add(gaps, fooled, failed)
                    if told is not None:
                        told(read.rows.stop / len(lot))
    if tallies is None:
        raise ValueError("pairs holds no pairs; accepted is at least one")
    return PropagationStudy(
        list(tallies),
        _table(tallies),
        {group: {name: tally.average(group) for name, tally in tallies.items()} for group in GROUPS},
    )


def random_edits(pairs: Pairs, seed: int = 0) -> Tensor:
    """(N, C, H, W): the clean images with the perturbation's pixels at random sites.

    Where a value would leave [0, 1] there its sign is turned; where that does not help either it is cut. Of up to 64
    draws of sites each image takes the first that keeps 99.9% of the size (sum of absolute changes), or the one that
    keeps most: a change of most of the range fits only where the image is dark or bright.
    """
    height, width = pairs.clean.shape[2:]
    keys, change = _random.keys(pairs.clean, seed), pairs.perturbation.flatten(2)
    size = change.abs().flatten(1).sum(1)
    best, kept = pairs.clean.clone(), torch.full_like(size, -1.0)
    for number in range(PLACEMENTS):
        rows = (kept < 0.999 * size).nonzero()[:, 0]
        if not len(rows):
            break
        clean = pairs.clean[rows]
        order = _random.uniform(keys[rows], number, height * width).argsort(1)
        moved = change[rows].gather(2, order[:, None].expand(-1, clean.shape[1], -1)).view_as(clean)
        outside = [(clean + sign * moved - 0.5).abs() for sign in (1, -1)]
        edited = (clean + torch.where(outside[0] > outside[1].clamp(min=0.5), -moved, moved)).clamp(0, 1)
        fraction = (edited - clean).abs().flatten(1).sum(1)
        better = fraction > kept[rows]
        best[rows[better]], kept[rows[better]] = edited[better], fraction[better]
    return best


def _outcomes(read: Read, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) bool each: which pairs fool the model, and which leave it right."""
    right, attacked = read.predicted[0] == labels, read.predicted[1]
    return right & (attacked != labels), right & (attacked == labels)


@dataclass
class _Tally:
    """Of one layer, numbers of every pair and sums of maps.

    Attributes:
        fooled: of each batch, which pairs succeed.
        failed: likewise, which fail.
        spread: of each batch (2, n), of the attacks and of the random edits.
        reach: likewise.
        sums: by group the sum of the maps, of random edits also over all pairs, under "all".
        counts: how many each sum is of.
    """

    fooled: list[Tensor] = field(default_factory=list)
    failed: list[Tensor] = field(default_factory=list)
    spread: list[Tensor] = field(default_factory=list)
    reach: list[Tensor] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, gaps: Sequence[ActivationChange], fooled: Tensor, failed: Tensor) -> None:
        attack, random = gaps
        self.fooled.append(fooled)
        self.failed.append(failed)
        self.spread.append(torch.stack([spread_of(one.maximum, one.peak) for one in gaps]))
        self.reach.append(torch.stack([reach_of(one.maximum, one.peak) for one in gaps]))
        for name, found, rows in (
            ("successes", attack, fooled), ("failures", attack, failed), ("random edits", random, fooled),
            ("all", random, torch.ones_like(fooled)),
        ):  # fmt: skip
            self.sums[name] = self.sums.get(name, 0) + found.maximum[rows].double().sum(0)
            self.counts[name] = self.counts.get(name, 0) + int(rows.sum())

    def average(self, group: str) -> Tensor:
        """(h, w), NaN where the group is empty."""
        chosen = "all" if group == "random edits" and not self.counts[group] else group
        count = self.counts[chosen]
        return (self.sums[chosen] / (count or torch.nan)).float()

    def numbers(self, group: str) -> dict[str, np.ndarray]:
        """Spread and reach of the group's pairs."""
        fooled, failed = torch.cat(self.fooled), torch.cat(self.failed)
        every = torch.ones_like(fooled)
        rows = {
            "successes": fooled, "failures": failed, "random edits": fooled if bool(fooled.any()) else every
        }[group]  # fmt: skip
        way = int(group == "random edits")
        return {
            name: torch.cat(values, 1)[way][rows].double().cpu().numpy()
            for name, values in (("spread", self.spread), ("reach", self.reach))
        }


def _table(tallies: Mapping[str, _Tally]) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for number, (name, tally) in enumerate(tallies.items()):
        for group in GROUPS:
            row: dict[str, object] = {
                "layer": name,
                "depth": number / max(1, len(tallies) - 1),
                "group": group,
            }
            for measure, values in tally.numbers(group).items():
                found = mean_interval(values[np.isfinite(values)])
                row |= dict(zip((measure, f"{measure}_low", f"{measure}_high"), found, strict=True))
                row["images"] = len(values)
            rows.append(row)
    return pd.DataFrame(rows)


MEANINGS = {
    "last_spread": "Share of the last layer's sites that change by over a tenth of its peak in the clean image.",
    "last_spread_random": "The same of a random edit of the same size: the perturbation's pixels put elsewhere.",
    "last_reach": "Largest change in the last layer, over its peak in the clean image.",
    "last_reach_random": "The same of that random edit.",
}


def analyze_propagation(model: nn.Module, pairs: Pairs, *, seed: int = 0) -> Analysis:
    """Maps of every layer, and how far the perturbation travels beside a random edit of its size.

    Of a network that keeps no maps there is nothing to say.
    """
    import pandas as pd

    with evaluating(model) as classifier:
        pairs = prepare_pairs(classifier, pairs)
        if not default_layers(classifier, pairs.clean[:1]):
            return Analysis(scores=pd.DataFrame(index=range(len(pairs))), maps={})
        others = [pairs.adversarial, random_edits(pairs, seed)]
        attack, random = propagations(classifier, pairs.clean, others)
    last = attack.layers[-1]
    scores = {
        "last_spread": attack.spread[last],
        "last_spread_random": random.spread[last],
        "last_reach": attack.reach[last],
        "last_reach_random": random.reach[last],
    }

    def curve(of_layers: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([of_layers[name] for name in attack.layers], 1).cpu()

    return Analysis(
        scores=pd.DataFrame({name: values.cpu().numpy() for name, values in scores.items()}),
        maps={},
        meanings=MEANINGS,
        series={
            "propagation": Series(
                "What the perturbation changes, layer by layer",
                steps=list(attack.layers),
                maps=[attack.maximum[name].cpu() for name in attack.layers],
                tops=[attack.peak[name].cpu() for name in attack.layers],
                curves={
                    "reach": curve(attack.reach),
                    "reach, random edit": curve(random.reach),
                    "spread": curve(attack.spread),
                    "spread, random edit": curve(random.spread),
                },
                meaning="Largest change over channels at each site; the brightest color is the layer's own peak in "
                "the clean image. Attacks that fail travel almost as far: what counts is the lead over a random edit "
                "of the same size. Its pixels are scattered, so an attack confined to a part of the image also differs "
                "from it by being compact.",
            )
        },
    )
