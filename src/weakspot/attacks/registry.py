"""Attacks by name: ours and plug-ins by entry point, those of other libraries as LIBRARY:CLASS.

To register an attack, add an entry point in the group `weakspot.attacks` of `pyproject.toml` (ours or your package's).
Nothing in this file has to change.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from weakspot._checks import ROUNDING, unknown_choice
from weakspot._plug_ins import entry_points
from weakspot.attacks.context import AttackOptions, attack_context
from weakspot.attacks.eight_bit import is_inside
from weakspot.attacks.libraries import LIBRARIES
from weakspot.attacks.library_attacks import external
from weakspot.attacks.losses import Minimized, Norm
from weakspot.pairs import AttackResult

V = TypeVar("V")

GROUP = "weakspot.attacks"
# Lists show these first, in this order. All other attacks follow, sorted by name.
ORDER = (
    "pgd",
    "ensemble",
    "fgsm",
    "bim",
    "minimal_pgd",
    "fmn",
    "carlini_wagner",
    "ead",
    "strattack",
    "few_pixel",
)
SHARED = {"model", "images", "labels", *(entry.name for entry in fields(AttackOptions))}
NORMS: tuple[Norm, ...] = ("linf", "l2", "l1", "l0")


@dataclass(frozen=True, repr=False)
class Attack:
    """An attack with everything that its signature says, read once.

    Attributes:
        name: as `find_attack` takes it.
        function: (model, images, labels, *, ...) -> AttackResult.
        accepts: the names of the arguments of `AttackOptions` that it takes.
        parameters: the arguments of its own, by name.
        open_ended: whether it takes further arguments of any name, as attacks of other libraries do.
        default_budget: whether it must have a budget, and so has one by default.
        minimizes: the norm in which it looks for the smallest change; "other" if that is a size that is no norm, or
            one that only the attack knows; None if it does not look for the smallest change.
        norm_argument: the name of the argument that overrides `minimizes`, or None.
        plug_in: whether it is another package's, so that `run` checks and verifies what it returns.
    """

    name: str
    function: Callable[..., AttackResult]
    accepts: frozenset[str] = frozenset()
    parameters: Mapping[str, inspect.Parameter] = field(default_factory=dict)
    open_ended: bool = False
    default_budget: bool = False
    minimizes: Minimized | None = None
    norm_argument: str | None = None
    plug_in: bool = False

    @classmethod
    def of(cls, name: str, function: Callable[..., AttackResult]) -> Attack:
        """Describe a function, which may be declared by `minimizes`."""
        every = inspect.signature(function).parameters
        open_ended = any(one.kind is one.VAR_KEYWORD for one in every.values())
        budget = every.get("budget")
        return cls(
            name,
            function,
            frozenset(SHARED if open_ended else SHARED & set(every)),
            {
                key: one
                for key, one in every.items()
                if key not in SHARED and one.kind in {one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD}
            },
            open_ended,
            default_budget=budget is not None and budget.default is not None,
            minimizes=getattr(function, "minimizes", None),
            norm_argument=getattr(function, "norm_argument", None),
            plug_in=not _is_ours(function),
        )

    def __repr__(self) -> str:
        own = ", ".join(f"{one.name}={one.default!r}" for one in self.parameters.values())
        return f"Attack({self.name}({own}), minimizes={self.minimizes!r})"

    @property
    def takes_budget(self) -> bool:
        """Whether it takes a budget."""
        return "budget" in self.accepts

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def norm(self, settings: Mapping[str, object]) -> Norm | None:
        """The norm in which it looks for the smallest change under these settings; None for any other size."""
        chosen = settings.get(self.norm_argument or "", self.minimizes)
        return next((norm for norm in NORMS if norm == chosen), None)

    def takes(self, setting: str) -> bool:
        """Whether there is an argument of its own of this name."""
        return setting in self.parameters or (self.open_ended and setting not in SHARED)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, **arguments: object) -> AttackResult:
        """Call the function as it is."""
        return self.function(model, images, labels, **arguments)

    def run(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        options: AttackOptions,
        settings: Mapping[str, object],
    ) -> AttackResult:
        """Call the function with as many of the shared options as it takes, and with settings of its own.

        The success of a plug-in's result comes from fresh forward passes of ours.

        Raises:
            ValueError: if there is a region and it takes none; or if a plug-in returns no AttackResult, or one that
                leaves the region or the budget.
        """
        if options.region is not None and "region" not in self.accepts:
            raise ValueError(f"region must be none for attack {self.name}, which takes no region")
        taken = {}
        for entry in fields(options):
            value = getattr(options, entry.name)
            # None leaves a budget at the attack's own default, and **options without an entry.
            omitted = value is None and (entry.name == "budget" or self.open_ended)
            if entry.name in self.accepts and not omitted:
                taken[entry.name] = value
        if not self.plug_in:
            return self.function(model, images, labels, **taken, **settings)
        # Copies: what a plug-in writes into its arguments changes neither the user's tensors nor what it is held to.
        copies = {name: _copied(value) for name, value in taken.items()}
        result = self.function(model, _copied(images), _copied(labels), **copies, **settings)
        # An attack that was given no budget is not held to one.
        asked = options if "budget" in taken else replace(options, budget=None)
        return _verified(self.name, result, model, images, labels, asked)


def _copied(value: V) -> V:
    return cast("V", value.detach().clone()) if isinstance(value, Tensor) else value


def _is_ours(function: Callable[..., AttackResult]) -> bool:
    function = function.func if isinstance(function, partial) else function
    return (getattr(function, "__module__", None) or "").partition(".")[0] == "weakspot"


def _verified(
    name: str,
    returned: object,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    options: AttackOptions,
) -> AttackResult:
    """The result of a plug-in, held to the contract of our attacks, with its success by fresh forward passes.

    The image is judged as it is and as an 8-bit file. These two passes are added to those that the plug-in counted.

    Args:
        name: of the attack.
        returned: by the attack.
        model: that was attacked.
        images: (N, C, H, W) that it was given.
        labels: (N,) that it was given.
        options: that it was given.

    Raises:
        ValueError: if it is no AttackResult of these images, or leaves [0, 1], the region or the budget.
    """
    if not isinstance(returned, AttackResult):
        kind = type(returned).__name__
        raise ValueError(f"attack {name} must return an AttackResult, got {kind}")
    with attack_context(model, images, labels, replace(options, progress=None)) as problem:
        adversarial = returned.adversarial.detach().to(problem.clean)
        if adversarial.shape != problem.clean.shape:
            shapes = tuple(adversarial.shape), tuple(problem.clean.shape)
            raise ValueError(f"attack {name} must return images of shape {shapes[1]}, got {shapes[0]}")
        low, high = float(adversarial.min()), float(adversarial.max())
        if low < -ROUNDING or high > 1 + ROUNDING:
            raise ValueError(f"attack {name} must return images in [0, 1], got {low:.3g} to {high:.3g}")
        adversarial = adversarial.clamp(0, 1)
        change = adversarial - problem.clean
        outside = ((change != 0).any(1, keepdim=True) & ~problem.region).flatten(1).sum(1)
        if bool(outside.any()):
            row = int(outside.argmax())
            raise ValueError(
                f"attack {name} must leave pixels outside the region as they are, got {int(outside[row])} changed "
                f"in image {row} (without a region of its own, it should not take the argument region)"
            )
        if problem.budget is not None:
            over = ~is_inside(change, problem.clean, problem.budget)
            if bool(over.any()):
                row = int(over.to(torch.uint8).argmax())
                spent = float(problem.ball.distance(change)[row])
                raise ValueError(
                    f"attack {name} must stay inside its budget of {problem.budget}, got {spent:.3g} in image {row}"
                )
        result = problem.result(adversarial)
        # The passes of the plug-in, and the two of `problem.result`.
        return replace(
            result,
            n_forward=returned.n_forward.to(result.n_forward) + result.n_forward,
            n_backward=returned.n_backward.to(result.n_backward),
        )


def available_attacks() -> dict[str, str]:
    """The names that `find_attack` takes, those of `ORDER` first, each with the first line of its docstring."""
    installed = {entry.name for entry in entry_points(group=GROUP)}
    summaries = {}
    for name in [*(name for name in ORDER if name in installed), *sorted(installed - set(ORDER))]:
        try:
            summaries[name] = find_attack(name).summary
        except ValueError as error:
            summaries[name] = str(error)
    return summaries


def find_attack(name: str) -> Attack:
    """The attack of that name, or of another library: "foolbox:LinfPGD", "torchattacks:PGD", "art:FastGradientMethod".

    Raises:
        ValueError: if no attack of that name is installed, or it cannot be loaded.
    """
    if name.partition(":")[0] in LIBRARIES:
        described = Attack.of(name, partial(external, name))
        # Without a budget, the library decides the size: some attacks minimize it, others have a default.
        return replace(described, minimizes="other")
    for entry in entry_points(group=GROUP, name=name):
        try:
            return Attack.of(name, entry.load())
        except Exception as error:
            raise ValueError(f"attack {name} ({entry.value}) cannot be loaded: {error}") from error
    names = [entry.name for entry in entry_points(group=GROUP)]
    remedy = f"or LIBRARY:CLASS of {', '.join(LIBRARIES)}"
    raise ValueError(unknown_choice("attack", name, names, remedy=remedy))
