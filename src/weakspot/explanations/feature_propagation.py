"""Propagation: how far does a perturbation travel through the layers of a network?

After Vargas and Su 2019 (arXiv 1902.02947): PM_max is the largest and PM_mean the mean over channels of
|A(x) - A(x')|, site by site. Spread and reach, fractions of the layer's own peak, are ours. Attacks that fail travel
almost as far as those that succeed, so the control is in `propagation_controls`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weakspot._checks import checked_batch_size
from weakspot.attribution.hooks import Place, fused_for, reading, spatial_layers
from weakspot.classifier import Classifier, default_batch, evaluating
from weakspot.explanations.analysis import check_pairs, prepare_pairs
from weakspot.pairs import Pairs
from weakspot.statistics.number_format import counted

TILE = 2**17  # values compared at once: their difference stays in the processor's cache
NOTABLE = 0.1  # fraction of the layer's own peak from which a site counts as reached


@dataclass(frozen=True, eq=False)
class ActivationChange:
    """How two activations (N, C, h, w) differ.

    Attributes:
        maximum: (N, h, w) largest absolute difference over channels.
        mean: (N, h, w) mean absolute difference over channels.
        peak: (N,) largest absolute value of the first activation.
    """

    maximum: Tensor
    mean: Tensor
    peak: Tensor

    @staticmethod
    def joined(parts: Sequence[ActivationChange]) -> ActivationChange:
        """Concatenate the changes of several batches."""
        return ActivationChange(
            *(torch.cat([getattr(part, name) for part in parts]) for name in ("maximum", "mean", "peak"))
        )


def activation_change(first: Tensor, second: Tensor) -> ActivationChange:
    """The difference of two activations of one shape, computed in the order in which their values lie in memory.

    >>> change = activation_change(torch.tensor([[[[1.0]], [[-3.0]]]]), torch.zeros(1, 2, 1, 1))
    >>> change.maximum.item(), change.mean.item(), change.peak.item()
    (3.0, 2.0, 3.0)
    """
    channels_last = first.stride(1) == 1 and first.shape[1] > 1
    return _by_sites(first, second) if channels_last else _by_channels(first, second)


def _by_sites(first: Tensor, second: Tensor) -> ActivationChange:
    """For activations in channels-last order: blocks of sites, each with all its channels."""
    count, channels, height, width = first.shape
    rows = max(1, TILE // channels)
    maximum, mean, peak = (_at_least_float32(first[:0]).new_empty(count * height * width) for _ in range(3))
    start = 0
    for one, other in zip(
        *(maps.permute(0, 2, 3, 1).reshape(-1, channels).split(rows) for maps in (first, second)), strict=True
    ):
        part = slice(start, start + len(one))
        # PM_max and PM_mean of Vargas and Su 2019, for a block of sites.
        difference = _at_least_float32(one).sub(_at_least_float32(other)).abs_()
        maximum[part], mean[part] = difference.amax(1), difference.mean(1)
        # max |A| without a copy of |A|: the larger of -min and max.
        least, most = one.aminmax(dim=1)
        peak[part] = torch.maximum(-least, most)
        start += len(one)
    shape = (count, height, width)
    return ActivationChange(
        maximum.view(shape).float(), mean.view(shape).float(), peak.view(count, -1).amax(1).float()
    )


def _by_channels(first: Tensor, second: Tensor) -> ActivationChange:
    """For activations in channels-first order: blocks of channels of a few images."""
    count, channels, height, width = first.shape
    step = max(1, TILE // (height * width))  # channels
    # As many whole images as fill a tile, or one image in blocks of channels.
    images = max(1, step // channels)
    parts = []
    for one, other in zip(
        *(maps.reshape(count, channels, -1).split(images) for maps in (first, second)), strict=True
    ):
        maximum, total = (torch.zeros_like(_at_least_float32(one[:, 0])) for _ in range(2))
        peak = torch.zeros_like(one[:, 0, 0])
        for block, other_block in zip(one.split(step, 1), other.split(step, 1), strict=True):
            difference = _at_least_float32(block).sub(_at_least_float32(other_block)).abs_()
            maximum = torch.maximum(maximum, difference.amax(1))
            total = total + difference.sum(1)
            least, most = block.flatten(1).aminmax(dim=1)
            peak = torch.maximum(peak, torch.maximum(-least, most))
        shape = (len(one), height, width)
        mean = (total / channels).view(shape)
        parts.append(ActivationChange(maximum.view(shape).float(), mean.float(), peak.float()))
    return ActivationChange.joined(parts)


def _at_least_float32(values: Tensor) -> Tensor:
    """Half precision as float32: sums over many channels need it."""
    return values.float() if values.dtype in {torch.float16, torch.bfloat16} else values


@dataclass(frozen=True, eq=False)
class Propagation:
    """What a perturbation changes in each layer.

    Attributes:
        layers: names, in the order in which they are computed.
        maximum: layer to (N, h, w), the largest |A(x) - A(x')| over channels.
        mean: layer to (N, h, w), the mean |A(x) - A(x')| over channels.
        peak: layer to (N,), the largest |A(x)| of the clean image.
    """

    layers: Sequence[str]
    maximum: Mapping[str, Tensor]
    mean: Mapping[str, Tensor]
    peak: Mapping[str, Tensor]

    @property
    def spread(self) -> dict[str, Tensor]:
        """Layer to (N,): fraction of the sites that change by over a tenth of the layer's peak in the clean image."""
        return {name: spread_of(self.maximum[name], self.peak[name]) for name in self.layers}

    @property
    def reach(self) -> dict[str, Tensor]:
        """Layer to (N,): the largest change, as a fraction of the layer's peak in the clean image."""
        return {name: reach_of(self.maximum[name], self.peak[name]) for name in self.layers}

    def __repr__(self) -> str:
        first, last = self.layers[0], self.layers[-1]
        spread, reach = (float(values[last].nanmean()) for values in (self.spread, self.reach))
        return (
            f"Propagation of {counted(len(self.peak[last]), 'perturbation')} through "
            f"{counted(len(self.layers), 'layer')}\n"
            f"  {first} {tuple(self.maximum[first].shape[1:])} ... {last} {tuple(self.maximum[last].shape[1:])}\n"
            f"  mean spread in the last layer: {spread:.0%}, mean reach: {reach:.2f}"
        )


def propagation(
    model: nn.Module, pairs: Pairs, *, layers: Sequence[str] | None = None, batch_size: int | None = None
) -> Propagation:
    """Maps of what a perturbation changes, layer by layer, from one pass over the stacked pairs.

    Spread alone says little: attacks that fail spread almost as far. `propagation_study` has the controls.

    Args:
        model: any classifier; the maps of tokens are the grid of their patches. It is not changed.
        pairs: N pairs.
        layers: names of modules whose outputs are maps. Default: behind every learned operation the last of its norms
            and activations, and each block.
        batch_size: pairs at once; changes no result.

    Raises:
        ValueError: if an argument is invalid; the message names it.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    >>> clean = torch.rand(2, 3, 16, 16)
    >>> result = propagation(model.eval(), Pairs.of(model, clean, (clean + 0.1).clamp(0, 1)))
    >>> result.layers, result.maximum["1"].shape
    (['1'], torch.Size([2, 14, 14]))
    """
    check_pairs(pairs, model)
    batch_size = checked_batch_size(batch_size)
    with evaluating(model) as classifier:
        pairs = prepare_pairs(classifier, pairs)
        (result,) = propagations(classifier, pairs.clean, [pairs.adversarial], layers, batch_size)
    return result


def propagations(
    classifier: Classifier,
    clean: Tensor,
    others: Sequence[Tensor],
    layers: Sequence[str] | None = None,
    batch_size: int | None = None,
) -> list[Propagation]:
    """`propagation` from the clean images to each of several others; the clean ones pass through the network once."""
    places = spatial_layers(classifier, clean[:1], layers)
    changes: list[dict[str, list[ActivationChange]]] = [{name: [] for name in places} for _ in others]
    with fused_for(classifier, clean[:1], places):
        for batch in stream(classifier, places, clean, others, batch_size):
            for name, of_others in batch.changes.items():
                for of_layers, change in zip(changes, of_others, strict=True):
                    of_layers[name].append(change)
    results = []
    for of_layers in changes:
        joined = {name: ActivationChange.joined(parts) for name, parts in of_layers.items()}
        results.append(
            Propagation(
                list(places),
                {name: change.maximum for name, change in joined.items()},
                {name: change.mean for name, change in joined.items()},
                {name: change.peak for name, change in joined.items()},
            )
        )
    return results


@dataclass(frozen=True, eq=False)
class ChangedBatch:
    """What the changed images of a batch of pairs change in each layer.

    Attributes:
        rows: which pairs.
        changes: layer to one change for each way in which the images were changed.
        predicted: (1 + ways, n) classes of the clean and of the changed images.
    """

    rows: slice
    changes: Mapping[str, Sequence[ActivationChange]]
    predicted: Tensor


def stream(
    classifier: Classifier,
    places: Mapping[str, Place],
    clean: Tensor,
    others: Sequence[Tensor],
    batch_size: int | None,
) -> Iterator[ChangedBatch]:
    """Batch by batch, each layer's maps of clean and changed images compared as they appear and then dropped."""
    fixed = classifier.fixed_batch
    # Half the usual batch, because clean and changed images go through the network together.
    size = fixed or batch_size or max(1, default_batch(clean) // 2)
    for start in range(0, len(clean), size):
        rows = slice(start, min(start + size, len(clean)))
        batches = [images[rows] for images in (clean, *others)]
        yield (_stacked if fixed is None else _in_turn)(classifier, places, rows, batches)


def _stacked(
    classifier: Classifier, places: Mapping[str, Place], rows: slice, batches: Sequence[Tensor]
) -> ChangedBatch:
    """One pass over the clean and the changed images stacked."""
    changes: dict[str, list[ActivationChange]] = {}
    count = len(batches[0])

    # The first `count` maps of the stack are the clean ones, followed by one block for each kind of change.
    def visit(name: str, maps: Tensor) -> None:
        changes[name] = [activation_change(maps[:count], part) for part in maps[count:].split(count)]

    with reading(classifier, places, visit), torch.no_grad():
        logits = classifier(torch.cat(list(batches)))
    return ChangedBatch(rows, _complete(changes, places), logits.argmax(1).view(len(batches), count))


def _in_turn(
    classifier: Classifier, places: Mapping[str, Place], rows: slice, batches: Sequence[Tensor]
) -> ChangedBatch:
    """For networks with a fixed batch size, which cannot take the stack: the clean maps wait for the others."""
    changes: dict[str, list[ActivationChange]] = {name: [] for name in places}
    waiting: dict[str, Tensor] = {}
    count = len(batches[0])

    def visit(name: str, maps: Tensor) -> None:
        if name in waiting:
            changes[name].append(activation_change(waiting[name], maps[:count]))
        else:
            waiting[name] = maps[:count].clone()

    with reading(classifier, places, visit), torch.no_grad():
        predicted = [classifier(classifier.filled(batch))[:count].argmax(1) for batch in batches]
    return ChangedBatch(rows, _complete(changes, places), torch.stack(predicted))


def _complete(
    changes: Mapping[str, Sequence[ActivationChange]], places: Mapping[str, Place]
) -> Mapping[str, Sequence[ActivationChange]]:
    """The changes in the order of the layers, each of which must have run."""
    missing = [name for name in places if not changes.get(name)]
    if missing:
        raise ValueError(
            f"layers must run in every forward pass, got {missing[0]!r}, which did not (choose a layer that each image "
            "goes through)"
        )
    return {name: changes[name] for name in places}


def spread_of(maximum: Tensor, peak: Tensor) -> Tensor:
    """(N,) fraction of the sites that change by over a tenth of the peak; in a silent layer any change counts."""
    fraction = (maximum > NOTABLE * peak[:, None, None]).flatten(1).double().mean(1)
    return fraction.where(maximum.flatten(1).isfinite().all(1), torch.nan)


def reach_of(maximum: Tensor, peak: Tensor) -> Tensor:
    """(N,) the largest change over the peak; NaN if the layer is silent in the clean image and not in the other."""
    largest = maximum.flatten(1).amax(1).double()
    # No change is no reach, even where a silent layer would make it 0 / 0.
    reach = torch.where(largest == 0, 0.0, largest / peak.double())
    return reach.where(reach.isfinite(), torch.nan)
