"""Site counts: where units are active, where concepts are, and where both are, summed over a data set.

`SiteCounts` gives intersection over union, `TopValues` the thresholds of units while a data set streams by, and
`DissectionCache` stores results in a folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from weakspot._io.files import write_atomic
from weakspot.attribution.alignment import Axis, Grid, effective_grid, place, receptive_grid
from weakspot.attribution.hooks import Place
from weakspot.attribution.layers import find_layer
from weakspot.classifier import Classifier
from weakspot.dissection.concepts import Annotation, ConceptSet
from weakspot.models.identity import fingerprint, settings

LAID_OUT = 256  # maps resized to the masks at once
DENOMINATORS = ("category", "activated", "all")
LARGEST = 8192  # values stored per unit; for larger data sets a fixed sample of the sites is taken
PRIME = 2654435761  # Knuth's multiplicative hash
SCHEMA = 1  # of cached results; a new number makes older files unused


@dataclass(frozen=True)
class SiteCounts:
    """Sums over images, for U units, C concepts and K categories.

    Attributes:
        both: (U, C) sites where the unit is active and the concept is.
        concept: (C,) sites where the concept is.
        active: (U,) sites where the unit is active.
        active_annotated: (U, K) the same in images whose category is annotated.
        active_labeled: (U, K) the same at sites with any label of the category.
    """

    both: Tensor
    concept: Tensor
    active: Tensor
    active_annotated: Tensor
    active_labeled: Tensor

    @staticmethod
    def empty(units: int, concepts: int, categories: int) -> SiteCounts:
        """Counts of no images."""
        shapes = ((units, concepts), (concepts,), (units,), (units, categories), (units, categories))
        return SiteCounts(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def iou(self, categories: Tensor, denominator: str) -> Tensor:
        """(U, C) intersection over union: |unit and concept| / (|unit| + |concept| - |unit and concept|).

        The denominator decides which sites of the unit count. Bau et al. 2017 count those of images that have the
        concept's category; other implementations count only sites with a label of it, or all images.

        Args:
            categories: (C,) int64 category of each concept.
            denominator: "category", "activated" or "all".
        """
        active = {
            "category": self.active_annotated[:, categories],
            "activated": self.active_labeled[:, categories],
            "all": self.active[:, None],
        }[denominator]
        union = active + self.concept - self.both
        return torch.where(union > 0, self.both / union.clamp(min=1), 0.0)

    def add(
        self,
        maps: Tensor,
        thresholds: Tensor,
        grid: Grid | None,
        annotations: Sequence[Annotation],
        categories: Tensor,
    ) -> None:
        """Count the sites of a batch.

        Args:
            maps: (N, U, h, w) of the units.
            thresholds: (U,) above which a unit is active.
            grid: where the cells of the maps lie among the masks' sites, or None if they tile them.
            annotations: of the N images, with masks of one size.
            categories: (C,) category of each concept.
        """
        # Bilinear interpolation never exceeds the largest cell: maps below the threshold everywhere are skipped.
        images, units = (maps.flatten(2).amax(2) > thresholds).nonzero().unbind(1)
        height, width = annotations[0].masks.shape[1:]
        sites = torch.zeros(0, height * width, dtype=torch.bool)
        for image, unit in zip(images.split(LAID_OUT), units.split(LAID_OUT), strict=True):
            if len(image):
                chosen = maps[image, unit][:, None].float()
                laid_out = place(chosen, (height, width), grid, unseen=-torch.inf)[:, 0]
                active = laid_out > thresholds[unit, None, None]
                sites = torch.cat([sites, active.flatten(1).cpu()])
        images, units = images.cpu(), units.cpu()
        for number, annotation in enumerate(annotations):
            own = images == number
            self._add_one(sites[own].float(), units[own], annotation, categories)

    def _add_one(self, active: Tensor, units: Tensor, annotation: Annotation, categories: Tensor) -> None:
        """Count one image with the active sites (P, S) of these units (P,)."""
        masks = annotation.masks.flatten(1)
        self.concept.index_add_(0, annotation.concepts, masks.sum(1).double())
        if not len(units):
            return
        # |unit| once for all images, once where the category is annotated, once where it is labeled.
        areas = active.sum(1).double()
        self.active.index_add_(0, units, areas)
        self.active_annotated.index_add_(0, units, areas[:, None] * annotation.categories)
        # (K, S): how many concepts of each category a site has.
        labeled = torch.zeros(self.active_labeled.shape[1], masks.shape[1], dtype=torch.int32)
        labeled.index_add_(0, categories[annotation.concepts], masks.int())
        # One product counts the sites shared with every concept and with every category.
        common = active @ torch.cat([masks.float(), (labeled > 0).float()]).T
        split = len(annotation.concepts)
        # Spread over all concepts of the data set: zero for those that the image lacks.
        every = torch.zeros(len(units), self.both.shape[1], dtype=torch.float64)
        every[:, annotation.concepts] = common[:, :split].double()
        self.both.index_add_(0, units, every)
        self.active_labeled.index_add_(0, units, common[:, split:].double())


def mask_grid(classifier: Classifier, image: Tensor, name: str, place: Place, alignment: str) -> Grid | None:
    """Where the layer's cells lie among the sites of masks, which have half the image's size.

    None if cells tile the image, and for a module with several calls, whose receptive fields are not known.
    """
    if alignment == "resize" or place.module is None or place.calls > 1:
        return None
    layer = find_layer(classifier, image, name)
    if layer is None:
        return None
    grid = (receptive_grid if alignment == "receptive_field" else effective_grid)(classifier, image, layer)
    if grid is None:
        return None
    # Mask site m covers pixels 2m and 2m + 1, with its center at pixel 2m + .5: so m = (pixel - .5) / 2.
    rows, columns = (Axis((axis.offset - 0.5) / 2, axis.stride / 2, axis.reach / 2) for axis in grid)
    return rows, columns


class TopValues:
    """The value that a fraction of all sites exceeds, for each unit, from one pass over the data.

    Exact as long as that fraction is at most `LARGEST` sites. Beyond that, sites are sampled by a hash of their number,
    so that about `LARGEST` of the top values remain.
    """

    def __init__(self, quantile: float, sites: int) -> None:
        """`sites` is the number of sites in all images together."""
        self.quantile = quantile
        self.every = max(1, math.ceil(quantile * sites / LARGEST))
        if self.every == 1:
            stored = math.floor(quantile * (sites - 1)) + 2  # the quantile lies between the last two of these
        else:
            stored = math.ceil(quantile * sites / self.every * 1.25) + 8  # a random sample can hold more
        self.stored = min(sites, stored)
        self.seen, self.counted = 0, 0
        self._values = torch.empty(0)

    def add(self, maps: Tensor) -> None:
        """Add maps (N, U, h, w) of the next N images."""
        values = maps.transpose(0, 1).flatten(1)
        if self.every > 1:
            numbers = torch.arange(self.seen, self.seen + values.shape[1], device=values.device)
            values = values[:, (numbers * PRIME) % 2**32 % self.every == 0]
        self.seen += maps.shape[0] * maps.shape[2] * maps.shape[3]
        self.counted += values.shape[1]
        # Keep the largest values of each batch, then of all batches together: memory stays constant.
        best = values.topk(min(self.stored, values.shape[1]), 1).values
        if len(self._values):
            best = torch.cat([self._values, best], 1)
        self._values = best.topk(min(self.stored, best.shape[1]), 1).values

    def thresholds(self) -> Tensor:
        """(U,) the quantile, interpolated between the two nearest values; the stored values are in descending order."""
        # The quantile of n values lies at position q (n - 1) from the top; memory may hold fewer.
        position = min(self.quantile * (self.counted - 1), self._values.shape[1] - 1.0)
        low = math.floor(position)
        high = min(low + 1, self._values.shape[1] - 1)
        return self._values[:, low].lerp(self._values[:, high], position - low)


@dataclass(frozen=True, eq=False)
class LayerResult:
    """The stored result of one layer: thresholds (U,), iou (U, C), top_images and top_values (U, k)."""

    thresholds: Tensor
    iou: Tensor
    top_images: Tensor
    top_values: Tensor


class DissectionCache:
    """A folder of results, or None to store nothing.

    The file name of a result is a hash of everything that decides it: the network (weights, structure and
    normalization), the layer, the data set (its tables, and name, size and time of its files) and the options.
    """

    def __init__(
        self,
        folder: Path | str | None,
        classifier: Classifier,
        concepts: ConceptSet,
        options: Mapping[str, object],
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"cache must be a folder, got the file {self.folder}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"cache must be a folder that can be created, got {self.folder}: {error.strerror}"
            ) from None
        self._common = {
            "schema": SCHEMA,
            "weights": fingerprint(classifier),
            "network": repr(classifier.network),
            "settings": repr(settings(classifier.network)),
            "normalization": [classifier.mean.flatten().tolist(), classifier.std.flatten().tolist()],
            "size": list(classifier.input_size),
            "data": _data_digest(concepts),
            **options,
        }

    def get(self, layer: str) -> LayerResult | None:
        """The stored result, or None; a file that cannot be read counts as none."""
        path = self._path(layer)
        if path is None or not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as stored:
                return LayerResult(
                    **{field.name: torch.from_numpy(stored[field.name]) for field in fields(LayerResult)}
                )
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return None

    def put(self, layer: str, result: LayerResult) -> None:
        """Store a result."""
        path = self._path(layer)
        if path is None:
            return
        arrays = {field.name: getattr(result, field.name).numpy() for field in fields(result)}

        def write(draft: Path) -> None:
            with draft.open("wb") as file:  # a path would get the suffix .npz appended
                np.savez_compressed(file, **arrays)

        write_atomic(path, write)

    def _path(self, layer: str) -> Path | None:
        if self.folder is None:
            return None
        key = json.dumps({**self._common, "layer": layer}, sort_keys=True)
        return self.folder / f"dissection-{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"


def _data_digest(concepts: ConceptSet) -> str:
    digest = hashlib.sha256()
    for name in ("index.csv", "label.csv"):
        digest.update((concepts.folder / name).read_bytes())
    for folder, subfolders, names in os.walk(concepts.folder / "images"):
        # Sorted in place: os.walk visits subfolders in the order of this list.
        subfolders.sort()
        for name in sorted(names):
            status = Path(folder, name).stat()
            relative = os.path.relpath(folder, concepts.folder)
            digest.update(f"{relative}/{name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()
