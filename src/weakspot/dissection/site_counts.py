"""Tally: sites where units are active, where concepts are, and where both.

Top values: the largest activations of every unit, kept while a data set streams by.

Cache: what dissections found, kept under a name of everything that decides it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from weakspot._io.files import write_atomic
from weakspot.attribution.alignment import Grid, place
from weakspot.classifier import Classifier
from weakspot.dissection.concepts import Annotation, ConceptSet
from weakspot.models.specs import fingerprint, settings

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
        active_labeled: (U, K) likewise, where the site carries some label of the category.
    """

    both: Tensor
    concept: Tensor
    active: Tensor
    active_annotated: Tensor
    active_labeled: Tensor

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
        labeled = torch.zeros(self.active_labeled.shape[1], masks.shape[1], dtype=torch.int32)
        labeled.index_add_(0, own, masks.int())
        common = active @ torch.cat([masks.float(), (labeled > 0).float()]).T
        split = len(annotation.concepts)
        every = torch.zeros(len(units), self.both.shape[1], dtype=torch.float64)
        every[:, annotation.concepts] = common[:, :split].double()
        self.both.index_add_(0, units, every)
        self.active_labeled.index_add_(0, units, common[:, split:].double())


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


SCHEMA = 1


@dataclass(frozen=True, eq=False)
class Numbers:
    """What is kept of a layer: thresholds (U,), iou (U, C), top_images and top_values (U, k)."""

    thresholds: Tensor
    iou: Tensor
    top_images: Tensor
    top_values: Tensor


class Cache:
    """A folder of results; without a folder nothing is kept and nothing found.

    The name of a result is made of the network (its weights, structure and normalization), the layer, the data set (its
    tables, and name, size and time of its files) and the options: another of any of them is another result.
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
            raise ValueError(
                f"cache is {self.folder}, which is a file; accepted is a folder, made where it is missing"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cache is {self.folder}, which cannot be made ({error.strerror})") from None
        self._common = {
            "schema": SCHEMA,
            "weights": fingerprint(classifier),
            "network": repr(classifier.network),
            "settings": repr(settings(classifier.network)),
            "normalization": [classifier.mean.flatten().tolist(), classifier.std.flatten().tolist()],
            "size": list(classifier.input_size),
            "data": _of_data(concepts),
            **options,
        }

    def get(self, layer: str) -> Numbers | None:
        """What was found before, or None; a file that cannot be read counts as none."""
        path = self._path(layer)
        if path is None or not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as kept:
                return Numbers(
                    **{field.name: torch.from_numpy(kept[field.name]) for field in fields(Numbers)}
                )
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return None

    def put(self, layer: str, numbers: Numbers) -> None:
        """Keep it, whole or not at all."""
        path = self._path(layer)
        if path is None:
            return
        tensors = {field.name: getattr(numbers, field.name).numpy() for field in fields(numbers)}

        def write(draft: Path) -> None:
            with draft.open("wb") as file:  # a file, because numpy appends .npz to a path
                np.savez_compressed(file, **tensors)

        write_atomic(path, write)

    def _path(self, layer: str) -> Path | None:
        if self.folder is None:
            return None
        name = hashlib.sha256(
            json.dumps({**self._common, "layer": layer}, sort_keys=True).encode()
        ).hexdigest()
        return self.folder / f"dissection-{name[:24]}.npz"


def _of_data(concepts: ConceptSet) -> str:
    digest = hashlib.sha256()
    for name in ("index.csv", "label.csv"):
        digest.update((concepts.folder / name).read_bytes())
    for folder, below, names in os.walk(concepts.folder / "images"):
        below.sort()
        for name in sorted(names):
            about = Path(folder, name).stat()
            digest.update(
                f"{os.path.relpath(folder, concepts.folder)}/{name} {about.st_size} {about.st_mtime_ns}".encode()
            )
    return digest.hexdigest()
