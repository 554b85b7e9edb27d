"""How robust the places of one image are, as a figure: its weak-spot map, and its certificate."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OPACITY = 0.45  # of the cells, so that the photograph shows through
NOT_FOUND = "?"
MOST_NUMBERS = 12 * 12  # cells up to which each has its number
# Light, middle and dark, so that they differ without color too; hatching and crosses differ on any print.
PROVEN, UNKNOWN, REFUTED, OUTSIDE = "#cfe8f3", "#f0b35a", "#5a1020", "#ffffff"
HATCH = "/////"
FINE = 512  # pixels of the raster on which hatched areas are drawn, so that they have straight borders
MOST_CROSSES = 2000


@dataclass(frozen=True, eq=False)
class SpotView:
    """The weak-spot map of one image, ready to be drawn.

    Attributes:
        image: (C, H, W) in [0, 1].
        estimate: (gh, gw) change that each cell needs to first order; infinite where none is enough.
        square: side, top and left of the smallest square found; None if not found.
        norm: of the sizes, "linf" or "l2".
        sizes: (gh, gw) the smallest change found in each cell, verified; NaN where not found. None if the cells
            were not searched.
        max_size: up to which they were searched.
    """

    image: NDArray[np.float32]
    estimate: NDArray[np.float32]
    square: tuple[int, int, int] | None
    norm: str = "linf"
    sizes: NDArray[np.float32] | None = None
    max_size: float = 1.0

    def __repr__(self) -> str:
        rows, columns = self.estimate.shape
        kind = "estimate" if self.sizes is None else "verified sizes"
        return f"SpotView({rows} x {columns} cells, {kind}, square {self.square})"


def spot_figure(view: SpotView, title: str, sentence: str) -> Figure:
    """Draw the map of one image under its sentence.

    Args:
        view: what to draw.
        title: such as the name of the image.
        sentence: on the smallest square.
    """
    from matplotlib.figure import Figure

    height, width = view.image.shape[1:]
    across = 6.4
    sheet = Figure(figsize=(across, 1.6 + 5.2 * min(1.6, max(0.4, height / width))), layout="constrained")
    axis = sheet.subplots()
    heading = [title, *textwrap.wrap(sentence, 74)]
    sheet.suptitle("\n".join(heading), fontsize=10, ha="left", x=0.03, parse_math=False)
    draw_spots(axis, view)
    return sheet


def draw_spots(axis: Axes, view: SpotView) -> None:
    """Draw the photograph in gray, the cells over it on a log scale (weakest brightest), and the square's outline."""
    from matplotlib.patches import Rectangle

    height, width = view.image.shape[1:]
    axis.imshow(view.image.mean(0), cmap="gray", vmin=0, vmax=1)
    values = view.estimate if view.sizes is None else view.sizes
    shown = _draw_cells(axis, values, view)
    if shown and view.sizes is not None and values.size <= MOST_NUMBERS:
        _write_sizes(axis, values, view)
    if view.square is not None:
        side, top, left = view.square
        # A dark line under a light one: visible on any photograph.
        for color, thick in (("black", 4.0), ("white", 1.8)):
            axis.add_patch(
                Rectangle((left - 0.5, top - 0.5), side, side, fill=False, edgecolor=color, lw=thick)
            )
    axis.set_xlim(-0.5, width - 0.5)
    axis.set_ylim(height - 0.5, -0.5)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel("\n".join(textwrap.wrap(_legend(view), 80)), fontsize=8)


def _draw_cells(axis: Axes, values: NDArray[np.float32], view: SpotView) -> bool:
    """Cells in color with their scale; whether there was any to draw. Cells without a size stay uncolored."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    height, width = view.image.shape[1:]
    unit = 255 if view.norm == "linf" else 1
    known = np.isfinite(values) & (values > 0) & (values <= (1 if view.norm == "linf" else np.inf))
    if not known.any():
        return False
    low, high = (float(unit * end) for end in (values[known].min(), values[known].max()))
    if high < 1.2 * low:  # a log scale needs two ends
        low, high = low / 1.2, high * 1.2
    drawn = axis.imshow(
        np.ma.masked_where(~known, unit * values),
        cmap="viridis_r",
        norm=LogNorm(low, high),
        alpha=OPACITY,
        # Pixel centers are whole numbers, so this covers the photograph from edge to edge.
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        interpolation="nearest",
    )
    bar = axis.figure.colorbar(drawn, ax=axis, shrink=0.8)
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    name = "n/255" if unit == 255 else "L2"
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    kind = "estimated" if view.sizes is None else "found"
    bar.set_label(f"change that a cell needs, {kind} ({name})", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return True


def _write_sizes(axis: Axes, sizes: NDArray[np.float32], view: SpotView) -> None:
    from matplotlib.patheffects import withStroke

    height, width = view.image.shape[1:]
    rows, columns = sizes.shape
    unit = 255 if view.norm == "linf" else 1
    for (row, column), size in np.ndenumerate(sizes):
        text = NOT_FOUND if math.isnan(size) else f"{unit * size:.2g}"
        axis.text(
            (column + 0.5) * width / columns - 0.5,
            (row + 0.5) * height / rows - 0.5,
            text,
            ha="center",
            va="center",
            fontsize=min(9, 60 / max(rows, columns)),
            color="white",
            path_effects=[withStroke(linewidth=1.8, foreground="black")],
        )


def _legend(view: SpotView) -> str:
    """What the colors and the missing ones mean."""
    parts = []
    if view.sizes is None:
        parts.append("Cells: the change that each needs alone, estimated from gradients.")
        if np.isinf(view.estimate).any() or (view.norm == "linf" and (view.estimate > 1).any()):
            parts.append("Uncolored: none is enough to first order.")
    else:
        parts.append("Cells: the smallest change found in each alone, verified.")
        if np.isnan(view.sizes).any():
            most = f"{255 * view.max_size:g}/255" if view.norm == "linf" else f"{view.max_size:g} L2"
            # Without numbers, and without a single color, no cell has a mark.
            marked = view.sizes.size <= MOST_NUMBERS and np.isfinite(view.sizes).any()
            parts.append(f"{NOT_FOUND if marked else 'Uncolored'}: not found up to {most}.")
    if view.square is not None:
        parts.append("Outline: the smallest square found.")
    return " ".join(parts)


@dataclass(frozen=True, eq=False)
class CertificateView:
    """The certificate of one image, ready to be drawn.

    Attributes:
        image: (C, H, W) in [0, 1].
        status: (H, W), 1 proven, 0 unknown, -1 refuted.
        region: bool (H, W), the pixels that were asked about.
    """

    image: NDArray[np.float32]
    status: NDArray[np.int8]
    region: NDArray[np.bool_]

    def __repr__(self) -> str:
        height, width = self.status.shape
        return f"CertificateView({height} x {width} pixels, {int(self.region.sum())} asked about)"


def certificate_figure(view: CertificateView, title: str, sentence: str) -> Figure:
    """Draw the photograph and the map beside it, under the sentence.

    Args:
        view: what to draw.
        title: such as the name of the image.
        sentence: on the pixels of the image.
    """
    from matplotlib.figure import Figure

    height, width = view.status.shape
    sheet = Figure(figsize=(8.4, 1.2 + 3.9 * min(1.6, max(0.4, height / width))), layout="constrained")
    photograph, chart = sheet.subplots(1, 2)
    sheet.suptitle(
        "\n".join([title, *textwrap.wrap(sentence, 98)]), fontsize=10, ha="left", x=0.02, parse_math=False
    )
    shown = view.image.transpose(1, 2, 0) if len(view.image) == 3 else view.image.mean(0)
    photograph.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    sheet.legend(
        handles=draw_certificate(chart, view), loc="outside lower right", ncols=4, fontsize=8, frameon=False
    )
    for axis in (photograph, chart):
        axis.set_xticks([])
        axis.set_yticks([])
    return sheet


def certificate_chart(view: CertificateView) -> Figure:
    """Draw the map alone with its legend, narrow enough for a phone: for a page that shows the rest beside it."""
    from matplotlib.figure import Figure

    height, width = view.status.shape
    sheet = Figure(figsize=(3.6, 0.7 + 3.4 * min(1.6, max(0.4, height / width))), layout="constrained")
    chart = sheet.subplots()
    sheet.legend(
        handles=draw_certificate(chart, view), loc="outside lower center", ncols=2, fontsize=9, frameon=False
    )
    chart.set_xticks([])
    chart.set_yticks([])
    return sheet


def draw_certificate(axis: Axes, view: CertificateView) -> list[Artist]:
    """Draw proven pixels light, unknown ones hatched, refuted ones dark with a white cross; return the legend's."""
    from matplotlib.colors import to_rgb
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    height, width = view.status.shape
    masks = {
        PROVEN: view.region & (view.status == 1),
        UNKNOWN: view.region & (view.status == 0),
        REFUTED: view.region & (view.status == -1),
    }
    colored = np.broadcast_to(to_rgb(OUTSIDE), (height, width, 3)).copy()
    for color, mask in masks.items():
        colored[mask] = to_rgb(color)
    axis.imshow(colored, interpolation="nearest")
    _hatch(axis, masks[UNKNOWN])
    rows, columns = np.nonzero(masks[REFUTED])
    if 0 < len(rows) <= MOST_CROSSES:
        # In points, on a map about 3.6 inches wide; the size of a marker, `s`, is an area in square points.
        points = 3.6 * 72 / max(height, width)  # size of a pixel
        axis.scatter(columns, rows, s=(0.7 * points) ** 2, marker="x", color="white", lw=max(0.4, points / 9))
    counts = [int(mask.sum()) for mask in masks.values()]
    handles: list[Artist] = [
        Patch(facecolor=PROVEN, edgecolor="#555555", label=f"proven: {counts[0]:,}"),
        Patch(facecolor=UNKNOWN, edgecolor="#333333", hatch=HATCH, label=f"unknown: {counts[1]:,}"),
        Line2D(
            [], [], ls="", marker="X", ms=9, mfc="white", mec=REFUTED, mew=2, label=f"refuted: {counts[2]:,}"
        ),
    ]
    if not view.region.all():
        handles.append(Patch(facecolor=OUTSIDE, edgecolor="#555555", label="not asked about"))
    return handles


def _hatch(axis: Axes, mask: NDArray[np.bool_]) -> None:
    """Hatch the pixels of a mask."""
    if not mask.any():
        return
    height, width = mask.shape
    fine = max(1, FINE // max(height, width))
    # A border around it, so that areas at the edge are closed.
    raster = np.pad(np.kron(mask, np.ones((fine, fine))), 1)
    # Centers of the fine cells in pixels of the image, with one more on each side for the border.
    down, across = ((np.arange(side * fine + 2) - 0.5) / fine - 0.5 for side in (height, width))
    drawn = axis.contourf(across, down, raster, levels=[0.5, 1.5], colors="none", hatches=[HATCH])
    drawn.set_edgecolor("#333333")
    drawn.set_linewidth(0)
    axis.set_xlim(-0.5, width - 0.5)
    axis.set_ylim(height - 0.5, -0.5)
