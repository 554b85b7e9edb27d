"""Accuracies: a bar for the undefended and for the defended model after each attack, with their intervals."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# Of the palette of Okabe and Ito; apart in grey, too, and one of them is hatched.
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
        shares = table[side].to_numpy()
        low, high = (table[f"{side}_{end}"].to_numpy() for end in ("low", "high"))
        axis.barh(
            places, shares, THICK, color=color, hatch=hatch, edgecolor="white", lw=0.5, label=side,
            xerr=(shares - low, high - shares), error_kw={"lw": 1.2, "capsize": 3, "ecolor": "#222222"},
        )  # fmt: skip
        # A bar of no length shows no colour; its marker does.
        axis.plot(shares, places, marker, color=color, mec="#222222", ms=5, zorder=3, clip_on=False)
        for place, share, end in zip(places, shares, high, strict=True):
            axis.text(end + 0.012, place, f"{share:.0%}", va="center", fontsize=9)
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
