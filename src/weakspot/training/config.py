"""Settings: all numbers that decide a training.

Recipes: which images a network is trained on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from weakspot._checks import check_budget, check_choice, check_seed, is_number
from weakspot.budgets import Budget, Linf


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
    check_choice("recipe", name, RECIPES)
    return RECIPES[name]


AUGMENTS = ("none", "crop", "crop,flip")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")


@dataclass(frozen=True)
class Settings:
    """What a training depends on besides network and data.

    Attributes:
        recipe: a name of `RECIPES`.
        budget: of the adversary.
        fraction: of every batch that is attacked.
        epochs: passes over the data.
        seed: of order, augmentation, random starts, scattered masks and dropout.
        steps: of projected gradient descent.
        step_size: of each, in the budget's own unit.
        batch_size: images per update, all devices together.
        learning_rate: at the start, falling to zero along a cosine (Loshchilov and Hutter 2017, arXiv 1608.03983).
        momentum: of SGD.
        weight_decay: of SGD.
        beta: weight of the second term of TRADES.
        augment: "none", "crop" (shifted by up to an eighth of the side) or "crop,flip".
        held_out: images that are kept from training and judged after every epoch.
        precision: "32-true", "16-mixed" or "bf16-mixed".
    """

    recipe: str
    budget: Budget
    fraction: float
    epochs: int
    seed: int
    steps: int
    step_size: float
    batch_size: int
    learning_rate: float
    momentum: float
    weight_decay: float
    beta: float
    augment: str
    held_out: int
    precision: str

    def __post_init__(self) -> None:
        find_recipe(self.recipe)
        check_budget(self.budget)
        check_seed(self.seed)
        for name in ("epochs", "steps", "batch_size", "held_out"):
            value, least = getattr(self, name), 0 if name == "held_out" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}; accepted is a whole number of at least {least}")
        for name, most in (
            ("fraction", 1.0),
            ("momentum", 1.0),
            ("step_size", math.inf),
            ("learning_rate", math.inf),
            ("weight_decay", math.inf),
            ("beta", math.inf),
        ):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= most or math.isinf(value):
                end = "" if math.isinf(most) else f" to {most:g}"
                raise ValueError(
                    f"{name} is {value!r}; accepted is a number from 0{end}{' up' if not end else ''}"
                )
        for name, accepted in (("augment", AUGMENTS), ("precision", PRECISIONS)):
            check_choice(name, getattr(self, name), accepted)

    @property
    def attacked(self) -> int:
        """Images of every batch that are attacked."""
        return 0 if find_recipe(self.recipe).search == "none" else round(self.fraction * self.batch_size)

    def rate(self, progress: float) -> float:
        """The learning rate when this share of all updates is done."""
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"budget": str(self.budget), "budget exactly": repr(self.budget)}


def defaults(channels: int) -> Mapping[str, Any]:
    """Budget, steps, step size and augmentation for gray images (as for MNIST) or color (as for CIFAR-10).

    Of Rothberg et al. 2019 (arXiv 1909.04779) only the abstract says what was done; the numbers are Madry's (2018,
    arXiv 1706.06083).
    """
    if channels == 1:
        return {"budget": Linf(0.3), "steps": 40, "step_size": 0.01, "augment": "none"}
    return {"budget": Linf(8 / 255), "steps": 10, "step_size": 2 / 255, "augment": "crop,flip"}
