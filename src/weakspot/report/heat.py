"""The evaluation matrix as a picture: trained networks down, tests across, accuracy as colour and number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


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
