"""Gaps: how two activations differ, site by site, in one look at each of their values.

Propagation: how far a perturbation travels through the layers of a network.

After Vargas and Su 2019 (arXiv 1902.02947); the shares are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weakspot._checks import check_batch_size
from weakspot.attribution.hooks import Place, fused_for, reading, spatial_layers
from weakspot.classifier import Classifier, default_batch, evaluating
from weakspot.explanations.analysis import check_pairs, prepare_pairs
from weakspot.pairs import Pairs

TILE = 2**17  # values looked at together: their difference stays in the processor's cache


@dataclass(frozen=True, eq=False)
class ActivationChange:
    """How two activations (N, C, h, w) differ.

    Attributes:
        maximum: (N, h, w) largest difference over channels.
        mean: (N, h, w) mean difference over channels.
        peak: (N,) largest value of the first, whatever its sign.
    """

    maximum: Tensor
    mean: Tensor
    peak: Tensor

    @staticmethod
    def joined(parts: Sequence[ActivationChange]) -> ActivationChange:
        """One after the other."""
        return ActivationChange(
            *(torch.cat([getattr(part, name) for part in parts]) for name in ("maximum", "mean", "peak"))
        )


def activation_change(first: Tensor, second: Tensor) -> ActivationChange:
    """The gap between two activations of one shape, in whichever order their values lie in memory.

    >>> found = gap(torch.tensor([[[[1.0]], [[-3.0]]]]), torch.tensor([[[[0.0]], [[0.0]]]]))
    >>> found.maximum.item(), found.mean.item(), found.peak.item()
    (3.0, 2.0, 3.0)
    """
    by_site = first.stride(1) == 1 and first.shape[1] > 1
    return _site_after_site(first, second) if by_site else _channel_after_channel(first, second)


def _site_after_site(first: Tensor, second: Tensor) -> ActivationChange:
    """Of values whose channels lie together."""
    count, channels, height, width = first.shape
    rows = max(1, TILE // channels)
    maximum, mean, peak = (_exact(first[:0]).new_empty(count * height * width) for _ in range(3))
    start = 0
    for one, other in zip(
        *(maps.permute(0, 2, 3, 1).reshape(-1, channels).split(rows) for maps in (first, second)), strict=True
    ):
        part = slice(start, start + len(one))
        difference = _exact(one).sub(_exact(other)).abs_()
        maximum[part], mean[part] = difference.amax(1), difference.mean(1)
        least, most = one.aminmax(dim=1)
        peak[part] = torch.maximum(-least, most)
        start += len(one)
    shape = (count, height, width)
    return ActivationChange(
        maximum.view(shape).float(), mean.view(shape).float(), peak.view(count, -1).amax(1).float()
    )


def _channel_after_channel(first: Tensor, second: Tensor) -> ActivationChange:
    """Of values whose sites lie together."""
    count, channels, height, width = first.shape
    step = max(1, TILE // (height * width))  # channels
    images = max(1, step // channels)
    gaps = []
    for one, other in zip(
        *(maps.reshape(count, channels, -1).split(images) for maps in (first, second)), strict=True
    ):
        maximum, total = (torch.zeros_like(_exact(one[:, 0])) for _ in range(2))
        peak = torch.zeros_like(one[:, 0, 0])
        for mine, theirs in zip(one.split(step, 1), other.split(step, 1), strict=True):
            difference = _exact(mine).sub(_exact(theirs)).abs_()
            maximum = torch.maximum(maximum, difference.amax(1))
            total = total + difference.sum(1)
            least, most = mine.flatten(1).aminmax(dim=1)
            peak = torch.maximum(peak, torch.maximum(-least, most))
        shape = (len(one), height, width)
        gaps.append(
            ActivationChange(
                maximum.view(shape).float(), (total / channels).view(shape).float(), peak.float()
            )
        )
    return ActivationChange.joined(gaps)


def _exact(values: Tensor) -> Tensor:
    """Half precision as single: sums over many channels need it."""
    return values.float() if values.dtype in {torch.float16, torch.bfloat16} else values


NOTABLE = 0.1  # of the layer's own peak: from there on a site counts as reached


@dataclass(frozen=True, eq=False)
class Propagation:
    """What a perturbation changes in each layer.

    Attributes:
        layers: names, in the order in which they are computed.
        maximum: layer to (N, h, w), largest over channels of |A(x) - A(x')|.
        mean: layer to (N, h, w), mean over channels likewise.
        peak: layer to (N,), largest |A(x)| of the clean image.
    """

    layers: Sequence[str]
    maximum: Mapping[str, Tensor]
    mean: Mapping[str, Tensor]
    peak: Mapping[str, Tensor]

    @property
    def spread(self) -> dict[str, Tensor]:
        """Layer to (N,): share of the sites changed by over a tenth of the layer's peak in the clean image."""
        return {name: spread_of(self.maximum[name], self.peak[name]) for name in self.layers}

    @property
    def reach(self) -> dict[str, Tensor]:
        """Layer to (N,): the largest change, over the layer's peak in the clean image."""
        return {name: reach_of(self.maximum[name], self.peak[name]) for name in self.layers}


def propagation(
    model: nn.Module, pairs: Pairs, *, layers: Sequence[str] | None = None, batch_size: int | None = None
) -> Propagation:
    """Maps of what a perturbation changes, layer by layer, from one pass over the stacked pairs.

    Spread alone says little: attacks that fail spread almost as far. `propagation_study` has the controls.

    Args:
        model: any classifier; maps of tokens are the grid of their patches.
        pairs: N pairs.
        layers: names of modules whose outputs are maps; where not given behind every learned operation the last of
            its norms and activations, and each block.
        batch_size: pairs at once; changes no result.

    Raises:
        ValueError: when an argument does not fit, naming it.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    >>> clean = torch.rand(2, 3, 16, 16)
    >>> found = propagation(model.eval(), Pairs.of(model, clean, (clean + 0.1).clamp(0, 1)))
    >>> found.layers, found.maximum["1"].shape
    (['1'], torch.Size([2, 14, 14]))
    """
    check_pairs(pairs, model)
    check_batch_size(batch_size)
    with evaluating(model) as classifier:
        pairs = prepare_pairs(classifier, pairs)
        (found,) = propagations(classifier, pairs.clean, [pairs.adversarial], layers, batch_size)
    return found


def propagations(
    classifier: Classifier,
    clean: Tensor,
    others: Sequence[Tensor],
    layers: Sequence[str] | None = None,
    batch_size: int | None = None,
) -> list[Propagation]:
    """`propagation` from the clean images to each of several others, the clean ones going through the network once."""
    places = spatial_layers(classifier, clean[:1], layers)
    gaps: list[dict[str, list[ActivationChange]]] = [{name: [] for name in places} for _ in others]
    with fused_for(classifier, clean[:1], places):
        for read in stream(classifier, places, clean, others, batch_size):
            for name, ways in read.gaps.items():
                for mine, found in zip(gaps, ways, strict=True):
                    mine[name].append(found)
    return [_joined(places, mine) for mine in gaps]


def _joined(places: Mapping[str, Place], gaps: Mapping[str, Sequence[ActivationChange]]) -> Propagation:
    together = {name: ActivationChange.joined(parts) for name, parts in gaps.items()}
    return Propagation(
        list(places),
        {name: found.maximum for name, found in together.items()},
        {name: found.mean for name, found in together.items()},
        {name: found.peak for name, found in together.items()},
    )


@dataclass(frozen=True, eq=False)
class Read:
    """What a batch of pairs changed.

    Attributes:
        rows: which pairs.
        gaps: layer to one gap for each way in which the images were changed.
        predicted: (1 + ways, n) classes of the clean and of the changed images.
    """

    rows: slice
    gaps: Mapping[str, Sequence[ActivationChange]]
    predicted: Tensor


def stream(
    classifier: Classifier,
    places: Mapping[str, Place],
    clean: Tensor,
    others: Sequence[Tensor],
    batch_size: int | None,
) -> Iterator[Read]:
    """Batch by batch, the clean images stacked with the changed ones; only gaps leave the pass."""
    stacked = classifier.fixed_batch is None
    size = batch_size or max(1, default_batch(clean) // 2)
    for start in range(0, len(clean), size if stacked else classifier.fixed_batch or 1):
        rows = slice(start, min(start + (size if stacked else classifier.fixed_batch or 1), len(clean)))
        batches = [images[rows] for images in (clean, *others)]
        yield (
            _stacked(classifier, places, rows, batches)
            if stacked
            else _in_turn(classifier, places, rows, batches)
        )


def _stacked(
    classifier: Classifier, places: Mapping[str, Place], rows: slice, batches: Sequence[Tensor]
) -> Read:
    gaps: dict[str, list[ActivationChange]] = {}
    count = len(batches[0])

    def visit(name: str, maps: Tensor) -> None:
        gaps[name] = [activation_change(maps[:count], part) for part in maps[count:].split(count)]

    with reading(classifier, places, visit), torch.no_grad():
        logits = classifier(torch.cat(list(batches)))
    return Read(rows, _all(gaps, places), logits.argmax(1).view(len(batches), count))


def _in_turn(
    classifier: Classifier, places: Mapping[str, Place], rows: slice, batches: Sequence[Tensor]
) -> Read:
    """For networks of one batch size, which cannot take the stack: the clean maps wait for the others."""
    gaps: dict[str, list[ActivationChange]] = {name: [] for name in places}
    waiting: dict[str, Tensor] = {}
    count = len(batches[0])

    def visit(name: str, maps: Tensor) -> None:
        if name in waiting:
            gaps[name].append(activation_change(waiting[name], maps[:count]))
        else:
            waiting[name] = maps[:count].clone()

    with reading(classifier, places, visit), torch.no_grad():
        predicted = [classifier(classifier.filled(batch))[:count].argmax(1) for batch in batches]
    return Read(rows, _all(gaps, places), torch.stack(predicted))


def _all(
    gaps: Mapping[str, Sequence[ActivationChange]], places: Mapping[str, Place]
) -> Mapping[str, Sequence[ActivationChange]]:
    missing = [name for name in places if not gaps.get(name)]
    if missing:
        raise ValueError(
            f"layer {missing[0]!r} did not run in every forward pass; accepted are layers that each image goes through"
        )
    return {name: gaps[name] for name in places}


def spread_of(maximum: Tensor, peak: Tensor) -> Tensor:
    """(N,) share of the sites that change by over a tenth of the peak; of a silent layer any change counts."""
    fraction = (maximum > NOTABLE * peak[:, None, None]).flatten(1).double().mean(1)
    return fraction.where(maximum.flatten(1).isfinite().all(1), torch.nan)


def reach_of(maximum: Tensor, peak: Tensor) -> Tensor:
    """(N,) the largest change over the peak; NaN of a layer that is silent in the clean image and not in the other."""
    largest = maximum.flatten(1).amax(1).double()
    reach = torch.where(largest == 0, 0.0, largest / peak.double())
    return reach.where(reach.isfinite(), torch.nan)
