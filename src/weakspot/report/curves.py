"""Curves over the depth of a network, with their intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from weakspot.explanations.propagation_study import PropagationStudy

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
