"""Output: tables and JSON on standard output, progress and warnings on standard error."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

import torch
import typer
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from weakspot._progress import Display, open_display
from weakspot.cli.app import console, note, notes, one_line, printable
from weakspot.statistics.number_format import counted

if TYPE_CHECKING:
    import pandas as pd

MOST_ROWS = 5  # of a table without --all
WHOLE_WIDTH = 1000  # characters of a line under --all, enough for every table
NAME_WIDTH = 26  # characters of a file name in a table, a third of a line
Row = TypeVar("Row")


@contextmanager
def working(*, quiet: bool, silent: bool) -> Iterator[Display]:
    """Do the work of a command: standard output is kept for results, warnings become notes, progress is shown."""
    # Text that a model prints must not end up among the results.
    with redirect_stdout(sys.stderr), warnings_as_notes(quiet), progress_display(silent) as display:
        yield display


@contextmanager
def progress_display(silent: bool) -> Iterator[Display]:
    """The display of a command's steps on standard error."""
    if silent:
        yield Display()
    else:
        remark = busy_remark()
        if remark:
            note(remark)
        with open_display(notes) as display:
            yield display


def busy_remark() -> str | None:
    """A hint to use one thread, if this machine is busy: threads that wait for each other spin and get in the way."""
    # The load cannot be asked for on every system.
    load, cores = getattr(os, "getloadavg", lambda: [0.0])()[0], os.cpu_count() or 1
    if torch.get_num_threads() == 1 or load <= cores:
        return None
    return f"this machine is busy (load {load:.1f} on {cores} cores); --threads 1 may be faster (see weakspot doctor)"


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
            # matplotlib draws a character that its font lacks as a box, which changes no result.
            unasked = issubclass(category, DeprecationWarning | FutureWarning) or text.startswith("Glyph ")
            if not (quiet or text in printed or unasked):
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
    """Print a table to standard output: within the terminal's width, or as wide as it is if it is to be whole.

    It is wider than the terminal if columns that may not wrap need it: rich would cut off the ends of their numbers.
    """
    page = console()
    options = page.options.update(max_width=WHOLE_WIDTH)
    fixed = [column for column in table.columns if column.no_wrap]
    for column in fixed:
        cells = (column.header, *column.cells)
        column.min_width = max(Measurement.get(page, options, cell).maximum for cell in cells)
    if fixed:
        page.width = max(page.width, Measurement.get(page, options, table).minimum)
    page.width = max(page.width, WHOLE_WIDTH if whole else 0)
    page.print(table)


def first_rows(rows: Sequence[Row], *, every: bool) -> tuple[Sequence[Row], int]:
    """The rows that a table shows, and how many it leaves out: at most five without --all."""
    shown = rows if every else rows[:MOST_ROWS]
    return shown, len(rows) - len(shown)


def outcome_sentence(
    scores: pd.DataFrame,
    correct: Sequence[bool],
    done: str = "fooled",
    ending: str = "",
    *,
    noun: str = "image",
) -> str:
    """On how many of the images that are classified as their label without an attack the attack succeeds.

    Args:
        scores: columns success and success_8bit.
        correct: whether each image is classified as its label; if not, no attack can succeed on it.
        done: what success is, in words.
        ending: of the sentence.
        noun: what a row is.
    """
    right = sum(correct)
    if not right:
        return f"{noun.capitalize()}s classified as their label without an attack: none of {len(scores)}{ending}."
    stored, floats = (
        sum(success and own for success, own in zip(scores[key], correct, strict=True))
        for key in ("success_8bit", "success")
    )
    which = noun if right == len(scores) else f"correctly classified {noun}"
    return f"{stored} of {counted(right, which)} {done} as 8-bit files ({floats} before rounding){ending}."


def print_sentences(scores: pd.DataFrame, summary: str) -> None:
    """Print one sentence for each image (columns image and sentence), of several images the summary first."""
    if len(scores) > 1:
        print_text(f"{summary}\n")
    for _, row in scores.iterrows():
        print_text(f"{shorten_name(row['image'])}: {row['sentence']}")


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


def print_choices(rows: Sequence[dict[str, str]], *, as_json: bool = False) -> None:
    """Print named choices by their kind, or all rows as JSON.

    Args:
        rows: kind, name and what each choice is, and what it takes under the name of an option such as "--set".
        as_json: print JSON.
    """
    if as_json:
        print_json(rows)
        return
    # One column of names for all kinds, so that the texts stand below each other.
    width = max(len(row["name"]) for row in rows)
    for kind in dict.fromkeys(row["kind"] for row in rows):
        print_text(f"{kind}s", style="bold")
        table = make_table(["  " + "name".ljust(width), "what"])
        table.show_header = False
        for row in (row for row in rows if row["kind"] == kind):
            takes = [f"{key}: {text}" for key, text in row.items() if key.startswith("--") and text]
            add_row(
                table, "  " + row["name"].ljust(width), Text("\n".join(map(one_line, [row["what"], *takes])))
            )
        print_table(table)
        print_text("")


def json_rows(frame: pd.DataFrame, digits: int = 9) -> list[dict[str, object]]:
    """The rows of a frame as JSON has them, NaN as null."""
    # Through pandas, which writes NaN as null and numpy's numbers as plain ones; `json.dumps` does neither.
    rows: list[dict[str, object]] = json.loads(frame.to_json(orient="records", double_precision=digits))
    return rows


def print_json(document: object) -> None:
    """Print a JSON document to standard output."""
    typer.echo(json.dumps(document, indent=2))


def earlier_texts(table: Path, column: str) -> list[str]:
    """A column of the table that an earlier run left; empty if there is none."""
    import pandas as pd

    try:
        return [str(value) for value in pd.read_csv(table)[column].dropna()]
    except (OSError, ValueError, KeyError):
        return []


def remove_stale(folder: Path, earlier: Iterable[str], written: Iterable[str]) -> None:
    """Remove the pictures of an earlier run in a folder that this run did not write again."""
    for name in set(earlier).difference(written):
        path = folder / name
        # The table that named it may have been changed since: nothing else is removed.
        if path.suffix == ".png" and path.resolve().is_relative_to(folder.resolve()):
            path.unlink(missing_ok=True)


def picture_names(images: Sequence[str]) -> list[str]:
    """The file name of the picture of each image.

    >>> picture_names(["photos/cat.jpg", "dog.png"])
    ['0001 cat.png', '0002 dog.png']
    """
    # Bytes, because systems allow 255 of them in a name, and files are written under a longer one first.
    stems = [Path(one_line(name)).stem.encode()[:150].decode(errors="ignore") for name in images]
    return [f"{number:04} {stem}.png" for number, stem in enumerate(stems, start=1)]
