"""Showing: the pictures that excite a unit most, and where in them it is active."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from weakspot.attribution.alignment import place
from weakspot.attribution.hooks import fused_for, reading, spatial_layers
from weakspot.classifier import default_batch, evaluating
from weakspot.dissection.broden_files import picture
from weakspot.dissection.concepts import ConceptSet
from weakspot.dissection.units import Dissection, grid_of


@dataclass(frozen=True, eq=False)
class Shown:
    """One picture of a unit, at half the size that the network takes.

    Attributes:
        image: number in the concept set.
        pixels: (C, h, w) in [0, 1].
        active: (h, w) bool, where the unit exceeds its threshold.
    """

    image: int
    pixels: Tensor
    active: Tensor


def show_units(
    model: nn.Module, found: Dissection, dataset: Path | str, units: Sequence[int], *, count: int = 4
) -> Mapping[int, Sequence[Shown]]:
    """The `count` pictures that excite each of these units most.

    Every picture goes through the network once, whichever units it is shown for.

    Args:
        model: the classifier that was dissected.
        found: what was found in it.
        dataset: the concept set that was used.
        units: numbers of units.
        count: pictures of each.

    Raises:
        ValueError: when there is no such unit.
    """
    units = [operator.index(unit) for unit in units]
    total = len(found.units)
    wrong = [unit for unit in units if not 0 <= unit < total]
    if wrong:
        raise ValueError(f"units has {wrong[0]}; {found.layer!r} has units 0 to {total - 1}")
    concepts = ConceptSet.open(dataset)
    thresholds = torch.tensor(found.units["threshold"].to_numpy())
    wanted: dict[int, list[int]] = {}
    for unit in units:
        for image in found.top_images[unit, :count].tolist():
            if image >= 0:
                wanted.setdefault(image, []).append(unit)
    shown: dict[tuple[int, int], Shown] = {}
    if not wanted:
        return {unit: [] for unit in units}
    with evaluating(model) as classifier:
        size = classifier.input_size
        half = (max(1, size[0] // 2), max(1, size[1] // 2))
        sample = torch.zeros(1, classifier.channels, *size, device=classifier.mean.device)
        places = spatial_layers(classifier, sample, [found.layer])
        grid = grid_of(classifier, sample, found.layer, places[found.layer], str(found.options["alignment"]))
        with fused_for(classifier, sample, places), torch.no_grad():
            for rows in torch.tensor(sorted(wanted)).split(
                classifier.fixed_batch or 2 * default_batch(sample)
            ):
                numbers = rows.tolist()
                images = torch.stack(
                    [picture(concepts, number, size, classifier.channels) for number in numbers]
                )
                seen: list[Tensor] = []
                with reading(classifier, places, partial(_keep, seen)):
                    classifier(classifier.filled(images.to(sample.device)))
                small = nn.functional.interpolate(images, half, mode="bilinear", antialias=True)
                for row, number in enumerate(numbers):
                    mine = wanted[number]
                    laid = place(seen[0][row, mine][:, None].float(), half, grid, unseen=-torch.inf)[
                        :, 0
                    ].cpu()
                    for unit, values in zip(mine, laid, strict=True):
                        shown[unit, number] = Shown(number, small[row].clamp(0, 1), values > thresholds[unit])
    return {
        unit: [shown[unit, image] for image in found.top_images[unit, :count].tolist() if image >= 0]
        for unit in units
    }


def _keep(seen: list[Tensor], _name: str, maps: Tensor) -> None:
    seen.append(maps.clone())
