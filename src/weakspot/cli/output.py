"""Output: tables and JSON on standard output, progress and warnings on standard error."""

from __future__ import annotations

import json
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO, TypeVar

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from weakspot.cli.app import console, note, notes, one_line, printable

if TYPE_CHECKING:
    import pandas as pd

LINE_EVERY = 30.0  # seconds between two progress lines if standard error is not a terminal
MOST_ROWS = 5  # of a table without --all
WHOLE_WIDTH = 1000  # characters of a line under --all, enough for every table
NAME_WIDTH = 26  # characters of a file name in a table, a third of a line
MEASURABLE = 0.02  # fraction done from which the remaining time is estimated
Row = TypeVar("Row")
Advance = Callable[[str, float], None]  # the current step, and the fraction of the command that is done


@contextmanager
def progress_bar(silent: bool) -> Iterator[Advance]:
    """A bar on a terminal, a line every 30 seconds elsewhere."""
    if silent:
        yield lambda _step, _fraction: None
    elif not notes.is_terminal:
        with _progress_lines() as advance:
            yield advance
    else:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=notes, transient=True) as bar:
            task = bar.add_task("starting", total=1.0)
            yield lambda step, fraction: bar.update(task, description=step, completed=fraction)


@contextmanager
def _progress_lines() -> Iterator[Advance]:
    """Print progress from a thread, so that one slow step does not silence it."""
    started, state, ended = time.monotonic(), [("starting", 0.0)], threading.Event()

    def print_lines() -> None:
        while not ended.wait(LINE_EVERY):
            step, fraction = state[0]
            elapsed = time.monotonic() - started
            left = ""
            if fraction > MEASURABLE:
                left = f", about {_duration(elapsed * (1 - fraction) / fraction)} left"
            notes.print(f"{step}: {fraction:.0%} after {_duration(elapsed)}{left}", soft_wrap=True)

    def advance(step: str, fraction: float) -> None:
        state[0] = (step, fraction)

    printer = threading.Thread(target=print_lines, daemon=True)
    printer.start()
    try:
        yield advance
    finally:
        ended.set()
        printer.join()


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


@contextmanager
def warnings_as_notes(quiet: bool) -> Iterator[None]:
    """Print each warning once, as one line without the place in the code."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        printed: set[str] = set()  # the filter "once" forgets when other code changes the filters

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,  # noqa: ARG001 - the signature that warnings calls
            lineno: int,  # noqa: ARG001
            file: TextIO | None = None,  # noqa: ARG001
            line: str | None = None,  # noqa: ARG001
        ) -> None:
            text = str(message)
            if not (quiet or text in printed or issubclass(category, DeprecationWarning | FutureWarning)):
                printed.add(text)
                note(text)

        warnings.showwarning = show
        yield


def make_table(
    headings: Sequence[str], *, fold: Sequence[str] | None = None, right: Sequence[str] = ()
) -> Table:
    """An empty table without borders.

    Args:
        headings: one for each column.
        fold: columns whose text may wrap; all of them by default.
        right: columns that are aligned to the right.
    """
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(
            heading,
            justify="right" if heading in right else "left",
            overflow="fold",
            no_wrap=fold is not None and heading not in fold,
        )
    return table


def add_row(table: Table, *cells: str | Text) -> None:
    """Add a row; nothing in its text is markup, and control characters are shown as escapes."""
    table.add_row(*(one_line(cell) if isinstance(cell, str) else cell for cell in cells))


def print_table(table: Table, *, whole: bool = False) -> None:
    """Print a table to standard output: within the terminal's width, or as wide as it is if it is to be whole."""
    page = console()
    page.width = max(page.width, WHOLE_WIDTH if whole else 0)
    page.print(table)


def first_rows(rows: Sequence[Row], *, every: bool) -> tuple[Sequence[Row], int]:
    """The rows that a table shows, and how many it leaves out: at most five without --all."""
    shown = rows if every else rows[:MOST_ROWS]
    return shown, len(rows) - len(shown)


def shorten_name(name: str, width: int = NAME_WIDTH) -> str:
    """A file name with its middle left out, because photographs often differ only at the end.

    >>> shorten_name("holidays/2024/IMG_20240817_183352_0412.jpg", 24)
    'holidays/202…52_0412.jpg'
    """
    half = (width - 1) // 2
    return name if len(name) <= width else f"{name[: width - 1 - half]}…{name[-half:]}"


def print_text(text: str, *, style: str | None = None) -> None:
    """Print text to standard output; nothing in it is markup, and lines are not wrapped."""
    console().print(printable(text), style=style, soft_wrap=True)


def print_rows(rows: Sequence[dict[str, str]], *, as_json: bool = False) -> None:
    """Print rows with equal keys as a table or as JSON."""
    if as_json:
        print_json(rows)
        return
    table = make_table(list(rows[0]))
    for row in rows:
        add_row(table, *row.values())
    print_table(table)


def json_rows(frame: pd.DataFrame, digits: int = 9) -> list[dict[str, object]]:
    """The rows of a frame as JSON has them, NaN as null."""
    rows: list[dict[str, object]] = json.loads(frame.to_json(orient="records", double_precision=digits))
    return rows


def print_json(document: object) -> None:
    """Print a JSON document to standard output."""
    typer.echo(json.dumps(document, indent=2))
