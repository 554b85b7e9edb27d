"""Network dissection: which concept does each unit of a layer detect?

After Bau et al. 2017 (arXiv 1704.05796): a unit is active above its top quantile over the data set, and detects the
concept whose sites agree best with its active sites, by intersection over union.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weakspot._checks import check_choice, check_count, checked_batch_size, is_number, with_plain_numbers
from weakspot._progress import Progress, ProgressOption, shown
from weakspot.attribution.alignment import Grid
from weakspot.attribution.hooks import Place, fused_for, reading, spatial_layers
from weakspot.classifier import Classifier, default_batch, evaluating
from weakspot.dissection.concepts import Annotation, Concept, ConceptSet, image_batches
from weakspot.dissection.site_counts import (
    DENOMINATORS,
    DissectionCache,
    LayerResult,
    SiteCounts,
    TopValues,
    mask_grid,
)

if TYPE_CHECKING:
    import pandas as pd

ALIGNMENTS = ("receptive_field", "effective", "resize")
TOP = 8  # images stored per unit
RUNNERS_UP = ("second", "third")
# Takes a layer, its maps (n, U, h, w) and the images' annotations.
Visit = Callable[[str, Tensor, list[Annotation]], None]


@dataclass(frozen=True)
class DissectionOptions:
    """The options of a dissection; see `dissect`.

    Attributes:
        quantile: fraction of the sites at which a unit is active.
        denominator: which sites of a unit the union counts.
        alignment: where the cells of a layer lie in the image.
        min_iou: least intersection over union of a detector.
        dataset: the folder of the data set.
        limit: at most so many of its images; None for all.

    Raises:
        ValueError: if an option is not valid.
    """

    quantile: float = 0.005
    denominator: str = "category"
    alignment: str = "receptive_field"
    min_iou: float = 0.04
    dataset: str = ""
    limit: int | None = None

    def __post_init__(self) -> None:
        with_plain_numbers(self)
        if not is_number(self.quantile) or not 0 < self.quantile < 1:
            raise ValueError(
                f"quantile must be a fraction between 0 and 1, such as 0.005, got {self.quantile!r}"
            )
        if not is_number(self.min_iou) or not 0 <= self.min_iou <= 1:
            raise ValueError(f"min_iou must be between 0 and 1, such as 0.04, got {self.min_iou!r}")
        if self.limit is not None:
            check_count("limit", self.limit)
        check_choice("denominator", self.denominator, DENOMINATORS)
        check_choice("alignment", self.alignment, ALIGNMENTS)


@dataclass(frozen=True, eq=False)
class Dissection:
    """The concepts of the units of one layer.

    Attributes:
        layer: name of the layer.
        units: one row per unit: unit, threshold, concept, category, iou, then second, second_iou, third, third_iou.
            concept and category are missing if no concept reaches `min_iou`; iou is then that of the nearest concept.
        concepts: the C concepts of the data set.
        iou: (U, C).
        top_images: (U, 8) numbers of the images with the largest activation of each unit, best first; -1 if there are
            fewer.
        top_values: (U, 8) those activations.
        options: the options of the dissection.
    """

    layer: str
    units: pd.DataFrame
    concepts: Sequence[Concept]
    iou: Tensor
    top_images: Tensor
    top_values: Tensor
    options: DissectionOptions

    def __repr__(self) -> str:
        detected = self.units["concept"].dropna()
        common = ", ".join(f"{name} ({count})" for name, count in detected.value_counts().head(5).items())
        return (
            f"Dissection of {self.layer!r}: {len(detected)} of {len(self.units)} units detect one of "
            f"{len(self.concepts)} concepts\n  most common: {common or 'none'}"
        )


def dissect(
    model: nn.Module,
    layer: str,
    dataset: Path | str,
    *,
    quantile: float = 0.005,
    min_iou: float = 0.04,
    denominator: str = "category",
    alignment: str = "receptive_field",
    batch_size: int | None = None,
    cache: Path | str | None = None,
    progress: ProgressOption = None,
) -> pd.DataFrame:
    """One row per unit of a layer: unit, threshold, concept, category, iou, and the runner-up concepts.

    A unit is active where it exceeds its threshold, the value that a fraction `quantile` of all sites of all images
    exceeds. It detects the concept whose sites agree best with those, by intersection over union.

    Args:
        model: any classifier; the units of tokens are their channels. It is not changed.
        layer: a module whose output is a map.
        dataset: a folder in Broden's layout; see `ConceptSet`.
        quantile: fraction of the sites at which a unit is active.
        min_iou: least intersection over union for a unit to count as a detector.
        denominator: which sites of a unit the union counts: those of images where the concept's category is annotated
            ("category"), only those that carry a label of it ("activated"), or those of all images ("all").
        alignment: cells lie at the centers of their receptive fields ("receptive_field"), where gradients show that
            they look ("effective"), or tile the image ("resize").
        batch_size: images at once; changes no result.
        cache: a folder where results are stored and found again for the same network, data and options.
        progress: True for a bar on standard error or in the notebook, or a function of the fraction done.

    Raises:
        ValueError: if an argument or a file of the data set is invalid; the message names it.
    """
    results = dissect_layers(
        model, [layer], dataset, quantile=quantile, min_iou=min_iou, denominator=denominator, alignment=alignment,
        batch_size=batch_size, cache=cache, progress=progress,
    )  # fmt: skip
    return results[layer].units


def dissect_layers(
    model: nn.Module,
    layers: Sequence[str],
    dataset: Path | str,
    *,
    quantile: float = 0.005,
    min_iou: float = 0.04,
    denominator: str = "category",
    alignment: str = "receptive_field",
    limit: int | None = None,
    batch_size: int | None = None,
    cache: Path | str | None = None,
    progress: ProgressOption = None,
) -> dict[str, Dissection]:
    """`dissect` for several layers in the same two passes over the data, with all concepts and the top images.

    `limit` takes at most so many images, evenly spaced in index.csv.
    """
    options = DissectionOptions(quantile, denominator, alignment, min_iou, str(Path(dataset)), limit)
    batch_size = checked_batch_size(batch_size)
    if not isinstance(layers, list | tuple) or not all(isinstance(one, str) for one in layers or [None]):
        raise ValueError(f"layers must be a list of layer names, got {layers!r}")
    concepts = ConceptSet.open(dataset, limit=limit)
    for file, rows in (("index.csv", len(concepts)), ("label.csv", len(concepts.concepts))):
        if not rows:
            raise ValueError(f"{Path(dataset) / file} must have at least one row, got none that can be used")
    decisive = {name: getattr(options, name) for name in ("quantile", "denominator", "alignment", "limit")}
    with (
        evaluating(model) as classifier,
        shown(progress, "dissecting", total=len(concepts), counted=False) as report,
    ):
        stored = DissectionCache(cache, classifier, concepts, decisive)
        results = {layer: result for layer in layers if (result := stored.get(layer)) is not None}
        missing = [layer for layer in layers if layer not in results]
        if missing:
            image = torch.zeros(1, classifier.channels, *classifier.input_size, device=classifier.mean.device)
            places = spatial_layers(classifier, image, missing)
            passes = _Passes(classifier, concepts, image, places, batch_size, report)
            with fused_for(classifier, image, places):
                # First pass: the threshold of each unit, and the images that excite it most.
                top_values, top_images = passes.top_values(quantile)
                thresholds = {name: values.thresholds() for name, values in top_values.items()}
                grids = {
                    name: mask_grid(classifier, image, name, place, alignment)
                    for name, place in places.items()
                }
                # Second pass: where units exceed their thresholds, and where concepts are.
                counts = passes.site_counts(thresholds, grids)
            categories = _categories(concepts)
            for name in missing:
                results[name] = LayerResult(
                    thresholds[name].float().cpu(),
                    counts[name].iou(categories, denominator).float(),
                    *top_images[name].padded(),
                )
                stored.put(name, results[name])
    return {layer: _dissection(layer, results[layer], concepts, options) for layer in layers}


class _TopImages:
    """The images with the largest activation of each unit."""

    def __init__(self, units: int) -> None:
        self.values = torch.empty(units, 0)
        self.images = torch.empty(units, 0, dtype=torch.long)
        self.seen = 0

    def add(self, maps: Tensor) -> None:
        """Add maps (N, U, h, w) of the next N images."""
        values = maps.flatten(2).amax(2).T.float().cpu()
        invalid = values.isnan() | (values == torch.inf)
        if bool(invalid.any()):
            image = self.seen + int(invalid.any(0).nonzero()[0])
            raise ValueError(
                f"the layer has NaN or infinity for image {image} of the data set (check the network's weights)"
            )
        images = torch.arange(self.seen, self.seen + len(maps)).expand_as(values)
        self.seen += len(maps)
        values, images = torch.cat([self.values, values], 1), torch.cat([self.images, images], 1)
        # Stable and in order of the images: of equal activations the first image stays.
        order = values.argsort(dim=1, descending=True, stable=True)[:, :TOP]
        self.values, self.images = values.gather(1, order), images.gather(1, order)

    def padded(self) -> tuple[Tensor, Tensor]:
        """(U, TOP) image numbers, -1 if there are fewer, and their values."""
        missing = TOP - self.images.shape[1]
        return (
            nn.functional.pad(self.images, (0, missing), value=-1),
            nn.functional.pad(self.values, (0, missing), value=torch.nan),
        )


@dataclass(frozen=True)
class _Passes:
    """The two passes over the data.

    Attributes:
        classifier: in eval mode.
        concepts: the data set.
        image: (1, C, H, W), of which only the size matters.
        places: the layers.
        batch_size: images at once.
        progress: called with the finished fraction.
    """

    classifier: Classifier
    concepts: ConceptSet
    image: Tensor
    places: Mapping[str, Place]
    batch_size: int | None
    progress: Progress | None

    def top_values(self, quantile: float) -> tuple[dict[str, TopValues], dict[str, _TopImages]]:
        """First pass: top values and top images of each layer."""
        values = {
            name: TopValues(quantile, len(self.concepts) * math.prod(place.layout.cells))
            for name, place in self.places.items()
        }
        images: dict[str, _TopImages] = {}

        def visit(name: str, maps: Tensor, _annotations: list[Annotation]) -> None:
            values[name].add(maps)
            images.setdefault(name, _TopImages(maps.shape[1])).add(maps)

        self._run(visit, annotated=False, done=0.0)
        return values, images

    def site_counts(
        self, thresholds: Mapping[str, Tensor], grids: Mapping[str, Grid | None]
    ) -> dict[str, SiteCounts]:
        """Second pass: sites of units, concepts and both, of each layer."""
        categories = _categories(self.concepts)
        sizes = len(self.concepts.concepts), len(self.concepts.categories)
        counts = {name: SiteCounts.empty(len(values), *sizes) for name, values in thresholds.items()}

        def visit(name: str, maps: Tensor, annotations: list[Annotation]) -> None:
            counts[name].add(maps, thresholds[name], grids[name], annotations, categories)

        self._run(visit, annotated=True, done=0.5)
        return counts

    def _run(self, visit: Visit, *, annotated: bool, done: float) -> None:
        """Pass all images through the network; `done` is the fraction of the whole work that is finished before."""
        size = self.classifier.fixed_batch or self.batch_size or 2 * default_batch(self.image)
        batches = image_batches(
            self.concepts, self.classifier.input_size, self.classifier.channels, size, annotated=annotated
        )
        finished = 0
        for images, labels in batches:
            count = len(images)

            def see(name: str, maps: Tensor, count: int = count, labels: list[Annotation] = labels) -> None:
                visit(name, maps[:count], labels)  # without the images that fill a fixed batch

            with reading(self.classifier, self.places, see), torch.no_grad():
                self.classifier(self.classifier.filled(images.to(self.image.device)))
            finished += count
            if self.progress is not None:
                self.progress(done + 0.5 * finished / len(self.concepts))


def _categories(concepts: ConceptSet) -> Tensor:
    """(C,) the category of each concept."""
    numbers = {name: number for number, name in enumerate(concepts.categories)}
    return torch.tensor([numbers[concept.category] for concept in concepts.concepts], dtype=torch.long)


def _dissection(
    layer: str, result: LayerResult, concepts: ConceptSet, options: DissectionOptions
) -> Dissection:
    import pandas as pd

    # Stable: of concepts with equal IoU the first in the data set wins.
    ious, ranked = result.iou.sort(dim=1, descending=True, stable=True)
    best = [concepts.concepts[position] for position in ranked[:, 0].tolist()]
    # With a least IoU of 0, a concept that shares no site with the unit is still not detected.
    detects = ((ious[:, 0] >= options.min_iou) & (ious[:, 0] > 0)).tolist()
    table: dict[str, object] = {
        "unit": range(len(ious)),
        "threshold": result.thresholds.numpy(),
        "concept": [concept.name if good else None for concept, good in zip(best, detects, strict=True)],
        "category": [concept.category if good else None for concept, good in zip(best, detects, strict=True)],
        "iou": ious[:, 0].numpy(),
    }
    for rank, title in enumerate(RUNNERS_UP[: ranked.shape[1] - 1], start=1):
        table[title] = [concepts.concepts[position].name for position in ranked[:, rank].tolist()]
        table[f"{title}_iou"] = ious[:, rank].numpy()
    return Dissection(
        layer,
        pd.DataFrame(table),
        concepts.concepts,
        result.iou,
        result.top_images,
        result.top_values,
        options,
    )
