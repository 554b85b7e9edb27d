"""The run folder: report, scores, pairs, maps, and how they were made."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import weakspot
from weakspot.explanations.explanation import Explanation
from weakspot.writing import write_whole

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
FILES = ("report.html", "scores.csv", "pairs.safetensors", "maps.npz", "run.json")


def write_run(explanation: Explanation, folder: Path, about: Mapping[str, Any]) -> dict[str, Path]:
    """Write `FILES` into `folder`, each whole or not at all; others that lie there stay.

    Args:
        explanation: what was found.
        folder: made where it is missing.
        about: what run.json says besides versions.

    Returns:
        File name to path.

    Raises:
        ValueError: when `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out is {folder}, which is a file; accepted is a folder, made where it is missing")
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / name for name in FILES}
    explanation.to_html(paths["report.html"])
    explanation.pairs.save(paths["pairs.safetensors"])
    maps = {name: tensor.numpy() for name, tensor in explanation.maps.items()}
    write_whole(paths["maps.npz"], lambda draft: _save_maps(draft, maps))
    write_scores(explanation.scores, about, folder)
    return paths


def write_scores(
    scores: pd.DataFrame, about: Mapping[str, Any], folder: Path, *, name: str = "scores.csv"
) -> None:
    """Write the scores under that name and, last of all files, run.json, which says how they were made."""
    write_whole(folder / name, lambda draft: scores.to_csv(draft, index=False))
    record = {"schema": SCHEMA, **about, "versions": versions()}
    write_whole(
        folder / "run.json", lambda draft: draft.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    )


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    return {
        "weakspot": weakspot.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _save_maps(draft: Path, maps: Mapping[str, np.ndarray]) -> None:
    with draft.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **maps)
