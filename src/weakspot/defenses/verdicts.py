"""Verdicts: what a table of `judge_defense` comes to, in one sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

CLOSE = 0.05  # of accuracy: a defence that an informed attacker leaves no better than this is none
SIDE_BY_SIDE = {"clean", "worst of all", "replayed, oracle region"}  # rows that are no attack of their own


def verdict(judged: pd.DataFrame) -> str:
    """One sentence: what the defence is worth against an attacker who knows of it.

    Naive is the accuracy that replayed attacks leave, adaptive and undefended that which the worst of all attacks
    leaves with and without the defence. Protection counts where it is over five points and the intervals of the two
    accuracies do not overlap. Where another single attack leaves ten points less than the white box, the defence's
    gradients do not lead to its weak spots, and the sentence says so.

    Args:
        judged: what `judge_defense` returned.
    """
    table = {str(row["attack"]): row for _, row in judged.iterrows()}
    worst = table["worst of all"]
    naive, adaptive, bare = (
        float(value) for value in (table["replayed"]["defended"], worst["defended"], worst["bare"])
    )
    told = f"Naive {naive:.0%}, adaptive {adaptive:.0%}, undefended {bare:.0%}"
    if adaptive <= bare + CLOSE:
        found = "no protection against an informed attacker"
    elif float(worst["defended_low"]) <= float(worst["bare_high"]):
        found = "no protection beyond doubt against an informed attacker"
    else:
        cost = float(table["clean"]["bare"]) - float(table["clean"]["defended"])
        price = f", at {cost:.0%} of clean accuracy" if cost > 0.005 else ""
        found = f"some protection against these attacks{price}"
    if "white box" in table:
        white = float(table["white box"]["defended"])
        others = {name: float(row["defended"]) for name, row in table.items() if name not in SIDE_BY_SIDE}
        strongest = min(others, key=others.__getitem__)
        if others[strongest] + 2 * CLOSE < white:
            found += f" (white box {white:.0%}, {strongest} {others[strongest]:.0%}: its own gradients overrate it)"
    return f"{told}: {found}."
