"""Tally: sites where units are active, where concepts are, and where both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weakspot.attribution.registration import Grid, place
from weakspot.dissection.broden import Annotation

TOGETHER = 256  # maps laid out at once
DENOMINATORS = ("category", "activated", "all")


@dataclass(frozen=True)
class Tally:
    """Sums over images, of U units, C concepts and K categories.

    Attributes:
        both: (U, C) sites where the unit is active and the concept is.
        concept: (C,) sites where the concept is.
        active: (U,) sites where the unit is active.
        active_annotated: (U, K) likewise, in images where somebody annotated the category.
        active_labelled: (U, K) likewise, where the site carries some label of the category.
    """

    both: Tensor
    concept: Tensor
    active: Tensor
    active_annotated: Tensor
    active_labelled: Tensor

    @staticmethod
    def empty(units: int, concepts: int, categories: int) -> Tally:
        """Nothing counted yet."""
        shapes = ((units, concepts), (concepts,), (units,), (units, categories), (units, categories))
        return Tally(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def iou(self, categories: Tensor, denominator: str) -> Tensor:
        """(U, C) intersection over union.

        What a unit's sites are counted over decides the union (Bau et al. 2017 count the images that have the concept's
        category; other implementations count only sites with a label of it, or all images).

        Args:
            categories: (C,) int64 category of each concept.
            denominator: "category", "activated" or "all".
        """
        active = {
            "category": self.active_annotated[:, categories],
            "activated": self.active_labelled[:, categories],
            "all": self.active[:, None],
        }[denominator]
        union = active + self.concept - self.both
        return torch.where(union > 0, self.both / union.clamp(min=1), 0.0)

    def add(
        self,
        maps: Tensor,
        thresholds: Tensor,
        grid: Grid | None,
        annotations: list[Annotation],
        categories: Tensor,
    ) -> None:
        """Count a batch.

        Maps that exceed the threshold at none of their own cells do so nowhere between them, and are left out.

        Args:
            maps: (N, U, h, w) of the units.
            thresholds: (U,) above which a unit is active.
            grid: where the cells lie among the masks' sites, or None where they tile them.
            annotations: of the N images, masks of one size.
            categories: (C,) category of each concept.
        """
        owners, units = (maps.flatten(2).amax(2) > thresholds).nonzero().unbind(1)
        size = annotations[0].masks.shape[1:]
        sites = torch.zeros(0, size[0] * size[1], dtype=torch.bool)
        for one, unit in zip(owners.split(TOGETHER), units.split(TOGETHER), strict=True):
            if len(one):
                shown = maps[one, unit][:, None].float()
                laid = place(shown, (size[0], size[1]), grid, unseen=-torch.inf)[:, 0]
                sites = torch.cat([sites, (laid > thresholds[unit, None, None]).flatten(1).cpu()])
        owners, units = owners.cpu(), units.cpu()
        for number, annotation in enumerate(annotations):
            mine = owners == number
            self._add_one(sites[mine].float(), units[mine], annotation, categories)

    def _add_one(self, active: Tensor, units: Tensor, annotation: Annotation, categories: Tensor) -> None:
        """Of one image: active sites (P, S) of these units."""
        masks = annotation.masks.flatten(1)
        self.concept.index_add_(0, annotation.concepts, masks.sum(1).double())
        if not len(units):
            return
        areas = active.sum(1).double()
        self.active.index_add_(0, units, areas)
        self.active_annotated.index_add_(0, units, areas[:, None] * annotation.categories)
        own = categories[annotation.concepts]
        labelled = torch.zeros(self.active_labelled.shape[1], masks.shape[1], dtype=torch.int32)
        labelled.index_add_(0, own, masks.int())
        common = active @ torch.cat([masks.float(), (labelled > 0).float()]).T
        split = len(annotation.concepts)
        every = torch.zeros(len(units), self.both.shape[1], dtype=torch.float64)
        every[:, annotation.concepts] = common[:, :split].double()
        self.both.index_add_(0, units, every)
        self.active_labelled.index_add_(0, units, common[:, split:].double())
