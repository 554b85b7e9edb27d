"""Plans as files and mappings of plain values: TOML from people, JSON in run.json."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from weakspot._checks import unknown_choice
from weakspot._io.urls import is_url
from weakspot.audit.plan.plan import LABELS, AttackPlan, ModelPlan, Plan, is_minimal
from weakspot.explanations.analysis import available_analyses


def read_plan(path: Path) -> dict[str, Any]:
    """What a TOML file says; paths in it are relative to its own folder (see `absolute`).

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no TOML.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such plan")
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML ({error})") from None


def absolute(mapping: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The same mapping; paths in it, `out` too, no longer relative to `folder`."""
    table = dict(mapping)
    images = table.get("images") or ()
    if isinstance(images, str | list | tuple):
        table["images"] = [
            _within(folder, str(path)) for path in ([images] if isinstance(images, str) else images)
        ]
    for key in ("out", "labels"):
        if isinstance(table.get(key), str) and table[key] not in LABELS:
            table[key] = _within(folder, table[key])
    if isinstance(table.get("model"), dict):
        own = dict(table["model"])
        table["model"] = own | {
            key: str(folder / own[key]) for key in ("weights", "classes") if isinstance(own.get(key), str)
        }
    return table


def read_mapping(mapping: Mapping[str, Any], folder: Path | None = None) -> Plan:
    """The plan that a mapping of plain values stands for, not yet `resolved`.

    Args:
        mapping: images, model (a spec or a table of `ModelPlan`), attacks (names or tables of `AttackPlan`),
            budget (for every attack that takes one; several make several of each; minimal-norm attacks are counted at
            it), regions, controls, control_images, analyses, labels, fraction, seed, limit, maps, shard, group. Lists
            may be given as text, separated by commas; analyses also as "all" or "none".
        folder: what paths are relative to; the working directory where not given.

    Raises:
        ValueError: when a key is unknown or a value of the wrong kind, naming it.
    """
    known = {entry.name for entry in fields(Plan)} - {"sources"} | {"images", "budget"}
    _check_keys("plan", mapping, known)
    folder = (folder or Path.cwd()).absolute()
    found: dict[str, Any] = {
        key: value for key, value in mapping.items() if key not in {"images", "budget", "model", "attacks"}
    }
    if mapping.get("budget") is not None:
        found["stated_budgets"] = mapping["budget"]
    for key in ("regions", "analyses", "stated_budgets"):
        if key in found:
            found[key] = tuple(_texts("budget" if key == "stated_budgets" else key, found[key]))
    if found.get("analyses") in {("none",), ("all",)}:
        found["analyses"] = tuple(available_analyses()) if found["analyses"] == ("all",) else ()
    if found.get("labels", "auto") not in LABELS:
        found["labels"] = str(folder / str(found["labels"]))
    sources = mapping.get("images") or ()  # a comma is a legal part of a path, so text is one path
    paths = _texts("images", [sources] if isinstance(sources, str) else sources)
    attacks = _attacks(mapping.get("attacks", "pgd"), mapping.get("budget"))
    return Plan(
        sources=tuple(_within(folder, path) for path in paths),
        model=_model(mapping.get("model", {}), folder),
        attacks=tuple(attacks),
        **found,
    )


def _within(folder: Path, path: str) -> str:
    return path if is_url(path) else str(folder / path)


def _model(said: Any, folder: Path) -> ModelPlan:
    table = {"spec": said} if isinstance(said, str) else said
    _check_keys("model", table, {entry.name for entry in fields(ModelPlan)})
    known: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in table.items()
    }
    if known.get("weights") is not None:
        known["weights"] = str(folder / str(known["weights"]))
    return ModelPlan(**known)


def _attacks(said: Any, budgets: Any) -> list[AttackPlan]:
    every: list[str | None] = [None] if budgets is None else [*_texts("budget", budgets)]
    found = []
    for entry in _texts("attacks", said) if isinstance(said, str) else said:
        table = {"name": entry.strip()} if isinstance(entry, str) else dict(entry)
        _check_keys("attacks", table, {one.name for one in fields(AttackPlan)})
        if "name" not in table:
            raise ValueError(f"attacks has {table!r}, which lacks name")
        settings = table.pop("settings", {})
        if not isinstance(settings, Mapping):
            raise ValueError(f"attacks has {table['name']} with settings {settings!r}; accepted is a table")
        attack = AttackPlan(**table, settings=tuple(sorted(settings.items())))
        takes = attack.budget is None and attack.takes_budget()
        found += [replace(attack, budget=budget) if takes else attack for budget in every]
    if budgets is not None and not any(attack.budget or is_minimal(attack) for attack in found):
        names = ", ".join(sorted({attack.name for attack in found}))
        raise ValueError(
            f"budget is {budgets!r}, but {names} takes none; leave it out, or add an attack such as pgd"
        )
    return found


def _check_keys(name: str, mapping: Any, known: Iterable[str]) -> None:
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{name} is {mapping!r}; accepted is a table of {', '.join(sorted(known))}")
    for key in mapping:
        if key not in known:
            raise ValueError(unknown_choice(f"key of {name}", key, sorted(known)))


def _texts(name: str, said: Any) -> list[str]:
    parts = [part.strip() for part in said.split(",")] if isinstance(said, str) else list(said or ())
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{name} is {said!r}; accepted is a list of texts")
    return [part for part in parts if part]
