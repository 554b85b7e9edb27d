"""Arrays in an .npz file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from weakspot.datasets.labelled import Labelled, from_tensors

IMAGES = ("images", "x", "data")
LABELS = ("labels", "y")


def read_npz(path: Path, split: str) -> Labelled:
    """images and labels, or x_train, y_train, x_test, y_test, in memory; channels may come first or last.

    Raises:
        ValueError: when the file is damaged or holds no such arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {key.lower(): file[key] for key in file.files}
    except Exception as error:  # noqa: BLE001 - damaged archives raise nearly anything
        raise ValueError(f"{path} cannot be read as an .npz file of arrays ({error})") from None
    found = []
    for names in (IMAGES, LABELS):
        spelled = [f"{name}_{split}" for name in names] + [f"{split}_{name}" for name in names]
        plain = [] if split == "test" and any("train" in key for key in held) else list(names)
        key = next((key for key in spelled + plain if key in held), None)
        if key is None:
            raise ValueError(
                f"{path} holds {', '.join(held) or 'nothing'}; accepted are {names[0]} or {names[0]}_{split}"
            )
        found.append(held[key])
    images, labels = found
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    if pixels.ndim == 4 and pixels.shape[1] not in {1, 3} and pixels.shape[3] in {1, 3}:
        pixels = pixels.permute(0, 3, 1, 2).contiguous()
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{path}: labels are {labels.dtype}; accepted are whole numbers")
    classes = torch.from_numpy(labels.reshape(-1).astype(np.int64))
    try:
        return from_tensors(pixels, classes, name=f"{path.stem} {split}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
