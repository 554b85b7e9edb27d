"""Identity: what makes two trainings the same one, so that one goes on with the other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import weakspot
from weakspot.classifier import Classifier
from weakspot.datasets import Labelled
from weakspot.defenses.training.checkpoint import CHECKPOINT, RECORD, read_record
from weakspot.defenses.training.settings import Settings
from weakspot.models.fingerprint import fingerprint

SAMPLED = 256  # images that are hashed of data that has to be decoded
PARTS = ("settings", "data", "start")
OWN = {*PARTS, "versions", "finished", "stopped", "weights", "epochs"}


def make_record(
    settings: Settings, data: Labelled, classifier: Classifier, about: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What training.json says before the first update.

    Raises:
        ValueError: when `about` cannot be written or has names of the record's own.
    """
    taken = sorted(OWN & set(about or {}))
    if taken:
        raise ValueError(f"about has {taken[0]!r}; accepted are names other than {', '.join(sorted(OWN))}")
    try:
        json.dumps(about)
    except (TypeError, ValueError) as error:
        raise ValueError(f"about cannot be written as JSON ({error}); accepted are plain values") from None
    return {
        "settings": settings.as_record(),
        "data": {"name": data.name, "images": len(data), "fingerprint": data_fingerprint(data)},
        "start": _start(classifier),
        "versions": {"weakspot": weakspot.__version__, "torch": str(torch.__version__)},
        **(about or {}),
    }


def find_earlier(out: Path, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of the training that `out` holds, None where it holds none.

    Raises:
        ValueError: when it is of another training, naming what differs.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out is {out}, which is a file; accepted is a folder, made where it is missing")
    try:
        earlier = read_record(out)
    except ValueError as error:
        raise ValueError(f"{error}; remove it and {CHECKPOINT} to begin anew") from None
    if earlier is not None:
        check_same(out / RECORD, record, earlier)
    return earlier


def check_same(path: Path, record: Mapping[str, Any], earlier: Mapping[str, Any]) -> None:
    """Raises ValueError where what `path` holds is another training than this record's, naming what differs."""
    for part in PARTS:
        asked, there = record[part], earlier.get(part)
        if asked == there:
            continue
        detail = ""
        if isinstance(asked, Mapping) and isinstance(there, Mapping):
            name = next(
                (key for key in [*asked, *there] if asked.get(key, asked) != there.get(key, there)), ""
            )
            detail = f" ({name} is {there.get(name)} there, {asked.get(name)} here)"
        raise ValueError(
            f"out is {path.parent}, which holds a training with other {part}{detail}; give another folder"
        )


def data_fingerprint(data: Labelled) -> str:
    """Sixteen hex digits made of all labels and all images; of picture files, of names, sizes and 256 of them."""
    digest = hashlib.sha256(repr((len(data), data.shape)).encode())
    digest.update(data.labels.cpu().numpy().tobytes())
    for path in getattr(data.pixels, "paths", ()):
        digest.update(f"{path} {path.stat().st_size}".encode())
    count = len(data) if data.held else min(SAMPLED, len(data))
    for rows in torch.linspace(0, len(data) - 1, count, dtype=torch.float64).round().long().split(SAMPLED):
        digest.update(data.pixels(rows).detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _start(classifier: Classifier) -> str:
    """Weights, normalisation and how the network prints: its layers, though not the functions called between them."""
    text = repr(
        (
            fingerprint(classifier.network),
            classifier.mean.flatten().tolist(),
            classifier.std.flatten().tolist(),
            str(classifier.network),
        )
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]
