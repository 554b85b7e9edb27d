"""Recipes: which images a network is trained on."""

from __future__ import annotations

from dataclasses import dataclass

from weakspot.checks import closest


@dataclass(frozen=True)
class Recipe:
    """What becomes of the attacked share of every batch.

    Attributes:
        region: where it may change: "everywhere", "background", "foreground", "random" (as many sites as the background
            has, scattered).
        search: how: "none", "descent" (projected gradient descent), "step" (one step from a random start), "noise"
            (the random start alone).
        trades: whether the loss is that of TRADES, else cross-entropy.
        summary: one line for people.
    """

    region: str
    search: str
    summary: str
    trades: bool = False


RECIPES = {
    "standard": Recipe("everywhere", "none", "clean images alone"),
    "localized": Recipe("background", "descent", "PGD in the background (Rothberg et al. 2019)"),
    "foreground": Recipe("foreground", "descent", "PGD in the foreground"),
    "random_mask": Recipe("random", "descent", "PGD in scattered sites, as many as the background has"),
    "full": Recipe("everywhere", "descent", "PGD everywhere (Madry et al. 2018)"),
    "fast": Recipe("everywhere", "step", "one step from a random start (Wong et al. 2020)"),
    "noise": Recipe("background", "noise", "random noise in the background"),
    "trades": Recipe(
        "everywhere", "descent", "PGD everywhere, loss of TRADES (Zhang et al. 2019)", trades=True
    ),
}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: when there is none.
    """
    if not isinstance(name, str) or name not in RECIPES:
        raise ValueError(f"recipe is {name!r}; {closest(str(name), RECIPES)}")
    return RECIPES[name]
