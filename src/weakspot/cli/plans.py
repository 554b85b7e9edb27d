"""Plans on the command line: options, and a plan.toml that they overrule."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from weakspot.cli.app import UNREADABLE, USAGE, Failure, complain
from weakspot.cli.inputs import class_names


def known(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """What was given."""
    return {key: value for key, value in mapping.items() if value is not None}


def lot_size(text: str) -> int | None:
    """The batch size, None for auto."""
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit() and int(text)):
        raise Failure(f"batch-size is {text!r}; accepted are auto and whole numbers of at least 1", USAGE)
    return int(text)


def plan_table(
    sources: list[str], said: dict[str, Any], settings: list[str], out: str | None
) -> tuple[dict[str, Any], str]:
    """The plan as a mapping, and the folder; says which sources are not there."""
    from weakspot.runs.places import exists, is_url
    from weakspot.runs.plan_files import absolute, read_plan

    table: dict[str, Any] = {}
    if len(sources) == 1 and Path(sources[0]).suffix == ".toml" and not is_url(sources[0]):
        plan = Path(sources.pop())
        table = absolute(read_plan(plan), plan.absolute().parent)
        if "out" in table and not isinstance(table["out"], str):
            raise Failure(f"{plan}: out is {table['out']!r}; accepted is a folder's path", USAGE)
        planned = table.pop("out", None)
        out = planned if out is None else out
        named = table.get("model")
        if isinstance(named, dict) and isinstance(named.get("classes"), str):
            named["classes"] = class_names(Path(named["classes"]))
        if isinstance(named, str):
            table["model"] = {"spec": named}
    elif sources:
        table["images"] = list(sources)
    if not table.get("images"):
        raise Failure(
            "no images were named; give files, folders, arrays, a plan.toml, or --resume RUN", USAGE
        )
    if out is None:
        raise Failure("no folder was named for what is found; give --out RUN", USAGE)
    model = {**table.get("model", {}), **said.pop("model", {})}
    table.update(said)
    table["model"] = model
    if settings:
        table["attacks"] = with_settings(table.get("attacks", "pgd"), settings)
    paths: list[str] = [table["images"]] if isinstance(table["images"], str) else table["images"]
    missing = [path for path in paths if not exists(path)]
    for path in missing:
        complain(f"{path}: there is no such file or folder")
    if len(missing) == len(paths):
        raise typer.Exit(UNREADABLE)
    return table, out


def with_settings(attacks: Any, settings: list[str]) -> list[dict[str, Any]]:
    """The attacks as tables, what --set says added to those it names."""
    from weakspot.checks import closest

    entries = [part.strip() for part in attacks.split(",")] if isinstance(attacks, str) else attacks
    tables: list[dict[str, Any]] = [
        {"name": entry} if isinstance(entry, str) else dict(entry) for entry in entries
    ]
    names = [str(table.get("name")) for table in tables]
    for setting in settings:
        place, equals, text = setting.partition("=")
        name, _, key = place.rpartition(".")
        if not (equals and name and key):
            raise Failure(f"--set is {setting!r}; accepted is ATTACK.NAME=VALUE, such as pgd.steps=50", USAGE)
        if name not in names:
            raise Failure(
                f"--set is {setting!r}, but {name} is none of the attacks; {closest(name, names)}", USAGE
            )
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        value = value if isinstance(value, int | float | bool | None) else text
        for one in tables:
            if one.get("name") == name:
                one["settings"] = {**one.get("settings", {}), key: value}
    return tables
