"""Checkpoints: a training as it stood between two updates, on disk whole or not at all.

Identity: what makes two trainings the same one, so that one goes on with the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import weakspot
from weakspot._io.files import write_atomic
from weakspot.classifier import Classifier
from weakspot.datasets import LabeledImages
from weakspot.models.specs import fingerprint
from weakspot.training.config import Settings

CHECKPOINT, RECORD, WEIGHTS = "checkpoint.pt", "training.json", "model.safetensors"
FORMAT = 1


def write_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Tensors and plain values alone, so that it is read without unpickling anything else."""
    write_atomic(
        folder / CHECKPOINT, lambda draft: torch.save({"format": FORMAT, **state}, draft), durable=True
    )


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """What `write_checkpoint` wrote, None where nothing was.

    Raises:
        ValueError: when the file is damaged or of a newer version.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Not torch's own words, which advise to unpickle it.
        raise ValueError(f"{path} is damaged ({type(error).__name__}); remove it to begin anew") from error
    if state.get("format") != FORMAT:
        raise ValueError(
            f"{path} is of format {state.get('format')}; this version of weakspot reads {FORMAT}"
        )
    return state


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """What was asked, and how it went so far, as JSON."""
    text = json.dumps(record, indent=2) + "\n"
    write_atomic(folder / RECORD, lambda draft: draft.write_text(text, "utf-8"), durable=True)


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `write_record` wrote, None where nothing was."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path} is damaged (it holds no mapping)")
    return record


def clear_drafts(folder: Path) -> None:
    """Remove what processes that were killed had begun to write."""
    for name in (CHECKPOINT, RECORD, WEIGHTS):
        for draft in folder.glob(f".{name}.*"):
            draft.unlink(missing_ok=True)


SAMPLED = 256  # images that are hashed of data that has to be decoded
PARTS = ("settings", "data", "start")
OWN = {*PARTS, "versions", "finished", "stopped", "weights", "epochs"}


def make_record(
    settings: Settings, data: LabeledImages, classifier: Classifier, about: Mapping[str, Any] | None
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


def data_fingerprint(data: LabeledImages) -> str:
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
    """Weights, normalization and how the network prints: its layers, though not the functions called between them."""
    text = repr(
        (
            fingerprint(classifier.network),
            classifier.mean.flatten().tolist(),
            classifier.std.flatten().tolist(),
            str(classifier.network),
        )
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]
