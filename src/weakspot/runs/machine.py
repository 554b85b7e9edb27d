"""Machine: the network as an audit uses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weakspot.classifier import Classifier
from weakspot.models.probe import Watch
from weakspot.runs.donors import Donors
from weakspot.runs.isolation import Lots
from weakspot.runs.plan import Plan
from weakspot.runs.steady import SteadyClassifier

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(eq=False)
class Machine:
    """The network as an audit uses it, and what it has learnt about its memory.

    Attributes:
        classifier: as it was loaded; analyses look inside it.
        steady: the same network for attacks.
        lots: how many images are attacked at once.
        pairs: how many are explained at once, or have their regions found.
        watch: whether the network is still what it was.
        donors: the other images of the run.
    """

    classifier: Classifier
    steady: SteadyClassifier
    lots: Lots
    pairs: Lots
    watch: Watch
    donors: Donors

    @classmethod
    def of(
        cls, classifier: Classifier, plan: Plan, listing: pa.Table, batch_size: int | None = None
    ) -> Machine:
        """For a plan; without a batch size all images of a shard are attacked at once, fewer when memory runs out."""
        steady = SteadyClassifier(classifier, plan.group)
        donors = Donors(listing, classifier, plan.seed)
        return cls(classifier, steady, Lots(batch_size, steady), Lots(None, None), Watch(classifier), donors)

    def predict(self, images: Tensor, troubles: dict[int, str]) -> Tensor:
        """Logits (N, K), in groups; NaN as they come, and where the network raised, which is entered as a trouble."""

        def go(mine: Tensor) -> Tensor:
            with torch.no_grad():
                return torch.cat([self.steady(images[part]) for part in mine.split(self.steady.group)])

        rows = torch.arange(len(images), device=images.device)
        found = self.lots.each(go, rows, troubles, f"a pass through {self.steady.name}")
        known = found[0][1] if found else torch.empty(0, max(2, self.watch.probe.logits.shape[1]))
        logits = known.new_full((len(images), known.shape[1]), torch.nan, device=images.device)
        for mine, own in found:
            logits[mine] = own
        return logits
