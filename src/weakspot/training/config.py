"""Recipes, and the configuration of a training."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Literal

from weakspot._checks import (
    check_budget,
    check_choice,
    check_count,
    check_seed,
    is_number,
    with_plain_numbers,
)
from weakspot.budgets import Budget, Linf

AUGMENTS = ("none", "crop", "crop,flip")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
STEP_RATIO = 2.5  # step size x steps / budget: PGD can cross the budget and come back
MACHINE = ("device", "workers", "save_every")  # fields that do not change the trained weights


@dataclass(frozen=True)
class Recipe:
    """What happens to the attacked images of every batch.

    Attributes:
        region: where pixels may change. "random" means as many scattered sites as the background has.
        search: how the perturbation is made. "descent" is projected gradient descent, "step" one step from a random
            start, "noise" the random start alone.
        summary: one line for the user.
        trades: whether the loss is that of TRADES instead of cross-entropy.
    """

    region: Literal["everywhere", "background", "foreground", "random"]
    search: Literal["none", "descent", "step", "noise"]
    summary: str
    trades: bool = False


RECIPES = {
    "standard": Recipe("everywhere", "none", "clean images only"),
    "localized": Recipe("background", "descent", "PGD in the background (Rothberg et al. 2019)"),
    "foreground": Recipe("foreground", "descent", "PGD in the foreground"),
    "random_mask": Recipe("random", "descent", "PGD in as many scattered sites as the background has"),
    "full": Recipe("everywhere", "descent", "PGD everywhere (Madry et al. 2018)"),
    "fast": Recipe("everywhere", "step", "one step from a random start (Wong et al. 2020)"),
    "noise": Recipe("background", "noise", "random noise in the background"),
    "trades": Recipe("everywhere", "descent", "PGD everywhere, TRADES loss (Zhang et al. 2019)", trades=True),
}


def find_recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        ValueError: if there is no such recipe.
    """
    check_choice("recipe", name, RECIPES)
    return RECIPES[name]


@dataclass(frozen=True)
class TrainConfig:
    """How a network is trained.

    `None` stands for the usual value for the data: gray images (one channel, as in MNIST) or color (as in CIFAR-10).
    Rothberg et al. 2019 (arXiv 1909.04779) is known here by its abstract only, so these values are those of Madry et
    al. 2018 (arXiv 1706.06083). `device`, `workers` and `save_every` do not change what is trained; a training resumes
    with other values of them.

    Attributes:
        recipe: a key of `training.RECIPES`: "standard", "localized", "foreground", "random_mask", "full", "fast",
            "noise" or "trades".
        budget: of the adversary. Default: `Linf(0.3)` for gray images, `Linf(8 / 255)` for color.
        epochs: passes over the data.
        attacked_fraction: fraction of every batch that is attacked, 0 to 1. The recipe "standard" attacks none.
        seed: of everything random: order, augmentation, random starts, scattered masks, dropout.
        steps: of projected gradient descent. Default: 40 for gray images, 10 for color.
        step_size: of each step, in units of the budget. Default: 0.01 for gray images, 2/255 for color; with another
            budget or number of steps 2.5 * budget / steps.
        batch_size: images per update, over all processes together.
        learning_rate: of SGD at the start; it falls to zero along a cosine.
        momentum: of SGD.
        weight_decay: of SGD.
        beta: weight of the robustness term of TRADES.
        augment: "none", "crop" (shifts of up to an eighth of each side) or "crop,flip". Default: "none" for gray
            images, "crop,flip" for color.
        held_out: images that are not trained on and are evaluated after every epoch; at most a tenth of the data.
            With fewer than 100, training never stops early.
        precision: "32-true", "16-mixed" or "bf16-mixed".
        device: "cpu", "cuda", "cuda:1", "mps" or "auto". Default: the device of the model.
        workers: processes that decode images, if these are not in memory.
        save_every: seconds between checkpoints within an epoch.

    Raises:
        ValueError: if a value does not fit.

    >>> TrainConfig(recipe="full", epochs=3)
    TrainConfig(recipe='full', epochs=3)
    """

    recipe: str = "localized"
    budget: Budget | None = None
    epochs: int = 10
    attacked_fraction: float = 0.5
    seed: int = 0
    steps: int | None = None
    step_size: float | None = None
    batch_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    beta: float = 6.0
    augment: str | None = None
    held_out: int = 512
    precision: str = "32-true"
    device: str | None = None
    workers: int = 2
    save_every: float = 60.0

    def __post_init__(self) -> None:
        with_plain_numbers(self)
        find_recipe(self.recipe)
        check_seed(self.seed)
        if self.budget is not None:
            check_budget(self.budget)
        for name in ("epochs", "batch_size"):
            check_count(name, getattr(self, name))
        for name in ("held_out", "workers"):
            check_count(name, getattr(self, name), least=0)
        if self.steps is not None:
            check_count("steps", self.steps)
        for name in ("attacked_fraction", "momentum"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value!r}")
        for name in ("step_size", "learning_rate", "weight_decay", "beta", "save_every"):
            value = getattr(self, name)
            if value is not None and (not is_number(value) or not 0 <= value < math.inf):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
        if self.augment is not None:
            check_choice("augment", self.augment, AUGMENTS)
        check_choice("precision", self.precision, PRECISIONS)

    def __repr__(self) -> str:
        changed = [
            f"{field.name}={value!r}"
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default
        ]
        return f"{type(self).__name__}({', '.join(changed)})"

    def resolved(self, channels: int) -> ResolvedConfig:
        """The configuration with a value instead of every `None`, for images of this many channels."""
        usual_budget, usual_steps, usual_size, usual_augment = (
            (Linf(0.3), 40, 0.01, "none") if channels == 1 else (Linf(8 / 255), 10, 2 / 255, "crop,flip")
        )
        budget = usual_budget if self.budget is None else self.budget
        steps = usual_steps if self.steps is None else self.steps
        if self.step_size is not None:
            step_size = self.step_size
        elif self.budget is None and self.steps is None:
            step_size = usual_size
        else:
            step_size = STEP_RATIO * limit_of(budget) / steps
        # Recipes without descent ignore both values, so that records of equal trainings are equal.
        if find_recipe(self.recipe).search != "descent":
            steps, step_size = 1, 0.0
        filled = {
            "budget": budget,
            "steps": steps,
            "step_size": step_size,
            "augment": usual_augment if self.augment is None else self.augment,
        }
        return ResolvedConfig(**vars(self) | filled)


@dataclass(frozen=True, repr=False)
class ResolvedConfig(TrainConfig):
    """A `TrainConfig` in which nothing is left to the data."""

    # Narrower types than in the base class, so that nothing below has to handle None.
    budget: Budget = Linf(0.3)  # noqa: RUF009 - frozen
    steps: int = 1
    step_size: float = 0.0
    augment: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        attacks = find_recipe(self.recipe).search != "none"
        if attacks and self.attacked_fraction > 0 and not self.attacked:
            raise ValueError(
                f"attacked_fraction must be 0 or more than {0.5 / self.batch_size:g}, got {self.attacked_fraction} "
                f"(which attacks no image of a batch of {self.batch_size})"
            )

    @property
    def attacked(self) -> int:
        """Images of every batch that are attacked."""
        if find_recipe(self.recipe).search == "none":
            return 0
        return round(self.attacked_fraction * self.batch_size)

    @property
    def passes(self) -> float:
        """Forward and backward passes over the network for every image of an epoch, those of the attack included."""
        recipe, attacked = find_recipe(self.recipe), self.attacked / self.batch_size
        steps = {"none": 0, "noise": 0, "step": 1, "descent": self.steps}[recipe.search]
        # TRADES passes attacked images on beside the clean ones.
        return 1 + attacked * (steps + recipe.trades)

    def rate(self, progress: float) -> float:
        """The learning rate after this fraction of all updates: a cosine to zero (arXiv 1608.03983, equation 5)."""
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def as_record(self) -> dict[str, object]:
        """The fields that decide the trained weights, for JSON."""
        record = {name: value for name, value in asdict(self).items() if name not in MACHINE}
        return record | {"budget": str(self.budget), "budget exactly": repr(self.budget)}


def limit_of(budget: Budget) -> float:
    """The size of a budget in its own unit."""
    return float(getattr(budget, "eps", 1.0))
