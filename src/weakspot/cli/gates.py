"""Gates on the command line: --fail-if and --junit, for builds that are to fail when a model gets weaker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from weakspot.cli.app import USAGE, Failure

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


def pass_gate(
    conditions: Sequence[str],
    rows: Callable[[], pd.DataFrame],
    words: Callable[[Mapping[str, Any]], str],
    junit: Path | None,
    suite: str,
    undefined: Callable[[Mapping[str, Any]], Sequence[str]] = lambda _: (),
) -> list[Verdict]:
    """The verdicts, written to the file where one is named; nothing where there are no conditions."""
    from weakspot.runs.gate import judge
    from weakspot.runs.gate import junit as as_junit
    from weakspot.writing import write_whole

    if not conditions:
        return []
    verdicts = judge(conditions, rows(), words, undefined)
    if junit is not None:
        text = as_junit(verdicts, suite)
        write_whole(junit, lambda draft: draft.write_text(text, "utf-8"))
    return verdicts


def tell_gate(verdicts: Sequence[Verdict], *, quiet: bool) -> None:
    """Say how the gate stands; raises typer.Exit(3) where it is shut."""
    shut = [verdict for verdict in verdicts if verdict.failed]
    console = Console(stderr=True, highlight=False)
    for verdict in shut:
        console.print(escape(f"gate: {verdict.row}: {verdict.why}"), soft_wrap=True, style="red")
    if verdicts and not shut and not quiet:
        console.print(f"gate: open, {len(verdicts)} checks", style="dim")
    if shut:
        raise typer.Exit(GATE)


def plain(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """For --json."""
    from dataclasses import asdict

    shut = any(verdict.failed for verdict in verdicts)
    return {"gate": {"failed": shut, "checks": [asdict(verdict) for verdict in verdicts]}} if verdicts else {}
