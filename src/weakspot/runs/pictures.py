"""Picture files: a batch of images as PNGs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from PIL import Image
from torch import Tensor

from weakspot.writing import write_whole

LONGEST = 180  # bytes of a file name


def write_pngs(images: Tensor, names: Sequence[str], folder: Path) -> list[str]:
    """Write (N, C, H, W) in [0, 1] to NAME.png each, rounded to 8 bits.

    Args:
        images: grey or colour.
        names: of the pictures they were made of, folders in them kept; their suffixes go, and equal ones are numbered.
        folder: made where it is missing.

    Returns:
        Paths within `folder`, one for each image.
    """
    written, taken = [], {str(parent).lower() for name in names for parent in _stem(name).parents}
    for image, name in zip(images, names, strict=True):
        stem = _stem(name)
        path, number = stem.with_name(stem.name + ".png"), 1
        while str(path).lower() in taken:
            number += 1
            path = stem.with_name(f"{stem.name}-{number}.png")
        taken.add(str(path).lower())
        levels = (image.detach().cpu().clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
        picture = Image.fromarray(levels if levels.shape[-1] == 3 else levels[..., 0])
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(folder / path, partial(picture.save, format="PNG"))
        written.append(str(path))
    return written


def _stem(name: str) -> PurePosixPath:
    """The name without suffix, inside its folder, short enough for any file system."""
    parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in {"/", "..", "."}]
    whole = PurePosixPath(*parts) if parts else PurePosixPath("image")
    return whole.with_name(whole.stem.encode()[:LONGEST].decode(errors="ignore") or "image")
