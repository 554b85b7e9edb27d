"""Sheets: many pairs at a glance, for people who look before they read."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from weakspot.pairs import Pairs
from weakspot.report.figures import photograph
from weakspot.writing import write_whole

ROWS = 12
WIDTH, HEIGHT = 9.0, 3.2  # inches, of the sheet and of a row


def overview(pairs: Pairs, captions: Sequence[str], path: Path) -> Path:
    """Write a PNG with the first twelve pairs, one row each: clean, adversarial, and their difference.

    The difference is drawn around mid-grey, every row stretched to its own largest change, which its title says.

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
    write_whole(path, lambda draft: sheet.savefig(draft, dpi=100, format="png"))
    return path
