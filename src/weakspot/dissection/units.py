"""Units: what each of a layer's units stands for, by network dissection (Bau et al. 2017, arXiv 1704.05796)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weakspot._checks import check_batch_size, check_choice, is_number
from weakspot.attribution.alignment import Axis, Grid, effective_grid, receptive_grid
from weakspot.attribution.hooks import Place, fused_for, reading, spatial_layers
from weakspot.attribution.layers import find_layer
from weakspot.classifier import Classifier, default_batch, evaluating
from weakspot.dissection.broden_files import image_batches
from weakspot.dissection.concepts import Concept, ConceptSet
from weakspot.dissection.site_counts import DENOMINATORS, Cache, Numbers, Tally, TopValues

if TYPE_CHECKING:
    import pandas as pd

ALIGNMENTS = ("receptive_field", "effective", "resize")
TOP = 8  # images of a unit that are remembered
RUNNERS_UP = ("second", "third")
Progress = Callable[[float], None]


@dataclass(frozen=True, eq=False)
class Dissection:
    """What the units of one layer stand for.

    Attributes:
        layer: its name.
        units: one row per unit: unit, threshold, concept, category, iou, then second, second_iou, third, third_iou;
            concept and category are missing where no concept reaches `min_iou`, and iou is then of the nearest.
        concepts: the C concepts of the data set.
        iou: (U, C).
        top_images: (U, 8) numbers of the images that excite each unit most, best first, -1 where there are fewer.
        top_values: (U, 8) by how much.
        options: what it was made with.
    """

    layer: str
    units: pd.DataFrame
    concepts: Sequence[Concept]
    iou: Tensor
    top_images: Tensor
    top_values: Tensor
    options: Mapping[str, object]


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
    progress: Progress | None = None,
) -> pd.DataFrame:
    """One row per unit of a layer: unit, threshold, concept, category, iou, and the runner-up concepts.

    A unit is active where it exceeds its threshold, the value that a share `quantile` of all sites of all images
    exceeds; it stands for the concept whose sites agree best with those, by intersection over union.

    Args:
        model: any classifier; the units of tokens are their channels.
        layer: a module whose output is a map.
        dataset: a folder in Broden's layout; see `ConceptSet`.
        quantile: share of the sites at which a unit is active.
        min_iou: least intersection over union for a unit to count as a detector.
        denominator: sites of a unit that the union counts: of images where the concept's category is annotated
            ("category"), only those that carry a label of it ("activated"), or of all images ("all").
        alignment: cells lie at the centers of their receptive fields ("receptive_field"), where gradients say that
            they look ("effective"), or tile the image ("resize").
        batch_size: images at once; changes no result.
        cache: a folder that keeps results and gives them back for the same network, data and options.
        progress: called with the share done.

    Raises:
        ValueError: when an argument or a file of the data set does not fit, naming it.
    """
    found = dissection(
        model, [layer], dataset, quantile=quantile, min_iou=min_iou, denominator=denominator, alignment=alignment,
        batch_size=batch_size, cache=cache, progress=progress,
    )  # fmt: skip
    return found[layer].units


def dissection(
    model: nn.Module,
    layers: Sequence[str],
    dataset: Path | str,
    *,
    quantile: float = 0.005,
    min_iou: float = 0.04,
    denominator: str = "category",
    alignment: str = "receptive_field",
    batch_size: int | None = None,
    cache: Path | str | None = None,
    progress: Progress | None = None,
) -> dict[str, Dissection]:
    """`dissect` for several layers in the same two passes over the data, with all concepts and the best images."""
    _check(quantile, min_iou, denominator, alignment)
    check_batch_size(batch_size)
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not len(layers):
        raise ValueError(f"layers is {layers!r}; accepted is a list of layer names")
    concepts = ConceptSet.open(dataset)
    for file, rows in (("index.csv", len(concepts)), ("label.csv", len(concepts.concepts))):
        if not rows:
            raise ValueError(
                f"{Path(dataset) / file} has no rows that say anything; accepted is at least one"
            )
    options = {"quantile": quantile, "denominator": denominator, "alignment": alignment}
    with evaluating(model) as classifier:
        kept = Cache(cache, classifier, concepts, options)
        found = {layer: known for layer in layers if (known := kept.get(layer)) is not None}
        missing = [layer for layer in layers if layer not in found]
        if missing:
            image = torch.zeros(1, classifier.channels, *classifier.input_size, device=classifier.mean.device)
            places = spatial_layers(classifier, image, missing)
            work = _Work(classifier, concepts, image, places, batch_size, progress)
            with fused_for(classifier, image, places):
                tops, best = work.thresholds(quantile)
                thresholds = {name: values.thresholds() for name, values in tops.items()}
                grids = {
                    name: grid_of(classifier, image, name, place, alignment) for name, place in places.items()
                }
                tallies = work.tallies(thresholds, grids)
            categories = _categories(concepts)
            for name in missing:
                numbers = Numbers(
                    thresholds[name].float().cpu(),
                    tallies[name].iou(categories, denominator).float(),
                    *best[name].found(),
                )
                kept.put(name, numbers)
                found[name] = numbers
    return {layer: _dissection(layer, found[layer], concepts, min_iou, options) for layer in layers}


class _Best:
    """The images with the largest activation of each unit."""

    def __init__(self, units: int) -> None:
        self.values = torch.empty(units, 0)
        self.images = torch.empty(units, 0, dtype=torch.long)
        self.seen = 0

    def add(self, maps: Tensor) -> None:
        values = maps.flatten(2).amax(2).T.float().cpu()
        if bool(values.isnan().any() or (values == torch.inf).any()):
            bad = self.seen + int((values.isnan() | (values == torch.inf)).any(0).nonzero()[0])
            raise ValueError(
                f"the layer has NaN or infinity for image {bad} of the data set; check the network's weights"
            )
        images = torch.arange(self.seen, self.seen + len(maps)).expand_as(values)
        self.seen += len(maps)
        values, images = torch.cat([self.values, values], 1), torch.cat([self.images, images], 1)
        order = values.argsort(dim=1, descending=True, stable=True)[:, :TOP]
        self.values, self.images = values.gather(1, order), images.gather(1, order)

    def found(self) -> tuple[Tensor, Tensor]:
        missing = TOP - self.images.shape[1]
        return (
            nn.functional.pad(self.images, (0, missing), value=-1),
            nn.functional.pad(self.values, (0, missing), value=torch.nan),
        )


@dataclass(frozen=True)
class _Work:
    """The two passes over the data.

    Attributes:
        classifier: in eval mode.
        concepts: the data set.
        image: (1, C, H, W), of which only the size matters.
        places: the layers.
        batch_size: images at once.
        progress: called with the share done.
    """

    classifier: Classifier
    concepts: ConceptSet
    image: Tensor
    places: Mapping[str, Place]
    batch_size: int | None
    progress: Progress | None

    def thresholds(self, quantile: float) -> tuple[dict[str, TopValues], dict[str, _Best]]:
        """Top values and best images of each layer."""
        tops = {
            name: TopValues(quantile, len(self.concepts) * math.prod(place.layout.cells))
            for name, place in self.places.items()
        }
        best: dict[str, _Best] = {}

        def visit(name: str, maps: Tensor, _labeled: object) -> None:
            tops[name].add(maps)
            best.setdefault(name, _Best(maps.shape[1])).add(maps)

        self._pass(visit, annotated=False, begun=0.0)
        return tops, best

    def tallies(self, thresholds: Mapping[str, Tensor], grids: Mapping[str, Grid | None]) -> dict[str, Tally]:
        """Sites of units, concepts and both, of each layer."""
        categories = _categories(self.concepts)
        sizes = len(self.concepts.concepts), len(self.concepts.categories)
        tallies = {name: Tally.empty(len(values), *sizes) for name, values in thresholds.items()}

        def visit(name: str, maps: Tensor, annotations: list[object]) -> None:
            tallies[name].add(maps, thresholds[name], grids[name], annotations, categories)  # type: ignore[arg-type]

        self._pass(visit, annotated=True, begun=0.5)
        return tallies

    def _pass(self, visit: Callable[..., None], *, annotated: bool, begun: float) -> None:
        size = self.classifier.fixed_batch or self.batch_size or 2 * default_batch(self.image)
        batches = image_batches(
            self.concepts, self.classifier.input_size, self.classifier.channels, size, annotated=annotated
        )
        done = 0
        for images, labeled in batches:
            count = len(images)

            def see(name: str, maps: Tensor, count: int = count, labeled: object = labeled) -> None:
                visit(name, maps[:count], labeled)

            with reading(self.classifier, self.places, see), torch.no_grad():
                self.classifier(self.classifier.filled(images.to(self.image.device)))
            done += count
            if self.progress is not None:
                self.progress(begun + 0.5 * done / len(self.concepts))


def _categories(concepts: ConceptSet) -> Tensor:
    """(C,) category of each concept."""
    numbers = {name: number for number, name in enumerate(concepts.categories)}
    return torch.tensor([numbers[concept.category] for concept in concepts.concepts], dtype=torch.long)


def grid_of(classifier: Classifier, image: Tensor, name: str, place: Place, alignment: str) -> Grid | None:
    """Where the layer's cells lie among sites of half the image's size; not known of a module with several calls."""
    if alignment == "resize" or place.module is None or place.calls > 1:
        return None
    layer = find_layer(classifier, image, name)
    if layer is None:
        return None
    grid = (receptive_grid if alignment == "receptive_field" else effective_grid)(classifier, image, layer)
    if grid is None:
        return None
    rows, columns = (Axis((axis.offset - 0.5) / 2, axis.stride / 2, axis.reach / 2) for axis in grid)
    return rows, columns


def _dissection(
    layer: str, numbers: Numbers, concepts: ConceptSet, min_iou: float, options: Mapping[str, object]
) -> Dissection:
    import pandas as pd

    ious, ranked = numbers.iou.sort(dim=1, descending=True, stable=True)
    best = [concepts.concepts[place] for place in ranked[:, 0].tolist()]
    detects = ((ious[:, 0] >= min_iou) & (ious[:, 0] > 0)).tolist()
    table: dict[str, object] = {
        "unit": range(len(ious)),
        "threshold": numbers.thresholds.numpy(),
        "concept": [concept.name if good else None for concept, good in zip(best, detects, strict=True)],
        "category": [concept.category if good else None for concept, good in zip(best, detects, strict=True)],
        "iou": ious[:, 0].numpy(),
    }
    for rank, title in enumerate(RUNNERS_UP[: ranked.shape[1] - 1], start=1):
        table[title] = [concepts.concepts[place].name for place in ranked[:, rank].tolist()]
        table[f"{title}_iou"] = ious[:, rank].numpy()
    about = {**options, "min_iou": min_iou, "dataset": str(concepts.folder)}
    return Dissection(
        layer,
        pd.DataFrame(table),
        concepts.concepts,
        numbers.iou,
        numbers.top_images,
        numbers.top_values,
        about,
    )


def _check(quantile: float, min_iou: float, denominator: str, alignment: str) -> None:
    if not is_number(quantile) or not 0 < quantile < 1:
        raise ValueError(
            f"quantile is {quantile!r}; accepted is a share of all sites between 0 and 1, as 0.005"
        )
    if not is_number(min_iou) or not 0 <= min_iou <= 1:
        raise ValueError(f"min_iou is {min_iou!r}; accepted is a number from 0 to 1, as 0.04")
    check_choice("denominator", denominator, DENOMINATORS)
    check_choice("alignment", alignment, ALIGNMENTS)
