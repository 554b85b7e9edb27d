"""Exact logits of many small edits of an image, without redoing the whole forward pass."""

from weakspot.edits.cell_windows import Windowed, cells, exchanged, grid, windowed
from weakspot.edits.engine import Prepared, prepare
from weakspot.edits.local import Edits, LocalEdits, work_saved

__all__ = [
    "Edits",
    "LocalEdits",
    "Prepared",
    "Windowed",
    "cells",
    "exchanged",
    "grid",
    "prepare",
    "windowed",
    "work_saved",
]
