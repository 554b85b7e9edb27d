"""Top values: the largest activations of every unit, kept while a data set streams by."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST = 8192  # values of a unit that are held; of larger data sets a fixed sample of the sites is taken
PRIME = 2654435761  # Knuth's multiplicative hash


class TopValues:
    """The value that a share of all sites exceeds, unit by unit, from one pass.

    Exact as long as that share is no more than `LARGEST` sites; beyond that sites are sampled, by their number alone,
    so that about as many are left.
    """

    def __init__(self, quantile: float, sites: int) -> None:
        """`sites` is how many there will be in all images together."""
        self.quantile = quantile
        self.every = max(1, math.ceil(quantile * sites / LARGEST))
        self.kept = min(sites, math.ceil(quantile * sites / self.every * 1.25) + 8 if self.every > 1
                        else math.floor(quantile * (sites - 1)) + 2)  # fmt: skip
        self.seen, self.counted = 0, 0
        self._held: Tensor | None = None

    def add(self, maps: Tensor) -> None:
        """Maps (N, U, h, w) of the next N images."""
        values = maps.transpose(0, 1).flatten(1)
        if self.every > 1:
            numbers = torch.arange(self.seen, self.seen + values.shape[1], device=values.device)
            values = values[:, (numbers * PRIME) % 2**32 % self.every == 0]
        self.seen += maps.shape[0] * maps.shape[2] * maps.shape[3]
        self.counted += values.shape[1]
        best = values.topk(min(self.kept, values.shape[1]), 1).values
        if self._held is not None:
            best = torch.cat([self._held, best], 1)
        self._held = best.topk(min(self.kept, best.shape[1]), 1).values

    def thresholds(self) -> Tensor:
        """(U,) the quantile, linear between the two nearest values."""
        if self._held is None:
            raise ValueError("no images were seen; accepted is at least one")
        place = min(self.quantile * (self.counted - 1), self._held.shape[1] - 1.0)
        low = math.floor(place)
        high = min(low + 1, self._held.shape[1] - 1)
        return self._held[:, low].lerp(self._held[:, high], place - low)
