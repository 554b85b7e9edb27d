"""Options that several commands share, each with one name, one default, one help text and one meaning."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer

from weakspot.cli.app import UNREADABLE, Failure

MODEL, ATTACK, OUTPUT = "Model", "Attack", "Output"  # panels of the help
Value = str | int | float | bool | None

ImagesArgument = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[IMAGES]...", help="Image files or folders of images.", show_default=False),
]
SamplesOption = Annotated[
    bool, typer.Option("--samples", help="Use the four photographs that come with scikit-image.")
]
LabelsOption = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="'folders' (each image's folder is named after its class), or a CSV file with the columns file and label "
        "(a class name or number).",
        show_default="the model's predictions",
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Use at most N images, chosen by --seed.", show_default=False),
]
BudgetOption = Annotated[
    str,
    typer.Option(
        "--budget",
        "-b",
        metavar="KIND:EPS",
        help="How much an image may change: linf:4/255, l2:1.5, l1:20, ssim:0.01, ssim-local:0.05.",
        rich_help_panel=ATTACK,
    ),
]
RegionOption = Annotated[
    str,
    typer.Option(
        metavar="REGION",
        help="Where an image may change: none (anywhere), cam, background, border:WIDTH, support, or a mask image "
        "(its white part). Combine with ~ (not), & (and), | (or); matched:REGION is a control of equal area.",
        rich_help_panel=ATTACK,
    ),
]
FractionOption = Annotated[
    float,
    typer.Option(
        metavar="X", help="Fraction of the image in a region of importance (cam, support), 0 to 1.", rich_help_panel=ATTACK
    ),
]
TargetOption = Annotated[
    str | None,
    typer.Option(
        metavar="CLASS",
        help="Class that the attack aims at, by name or number.",
        show_default="any other class",
        rich_help_panel=ATTACK,
    ),
]
StepsOption = Annotated[int, typer.Option(metavar="N", help="Steps of PGD.", min=1, rich_help_panel=ATTACK)]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Set an argument of the attack or defense, such as steps=50. Repeat for several.",
        show_default=False,
        rich_help_panel=ATTACK,
    ),
]
AnalysesOption = Annotated[
    str, typer.Option(metavar="NAMES", help="Analyses to run, separated by commas, or all, or none.")
]
BatchSizeOption = Annotated[
    str,
    typer.Option(
        metavar="N",
        help="Images attacked at once, or auto: as many as fit in memory. Does not change results.",
        rich_help_panel=ATTACK,
    ),
]
SeedOption = Annotated[int, typer.Option(metavar="N", help="Seed of all random numbers.")]
WeightsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Weights: .safetensors, or a PyTorch state dict.", show_default=False, rich_help_panel=MODEL
    ),
]
DeviceOption = Annotated[
    str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda or mps.", rich_help_panel=MODEL)
]


@dataclass(frozen=True)
class ModelOptions:
    """Which classifier, and how images are prepared for it."""

    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="An installed model (see weakspot models), package.module:factory, model.pt2, a folder that weakspot "
            "train wrote, hf:DIRECTORY, timm:NAME or torchvision:NAME.",
            rich_help_panel=MODEL,
        ),
    ] = "efficientnet_lite0"
    weights: WeightsOption = None
    mean: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBERS",
            help="Mean of each channel on the [0, 1] scale: .485,.456,.406.",
            show_default="the model's",
            rich_help_panel=MODEL,
        ),
    ] = None
    std: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBERS",
            help="Standard deviation of each channel: .229,.224,.225.",
            show_default="the model's",
            rich_help_panel=MODEL,
        ),
    ] = None
    classes: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Class names: a text file with one per line, or a JSON list.",
            show_default="the model's",
            rich_help_panel=MODEL,
        ),
    ] = None
    size: Annotated[
        str | None,
        typer.Option(
            metavar="HxW",
            help="Height and width that images are resized to.",
            show_default="the model's",
            rich_help_panel=MODEL,
        ),
    ] = None
    device: DeviceOption = "auto"


@dataclass(frozen=True)
class OutputOptions:
    """How a command reports."""

    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON.", rich_help_panel=OUTPUT)
    ] = False
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print nothing but errors.", rich_help_panel=OUTPUT)
    ] = False
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=OUTPUT)
    ] = False

    @property
    def silent(self) -> bool:
        """Whether standard error shows no progress."""
        return self.quiet or self.as_json


def given(context: typer.Context, names: Sequence[str]) -> dict[str, str]:
    """The parameters that the user gave on the command line, even if equal to the default.

    Args:
        context: of the running command.
        names: parameters to look at.

    Returns:
        Parameter name to option name, as in {"as_json": "--json"}.
    """
    spelled = {parameter.name: max(parameter.opts, key=len) for parameter in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in names}
    return {name: spelled[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def refuse(context: typer.Context, names: Sequence[str], why: str) -> None:
    """Refuse options that would be ignored.

    Args:
        context: of the running command.
        names: parameters without an effect in this call.
        why: the reason and the remedy, as in "without --masks (add it)".

    Raises:
        Failure: if the user gave any of them.
    """
    options = list(given(context, names).values())
    if options:
        *rest, last = options
        listed = f"{', '.join(rest)} and {last}" if rest else last
        raise Failure(f"{listed} {'have' if rest else 'has'} no effect {why}")


def refuse_fraction(context: typer.Context, regions: Sequence[str], option: str = "--region") -> None:
    """Refuse --fraction if none of the regions depends on it."""
    from weakspot.regions.spec import depends_on_fraction

    if not any(depends_on_fraction(region) for region in regions):
        refuse(context, ["fraction"], f"without cam or support in {option}")


def parse_number(name: str, text: str) -> float:
    """A number such as 0.03 or 8/255."""
    try:
        return float(Fraction(text.replace(" ", "")))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise Failure(f"{name} must be a number such as 0.03 or 8/255, got {text!r}") from None


def parse_numbers(name: str, text: str | None) -> list[float] | None:
    """Numbers separated by commas."""
    if text is None:
        return None
    try:
        return [parse_number(name, part) for part in text.split(",")]
    except Failure:
        raise Failure(f"{name} must be numbers separated by commas, one per channel, got {text!r}") from None


def parse_size(text: str | None) -> tuple[int, int] | None:
    """HEIGHTxWIDTH, or one number for both."""
    if text is None:
        return None
    height, _, width = text.lower().partition("x")
    if not all(side.isascii() and side.isdigit() and int(side) for side in (height, width or height)):
        raise Failure(f"--size must be HEIGHTxWIDTH in pixels such as 224x224, got {text!r}")
    return int(height), int(width or height)


def parse_batch_size(text: str) -> int | None:
    """The batch size, None for auto."""
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit() and int(text)):
        raise Failure(f"--batch-size must be auto or an integer of at least 1, got {text!r}")
    return int(text)


def parse_names(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_settings(
    settings: Sequence[str] | None, *, form: str = "NAME=VALUE", texts: Sequence[str] = ()
) -> dict[str, Value]:
    """The values of --set: numbers, true, false and null as in JSON, anything else as text.

    Args:
        settings: as given.
        form: the form that the error message asks for.
        texts: names whose values are always text.
    """
    values: dict[str, Value] = {}
    for setting in settings or ():
        name, equals, text = setting.partition("=")
        if not (equals and name):
            raise Failure(f"--set must be {form}, got {setting!r}")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        plain = name not in texts and isinstance(value, int | float | bool | None)
        values[name] = value if plain else text
    return values


def read_class_names(path: Path | None) -> list[str] | None:
    """Names from a text file with one per line, or from a JSON list or object of number to name."""
    if path is None:
        return None
    if not path.is_file():
        raise Failure(f"--classes: {path} does not exist", UNREADABLE)
    text = path.read_text("utf-8", errors="replace")
    if path.suffix != ".json":
        return text.splitlines()
    try:
        names = json.loads(text)
    except ValueError:
        raise Failure(f"--classes: {path} is not valid JSON (it must be a list of names)", UNREADABLE) from None
    names = [names[key] for key in sorted(names, key=int)] if isinstance(names, Mapping) else names
    return [str(name) for name in names]
