"""Gaps: how two activations differ, site by site, in one look at each of their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 2**17  # values looked at together: their difference stays in the processor's cache


@dataclass(frozen=True, eq=False)
class Gap:
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
    def joined(parts: Sequence[Gap]) -> Gap:
        """One after the other."""
        return Gap(
            *(torch.cat([getattr(part, name) for part in parts]) for name in ("maximum", "mean", "peak"))
        )


def gap(first: Tensor, second: Tensor) -> Gap:
    """The gap between two activations of one shape, in whichever order their values lie in memory.

    >>> found = gap(torch.tensor([[[[1.0]], [[-3.0]]]]), torch.tensor([[[[0.0]], [[0.0]]]]))
    >>> found.maximum.item(), found.mean.item(), found.peak.item()
    (3.0, 2.0, 3.0)
    """
    by_site = first.stride(1) == 1 and first.shape[1] > 1
    return _site_after_site(first, second) if by_site else _channel_after_channel(first, second)


def _site_after_site(first: Tensor, second: Tensor) -> Gap:
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
    return Gap(maximum.view(shape).float(), mean.view(shape).float(), peak.view(count, -1).amax(1).float())


def _channel_after_channel(first: Tensor, second: Tensor) -> Gap:
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
        gaps.append(Gap(maximum.view(shape).float(), (total / channels).view(shape).float(), peak.float()))
    return Gap.joined(gaps)


def _exact(values: Tensor) -> Tensor:
    """Half precision as single: sums over many channels need it."""
    return values.float() if values.dtype in {torch.float16, torch.bfloat16} else values
