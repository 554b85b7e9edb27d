"""The application: commands with option groups, exit codes, and how exceptions become sentences."""

import inspect
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_type_hints

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text
from typer.core import TyperGroup
from typer.models import OptionInfo

from weakspot._errors import ModelError, describe_error
from weakspot._interrupts import INTERRUPTED, NOTHING_WRITTEN, stop_import

UNEXPECTED, USAGE, GATE_FAILED, UNREADABLE, RESUMABLE = 1, 2, 3, 4, 5
WRITTEN_KEY = (
    f"{__name__}.written"  # in the context: a function that says what the command has written so far
)
EXTRAS = {
    "audit": (("pyarrow", "duckdb", "zarr", "fsspec", "vl_convert"), "audit, compare, report"),
    "explore": (("starlette", "uvicorn", "websockets"), "explore"),
    "train": (("lightning_fabric",), "train, reproduce localized"),
    "ray": (("ray",), "audit --engine ray"),
    "datasets": (("datasets",), "train hf:NAME"),
    "transformers": (("transformers",), "--model hf:DIRECTORY"),
    "timm": (("timm",), "--model timm:NAME"),
    "torchvision": (("torchvision",), "--model torchvision:NAME"),
}
"""Each optional extra: the modules that it installs, and the commands and options that need them."""

# Characters that move the cursor, recolor the terminal or reverse the text: controls, and direction overrides.
_CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def console(*, stderr: bool = False) -> Console:
    """A console on which text is never markup: names such as "[red]" and ":smile:" are printed as they are."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def printable(text: str) -> str:
    """The text with control characters, and bytes that are not text, as escapes. Line breaks stay."""
    escaped = _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return escaped.encode("utf-8", "backslashreplace").decode("utf-8")


def one_line(text: str) -> str:
    """The printable text with line breaks as escapes: a file name must not look like a line of ours."""
    return printable(text).replace("\n", "\\n")


notes = console(stderr=True)
_quiet = threading.Event()  # whether the running command has --quiet; for all of its threads


class Failure(Exception):  # noqa: N818 - a mistake of the user, not of the program
    """One sentence for the user and the exit code of the command."""

    def __init__(self, sentence: str, code: int = USAGE) -> None:
        super().__init__(sentence)
        self.code = code


def read_path(text: str) -> Path:
    """The path of images that were named."""
    if re.match(r"\w+://", text):
        raise Failure(
            f"IMAGES must be files or folders, got {text} (URLs are not read; download it first)", UNREADABLE
        )
    return Path(text)


class Commands(TyperGroup):
    """All commands. Turns interrupts, and models that exit, into a `Failure`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command line.

        Raises:
            Failure: if an argument is empty. As a path it would be the current folder.
        """
        for before, given in zip(["weakspot", *args], args, strict=False):
            if not given or re.fullmatch(r"--[\w-]+=", given):
                got = given or f"{before} ''"
                raise Failure(f"arguments must not be empty, got {got} (an empty shell variable?)")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the selected command.

        Raises:
            Failure: if the command was interrupted, with the files written so far, or if a model or plug-in called
                `sys.exit` with any code.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # typer would end with the code alone
            written = ctx.meta.get(WRITTEN_KEY, str)()
            raise Failure(f"interrupted; {written}" if written else "interrupted", INTERRUPTED) from None
        except Exception:
            raise
        except BaseException as error:
            # rich exits this way if the reader of a pipe has gone.
            if (
                isinstance(error, SystemExit)
                and error.code
                and isinstance(error.__context__, BrokenPipeError)
            ):
                raise
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


ThreadsOption = Annotated[
    int | None,
    typer.Option(
        help="Threads of the network. On a busy machine, 1 can be several times faster.",
        metavar="N",
        min=1,
        show_default="one for each core",
        rich_help_panel="Output",
    ),
]


def set_threads(count: int) -> None:
    """Use so many threads in this process and in those that it starts."""
    torch.set_num_threads(count)
    os.environ["OMP_NUM_THREADS"] = str(count)


def command(*examples: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command.

    Parameters whose type is a dataclass are option groups: each field becomes an option, and the function receives the
    filled dataclass. The class attribute `panel`, if there is one, is the options' panel in the help.

    Args:
        *examples: command lines for the end of the help text.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        groups = {name: kind for name, kind in hints.items() if isinstance(kind, type) and is_dataclass(kind)}
        parameters: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(function).parameters.items():
            if name not in groups:
                parameters.append(parameter.replace(annotation=hints[name]))
                continue
            types = get_type_hints(groups[name], include_extras=True)
            # The help shows the options of a group in the panel of the group, unless they name another one.
            for info in (info for kind in types.values() for info in getattr(kind, "__metadata__", ())):
                info.rich_help_panel = info.rich_help_panel or getattr(groups[name], "panel", None)
            parameters += [
                parameter.replace(name=field.name, annotation=types[field.name], default=field.default)
                for field in fields(groups[name])
            ]

        parameters.append(
            inspect.Parameter(
                "threads", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=ThreadsOption
            )
        )
        for parameter in parameters:
            for info in getattr(parameter.annotation, "__metadata__", ()):
                # Every option shows a default, also those that are off or empty without it.
                if isinstance(info, OptionInfo) and parameter.default is None and info.show_default is True:
                    info.show_default = "none"

        def call(**values: object) -> None:
            _quiet.set() if values.get("quiet") else _quiet.clear()
            threads = values.pop("threads")
            if isinstance(threads, int):
                set_threads(threads)
            for name, kind in groups.items():
                values[name] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
            function(**values)

        # Typer reads both the signature and the annotations: each lists the options of the groups.
        keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        call.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        # Paragraphs on one line each: the help is wrapped to the terminal, not to the source.
        paragraphs = (function.__doc__ or "").split("\n\n")
        extra = next(
            (name for name, (_, uses) in EXTRAS.items() if function.__name__ in uses.split(", ")), None
        )
        paragraphs += [f"Needs an extra: pip install 'weakspot[{extra}]'."] if extra else []
        # Escaped, because help is the one text that typer prints as markup.
        text = "\n\n".join(escape(" ".join(paragraph.split())) for paragraph in paragraphs)
        epilog = "\n\n".join(
            ["[bold]Examples[/bold]" if len(examples) > 1 else "[bold]Example[/bold]", *examples]
        )
        app.command(function.__name__, help=text, epilog=epilog)(call)
        return function

    return register


def complain(sentence: str) -> None:
    """Print an error to standard error."""
    notes.print(Text.assemble(("weakspot:", "red"), f" {one_line(sentence)}"), soft_wrap=True)


def note(sentence: str, *, failure: bool = False) -> None:
    """Print a note to standard error; with --quiet, only if it is about a failure."""
    if _quiet.is_set() and not failure:
        return
    notes.print(Text.assemble(("note:", "yellow"), f" {one_line(sentence)}"), soft_wrap=True)


def main() -> None:
    """Run the command line."""
    debug = "--debug" in sys.argv
    # `kill`, and schedulers that end a job, interrupt a command as Ctrl-C does: what has finished is kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # From here on an interrupt is an exception. One that the shell had ignored stays ignored.
    if signal.getsignal(signal.SIGINT) is stop_import:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        # Not standalone: typer raises its errors and returns exit codes, instead of printing and exiting.
        code = app(prog_name="weakspot", standalone_mode=False)
        if code == INTERRUPTED:  # an interrupt before the command was called
            complain(NOTHING_WRITTEN)
    except SystemExit as stopped:
        code = stopped.code
    except (Exception, KeyboardInterrupt) as error:
        sentence, code = explained(error)
        if debug and code != INTERRUPTED:
            raise
        if sentence:
            complain(sentence)
    _exit(code)


def explained(error: BaseException) -> tuple[str, int]:
    """The sentence and the exit code for an exception."""
    if isinstance(error, Failure):
        return str(error), error.code
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return NOTHING_WRITTEN, INTERRUPTED
    if isinstance(error, typer.BadParameter.__mro__[1]):  # UsageError, which typer does not export
        return _usage_sentence(error), USAGE
    if isinstance(error, ModelError):
        return str(error), UNEXPECTED
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        for extra, (modules, _) in EXTRAS.items():
            if module in modules:
                return f"{module} is not installed; run: pip install 'weakspot[{extra}]'", USAGE
    # The library's own sentences. An OSError, such as a missing file, is input that cannot be read.
    if isinstance(error, ValueError | OSError):
        return str(error).strip() or type(error).__name__, UNREADABLE if isinstance(error, OSError) else USAGE
    return f"unexpected {describe_error(error)} (run again with --debug to see the traceback)", UNEXPECTED


def _usage_sentence(error: Any) -> str:
    """Typer's message for a command line that it cannot parse, in the style of the other errors."""
    options = getattr(getattr(error, "param", None), "opts", [])
    expected = str(getattr(error, "message", "")).partition(", unable")[0].removeprefix("Input should be ")
    if hasattr(error, "possibilities"):
        near = " or ".join(sorted(error.possibilities or ()))
        text = f"unknown option {error.option_name}" + (f" (did you mean {near}?)" if near else "")
    elif options and options[0].startswith("-") and expected:
        value = next((value for option, value in pairwise(sys.argv) if option in options), None)
        text = f"{max(options, key=len)} must be {expected}" + (f", got {value!r}" if value else "")
    else:
        text = error.format_message().rstrip(".")
        text = text[:1].lower() + text[1:]
    # Not from the context: some errors of the parser have none.
    named = [word for word in sys.argv[1:2] if any(word == known.name for known in app.registered_commands)]
    return f"{text}; see {' '.join(['weakspot', *named])} --help" if text else ""


def _exit(code: int | str | None) -> NoReturn:
    """Exit with the code, after an interrupt too.

    If the interrupt arrived inside an `exec` of a string (dataclasses do this while libraries are imported),
    `python -m` kills itself by SIGINT whatever the code, unless another `exec` has succeeded since.
    """
    exec("")  # noqa: S102
    sys.exit(code)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"weakspot {version('weakspot')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Find where an image classifier is weak, why, and what helps."""
