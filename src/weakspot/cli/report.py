"""`weakspot report`: the page of an audit, complete or not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weakspot.cli.app import USAGE, Failure, app
from weakspot.cli.gates import FloatOption
from weakspot.cli.options import DebugOption, QuietOption

EXAMPLES = """

[bold]Examples[/bold]

weakspot report runs/v7

weakspot report runs/v7 --out v7.html
"""


@app.command(epilog=EXAMPLES)
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
    from weakspot.runs import Run, write_run_report
    from weakspot.runs.reporting import keep_run_report

    opened = Run(run, eight_bit=not floats)
    if out is not None and out.is_dir():
        raise Failure(f"--out is {out}, which is a folder; accepted is a file's path", USAGE)
    where = keep_run_report(opened) if out is None else str(write_run_report(opened, out).resolve())
    if not quiet:
        typer.echo(f"Written to {where}")
