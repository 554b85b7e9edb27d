"""Attacks by name: our own and installed ones from the entry-point group, foreign ones as LIBRARY:CLASS."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points

from weakspot.attacks.foreign import external
from weakspot.attacks.libraries import LIBRARIES
from weakspot.checks import closest
from weakspot.pairs import AttackResult

GROUP = "weakspot.attacks"
ORDER = ("pgd", "auto", "fgsm", "iterative", "fmn", "carlini_wagner", "elastic_net", "structured", "pixels")
Attack = Callable[..., AttackResult]  # (model, images, labels, *, region, targets, seed, ...) -> AttackResult


def available_attacks() -> dict[str, str]:
    """Names that `find_attack` takes, ours first, each with the first sentence of what it says of itself."""
    entries = {entry.name: entry for entry in entry_points(group=GROUP)}
    names = [name for name in ORDER if name in entries] + sorted(set(entries) - set(ORDER))
    told = {}
    for name in names:
        try:
            told[name] = (inspect.getdoc(find_attack(name)) or "").partition("\n")[0]
        except ValueError as error:
            told[name] = str(error)
    return told


def find_attack(name: str) -> Attack:
    """The attack of that name, or of another library: "foolbox:LinfPGD", "torchattacks:PGD", "art:FastGradientMethod".

    Raises:
        ValueError: when no attack of that name is installed, or it cannot be loaded.
    """
    if name.partition(":")[0] in LIBRARIES:
        return partial(external, name)
    for entry in entry_points(group=GROUP, name=name):
        try:
            found: Attack = entry.load()
        except Exception as error:
            raise ValueError(f"attack {name} ({entry.value}) cannot be loaded: {error}") from error
        return found
    known = [entry.name for entry in entry_points(group=GROUP)]
    raise ValueError(
        f"attack is {name!r}; {closest(name, known)} (or LIBRARY:CLASS of {', '.join(LIBRARIES)})"
    )
