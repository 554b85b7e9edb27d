"""The folder that commands other than audit write: report, scores, pairs, maps, pictures, and how they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from weakspot._io.files import write_atomic
from weakspot.audit.store.run_info import RUN_FILE, versions
from weakspot.explanations.explanation import Explanation

if TYPE_CHECKING:
    import pandas as pd

FILES = ("report.html", "scores.csv", "pairs.safetensors", "maps.npz", RUN_FILE)
SCHEMA = 1  # of run.json
LONGEST = 180  # bytes of a file name


def write_run(explanation: Explanation, folder: Path, about: Mapping[str, object]) -> dict[str, Path]:
    """Write `FILES` into a folder, each atomically; other files in it stay.

    Args:
        explanation: to be written.
        folder: created if it does not exist.
        about: content of run.json besides versions.

    Returns:
        File name -> path.

    Raises:
        ValueError: if `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder, got {folder}, which is a file")
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / name for name in FILES}
    explanation.to_html(paths["report.html"])
    explanation.pairs.save(paths["pairs.safetensors"])
    maps = {name: tensor.numpy() for name, tensor in explanation.maps.items()}
    write_atomic(paths["maps.npz"], lambda draft: _save_maps(draft, maps))
    write_scores(explanation.scores, about, folder)
    return paths


def write_scores(
    scores: pd.DataFrame, about: Mapping[str, object], folder: Path, *, name: str = "scores.csv"
) -> None:
    """Write the scores under that name and, last of all files, the run.json that says how they were made."""
    write_atomic(folder / name, lambda draft: scores.to_csv(draft, index=False))
    text = json.dumps({"schema": SCHEMA, **about, "versions": versions()}, indent=2) + "\n"
    write_atomic(folder / RUN_FILE, lambda draft: draft.write_text(text, "utf-8"))


def _save_maps(draft: Path, maps: Mapping[str, np.ndarray]) -> None:
    with draft.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **maps)


def write_pngs(images: Tensor, names: Sequence[str], folder: Path) -> list[str]:
    """Write images (N, C, H, W) in [0, 1] as NAME.png, rounded to 8 bits.

    Args:
        images: gray or color.
        names: of the original pictures; folders in them are kept, suffixes replaced, and equal names numbered.
        folder: created if it does not exist.

    Returns:
        Paths within `folder`, one per image.
    """
    written, taken = [], {str(parent).lower() for name in names for parent in _stem(name).parents}
    for image, name in zip(images, names, strict=True):
        stem = _stem(name)
        path, number = stem.with_name(stem.name + ".png"), 1
        while str(path).lower() in taken:  # file systems may ignore case
            number += 1
            path = stem.with_name(f"{stem.name}-{number}.png")
        taken.add(str(path).lower())
        levels = (image.detach().cpu().clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
        picture = Image.fromarray(levels if levels.shape[-1] == 3 else levels[..., 0])
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / path, partial(picture.save, format="PNG"))
        written.append(str(path))
    return written


def _stem(name: str) -> PurePosixPath:
    """The name without suffix, confined to its folder, and short enough for any file system."""
    parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in {"/", "..", "."}]
    path = PurePosixPath(*parts) if parts else PurePosixPath("image")
    return path.with_name(path.stem.encode()[:LONGEST].decode(errors="ignore") or "image")
