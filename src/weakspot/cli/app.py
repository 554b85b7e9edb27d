"""The application: options, exit codes, and the one place that turns exceptions into sentences.

What is kept: the files that a command had written when it was interrupted.
"""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from typer.core import TyperGroup

import weakspot
from weakspot._checks import ModelError, describe_error

KEY = __name__
Files = dict[Path, tuple[int, int, int]]


@dataclass(frozen=True)
class Watched:
    """A folder as it was before the command began.

    Attributes:
        folder: that the command writes to.
        names: of what it writes there, files or folders; patterns too.
        before: the files of these names, each with what changes when it is written.
    """

    folder: Path
    names: Sequence[str]
    before: Files

    def written(self) -> list[str]:
        """The files written since, those in folders by their number."""
        now = _files(self.folder, self.names)
        new = [path.relative_to(self.folder).parts for path in now if now[path] != self.before.get(path)]
        inside = Counter(parts[0] for parts in new if len(parts) > 1)
        folders = [f"{name}/ ({count} file{'s' if count > 1 else ''})" for name, count in inside.items()]
        return folders + [parts[0] for parts in new if len(parts) == 1]


def watch(context: typer.Context, folder: Path, names: Sequence[str]) -> None:
    """Remember what lies in the folder, so that an interrupt can be told what the command had written.

    Args:
        context: of the command that runs.
        folder: that it will write to; need not be there.
        names: of what it will write there, files or folders; patterns too. Nothing else is looked at.
    """
    context.meta[KEY] = Watched(folder, names, _files(folder, names))


def what_is_kept(context: typer.Context) -> str:
    """What an interrupted command left behind, in words; nothing of one that watches no folder."""
    watched: Watched | None = context.meta.get(KEY)
    if watched is None:
        return ""
    written = watched.written()
    return f"written to {watched.folder} by then: {', '.join(written)}" if written else "nothing was written"


def _files(folder: Path, names: Sequence[str]) -> Files:
    found: Files = {}
    for top in (path for name in names for path in sorted(folder.glob(name))):
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file():
                about = path.stat()
                found[path] = (about.st_ino, about.st_mtime_ns, about.st_size)
    return found


UNEXPECTED, USAGE, UNREADABLE, RESUMABLE, INTERRUPTED = 1, 2, 4, 5, 130
LINE_EVERY = 30.0  # seconds between two lines of progress where there is no terminal
BEFORE = "interrupted; nothing was written"


class Failure(Exception):  # noqa: N818 - what the user did is not an error of the program
    """One sentence for the user and the exit code it ends with."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code


class Commands(TyperGroup):
    """All commands; an interrupt of one that has no words of its own for it becomes a sentence."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named.

        Raises:
            Failure: if it was interrupted, saying what it had written by then; or if code that it called (a model, an
                attack, an analysis) asked Python to exit, whatever the code: the commands themselves never do.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # here, because typer ends with the code alone
            kept = what_is_kept(ctx)
            raise Failure(f"interrupted; {kept}" if kept else "interrupted", INTERRUPTED) from None
        except Exception:
            raise
        except BaseException as error:
            if (
                isinstance(error, SystemExit)
                and error.code
                and isinstance(error.__context__, BrokenPipeError)
            ):
                raise  # rich, when nobody reads on
            raise Failure(
                f"the command did not finish: the model or a plug-in raised {describe_error(error)}",
                UNEXPECTED,
            ) from error


app = typer.Typer(
    name="weakspot",
    cls=Commands,
    help="Find where an image classifier is weak, why, and what helps.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
notes = Console(stderr=True, highlight=False)


def complain(sentence: str) -> None:
    """One line of what was wrong, to standard error."""
    notes.print(f"[red]weakspot:[/red] {escape(sentence)}", soft_wrap=True)


def note(sentence: str) -> None:
    """One line worth knowing, to standard error."""
    notes.print(f"[yellow]note:[/yellow] {escape(sentence)}", soft_wrap=True)


def main() -> None:
    """Run the command line; the only place that turns exceptions into sentences and exit codes."""
    debug = "--debug" in sys.argv
    try:
        app(prog_name="weakspot")
    except Failure as failure:
        if debug and failure.code != INTERRUPTED:
            raise
        complain(str(failure))
        _end(failure.code)
    except ModelError as error:
        if debug:
            raise
        complain(str(error))
        sys.exit(UNEXPECTED)
    except (ValueError, FileNotFoundError, OSError) as error:
        if debug:
            raise
        complain(str(error).strip() or type(error).__name__)
        sys.exit(UNREADABLE if isinstance(error, OSError) else USAGE)
    except Exception as error:
        if debug:
            raise
        why = str(error).strip().partition("\n")[0]
        complain(f"{type(error).__name__} that was not expected: {why} (run again with --debug to see where)")
        sys.exit(UNEXPECTED)
    except KeyboardInterrupt:
        complain(BEFORE)
        _end(INTERRUPTED)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # typer's, for an interrupt before it called a command
            complain(BEFORE)
        _end(ended.code)


def _end(code: int | str | None) -> NoReturn:
    """Exit with the code, after an interrupt too.

    `python -m` kills itself by SIGINT, whatever the code, where the interrupt arrived inside an `exec`
    of a string (as in the making of dataclasses, while libraries are imported), unless another `exec` ended well.
    """
    exec("")  # noqa: S102
    sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"weakspot {weakspot.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Find where an image classifier is weak, why, and what helps."""


@contextmanager
def progress_bar(silent: bool) -> Iterator[Callable[[str, float], None]]:
    """`advance(what, share)` moves a bar on a terminal; elsewhere a line is printed every 30 seconds."""
    if silent:
        yield lambda _what, _share: None
    elif not notes.is_terminal:
        with _progress_lines() as advance:
            yield advance
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=notes, transient=True) as bar:
            task = bar.add_task("starting", total=1.0)
            yield lambda what, fraction: bar.update(task, description=what, completed=fraction)


@contextmanager
def _progress_lines() -> Iterator[Callable[[str, float], None]]:
    """Lines of how far the work is; from a thread, so that one slow step does not silence them."""
    started, state, ended = time.monotonic(), [("starting", 0.0)], threading.Event()

    def print_lines() -> None:
        while not ended.wait(LINE_EVERY):
            what, fraction = state[0]
            elapsed = time.monotonic() - started
            left = f", about {_duration(elapsed * (1 - fraction) / fraction)} left" if fraction > 0.02 else ""
            notes.print(f"{escape(what)}: {fraction:.0%} after {_duration(elapsed)}{left}", soft_wrap=True)

    def advance(what: str, fraction: float) -> None:
        state[0] = (what, fraction)

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
def notes_for_people(quiet: bool) -> Iterator[None]:
    """Warnings as one line each, without the place in the code."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        said: set[str] = set()  # "once" forgets whenever code in between changes the filters for a while

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,  # noqa: ARG001 - the signature that warnings calls
            lineno: int,  # noqa: ARG001
            file: TextIO | None = None,  # noqa: ARG001
            line: str | None = None,  # noqa: ARG001
        ) -> None:
            if quiet or str(message) in said or issubclass(category, DeprecationWarning | FutureWarning):
                return
            said.add(str(message))
            note(str(message))

        warnings.showwarning = show
        yield
