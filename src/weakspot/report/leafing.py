"""Leafing: maps along the layers of a network and the curves over them, as the page shows them."""

from __future__ import annotations

import base64
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from weakspot.explanations.analysis import Series

WIDTH, HEIGHT = 600, 120  # of the drawing of the curves, in its own units


def leaves(series: Series, index: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the page writes of one pair's series, and the frames that its script draws."""
    frames = []
    for step, maps, tops in zip(series.steps, series.maps, series.tops, strict=True):
        values = np.nan_to_num(maps[index].numpy().astype(np.float32), posinf=0, neginf=0)
        highest, top = float(values.max()), float(np.nan_to_num(tops[index].item(), posinf=0))
        frames.append(
            {
                "step": step,
                "height": values.shape[0],
                "width": values.shape[1],
                "values": text(
                    zlib.compress(np.rint(values * (255 / (highest or 1))).astype(np.uint8).tobytes(), 9)
                ),
                "highest": highest,
                "top": top or highest or 1.0,
            }
        )
    curves = {name: values[index].double().numpy() for name, values in series.curves.items()}
    limit = (
        max((float(np.nanmax(values, initial=0)) for values in map(_finite, curves.values())), default=0)
        or 1.0
    )
    return {
        "title": series.title,
        "meaning": series.meaning,
        "last": len(frames) - 1,
        "first_step": series.steps[0],
        "last_step": series.steps[-1],
        "size": (WIDTH, HEIGHT),
        "limit": limit,
        "curves": [
            {
                "name": name,
                "points": _points(values, limit),
                "values": [float(f"{value:.3g}") for value in values],
            }
            for name, values in curves.items()
        ],
    }, frames


def _points(values: np.ndarray, limit: float) -> str:
    """Of an SVG polyline, from left to right."""
    across = np.linspace(0, WIDTH, len(values)) if len(values) > 1 else np.array([WIDTH / 2])
    down = HEIGHT * (1 - np.nan_to_num(_finite(values)) / limit)
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))


def text(content: bytes) -> str:
    """Bytes as base64."""
    return base64.b64encode(content).decode("ascii")


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)
