"""Cache: what dissections found, kept under a name of everything that decides it."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from weakspot.classifier import Classifier
from weakspot.dissection.broden import ConceptSet
from weakspot.models.fingerprint import fingerprint
from weakspot.models.settings import settings

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

    The name of a result is made of the network (its weights, structure and normalisation), the layer, the data set (its
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
            "normalisation": [classifier.mean.flatten().tolist(), classifier.std.flatten().tolist()],
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
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with draft.open("wb") as file:
                np.savez_compressed(
                    file, **{field.name: getattr(numbers, field.name).numpy() for field in fields(numbers)}
                )
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)

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
