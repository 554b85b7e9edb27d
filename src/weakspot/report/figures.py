"""Figures: one pair on one sheet of matplotlib, for papers and notebooks.

Drawing: what figures and pages both need to know of a pair's maps.

Curves over the depth of a network, with their intervals.

Sheets: many pairs at a glance, for people who look before they read.

The evaluation matrix as a picture: trained networks down, tests across, accuracy as color and number.

Accuracies: a bar for the undefended and for the defended model after each attack, with their intervals.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from weakspot._io.files import write_atomic
from weakspot.explanations.analysis import Picture
from weakspot.pairs import Pairs
from weakspot.report.rendering import CATEGORIES, HATCHES, table
from weakspot.report.sentences import headline

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from weakspot.explanations.explanation import Explanation
    from weakspot.explanations.propagation_controls import PropagationStudy


DIFFERENCE = Picture(
    "Difference",
    kind="signed",
    meaning="Adversarial less clean image, mean over color channels: blue is darker, orange is brighter.",
)


@dataclass(frozen=True)
class MapView:
    """One map of one pair, ready to be drawn.

    Attributes:
        name: of the map.
        title: class names filled in.
        meaning: one sentence, class names filled in.
        picture: how it is drawn.
        values: (H, W).
        low: value of the first color.
        high: value of the last color.
    """

    name: str
    title: str
    meaning: str
    picture: Picture
    values: NDArray[np.float32]
    low: float
    high: float


def drawings(explanation: Explanation, index: int) -> list[MapView]:
    """The difference of the pair and every map that was found, maps of one scale sharing their limits."""
    maps = {"difference": explanation.pairs.perturbation[index].mean(0).numpy()}
    maps |= {name: tensor[index, 0].numpy().astype(np.float32) for name, tensor in explanation.maps.items()}
    pictures = {"difference": DIFFERENCE} | explanation.pictures
    own, other = explanation.class_names[index]

    def told(text: str) -> str:
        return text.replace("{label}", own).replace("{target}", other)

    ready = []
    for name, values in maps.items():
        picture = pictures[name]
        alike = [maps[key] for key in maps if picture.scale and pictures[key].scale == picture.scale] or [
            values
        ]
        low, high = _limits(picture, alike)
        title = told(picture.title)
        if name == "difference" and high > 0:
            title = f"Difference, amplified {1 / high:.0f} times"
        ready.append(MapView(name, title, told(picture.meaning), picture, values, low, high))
    return ready


def _limits(picture: Picture, alike: list[NDArray[np.float32]]) -> tuple[float, float]:
    """Color limits: around zero for signed maps, from zero up for magnitudes; never of no width."""
    if picture.fixed is not None:
        return picture.fixed
    if picture.kind == "category":
        return 0.0, float(max(len(picture.categories) - 1, 1))
    finite = [np.abs(values) if picture.kind == "signed" else values for values in alike]
    high = float(max((np.nanmax(v, initial=0, where=np.isfinite(v)) for v in finite), default=0)) or 1.0
    return (-high, high) if picture.kind == "signed" else (0.0, high)


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
    """Draw (C, H, W) in [0, 1], in color or gray."""
    if len(pixels) == 3:
        axis.imshow(pixels.transpose(1, 2, 0))
    else:
        axis.imshow(pixels.mean(0), cmap="gray", vmin=0, vmax=1)


def _draw(axis: Axes, drawing: MapView, photograph: np.ndarray) -> None:
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
        chosen = drawing.values == category  # noqa: PD011 - a tensor
        color, hatch = CATEGORIES[category % len(CATEGORIES)], HATCHES[category % len(HATCHES)]
        if category and chosen.any() and min(chosen.shape) > 1:
            axis.contourf(chosen, levels=[0.5, 1.5], colors=[color], alpha=0.6, hatches=[hatch])
        handles.append(
            Patch(facecolor=color, hatch=hatch, label=f"{title} {chosen.mean():.0%}", edgecolor="0.4")
        )
    axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), fontsize=7, frameon=False)


AXES = {
    "spread": "Share of sites changed by over 10% of the layer's peak",
    "reach": "Largest change over the layer's peak",
}
COLORS = ("#0072b2", "#d55e00", "#555555")
DASHES = ("solid", "dashed", "dotted")


def depth_figure(study: PropagationStudy) -> Figure:
    """Spread and reach from the first layer to the last, a line and its 95% interval for each group."""
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(11, 4.2), layout="compressed")
    for axis, (measure, title) in zip(sheet.subplots(1, len(AXES)), AXES.items(), strict=True):
        for number, (group, rows) in enumerate(study.table.groupby("group", sort=False)):
            if not rows["images"].iloc[0]:
                continue
            places = range(len(rows))
            color = COLORS[number % len(COLORS)]
            axis.fill_between(
                places, rows[f"{measure}_low"], rows[f"{measure}_high"], color=color, alpha=0.2, lw=0
            )
            axis.plot(
                places, rows[measure], color=color, ls=DASHES[number % len(DASHES)],
                label=f"{group} ({rows['images'].iloc[0]})",
            )  # fmt: skip
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("layer, in the order of computation", fontsize=9)
        ticks = range(0, len(study.layers), max(1, len(study.layers) // 8))
        axis.set_xticks(
            list(ticks), [study.layers[place] for place in ticks], rotation=40, ha="right", fontsize=7
        )
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    sheet.axes[0].legend(frameon=False, fontsize=9)
    return sheet


ROWS = 12
WIDTH, HEIGHT = 9.0, 3.2  # inches, of the sheet and of a row


def overview(pairs: Pairs, captions: Sequence[str], path: Path) -> Path:
    """Write a PNG with the first twelve pairs, one row each: clean, adversarial, and their difference.

    The difference is drawn around mid-gray, every row stretched to its own largest change, which its title says.

    Args:
        pairs: what to show.
        captions: one line for each of them.
        path: of the PNG file.
    """
    from matplotlib.figure import Figure

    shown = min(len(pairs), ROWS)
    sheet = Figure(figsize=(WIDTH, HEIGHT * shown), layout="constrained")
    axes = sheet.subplots(shown, 3, squeeze=False)
    for row in range(shown):
        change = pairs.perturbation[row].float().cpu()
        largest = float(change.abs().max())
        stretched = 0.5 + change / (2 * largest) if largest else change + 0.5
        titles = ("clean", "adversarial", f"difference, full scale ±{largest:.3g}")
        images = (pairs.clean[row].cpu(), pairs.adversarial[row].cpu(), stretched)
        for axis, title, image in zip(axes[row], titles, images, strict=True):
            photograph(axis, image.numpy().clip(0, 1))
            axis.set_title(title, fontsize=8, parse_math=False)
            axis.set_axis_off()
        axes[row, 0].text(
            0,
            -0.04,
            textwrap.shorten(captions[row], 130),
            transform=axes[row, 0].transAxes,
            va="top",
            fontsize=8,
            parse_math=False,
        )
    write_atomic(path, lambda draft: sheet.savefig(draft, dpi=100, format="png"))
    return path


def matrix_figure(accuracy: pd.DataFrame, titles: Mapping[str, str]) -> Figure:
    """A heat map of the columns recipe, test, accuracy, low, high.

    Args:
        accuracy: a row for each recipe and test.
        titles: what stands above each test.
    """
    from matplotlib.figure import Figure

    recipes, tests = (list(dict.fromkeys(accuracy[name])) for name in ("recipe", "test"))
    values = accuracy.set_index(["recipe", "test"])
    sheet = Figure(figsize=(2.2 + 1.5 * len(tests), 1.3 + 0.62 * len(recipes)), layout="compressed")
    axis = sheet.subplots()
    shown = [[float(values.loc[(recipe, test), "accuracy"]) for test in tests] for recipe in recipes]
    drawn = axis.imshow(shown, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for row, recipe in enumerate(recipes):
        for column, test in enumerate(tests):
            cell = values.loc[(recipe, test)]
            ink = "black" if cell["accuracy"] > 0.6 else "white"
            axis.text(
                column, row - 0.1, f"{cell['accuracy']:.1%}", ha="center", va="center", color=ink, fontsize=10
            )
            if cell["low"] == cell["low"]:  # NaN: too few images for an interval
                axis.text(
                    column, row + 0.24, f"{cell['low']:.1%} to {cell['high']:.1%}", ha="center", va="center", color=ink,
                    fontsize=6.5,
                )  # fmt: skip
    axis.set_xticks(range(len(tests)), [titles.get(test, test) for test in tests], fontsize=8.5)
    axis.set_yticks(range(len(recipes)), [recipe.replace("_", " ") for recipe in recipes], fontsize=9)
    axis.xaxis.tick_top()
    axis.set_ylabel("trained", fontsize=9)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    sheet.colorbar(drawn, ax=axis, label="images read rightly", shrink=0.9)
    return sheet


# Of the palette of Okabe and Ito; apart in gray, too, and one of them is hatched.
SIDES = (("undefended", "#56b4e9", "", "o"), ("defended", "#d55e00", "///", "D"))
THICK = 0.38


def accuracy_figure(table: pd.DataFrame, title: str) -> Figure:
    """What `evaluate_defense` returned, as bars; whiskers are 95% intervals over images.

    Args:
        table: one row per attack.
        title: above the bars.
    """
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(8.6, 1.5 + 0.62 * len(table)), layout="constrained")
    axis = sheet.subplots()
    for number, (side, color, hatch, marker) in enumerate(SIDES):
        places = [row + (number - 0.5) * THICK for row in range(len(table))]
        fractions = table[side].to_numpy()
        low, high = (table[f"{side}_{end}"].to_numpy() for end in ("low", "high"))
        axis.barh(
            places, fractions, THICK, color=color, hatch=hatch, edgecolor="white", lw=0.5, label=side,
            xerr=(fractions - low, high - fractions), error_kw={"lw": 1.2, "capsize": 3, "ecolor": "#222222"},
        )  # fmt: skip
        # A bar of no length shows no color; its marker does.
        axis.plot(fractions, places, marker, color=color, mec="#222222", ms=5, zorder=3, clip_on=False)
        for place, fraction, end in zip(places, fractions, high, strict=True):
            axis.text(end + 0.012, place, f"{fraction:.0%}", va="center", fontsize=9)
    names = [textwrap.fill(str(name), 22) for name in table["attack"]]
    axis.set_yticks(range(len(table)), names, fontsize=9.5)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.09)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axis.set_xlabel(
        "accuracy left after this attack and those above it, with 95% interval over images", fontsize=9.5
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    sheet.suptitle(textwrap.fill(title, 88), fontsize=11, ha="left", x=0.02, parse_math=False)
    sheet.legend(loc="outside lower right", ncols=len(SIDES), frameon=False, fontsize=9.5)
    return sheet
