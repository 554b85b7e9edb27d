"""Images of a run's report: small pictures of what was attacked, what came of it, and where it mattered."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from weakspot.report.colors import table
from weakspot.report.leafing import text

WIDE = 128  # pixels of the longer side, at most
FAITHFUL = 64  # up to here pictures are kept to the bit
SHARE = 0.6  # of the colour over the photograph


def picture(levels: NDArray[np.uint8]) -> str:
    """A picture (C, H, W) of 8 bits as a data URL, smaller where it is large."""
    pixels = _pixels(levels)
    return _encoded(_small(Image.fromarray(pixels)), exact=max(pixels.shape[:2]) <= FAITHFUL)


def overlaid(levels: NDArray[np.uint8], importance: NDArray[np.float32]) -> str:
    """A map (h, w) in colour, from zero to its largest value, over the picture in grey."""
    pixels = _pixels(levels)
    grey = np.asarray(Image.fromarray(pixels).convert("L").convert("RGB"), dtype=np.float32)
    values = np.nan_to_num(importance, nan=0, posinf=0, neginf=0).clip(min=0)
    places = np.rint(values * (255 / (float(values.max(initial=0)) or 1))).astype(np.uint8)
    colors = Image.fromarray(table("magnitude")[places])
    colors = colors.resize((pixels.shape[1], pixels.shape[0]), Image.Resampling.NEAREST)
    mixed = (1 - SHARE) * grey + SHARE * np.asarray(colors, dtype=np.float32)
    drawn = Image.fromarray(np.rint(mixed).astype(np.uint8))
    return _encoded(_small(drawn), exact=max(pixels.shape[:2]) <= FAITHFUL)


def pixelated(levels: NDArray[np.uint8]) -> bool:
    """Whether it is so small that it is drawn larger than it is."""
    return bool(max(levels.shape[1:]) <= FAITHFUL)


def _pixels(levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if len(levels) == 3:
        return np.ascontiguousarray(levels.transpose(1, 2, 0))
    return np.repeat(np.rint(levels.mean(0))[..., None], 3, axis=2).astype(np.uint8)


def _small(drawn: Image.Image) -> Image.Image:
    if max(drawn.size) > WIDE:
        drawn.thumbnail((WIDE, WIDE), Image.Resampling.LANCZOS)
    return drawn


def _encoded(drawn: Image.Image, *, exact: bool) -> str:
    buffer = io.BytesIO()
    if exact:
        drawn.save(buffer, "PNG", optimize=True)
        return "data:image/png;base64," + text(buffer.getvalue())
    drawn.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + text(buffer.getvalue())
