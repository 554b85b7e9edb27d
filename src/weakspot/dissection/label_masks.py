"""Masks: PNG files whose pixels are numbers."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from weakspot._checks import quiet
from weakspot.images import LARGEST_PICTURE

LARGEST_LABEL = 65_535  # the red and the green byte of a mask hold no larger number


def read_labels(path: Path) -> NDArray[np.int64]:
    """(H, W) label numbers in a mask: R + 256 G of a color PNG whose B is 0, or the value of a gray one.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no such PNG.
    """
    mode, pixels = read_pixels(path)
    if mode in {"L", "I;16", "I"}:  # older Pillow reads 16 bits as I
        return pixels.astype(np.int64)
    if mode != "RGB":
        raise ValueError(
            f"{path} is a PNG of mode {mode}; accepted are 8-bit RGB and 8-bit or 16-bit grayscale without a palette"
        )
    if pixels[..., 2].any():
        row, column = (int(place[0]) for place in pixels[..., 2].nonzero())
        raise ValueError(
            f"{path} is blue {pixels[row, column, 2]} at row {row}, column {column}; accepted is blue 0 everywhere, "
            "as a mask's label is red + 256 green"
        )
    wide: NDArray[np.int64] = pixels[..., :2].astype(np.int64)  # bytes times 256 would overflow
    return np.asarray(wide[..., 0] + 256 * wide[..., 1])


def read_pixels(path: Path) -> tuple[str, NDArray[np.generic]]:
    """Mode and pixels of a PNG as they are stored; of a palette the indices.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it cannot be read or is too large.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; accepted is a PNG mask")
    try:
        content = path.read_bytes()
        mode, pixels = _decode(content)
    except Image.DecompressionBombError:
        raise ValueError(
            f"{path} is too large; accepted are masks of up to {LARGEST_PICTURE // 10**6} million pixels"
        ) from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} is no PNG picture; accepted is a PNG mask") from None
    # Pillow's decoders raise nearly anything on damaged input; any of it means one thing to the user.
    except Exception as error:
        raise ValueError(f"{path} is damaged ({error}); accepted is a PNG mask") from error
    # Pillow drops the lower byte of 16-bit colors, which is where a label would be; depth is byte 24 of every PNG.
    return ("RGB with 16 bits" if mode == "RGB" and content[24] == 16 else mode), pixels


def nearest(
    labels: NDArray[np.int64], shape: tuple[int, int], crop: tuple[int, int] | None = None
) -> NDArray[np.int64]:
    """Labels (H, W) at the centers of `shape` sites, never a mixture of two.

    With `crop`, which is (height, width), only the largest centered part of that shape counts.
    """
    if labels.shape == shape and crop is None:
        return labels
    scale = 1.0 if crop is None else min(labels.shape[0] / crop[0], labels.shape[1] / crop[1])
    spans = labels.shape if crop is None else (crop[0] * scale, crop[1] * scale)
    rows, columns = (
        ((own - span) / 2 + (np.arange(side) + 0.5) * (span / side)).astype(np.int64)
        for own, side, span in zip(labels.shape, shape, spans, strict=True)
    )
    return np.asarray(labels[rows[:, None], columns])


def write_labels(path: Path, labels: NDArray[np.int64]) -> None:
    """Write label numbers (H, W) below 65536 as a color PNG that `read_labels` reads."""
    colors = np.stack([labels % 256, labels // 256, np.zeros_like(labels)], axis=2).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colors).save(path)


def _decode(content: bytes) -> tuple[str, NDArray[np.generic]]:
    with quiet():  # Pillow's own remarks; what matters is said by the caller, by name
        with Image.open(io.BytesIO(content), formats=("PNG",)) as opened:
            opened.verify()  # checksums: decoding alone lets some damage pass, as other labels
        with Image.open(io.BytesIO(content), formats=("PNG",)) as opened:
            if opened.height * opened.width > LARGEST_PICTURE:
                raise Image.DecompressionBombError
            return opened.mode, np.asarray(opened)
