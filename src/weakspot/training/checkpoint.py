"""Files of a training: its checkpoint, its record (training.json), and what makes two trainings the same one."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias, TypedDict

import torch
from torch import Tensor

from weakspot._io.files import write_atomic
from weakspot.classifier import Classifier
from weakspot.datasets import LabeledImages
from weakspot.models.identity import fingerprint
from weakspot.training.config import ResolvedConfig

CHECKPOINT, RECORD, WEIGHTS = "checkpoint.pt", "training.json", "model.safetensors"
FORMAT = 1
HASHED = 256  # images that are hashed, if images have to be decoded
IDENTITY = ("settings", "data", "start")  # entries of a record that must be equal to resume
RESERVED = {*IDENTITY, "versions", "finished", "stopped", "weights", "epochs"}
Record: TypeAlias = Mapping[str, object]
"""The content of training.json."""


class Best(TypedDict):
    """The weights of the best epoch so far, by robust accuracy."""

    robust: float
    model: dict[str, object]


class State(TypedDict):
    """A training between two updates: what `Loop` needs to resume."""

    epoch: int
    update: int
    history: list[dict[str, float]]
    losses: list[float]
    stopped: str
    model: dict[str, object]
    buffers: dict[str, Tensor]
    optimizer: dict[str, object]
    precision: dict[str, object]
    best: Best | None


def write_checkpoint(folder: Path, state: State, record: Record) -> None:
    """Write the state: tensors and plain values only, so that it is read without unpickling code."""
    content = {"format": FORMAT, "record": json.dumps(record), "state": state}
    write_atomic(folder / CHECKPOINT, lambda draft: torch.save(content, draft), durable=True)


def read_checkpoint(folder: Path) -> tuple[State, Record] | None:
    """What `write_checkpoint` wrote, or None.

    Raises:
        ValueError: if the file is damaged or has another format.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's own message advises unpickling, so only the type of the error is passed on.
        raise ValueError(f"{path} is damaged ({type(error).__name__}); remove it to start over") from error
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path} must have format {FORMAT}, got {content.get('format')} (remove it to start over)"
        )
    return content["state"], json.loads(content["record"])


def write_record(folder: Path, record: Record) -> None:
    """Write training.json."""
    text = json.dumps(record, indent=2) + "\n"
    write_atomic(folder / RECORD, lambda draft: draft.write_text(text, "utf-8"), durable=True)


def read_record(folder: Path) -> dict[str, object] | None:
    """The content of training.json, or None if there is none.

    Raises:
        ValueError: if the file is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path} is damaged (it must hold a JSON object)")
    return record


def clear_drafts(folder: Path) -> None:
    """Remove the unfinished files of processes that were killed."""
    for name in (CHECKPOINT, RECORD, WEIGHTS):
        for draft in folder.glob(f".{name}.*"):
            draft.unlink(missing_ok=True)


def make_record(
    config: ResolvedConfig, data: LabeledImages, classifier: Classifier, about: Record | None
) -> Record:
    """The content of training.json before the first update.

    Raises:
        ValueError: if `about` cannot be written as JSON or uses a reserved name.
    """
    taken = sorted(RESERVED & set(about or {}))
    if taken:
        raise ValueError(f"about must not have the names {', '.join(sorted(RESERVED))}, got {taken[0]!r}")
    try:
        json.dumps(about, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"about must hold values that JSON has: {error}") from None
    return {
        "settings": config.as_record(),
        "data": {"name": data.name, "images": len(data), "fingerprint": data_fingerprint(data)},
        "start": _start_fingerprint(classifier),
        "versions": {"weakspot": version("weakspot"), "torch": str(torch.__version__)},
        **(about or {}),
    }


def find_earlier(out: Path, record: Record) -> Record | None:
    """The record of the training in `out`, or None.

    Raises:
        ValueError: if it is another training. The message has the difference.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, got the file {out}")
    try:
        earlier = read_record(out)
    except ValueError as error:
        raise ValueError(f"{error}; remove it and {CHECKPOINT} to start over") from None
    if earlier is not None:
        check_same(out, record, earlier)
    return earlier


def check_same(out: Path, record: Record, earlier: Record) -> None:
    """Raises ValueError if the folder's earlier record is of another training."""
    for part in IDENTITY:
        # Versions are recorded but not compared: an update must not end a training.
        asked, stored = record[part], earlier.get(part)
        if asked == stored:
            continue
        detail = ""
        if isinstance(asked, Mapping) and isinstance(stored, Mapping):
            name = next((key for key in [*asked, *stored] if asked.get(key) != stored.get(key)), "")
            detail = f" ({name} was {stored.get(name)} and is {asked.get(name)})"
        raise ValueError(
            f"out must not hold another training, got {out} with other {part}{detail}; use another folder"
        )


def data_fingerprint(data: LabeledImages) -> str:
    """Sixteen hex digits of all labels and images; of images that have to be decoded, of 256 and the files' sizes."""
    digest = hashlib.sha256(repr((len(data), data.shape)).encode())
    digest.update(data.labels.cpu().numpy().tobytes())
    for path in getattr(data.pixels, "paths", ()):
        digest.update(f"{path} {path.stat().st_size}".encode())
    # Evenly spread rows, because decoding all images would take as long as an epoch.
    count = len(data) if data.held else min(HASHED, len(data))
    for rows in torch.linspace(0, len(data) - 1, count, dtype=torch.float64).round().long().split(HASHED):
        digest.update(data.pixels(rows).detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _start_fingerprint(classifier: Classifier) -> str:
    """Of the weights, the normalization and the printed network: its layers, but no functions between them."""
    text = repr(
        (
            fingerprint(classifier.network),
            classifier.mean.flatten().tolist(),
            classifier.std.flatten().tolist(),
            str(classifier.network),
        )
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]
