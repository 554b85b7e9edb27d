"""What a plan states about its network and its attacks, and how both are read from plain values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from weakspot._checks import unknown_choice
from weakspot.attacks import Attack, find_attack
from weakspot.budgets import Budget, read_budget

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

    @classmethod
    def from_mapping(cls, value: object, folder: Path) -> ModelPlan:
        """Read a spec, or a table of this class's attributes.

        Raises:
            ValueError: if the value is neither, or has an unknown key.
        """
        table = checked_table("model", {"spec": value} if isinstance(value, str) else value, cls)
        for key, item in table.items():
            if isinstance(item, list):
                table[key] = tuple(item)
        if table.get("weights") is not None:
            table["weights"] = str(folder / str(table["weights"]))
        return cls(**table)


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

    @classmethod
    def from_mapping(cls, value: object) -> AttackPlan:
        """Read a name, or a table of this class's attributes.

        Raises:
            ValueError: if the value is neither, or has an unknown key.
        """
        table = checked_table("attacks", {"name": value.strip()} if isinstance(value, str) else value, cls)
        if "name" not in table:
            raise ValueError(f"attacks must each have a name, got {value!r}")
        settings = table.pop("settings", {})
        if not isinstance(settings, Mapping):
            raise ValueError(f"settings of attack {table['name']} must be a table, got {settings!r}")
        return cls(**table, settings=tuple(sorted(settings.items())))

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

    def parsed_budget(self) -> Budget | None:
        """The budget that the attack gets, None if the plan states none."""
        return None if self.budget is None else read_budget(self.budget)

    def takes_budget(self) -> bool:
        """Whether the attack has a parameter that limits the change."""
        return find_attack(self.name).takes_budget

    def requires_budget(self) -> bool:
        """Whether a plan that states no budget gives this attack the default one."""
        return find_attack(self.name).default_budget

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

    def _installed(self) -> Attack | None:
        """The attack, or None if a finished run is read where its plug-in is not installed."""
        try:
            return find_attack(self.name)
        except ValueError:
            return None


def read_attacks(value: object, budgets: object) -> tuple[AttackPlan, ...]:
    """Read names or tables of attacks; every attack that takes a budget and states none appears once per budget.

    Raises:
        ValueError: if budgets are given and no attack can use them.
    """
    texts: list[str | None] = [None] if budgets is None else [*read_texts("budget", budgets)]
    attacks = []
    entries = read_texts("attacks", value) if isinstance(value, str) else value
    if not isinstance(entries, Iterable):
        raise ValueError(f"attacks must be a list of names or tables, got {value!r}")
    for entry in entries:
        attack = AttackPlan.from_mapping(entry)
        # The plan of a finished run has no budgets to fill in, and is read without the package of its attack, too.
        fill = budgets is not None and attack.budget is None and attack.takes_budget()
        attacks += [replace(attack, budget=text) if fill else attack for text in texts]
    if budgets is not None and not any(attack.budget or attack.is_minimal for attack in attacks):
        names = ", ".join(sorted({attack.name for attack in attacks}))
        raise ValueError(
            f"budget must be left out, got {budgets!r}: {names} takes none (or add an attack such as pgd)"
        )
    return tuple(attacks)


def labeled(attacks: Iterable[AttackPlan]) -> tuple[AttackPlan, ...]:
    """The different attacks, each with a label: its name or, where several share a name, also budget and settings.

    Raises:
        ValueError: if two have the same label.
    """
    # Records and maps are keyed by label, so labels must tell all attacks apart.
    unique = list(dict.fromkeys(attacks))
    names = [attack.name for attack in unique]
    own = [attack.label or attack.name for attack in unique]
    for attack in unique:
        if attack.label and own.count(attack.label) > 1:
            raise ValueError(f"labels of attacks must differ, got two of {attack.label!r}")
    return tuple(
        attack
        if attack.label
        else replace(attack, label=attack.name if names.count(attack.name) == 1 else _description(attack))
        for attack in unique
    )


def _description(attack: AttackPlan) -> str:
    settings = [f"{key}={value}" for key, value in attack.settings]
    return " ".join([attack.name, *([attack.budget] if attack.budget else []), *settings])


def checked_table(name: str, value: object, *types: type, more: Iterable[str] = ()) -> dict[str, Any]:
    """A copy of a table whose keys are fields of these dataclasses or one of `more`.

    Raises:
        ValueError: if the value is no table or has another key.
    """
    keys = sorted({entry.name for kind in types for entry in fields(kind)} | set(more))
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a table of {', '.join(keys)}, got {value!r}")
    for key in value:
        if key not in keys:
            raise ValueError(unknown_choice(f"key of {name}", key, keys))
    return dict(value)


def read_texts(name: str, value: object) -> tuple[str, ...]:
    """A list of texts, or one text of several separated by commas; empty ones are dropped."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{name} must be a list of texts, got {value!r}")
    return tuple(part.strip() for part in parts if part.strip())
