"""Gates on the command line: --fail-if and --junit, for builds that are to fail when a model gets weaker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from weakspot.cli.app import UNREADABLE, USAGE, Failure

if TYPE_CHECKING:
    import pandas as pd

    from weakspot.runs.gate import Verdict

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
    from weakspot.runs.gate import Condition

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
    from weakspot.runs.gate import Verdict, judge
    from weakspot.runs.gate import junit as as_junit
    from weakspot.writing import write_whole

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
        write_whole(junit, lambda draft: draft.write_text(text, "utf-8"))
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
