"""Attacking: any attack of the registry called with what it takes, and results put together and taken apart."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from weakspot.classifier import Classifier
from weakspot.pairs import AttackResult


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
