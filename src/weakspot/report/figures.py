"""Figures drawn with matplotlib, for papers and notebooks."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from weakspot._io.files import write_atomic
from weakspot.defenses.verdicts import AttackRow
from weakspot.explanations.explanation import Explanation
from weakspot.explanations.propagation_controls import PropagationStudy
from weakspot.pairs import Pairs
from weakspot.report.image_verdict import headline
from weakspot.report.map_views import MapView, map_views, worth_drawing
from weakspot.report.rendering import CATEGORIES, HATCHES, color_table
from weakspot.statistics.number_format import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 4  # of the figure of a pair
LAYER_MEASURES = {
    "spread": "Fraction of sites changed by over 10% of the layer's peak",
    "reach": "Largest change over the layer's peak",
}
LINE_COLORS = ("#0072b2", "#d55e00", "#555555")
DASHES = ("solid", "dashed", "dotted")
SHEET_ROWS = 12  # pairs on a contact sheet
CAPTION = 105  # characters under a row, as many as fit
SHEET_WIDTH, ROW_HEIGHT = 9.0, 3.2  # inches
# From the palette of Okabe and Ito; they differ in gray as well, and one is hatched.
SIDES = (("undefended", "#56b4e9", "", "o"), ("defended", "#d55e00", "///", "D"))
BAR = 0.38  # height of a bar, of a row's 1


def figure(explanation: Explanation, index: int = 0) -> Figure:
    """Draw pair number `index`: both images, their difference, and every map that shows something, with its scale.

    Raises:
        IndexError: if there is no such pair.
    """
    from matplotlib.figure import Figure

    views, _ = worth_drawing(map_views(explanation, index))
    rows = math.ceil((2 + len(views)) / COLUMNS)
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
    for axis, view in zip(axes[2:], views, strict=False):
        _draw(axis, view, explanation.pairs.clean[index].numpy())
        axis.set_title("\n".join(textwrap.wrap(view.title, 36)), fontsize=9, parse_math=False)
    return sheet


def photograph(axis: Axes, pixels: NDArray[np.float32]) -> None:
    """Draw (C, H, W) in [0, 1]; other channel counts than three are drawn as their gray mean."""
    if len(pixels) == 3:
        axis.imshow(pixels.transpose(1, 2, 0))
    else:
        axis.imshow(pixels.mean(0), cmap="gray", vmin=0, vmax=1)


def _draw(axis: Axes, view: MapView, clean: NDArray[np.float32]) -> None:
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.patches import Patch, Rectangle

    values = view.values  # noqa: PD011 - an array
    if view.picture.kind != "category":
        colors = ListedColormap(color_table(view.picture.kind) / 255)
        if view.logarithmic:
            # In gray levels, the smallest brightest, over the photograph.
            axis.imshow(clean.mean(0), cmap="gray", vmin=0, vmax=1)
            # On a logarithmic scale `high` is the smallest size, which is the lower limit here.
            scale = LogNorm(255 * view.high, 255 * view.low, clip=True)
            shown = axis.imshow(
                255 * values, cmap=colors.reversed(), norm=scale, interpolation="nearest", alpha=0.65
            )
            bar = axis.figure.colorbar(shown, ax=axis, shrink=0.8)
            marks = np.geomspace(255 * view.high, 255 * view.low, 4)
            bar.set_ticks(marks.tolist(), labels=[f"{mark:.2g}/255" for mark in marks])
            bar.minorticks_off()
        else:
            shown = axis.imshow(values, cmap=colors, vmin=view.low, vmax=view.high, interpolation="nearest")
            axis.figure.colorbar(shown, ax=axis, shrink=0.8)
        if view.square is not None:
            top, left, side = view.square
            for color, width in (("black", 3.5), ("white", 1.75)):
                place = (left - 0.5, top - 0.5)  # of the corner: the middle of pixel 0 is at 0
                axis.add_patch(Rectangle(place, side, side, fill=False, ec=color, lw=width))
        return
    axis.imshow(clean.mean(0), cmap="gray", vmin=0, vmax=1)
    handles = []
    for category, title in enumerate(view.picture.categories):
        sites = values == category
        color, hatch = CATEGORIES[category % len(CATEGORIES)], HATCHES[category % len(HATCHES)]
        if category and sites.any() and min(sites.shape) > 1:  # contours need two rows and columns
            axis.contourf(sites, levels=[0.5, 1.5], colors=[color], alpha=0.6, hatches=[hatch])
        if sites.any():
            label = f"{title} {sites.mean():.0%}"
            handles.append(Patch(facecolor=color, hatch=hatch, label=label, edgecolor="0.4"))
    axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), fontsize=7, frameon=False)


def depth_figure(study: PropagationStudy) -> Figure:
    """Spread and reach from the first layer to the last, with a line and its 95% interval for each group."""
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(11, 4.2), layout="compressed")
    subplots = sheet.subplots(1, len(LAYER_MEASURES))
    for axis, (measure, title) in zip(subplots, LAYER_MEASURES.items(), strict=True):
        for number, (group, rows) in enumerate(study.table.groupby("group", sort=False)):
            if not rows["images"].iloc[0]:
                continue
            color, dash = LINE_COLORS[number % len(LINE_COLORS)], DASHES[number % len(DASHES)]
            low, high = rows[f"{measure}_low"], rows[f"{measure}_high"]
            axis.fill_between(range(len(rows)), low, high, color=color, alpha=0.2, lw=0)
            label = f"{group} ({rows['images'].iloc[0]})"
            axis.plot(range(len(rows)), rows[measure], color=color, ls=dash, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("layer, in the order of computation", fontsize=9)
        ticks = list(range(0, len(study.layers), max(1, len(study.layers) // 8)))
        axis.set_xticks(ticks, [study.layers[tick] for tick in ticks], rotation=40, ha="right", fontsize=7)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    sheet.axes[0].legend(frameon=False, fontsize=9)
    return sheet


def contact_sheet(pairs: Pairs, captions: Sequence[str], path: Path) -> Path:
    """Write a PNG with the first twelve pairs, one row each: clean, adversarial, and their difference.

    The difference is drawn around mid-gray; each row is stretched to its own largest change, which its title states.

    Args:
        pairs: the pairs to show.
        captions: one line for each of them.
        path: of the PNG file.
    """
    from matplotlib.figure import Figure

    shown = min(len(pairs), SHEET_ROWS)
    sheet = Figure(figsize=(SHEET_WIDTH, ROW_HEIGHT * shown))
    axes = sheet.subplots(shown, 3, squeeze=False)
    # Fixed margins: a layout that measures every text would draw the sheet twice.
    ends = {
        "left": 0.01,
        "right": 0.99,
        "bottom": 0.3 / sheet.get_figheight(),
        "top": 1 - 0.2 / sheet.get_figheight(),
    }
    sheet.subplots_adjust(**ends, wspace=0.02, hspace=0.17)
    for row in range(shown):
        change = pairs.perturbation[row].float().cpu()
        largest = float(change.abs().max())
        # Mid-gray (0.5) is no change.
        stretched = 0.5 + change / (2 * largest) if largest else change + 0.5
        titles = ("clean", "adversarial", f"difference, full scale ±{largest:.3g}")
        images = (pairs.clean[row].cpu(), pairs.adversarial[row].cpu(), stretched)
        for axis, title, image in zip(axes[row], titles, images, strict=True):
            photograph(axis, image.numpy().clip(0, 1))
            axis.set_title(title, fontsize=8, parse_math=False)
            axis.set_axis_off()
        caption, place = captions[row], axes[row, 0].transAxes
        caption = caption if len(caption) <= CAPTION else f"{caption[: CAPTION - 1]}…"
        axes[row, 0].text(0, -0.04, caption, transform=place, va="top", fontsize=8, parse_math=False)
    write_atomic(path, lambda draft: sheet.savefig(draft, dpi=100, format="png"))
    return path


def matrix_figure(accuracy: pd.DataFrame, titles: Mapping[str, str]) -> Figure:
    """A heat map of a robustness matrix: recipes down, tests across, accuracy as color and number.

    Args:
        accuracy: one row per recipe and test; columns recipe, test, accuracy, low, high.
        titles: heading of each test.
    """
    from matplotlib.figure import Figure

    recipes, tests = (list(dict.fromkeys(accuracy[name])) for name in ("recipe", "test"))
    cells = accuracy.set_index(["recipe", "test"])
    sheet = Figure(figsize=(2.2 + 1.5 * len(tests), 1.3 + 0.62 * len(recipes)), layout="compressed")
    axis = sheet.subplots()
    shown = [[float(cells.loc[(recipe, test), "accuracy"]) for test in tests] for recipe in recipes]
    drawn = axis.imshow(shown, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for row, recipe in enumerate(recipes):
        for column, test in enumerate(tests):
            value, low, high = (
                float(cells.loc[(recipe, test), name]) for name in ("accuracy", "low", "high")
            )
            texts = [(-0.1, f"{value:.1%}", 10.0)]
            if not math.isnan(low):  # there is no interval for too few images
                texts.append((0.24, f"{low:.1%} to {high:.1%}", 6.5))
            ink = "black" if value > 0.6 else "white"
            for below, text, size in texts:
                axis.text(column, row + below, text, ha="center", va="center", color=ink, fontsize=size)
    axis.set_xticks(range(len(tests)), [titles.get(test, test) for test in tests], fontsize=8.5)
    axis.set_yticks(range(len(recipes)), [recipe.replace("_", " ") for recipe in recipes], fontsize=9)
    axis.xaxis.tick_top()
    axis.set_ylabel("trained", fontsize=9)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    sheet.colorbar(drawn, ax=axis, label="correctly classified images", shrink=0.9)
    return sheet


def accuracy_figure(table: pd.DataFrame, title: str) -> Figure:
    """Bars of accuracy for the undefended and the defended model; whiskers are 95% intervals over images.

    Args:
        table: from `evaluate_defense`, one row per attack.
        title: above the bars.
    """
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(8.6, 1.5 + 0.62 * len(table)), layout="constrained")
    axis = sheet.subplots()
    for number, (side, color, hatch, marker) in enumerate(SIDES):
        places = [row + (number - 0.5) * BAR for row in range(len(table))]
        value, low, high = (table[name].to_numpy() for name in (side, f"{side}_low", f"{side}_high"))
        axis.barh(
            places, value, BAR, color=color, hatch=hatch, edgecolor="white", lw=0.5, label=side,
            xerr=(value - low, high - value), error_kw={"lw": 1.2, "capsize": 3, "ecolor": "#222222"},
        )  # fmt: skip
        # A bar of length zero shows no color, but its marker does.
        axis.plot(value, places, marker, color=color, mec="#222222", ms=5, zorder=3, clip_on=False)
        for place, accuracy, end in zip(places, value, high, strict=True):
            axis.text(end + 0.012, place, percent(accuracy), va="center", fontsize=9)
    # The oracle has no adaptive attacker: its row is not the accuracy after all attacks above it.
    alone = {AttackRow.ORACLE: f"{AttackRow.ORACLE} (transferred attack alone)"}
    names = [textwrap.fill(alone.get(str(name), str(name)), 22) for name in table["attack"]]
    axis.set_yticks(range(len(table)), names, fontsize=9.5)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.09)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axis.set_xlabel(
        "accuracy after this attack and those above it, with 95% interval over images", fontsize=9.5
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    sheet.suptitle(textwrap.fill(title, 88), fontsize=11, ha="left", x=0.02, parse_math=False)
    sheet.legend(loc="outside lower right", ncols=len(SIDES), frameon=False, fontsize=9.5)
    return sheet
