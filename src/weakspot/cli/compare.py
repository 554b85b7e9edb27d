"""`weakspot compare`: what has moved between two audits.

`weakspot report`: the page of an audit, complete or not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from weakspot.cli.app import USAGE, Failure, app, notes_for_people
from weakspot.cli.audit_options import (
    FailIfOption,
    FloatOption,
    JUnitOption,
    check_gate,
    pass_gate,
    plain,
    tell_gate,
)
from weakspot.cli.options import DebugOption, QuietOption

if TYPE_CHECKING:
    import pandas as pd


EXAMPLES = """

[bold]Examples[/bold]

weakspot compare runs/v7 runs/v8

weakspot compare runs/v7 runs/v8 --csv moved.csv

weakspot compare runs/v7 runs/v8 --fail-if "score == 'robust_accuracy' and high < 0" --junit gate.xml
"""
SHOWN = 20


@app.command(epilog=EXAMPLES)
def compare(
    before: Annotated[str, typer.Argument(help="Folder of an audit, or its URL.", show_default=False)],
    after: Annotated[str, typer.Argument(help="Folder of another, on the same images.", show_default=False)],
    every: Annotated[
        bool, typer.Option("--all", help="Show all scores, not only those that have moved.")
    ] = False,
    csv: Annotated[Path | None, typer.Option(help="Write all scores to this file.")] = None,
    floats: FloatOption = False,
    fail_if: FailIfOption = None,
    junit: JUnitOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare two audits image by image: which scores moved, by how much, with what confidence.

    Images are the same where their content is. Intervals are of the mean difference over images; q is a p value
    corrected for the number of scores. A gate (--fail-if) is asked of every row: its columns are score, attack,
    region, images, before, after, difference, low, high, p and q.
    """
    del debug
    conditions = list(fail_if or [])
    check_gate(conditions, junit)
    if csv is not None and (csv.is_dir() or not csv.absolute().parent.is_dir()):
        raise Failure(f"--csv is {csv}; accepted is a file in a folder that is there", USAGE)
    with notes_for_people(quiet):
        from weakspot._io.files import write_atomic
        from weakspot.audit import compare as beside
        from weakspot.audit import open_run

        pair = open_run(before, eight_bit=not floats), open_run(after, eight_bit=not floats)
        shortfalls = [f"{run.name}: {run.shortfall}" for run in pair if run.shortfall]
        found = beside(*pair)
        verdicts = pass_gate(
            conditions,
            lambda: found.table,
            _name,
            junit,
            f"compare {before} {after}",
            shortfalls=shortfalls,
        )
        if csv is not None:
            write_atomic(csv, lambda draft: found.table.to_csv(draft, index=False))
    if as_json:
        typer.echo(json.dumps({**found.as_mapping(), **plain(verdicts)}, indent=2))
    elif not quiet:
        console = Console(highlight=False)
        _print(found.table if every else found.moved, console, every=every)
        console.print(escape(found.sentence()), soft_wrap=True)
        for said in (*found.remarks, *found.only):
            console.print(escape(said), style="dim", soft_wrap=True)
    tell_gate(verdicts, quiet=quiet or as_json, shortfalls=shortfalls)


def _name(row: Any) -> str:
    return " / ".join(str(row[key]) for key in ("score", "attack", "region") if row[key])


def _print(rows: pd.DataFrame, console: Console, *, every: bool) -> None:
    if rows.empty:
        console.print("No score has moved beyond chance.")
        return
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for heading in (
        "score",
        "attack",
        "region",
        "images",
        "before",
        "after",
        "difference",
        "95% interval",
        "q",
    ):
        table.add_column(heading, overflow="fold", no_wrap=heading not in {"score", "attack", "region"})
    shown = rows if every else rows.head(SHOWN)
    for _, row in shown.iterrows():
        table.add_row(
            *(escape(str(row[key])) for key in ("score", "attack", "region", "images")),
            *(f"{row[key]:.3g}" for key in ("before", "after", "difference")),
            f"{row['low']:.3g} to {row['high']:.3g}" if row["low"] == row["low"] else "",
            "" if row["q"] != row["q"] else "< 0.001" if row["q"] < 0.001 else f"{row['q']:.3f}",
        )
    console.print(table)
    if len(rows) > len(shown):
        console.print(f"... and {len(rows) - len(shown)} more, by --all", style="dim")
    console.print()


REPORT_EXAMPLES = """

[bold]Examples[/bold]

weakspot report runs/v7

weakspot report runs/v7 --out v7.html
"""


@app.command(epilog=REPORT_EXAMPLES)
def report(
    run: Annotated[str, typer.Argument(help="Folder of `weakspot audit`, complete or not, or its URL.")],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write; report.html in the folder where not given.", show_default=False),
    ] = None,
    floats: FloatOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Tell an audit on one page: robust accuracy, distributions, classes, images, layers, with their intervals.

    The page is one file, drawings included; it opens by double click, without a network. Of an audit that still goes
    on, or was cut off, it tells what is there, and says so.
    """
    del debug
    from weakspot.audit import open_run, write_run_report
    from weakspot.audit.page.run_page import store_run_report

    opened = open_run(run, eight_bit=not floats)
    if out is not None and out.is_dir():
        raise Failure(f"--out is {out}, which is a folder; accepted is a file's path", USAGE)
    where = store_run_report(opened) if out is None else str(write_run_report(opened, out).resolve())
    if not quiet:
        typer.echo(f"Written to {where}")
