"""Concepts of units: what `weakspot dissect` has found that they respond to."""

from __future__ import annotations

import math
from pathlib import Path

FILE = "scores.csv"  # as the command writes it
COLUMNS = ("layer", "unit", "concept", "iou")


def read_concepts(folder: Path) -> dict[tuple[str, int], str]:
    """The concept of each unit that stands for one, with its intersection over union, by layer and unit.

    Args:
        folder: that `weakspot dissect` wrote.

    Raises:
        FileNotFoundError: if it holds no such file.
        ValueError: if the file is not that of a dissection.
    """
    import pandas as pd

    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} must be a folder that weakspot dissect wrote, got none with {FILE}"
        )
    try:
        table = pd.read_csv(path)
    except (ValueError, UnicodeDecodeError):
        raise ValueError(f"{path} must be the table of a dissection, got a file that is no table") from None
    missing = [name for name in COLUMNS if name not in table]
    if missing:
        raise ValueError(f"{path} must be the table of a dissection, got one without {', '.join(missing)}")
    rows = zip(*(table[name] for name in COLUMNS), strict=True)
    return {
        (str(layer), int(unit)): f"{concept} (IoU {iou:.2g})"
        for layer, unit, concept, iou in rows
        if isinstance(concept, str) and not math.isnan(iou)
    }
