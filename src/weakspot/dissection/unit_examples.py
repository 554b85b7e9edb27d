"""Unit examples: the pictures that excite a unit most, and where in them it is active."""

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
from weakspot.dissection.concepts import ConceptSet, read_picture
from weakspot.dissection.site_counts import mask_grid
from weakspot.dissection.units import Dissection


@dataclass(frozen=True, eq=False)
class UnitExample:
    """One picture of a unit, at half the network's input size.

    Attributes:
        image: number in the concept set.
        pixels: (C, h, w) in [0, 1].
        active: (h, w) bool, where the unit exceeds its threshold.
    """

    image: int
    pixels: Tensor
    active: Tensor

    def __repr__(self) -> str:
        return (
            f"UnitExample(image {self.image}, active in {float(self.active.float().mean()):.1%} of its sites)"
        )


def show_units(
    model: nn.Module, dissection: Dissection, dataset: Path | str, units: Sequence[int], *, count: int = 4
) -> Mapping[int, Sequence[UnitExample]]:
    """The `count` pictures that excite each of the units most.

    Every picture passes through the network once, even if it is shown for several units.

    Args:
        model: the classifier that was dissected.
        dissection: of one of its layers.
        dataset: the concept set of the dissection.
        units: numbers of units.
        count: pictures per unit.

    Raises:
        ValueError: if there is no such unit.
    """
    units = [operator.index(unit) for unit in units]
    total = len(dissection.units)
    wrong = [unit for unit in units if not 0 <= unit < total]
    if wrong:
        raise ValueError(f"units must be between 0 and {total - 1} for {dissection.layer!r}, got {wrong[0]}")
    images_of = {
        unit: [image for image in dissection.top_images[unit, :count].tolist() if image >= 0]
        for unit in units
    }
    units_of: dict[int, list[int]] = {}
    for unit, images in images_of.items():
        for image in images:
            units_of.setdefault(image, []).append(unit)
    if not units_of:
        return {unit: [] for unit in units}
    concepts = ConceptSet.open(dataset, limit=dissection.options.limit)
    thresholds = torch.tensor(dissection.units["threshold"].to_numpy())
    examples: dict[tuple[int, int], UnitExample] = {}
    with evaluating(model) as classifier:
        size = classifier.input_size
        half = (max(1, size[0] // 2), max(1, size[1] // 2))
        sample = torch.zeros(1, classifier.channels, *size, device=classifier.mean.device)
        places = spatial_layers(classifier, sample, [dissection.layer])
        layer = places[dissection.layer]
        grid = mask_grid(classifier, sample, dissection.layer, layer, dissection.options.alignment)
        batch = classifier.fixed_batch or 2 * default_batch(sample)
        with fused_for(classifier, sample, places), torch.no_grad():
            for rows in torch.tensor(sorted(units_of)).split(batch):
                numbers = rows.tolist()
                pictures = torch.stack(
                    [read_picture(concepts, number, size, classifier.channels) for number in numbers]
                )
                maps: list[Tensor] = []
                with reading(classifier, places, partial(_store, maps)):
                    classifier(classifier.filled(pictures.to(sample.device)))
                small = nn.functional.interpolate(pictures, half, mode="bilinear", antialias=True)
                for row, number in enumerate(numbers):
                    shown = units_of[number]
                    # (units, 1, h, w), of the units that this picture is shown for.
                    own = maps[0][row, shown][:, None].float()
                    # Where no cell looks, no threshold is exceeded.
                    laid_out = place(own, half, grid, unseen=-torch.inf)[:, 0].cpu()
                    for unit, values in zip(shown, laid_out, strict=True):
                        active = values > thresholds[unit]
                        examples[unit, number] = UnitExample(number, small[row].clamp(0, 1), active)
    return {unit: [examples[unit, image] for image in images] for unit, images in images_of.items()}


def _store(stored: list[Tensor], _name: str, maps: Tensor) -> None:
    stored.append(maps.clone())
