"""Checkpoints: a training as it stood between two updates, on disk whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from weakspot.writing import write_whole

CHECKPOINT, RECORD, WEIGHTS = "checkpoint.pt", "training.json", "model.safetensors"
FORMAT = 1


def write_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Tensors and plain values alone, so that it is read without unpickling anything else."""
    write_whole(
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
    write_whole(folder / RECORD, lambda draft: draft.write_text(text, "utf-8"), durable=True)


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
