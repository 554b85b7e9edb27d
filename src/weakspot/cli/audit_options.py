"""Plans on the command line: options, and a plan.toml that they overrule.

Gates on the command line: --fail-if and --junit, for builds that are to fail when a model gets weaker.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from weakspot.cli.app import UNREADABLE, USAGE, Failure, complain
from weakspot.cli.inputs import class_names

if TYPE_CHECKING:
    import pandas as pd

    from weakspot.audit.findings.gates import Verdict


def known(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """What was given."""
    return {key: value for key, value in mapping.items() if value is not None}


def parse_batch_size(text: str) -> int | None:
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
    from weakspot._io.urls import exists, is_url
    from weakspot.audit.plan.plan import read_plan

    table: dict[str, Any] = {}
    if len(sources) == 1 and Path(sources[0]).suffix == ".toml" and not is_url(sources[0]):
        plan = Path(sources.pop())
        table = dict(read_plan(plan))
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
    from weakspot._checks import unknown_choice

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
            raise Failure(unknown_choice("attack in --set", name, names), USAGE)
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        value = value if isinstance(value, int | float | bool | None) else text
        for one in tables:
            if one.get("name") == name:
                one["settings"] = {**one.get("settings", {}), key: value}
    return tables


GATE = 3  # exit code of a gate that is shut
FailIfOption = Annotated[
    list[str] | None,
    typer.Option(
        "--fail-if",
        help="Exit with code 3 where this holds of any row, or cannot be judged; may be given several times: "
        '"robust_accuracy < 0.4", "region == \'cam\' and robust_high < 0.2".',
    ),
]
FloatOption = Annotated[
    bool,
    typer.Option(
        "--float",
        help="Count attacked images before they are rounded to 8 bits, instead of what picture files hold.",
    ),
]
JUnitOption = Annotated[
    Path | None, typer.Option("--junit", help="Write what the gate found to this file, for build servers.")
]


def check_gate(conditions: Sequence[str], junit: Path | None) -> None:
    """What can be said of a gate before anything is computed."""
    from weakspot.audit.findings.gates import Condition

    for text in conditions:
        Condition(text)
    if junit is not None and not conditions:
        raise Failure("--junit has nothing to tell without --fail-if", USAGE)
    if junit is not None and (junit.is_dir() or not junit.absolute().parent.is_dir()):
        raise Failure(f"--junit is {junit}; accepted is a file in a folder that is there", USAGE)
    if junit is not None and junit.is_file() and not junit.is_symlink():
        junit.unlink()  # whatever happens from here on, an earlier verdict is not taken for the one of this run


def pass_gate(
    conditions: Sequence[str],
    rows: Callable[[], pd.DataFrame],
    words: Callable[[Mapping[str, Any]], str],
    junit: Path | None,
    suite: str,
    *,
    shortfalls: Sequence[str] = (),
    undefined: Callable[[Mapping[str, Any]], Sequence[str]] = lambda _: (),
    others: Callable[[pd.DataFrame], Sequence[tuple[str, pd.DataFrame]]] | None = None,
) -> list[Verdict]:
    """The verdicts, written to the file where one is named; nothing where there are no conditions.

    Of a run that is not complete (`shortfalls` say why) every condition fails: what is missing could decide it.
    `others` makes of the rows what they could be as well, as `judge` has it.
    """
    from weakspot._io.files import write_atomic
    from weakspot.audit.findings.gates import Verdict, judge
    from weakspot.audit.findings.gates import junit as as_junit

    if not conditions:
        return []
    if shortfalls:
        why = "; ".join(shortfalls)
        verdicts = [
            Verdict(text.strip(), "all images", True, f"{text.strip()} cannot be judged: {why}")
            for text in conditions
        ]
    else:
        table = rows()
        cases = others(table) if others is not None else ()
        verdicts = judge(conditions, table, words, undefined=undefined, others=cases)
    if junit is not None:
        text = as_junit(verdicts, suite)
        write_atomic(junit, lambda draft: draft.write_text(text, "utf-8"))
    return verdicts


def tell_gate(verdicts: Sequence[Verdict], *, quiet: bool, shortfalls: Sequence[str] = ()) -> None:
    """Say how the gate stands; raises typer.Exit(3) where it is shut, typer.Exit(4) of runs that are not complete."""
    shut = [verdict for verdict in verdicts if verdict.failed]
    console = Console(stderr=True, highlight=False)
    for verdict in shut:
        console.print(escape(f"gate: {verdict.row}: {verdict.why}"), soft_wrap=True, style="red")
    if verdicts and not shut and not quiet:
        console.print(f"gate: open, {len(verdicts)} checks", style="dim")
    if shut:
        raise typer.Exit(UNREADABLE if shortfalls else GATE)


def plain(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """For --json."""
    from dataclasses import asdict

    shut = any(verdict.failed for verdict in verdicts)
    return {"gate": {"failed": shut, "checks": [asdict(verdict) for verdict in verdicts]}} if verdicts else {}
