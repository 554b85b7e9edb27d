"""Exact logits of many small edits of an image, without redoing the whole forward pass."""

from weakspot.edits.cell_windows import Windowed, cells, exchanged, grid, windowed
from weakspot.edits.crops import Crops, bounding_boxes, differentiable_engine
from weakspot.edits.engine import Prepared, prepare
from weakspot.edits.local import Edits, LocalEdits, work_saved

__all__ = [
    "Crops",
    "Edits",
    "LocalEdits",
    "Prepared",
    "Windowed",
    "bounding_boxes",
    "cells",
    "differentiable_engine",
    "exchanged",
    "grid",
    "prepare",
    "windowed",
    "work_saved",
]
