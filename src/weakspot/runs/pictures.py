"""Picture files: a batch of images as PNGs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from PIL import Image
from torch import Tensor

from weakspot.runs.folder import write_whole


def write_pngs(images: Tensor, names: Sequence[str], folder: Path) -> list[str]:
    """Write (N, C, H, W) in [0, 1] to NAME.png each, rounded to 8 bits.

    Args:
        images: grey or colour.
        names: of the pictures they were made of, folders in them kept; their suffixes go, and equal ones are numbered.
        folder: made where it is missing.

    Returns:
        Paths within `folder`, one for each image.
    """
    written: list[str] = []
    for image, name in zip(images, names, strict=True):
        parts = [
            part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in {"/", "..", "."}
        ]
        stem = PurePosixPath(*parts).with_suffix("") if parts else PurePosixPath("image")
        path, number = stem.with_name(stem.name + ".png"), 1
        while str(path).lower() in {other.lower() for other in written}:
            number += 1
            path = stem.with_name(f"{stem.name}-{number}.png")
        levels = (image.detach().cpu().clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
        picture = Image.fromarray(levels if levels.shape[-1] == 3 else levels[..., 0])
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(folder / path, partial(picture.save, format="PNG"))
        written.append(str(path))
    return written
