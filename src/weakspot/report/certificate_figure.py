"""The certificate of one image as a figure: which pixels are proven, refuted or unknown, readable without color."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Light, middle and dark, so that they differ without color too; hatching and crosses differ on any print.
PROVEN, UNKNOWN, REFUTED, OUTSIDE = "#cfe8f3", "#f0b35a", "#5a1020", "#ffffff"
HATCH = "/////"
FINE = 512  # pixels of the raster on which hatched areas are drawn, so that they have straight borders
MOST_CROSSES = 2000


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
