"""Attacks by name: our own and installed ones from the entry-point group, foreign ones as LIBRARY:CLASS.

Attacking: any attack of the registry called with what it takes, and results put together and taken apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor

from weakspot._checks import unknown_choice
from weakspot.attacks.libraries import LIBRARIES
from weakspot.attacks.library_attacks import external
from weakspot.classifier import Classifier
from weakspot.pairs import AttackResult

GROUP = "weakspot.attacks"
ORDER = ("pgd", "ensemble", "fgsm", "bim", "fmn", "carlini_wagner", "ead", "strattack", "pixels")
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
        unknown_choice("attack", name, known, remedy=f"or give LIBRARY:CLASS of {', '.join(LIBRARIES)}")
    )


def call_attack(
    run: Callable[..., AttackResult],
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> AttackResult:
    """The attack with as many of the options as it takes.

    Raises:
        ValueError: when it takes no region and one is given, or returns something else than an AttackResult.
    """
    parameters = inspect.signature(run).parameters
    free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    name = getattr(run, "__name__", str(run))
    if options["region"] is not None and not free and "region" not in parameters:
        raise ValueError(f"attack {name} takes no region; accepted is the region none")
    taken = {key: value for key, value in options.items() if free or key in parameters}
    result = run(classifier, images, labels, **taken, **settings)
    if not isinstance(result, AttackResult):
        raise ValueError(f"attack {name} returned a {type(result).__name__}; accepted is an AttackResult")
    return result


def joined(results: Sequence[AttackResult]) -> AttackResult:
    """Several results one after the other."""
    if len(results) == 1:
        return results[0]

    def both(name: str) -> Any:
        parts = [getattr(result, name) for result in results]
        return None if any(part is None for part in parts) else torch.cat(parts)

    return AttackResult(**{entry.name: both(entry.name) for entry in fields(AttackResult)})


def chosen(pairs: AttackResult, rows: Tensor) -> AttackResult:
    """Some of the pairs."""
    if len(rows) == len(pairs):
        return pairs
    parts = {entry.name: getattr(pairs, entry.name) for entry in fields(AttackResult)}
    kept: dict[str, Any] = {name: None if part is None else part[rows] for name, part in parts.items()}
    return AttackResult(**kept)
