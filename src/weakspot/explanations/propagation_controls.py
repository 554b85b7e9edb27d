"""Propagation with its controls: do successful attacks travel further than failed attacks and random edits?

After Vargas and Su 2019 (arXiv 1902.02947). The controls, attacks that fail and random edits of the same size, and the
intervals over images are ours. Without them, spread explains nothing: failed attacks travel almost as far.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from weakspot import _random
from weakspot._checks import check_seed, checked_batch_size
from weakspot._progress import Progress
from weakspot.attribution.hooks import default_layers, fused_for, spatial_layers
from weakspot.classifier import evaluating
from weakspot.explanations.analysis import (
    Analysis,
    Series,
    batches_of,
    check_pairs,
    find_renderer,
    prepare_pairs,
)
from weakspot.explanations.feature_propagation import (
    ActivationChange,
    propagations,
    reach_of,
    spread_of,
    stream,
)
from weakspot.pairs import Pairs
from weakspot.statistics import fraction_interval, mean_interval
from weakspot.statistics.number_format import counted, number, percent

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PLACEMENTS = 64  # draws of sites for a random edit, at most
GROUPS = ("successes", "failures", "random edits")
MEANINGS = {
    "last_spread": "Fraction of the last layer's sites that change by over a tenth of its peak in the clean image.",
    "last_spread_random": "The same for a random edit of the same size: the perturbation's pixels at random sites.",
    "last_reach": "Largest change in the last layer, as a fraction of its peak in the clean image.",
    "last_reach_random": "The same for that random edit.",
}


@dataclass(frozen=True, eq=False)
class PropagationStudy:
    """How far successful attacks travel, compared with failed attacks and random edits of the same size.

    Attributes:
        layers: names, in the order in which they are computed.
        table: one row for each layer and group ("successes", "failures", "random edits"): layer, depth (0 for the
            first, 1 for the last), group, spread, spread_low, spread_high, reach, reach_low, reach_high, images: means
            over images with 95% intervals. See `Propagation.spread` and `.reach`.
        maximum: group to layer to (h, w): mean over the group's images of `Propagation.maximum`.
    """

    layers: Sequence[str]
    table: pd.DataFrame
    maximum: Mapping[str, Mapping[str, Tensor]]

    def figure(self) -> Figure:
        """Spread and reach over depth, one line with its interval for each group."""
        return cast("Figure", find_renderer("depth_figure")(self))

    def __repr__(self) -> str:
        last = self.table[self.table["layer"] == self.layers[-1]]
        lines = [
            f"  {row['group']} ({counted(row['images'])}): spread {percent(row['spread'])}, "
            f"reach {number(row['reach'])}"
            for row in last.to_dict("records")
        ]
        return "\n".join(
            [f"PropagationStudy of {len(self.layers)} layers; in the last, {last.layer.iloc[0]}:", *lines]
        )


def propagation_study(
    model: nn.Module,
    pairs: Pairs | Iterable[Pairs],
    *,
    layers: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> PropagationStudy:
    """Measure propagation over many pairs in one stream, with its controls; no map of a single pair is stored.

    A pair succeeds if the clean image is classified as its label and the adversarial one is not. It fails if both are.
    A random edit is a pair's own perturbation with its pixels at random sites (`random_edits`); its group holds the
    random edits of the pairs that succeed, or of all pairs if none does.

    Args:
        model: any classifier. It is not changed.
        pairs: N pairs of different images, which intervals take as independent; or an iterable of batches of them.
        layers: as in `propagation`.
        seed: of the random edits.
        batch_size: pairs at once; changes no result.
        progress: called with the finished fraction, if `pairs` is one batch.

    Raises:
        ValueError: if an argument is invalid, or there are no pairs; the message names it.
    """
    check_seed(seed)
    batch_size = checked_batch_size(batch_size)
    batches = batches_of(pairs)
    report = progress if isinstance(pairs, Pairs) else None
    numbers: dict[str, _LayerNumbers] | None = None
    with evaluating(model) as classifier:
        for batch in batches:
            check_pairs(batch, model)
            prepared = prepare_pairs(classifier, batch)
            if numbers is None:
                shape = prepared.clean.shape[1:]
                places = spatial_layers(classifier, prepared.clean[:1], layers)
                numbers = {name: _LayerNumbers() for name in places}
            if prepared.clean.shape[1:] != shape:
                raise ValueError(
                    f"pairs must hold images of one shape, got {tuple(shape)} and {tuple(prepared.clean.shape[1:])}"
                )
            others = [prepared.adversarial, random_edits(prepared, seed)]
            with fused_for(classifier, prepared.clean[:1], places):
                for part in stream(classifier, places, prepared.clean, others, batch_size):
                    labels = prepared.labels[part.rows]
                    correct, attacked = part.predicted[0] == labels, part.predicted[1]
                    fooled, failed = correct & (attacked != labels), correct & (attacked == labels)
                    for name, (attack, random) in part.changes.items():
                        numbers[name].add(attack, random, fooled, failed)
                    if report is not None:
                        report(part.rows.stop / len(prepared))
    if numbers is None:
        raise ValueError("pairs must hold at least one pair, got none")
    return PropagationStudy(
        list(numbers),
        _table(numbers),
        {group: {name: layer.average(group) for name, layer in numbers.items()} for group in GROUPS},
    )


def random_edits(pairs: Pairs, seed: int = 0) -> Tensor:
    """(N, C, H, W): the clean images with the perturbation's pixels at random sites.

    If a value would leave [0, 1] there, its sign is flipped; if that does not help either, it is clipped. Of up to 64
    draws of sites, each image takes the first that retains 99.9% of the size (sum of absolute changes), or the one that
    retains most: a change of most of the range fits only where the image is dark or bright.
    """
    height, width = pairs.clean.shape[2:]
    keys, change = _random.keys(pairs.clean, seed), pairs.perturbation.flatten(2)
    size = change.abs().flatten(1).sum(1)
    best, retained = pairs.clean.clone(), torch.full_like(size, -1.0)
    for attempt in range(PLACEMENTS):
        rows = (retained < 0.999 * size).nonzero()[:, 0]
        if not len(rows):
            break
        clean = pairs.clean[rows]
        # A random permutation of the sites: pixels move as a whole, with all their channels.
        order = _random.uniform(keys[rows], attempt, height * width).argsort(1)
        moved = change[rows].gather(2, order[:, None].expand(-1, clean.shape[1], -1)).view_as(clean)
        # |x - .5| > .5 is outside [0, 1]: flip only if the value is outside and the flipped one is less so.
        excess, flipped_excess = ((clean + sign * moved - 0.5).abs() for sign in (1, -1))
        signed = torch.where(excess > flipped_excess.clamp(min=0.5), -moved, moved)
        edited = (clean + signed).clamp(0, 1)
        fitted = (edited - clean).abs().flatten(1).sum(1)
        better = fitted > retained[rows]
        best[rows[better]], retained[rows[better]] = edited[better], fitted[better]
    return best


@dataclass
class _LayerNumbers:
    """Spread and reach in one layer of every pair, and sums of maps.

    Attributes:
        fooled: for each batch, which pairs succeed.
        failed: for each batch, which pairs fail.
        spread: for each batch (2, n), of the attacks and of the random edits.
        reach: for each batch (2, n), the same of reach.
        sums: group to the sum of its maps; "all" holds the random edits of all pairs.
        counts: group to the number of maps in its sum.
    """

    fooled: list[Tensor] = field(default_factory=list)
    failed: list[Tensor] = field(default_factory=list)
    spread: list[Tensor] = field(default_factory=list)
    reach: list[Tensor] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, attack: ActivationChange, random: ActivationChange, fooled: Tensor, failed: Tensor) -> None:
        self.fooled.append(fooled)
        self.failed.append(failed)
        self.spread.append(torch.stack([spread_of(one.maximum, one.peak) for one in (attack, random)]))
        self.reach.append(torch.stack([reach_of(one.maximum, one.peak) for one in (attack, random)]))
        groups = {
            "successes": (attack, fooled),
            "failures": (attack, failed),
            "random edits": (random, fooled),
            "all": (random, torch.ones_like(fooled)),
        }
        for name, (change, rows) in groups.items():
            self.sums[name] = self.sums.get(name, 0) + change.maximum[rows].double().sum(0)
            self.counts[name] = self.counts.get(name, 0) + int(rows.sum())

    def average(self, group: str) -> Tensor:
        """(h, w) mean map of a group; NaN if the group is empty."""
        chosen = "all" if group == "random edits" and not self.counts[group] else group
        return (self.sums[chosen] / (self.counts[chosen] or torch.nan)).float()

    def values(self, group: str) -> dict[str, np.ndarray]:
        """Spread and reach of the group's pairs."""
        # Without successes the random edits of all pairs are the control.
        fooled, failed = torch.cat(self.fooled), torch.cat(self.failed)
        rows = failed if group == "failures" else fooled
        if group == "random edits" and not bool(fooled.any()):
            rows = torch.ones_like(fooled)
        kind = int(group == "random edits")
        return {
            name: torch.cat(values, 1)[kind][rows].double().cpu().numpy()
            for name, values in (("spread", self.spread), ("reach", self.reach))
        }


def _table(numbers: Mapping[str, _LayerNumbers]) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for position, (name, layer) in enumerate(numbers.items()):
        for group in GROUPS:
            depth = position / max(1, len(numbers) - 1)
            row: dict[str, object] = {"layer": name, "depth": depth, "group": group}
            for measure, values in layer.values(group).items():
                # Spread is a fraction of the sites; reach may exceed 1.
                interval_of = fraction_interval if measure == "spread" else mean_interval
                interval = interval_of(values[np.isfinite(values)])
                row |= dict(zip((measure, f"{measure}_low", f"{measure}_high"), interval, strict=True))
                row["images"] = len(values)
            rows.append(row)
    return pd.DataFrame(rows)


def analyze_propagation(model: nn.Module, pairs: Pairs, *, seed: int = 0) -> Analysis:
    """Maps of every layer, and how far the perturbation travels compared with a random edit of its size.

    A network without maps has no scores.
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
    curves = {
        "reach": attack.reach,
        "reach, random edit": random.reach,
        "spread": attack.spread,
        "spread, random edit": random.spread,
    }
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
                    title: torch.stack([values[name] for name in attack.layers], 1).cpu()
                    for title, values in curves.items()
                },
                meaning="Largest change over channels at each site; the brightest color is the layer's own peak in the "
                "clean image. Attacks that fail travel almost as far, so the lead over a random edit of the same size "
                "counts. The pixels of a random edit are scattered, so an attack confined to a part of the image "
                "also differs from it by being compact.",
            )
        },
    )
