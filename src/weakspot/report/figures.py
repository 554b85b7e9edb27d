"""Figures: one pair on one sheet of matplotlib, for papers and notebooks."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

import numpy as np

from weakspot.report.colors import CATEGORIES, HATCHES, table
from weakspot.report.drawing import Drawing, drawings
from weakspot.report.words import headline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from weakspot.explanations.explanation import Explanation

COLUMNS = 4


def figure(explanation: Explanation, index: int = 0) -> Figure:
    """Clean and adversarial image, their difference, and every map with its scale.

    Args:
        explanation: of the pair among others.
        index: of the pair.

    Raises:
        IndexError: when there is no such pair.
    """
    from matplotlib.figure import Figure

    if not -len(explanation) <= index < len(explanation):
        raise IndexError(f"index is {index}; there are {len(explanation)} pairs")
    maps = drawings(explanation, index)
    rows = math.ceil((2 + len(maps)) / COLUMNS)
    sheet = Figure(figsize=(3.3 * COLUMNS, 2.9 * rows + 0.9), layout="compressed")
    axes = list(sheet.subplots(rows, COLUMNS, squeeze=False).flat)
    row = explanation.scores.iloc[index]
    heading = f"{row['image']}: {headline(row)}"
    sheet.suptitle(
        heading + "\n" + "\n".join(textwrap.wrap(explanation.verdict(index), 130)),
        fontsize=10,
        parse_math=False,
    )
    for axis in axes:
        axis.set_axis_off()
    photographs = {"clean": explanation.pairs.clean, "adversarial": explanation.pairs.adversarial}
    for axis, (title, images) in zip(axes, photographs.items(), strict=False):
        photograph(axis, images[index].numpy())
        axis.set_title(title, fontsize=9, parse_math=False)
    for axis, drawing in zip(axes[2:], maps, strict=False):
        _draw(axis, drawing, explanation.pairs.clean[index].numpy())
        axis.set_title("\n".join(textwrap.wrap(drawing.title, 36)), fontsize=9, parse_math=False)
    return sheet


def photograph(axis: Axes, pixels: np.ndarray) -> None:
    """Draw (C, H, W) in [0, 1], in colour or grey."""
    if len(pixels) == 3:
        axis.imshow(pixels.transpose(1, 2, 0))
    else:
        axis.imshow(pixels.mean(0), cmap="gray", vmin=0, vmax=1)


def _draw(axis: Axes, drawing: Drawing, photograph: np.ndarray) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    if drawing.picture.kind != "category":
        colors = ListedColormap(table(drawing.picture.kind) / 255)
        shown = axis.imshow(
            drawing.values, cmap=colors, vmin=drawing.low, vmax=drawing.high, interpolation="nearest"
        )
        axis.figure.colorbar(shown, ax=axis, shrink=0.8)
        return
    axis.imshow(photograph.mean(0), cmap="gray", vmin=0, vmax=1)
    handles = []
    for category, title in enumerate(drawing.picture.categories):
        chosen = drawing.values == category
        color, hatch = CATEGORIES[category % len(CATEGORIES)], HATCHES[category % len(HATCHES)]
        if category and chosen.any() and min(chosen.shape) > 1:
            axis.contourf(chosen, levels=[0.5, 1.5], colors=[color], alpha=0.6, hatches=[hatch])
        handles.append(
            Patch(facecolor=color, hatch=hatch, label=f"{title} {chosen.mean():.0%}", edgecolor="0.4")
        )
    axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), fontsize=7, frameon=False)
