"""Maps along the layers of a network as the explanation page draws them: a slider over maps, and curves."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from weakspot.explanations.analysis import Series
from weakspot.report.rendering import compressed_levels

WIDTH, HEIGHT = 600, 120  # of the drawing of the curves, in its own units
CHANGED, ALL = 0.1, 0.9  # a layer of which 90% changed by a tenth of its top shows no place


def layer_browser(series: Series, index: int) -> tuple[dict[str, object], list[dict[str, object]]]:
    """The template's variables for one pair's maps along the layers, and the frames that the script draws."""
    frames: list[dict[str, object]] = []
    for step, maps, tops in zip(series.steps, series.maps, series.tops, strict=True):
        values = np.nan_to_num(maps[index].numpy().astype(np.float32), posinf=0, neginf=0)
        highest, top = float(values.max()), float(np.nan_to_num(tops[index].item(), posinf=0))
        frame = {"step": step, "height": values.shape[0], "width": values.shape[1], "highest": highest}
        frames.append(
            # A layer that is silent in the clean image has no peak; then the largest change is the brightest.
            {**frame, "values": compressed_levels(values, 0.0, highest), "top": top or highest or 1.0}
        )
    # The slider starts at the last layer whose map shows something: often the whole last layer has changed.
    telling = [n for n, frame in enumerate(frames) if _changed(series.maps[n][index], frame["top"]) < ALL]
    curves = {name: values[index].double().numpy() for name, values in series.curves.items()}
    limit = max((float(np.nanmax(_finite(curve), initial=0)) for curve in curves.values()), default=0) or 1.0
    return {
        "title": series.title,
        "meaning": series.meaning,
        "last": len(frames) - 1,
        "first_shown": telling[-1] if telling else len(frames) - 1,
        "first_step": series.steps[0],
        "last_step": series.steps[-1],
        "size": (WIDTH, HEIGHT),
        "limit": limit,
        "curves": [
            {
                "name": name,
                "points": _polyline(curve, limit),
                "values": [float(f"{value:.3g}") for value in curve],
            }
            for name, curve in curves.items()
        ],
    }, frames


def _changed(values: Tensor, top: object) -> float:
    """The fraction of sites that changed by over a tenth of the brightest color."""
    assert isinstance(top, float)  # noqa: S101
    return float((values > CHANGED * top).float().mean())


def _polyline(curve: NDArray[np.float64], limit: float) -> str:
    """The points of an SVG polyline, from left to right; SVG's y axis points down."""
    across = np.linspace(0, WIDTH, len(curve)) if len(curve) > 1 else np.array([WIDTH / 2])
    down = HEIGHT * (1 - np.nan_to_num(_finite(curve)) / limit)
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.isfinite(values), values, np.nan)
