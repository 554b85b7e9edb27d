"""What a plan states about its network and its attacks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from weakspot._checks import unknown_choice
from weakspot.attacks import Attack, find_attack
from weakspot.budgets import Budget, read_budget

DEFAULT_BUDGET = "linf:4/255"
NORMS = ("linf", "l2", "l1")  # budgets that have a distance in the records
Value = str | int | float | bool | None


@dataclass(frozen=True)
class ModelPlan:
    """The network of an audit: the arguments of `weakspot.load`.

    Attributes:
        spec: as `load` takes it.
        weights: path of a weights file.
        mean: normalization on the [0, 1] scale, one value per channel; None for the network's own.
        std: normalization on the [0, 1] scale, one value per channel; None for the network's own.
        size: (height, width) that images are resized to; None for the network's own.
        classes: names of the classes; None for the network's own.
        device: auto, cpu, cuda or mps.
    """

    spec: str = "efficientnet_lite0"
    weights: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, int] | None = None
    classes: tuple[str, ...] | None = None
    device: str = "auto"


@dataclass(frozen=True)
class AttackPlan:
    """One attack with its budget and its own settings.

    Attributes:
        name: as `weakspot attack --list` prints it.
        budget: text such as linf:4/255; None if the attack takes none.
        settings: its other arguments as pairs (name, value).
        label: its name in records and maps, unique within the plan.
    """

    name: str
    budget: str | None = None
    settings: tuple[tuple[str, Value], ...] = ()
    label: str = ""

    def resolved(self) -> AttackPlan:
        """The same attack, with the default budget if it must have one and states none.

        Raises:
            ValueError: if there is no such attack, or it does not take its budget or settings.
        """
        attack = find_attack(self.name)
        if self.budget is not None and not attack.takes_budget:
            raise ValueError(f"budget of attack {self.name} must be left out, got {self.budget}")
        self.own_settings()
        return replace(self, budget=DEFAULT_BUDGET) if self.budget is None and attack.default_budget else self

    def own_settings(self) -> dict[str, Value]:
        """Keyword arguments of the attack's own.

        Raises:
            ValueError: if there is no such attack, or it does not take them.
        """
        attack = find_attack(self.name)
        for key, _ in self.settings:
            if not attack.takes(key):
                raise ValueError(unknown_choice(f"setting of attack {self.name}", key, attack.parameters))
        return dict(self.settings)

    @property
    def stated(self) -> list[str]:
        """Its budget, if it states one, and its settings, as texts."""
        budget = [self.budget] if self.budget else []
        return budget + [f"{key}={value}" for key, value in self.settings]

    @property
    def identity(self) -> tuple[str, str | None, frozenset[tuple[str, Value]]]:
        """Name, budget, and the settings that are not at their default; all of them if it is not installed here."""
        attack = self._installed()
        defaults = set() if attack is None else {(key, one.default) for key, one in attack.parameters.items()}
        return self.name, self.budget, frozenset(self.settings) - defaults

    def parsed_budget(self) -> Budget | None:
        """The budget that the attack gets, None if the plan states none."""
        return None if self.budget is None else read_budget(self.budget)

    def takes_budget(self) -> bool:
        """Whether the attack has a parameter that limits the change."""
        return find_attack(self.name).takes_budget

    def takes_region(self) -> bool:
        """Whether the attack can be confined to a region."""
        return "region" in find_attack(self.name).accepts

    @property
    def is_minimal(self) -> bool:
        """Whether the attack looks for the smallest change, or limits it to a size that the plan does not state.

        The latter are attacks of other libraries without a budget.
        """
        attack = self._installed()
        return self.budget is None and attack is not None and attack.minimizes is not None

    @property
    def is_known(self) -> bool:
        """Whether it is known what counts as success: not for a plug-in that is missing here and states no budget."""
        return self.budget is not None or self._installed() is not None

    @property
    def minimized_norm(self) -> str | None:
        """The norm in which a minimal-norm attack looks for the smallest change; None for all other attacks."""
        attack = self._installed()
        return None if attack is None or self.budget is not None else attack.norm(dict(self.settings))

    @property
    def recorded_norm(self) -> str | None:
        """`minimized_norm`, if the records hold a distance in it; None otherwise."""
        return self.minimized_norm if self.minimized_norm in NORMS else None

    def _installed(self) -> Attack | None:
        """The attack, or None if a finished run is read where its plug-in is not installed."""
        try:
            return find_attack(self.name)
        except ValueError:
            return None


class Limit(NamedTuple):
    """A stated budget: its text, its kind (linf, l2, l1, ...) and its amount."""

    budget: str
    kind: str
    amount: float


def read_limit(text: str) -> Limit:
    """Parse a budget such as linf:4/255."""
    kind = text.partition(":")[0].strip().lower()
    return Limit(text, kind, float(getattr(read_budget(text), "eps")))  # noqa: B009 - Budget is a protocol without it


def with_budgets(attacks: Iterable[AttackPlan], budgets: Sequence[str]) -> tuple[AttackPlan, ...]:
    """The attacks; every one that takes a budget and states none appears once per budget.

    Raises:
        ValueError: if budgets are given and no attack can use them.
    """
    if not budgets:
        return tuple(attacks)
    filled: list[AttackPlan] = []
    for attack in attacks:
        fill = attack.budget is None and attack.takes_budget()
        filled += [replace(attack, budget=text) for text in budgets] if fill else [attack]
    if not any(attack.budget or attack.is_minimal for attack in filled):
        names = ", ".join(sorted({attack.name for attack in filled}))
        raise ValueError(
            f"budget must be left out, got {', '.join(budgets)!r}: {names} takes none (or add an attack such as pgd)"
        )
    return tuple(filled)


def labeled(attacks: Iterable[AttackPlan]) -> tuple[AttackPlan, ...]:
    """The different attacks, each with a label: its name or, where several share a name, also budget and settings.

    Raises:
        ValueError: if two have the same label.
    """
    # Records and maps are keyed by label, so labels must tell all attacks apart.
    unique = list(dict.fromkeys(attacks))
    names = [attack.name for attack in unique]
    own = [attack.label or attack.name for attack in unique]
    result = []
    for attack in unique:
        if attack.label and own.count(attack.label) > 1:
            raise ValueError(f"labels of attacks must differ, got two of {attack.label!r}")
        more = attack.stated if names.count(attack.name) > 1 else []
        result.append(replace(attack, label=attack.label or " ".join([attack.name, *more])))
    return tuple(result)
