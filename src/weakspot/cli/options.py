"""Options that several commands share, each with one name, one default, one help text and one meaning."""

import json
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from typer.models import ArgumentInfo, OptionInfo

from weakspot.budgets.parse import BUDGETS, read_amount
from weakspot.cli.app import UNREADABLE, Failure, read_path
from weakspot.datasets.labels import LABEL_FILE
from weakspot.regions.spec import REGIONS, RegionSpec, region_forms

MODEL, ATTACK, OUTPUT = "Model", "Attack", "Output"  # panels of the help
Value = str | int | float | bool | None
BY_FRACTION = [name for name, kind in REGIONS.items() if kind.depends_on_fraction]


def option(
    form: str, text: str, *, default: str | None = None, least: int | None = None, panel: str | None = None
) -> OptionInfo:
    """An option with a value.

    Args:
        form: names, then what the help calls the value, as in "--budget -b KIND:EPS"; the name may be left out.
        text: help.
        default: how the help describes a default that depends on other things.
        least: minimum of a number.
        panel: of the help.
    """
    # A flag ends in a space, so its metavar is empty, which hides the column <bool> of the help.
    *names, metavar = form.split(" ")
    made: OptionInfo = typer.Option(
        *names, help=text, metavar=metavar, show_default=default or True, min=least, rich_help_panel=panel
    )
    return made


def flag(form: str, text: str, *, panel: str | None = None) -> OptionInfo:
    """An option without a value; `form` is its names."""
    return option(f"{form} ", text, panel=panel)


def argument(form: str, text: str, *, parser: Callable[[str], Path] | None = None) -> ArgumentInfo:
    """A positional argument; `form` is what the help calls it."""
    made: ArgumentInfo = typer.Argument(help=text, metavar=form, show_default=False, parser=parser)
    return made


ImagesArgument = Annotated[
    list[Path] | None, argument("IMAGES", "Image files or folders of images.", parser=read_path)
]
SamplesOption = Annotated[bool, flag("--samples", "Use the four photographs that come with scikit-image.")]
LabelsOption = Annotated[
    str | None,
    option(
        "SOURCE",
        f"'folders' (each image's folder is named after its class), or {LABEL_FILE} (a class name or number).",
        default="the model's predictions",
    ),
]
LimitOption = Annotated[
    int | None, option("N", "Use at most N images, chosen by --seed.", least=1, default="all images")
]
QUICK_IMAGES, QUICK_STEPS = 16, 10  # of a trial
QuickOption = Annotated[
    bool,
    flag(
        "--quick",
        f"A trial: at most {QUICK_IMAGES} images, chosen by --seed, and at most {QUICK_STEPS} steps of each attack "
        "chosen by name. Shows that it works, not how well.",
    ),
]
QuickImagesOption = Annotated[
    bool,
    flag(
        "--quick",
        f"A trial: at most {QUICK_IMAGES} images, chosen by --seed. Shows that it works, not how well.",
    ),
]
BudgetOption = Annotated[
    str,
    option(
        "--budget -b KIND:EPS",
        f"How much an image may change: {', '.join(kind.example for kind in BUDGETS.values())}.",
        panel=ATTACK,
    ),
]
RegionOption = Annotated[
    str,
    option(
        "REGION",
        f"Where an image may change: {', '.join(region_forms()).replace('none', 'none (anywhere)')}, or a mask image "
        "(its white part, or what is painted on a transparent ground). Combine with ~ (not), & (and), | (or); "
        "matched:REGION is a control of equal area.",
        panel=ATTACK,
    ),
]
FractionOption = Annotated[
    float,
    option(
        "X",
        f"Fraction of the image in a region of importance ({', '.join(BY_FRACTION)}), 0 to 1.",
        panel=ATTACK,
    ),
]
STEPS = "Steps of the attack."
StepsOption = Annotated[int, option("N", STEPS, least=1, panel=ATTACK)]
SetOption = Annotated[
    list[str] | None,
    option(
        "--set NAME=VALUE",
        "Set an argument of the attack (steps=50) or defense (fraction=0.1). Repeat for several.",
        panel=ATTACK,
    ),
]
AnalysesOption = Annotated[
    str,
    option(
        "NAMES",
        "Analyses to run, separated by commas; all (but certificate, which takes minutes an image); or none.",
    ),
]
EveryOption = Annotated[bool, flag("--all", "Show every row and column of the table.", panel=OUTPUT)]
FloatOption = Annotated[
    bool,
    flag(
        "--float",
        "Count attacked images as the attack returned them, not rounded to 8 bits as image files are.",
    ),
]
SeedOption = Annotated[int, option("N", "Seed of all random numbers.")]
WeightsOption = Annotated[
    Path | None,
    option("FILE", "Weights: .safetensors, or a PyTorch state dict.", default="the model's own", panel=MODEL),
]
DeviceOption = Annotated[str, option("DEVICE", "auto, cpu, cuda or mps.", panel=MODEL)]


@dataclass(frozen=True)
class ModelOptions:
    """Which classifier, and how images are prepared for it."""

    panel: ClassVar[str | None] = MODEL

    model: Annotated[
        str,
        option(
            "--model -m MODEL",
            "An installed model (see weakspot models), package.module:factory, model.pt2, a folder that weakspot "
            "train wrote, hf:DIRECTORY, timm:NAME or torchvision:NAME.",
        ),
    ] = "efficientnet_lite0"
    weights: WeightsOption = None
    mean: Annotated[
        str | None,
        option("NUMBERS", "Mean of each channel on the [0, 1] scale: .485,.456,.406.", default="the model's"),
    ] = None
    std: Annotated[
        str | None,
        option("NUMBERS", "Standard deviation of each channel: .229,.224,.225.", default="the model's"),
    ] = None
    classes: Annotated[
        Path | None,
        option("FILE", "Class names: a text file with one per line, or a JSON list.", default="the model's"),
    ] = None
    size: Annotated[
        str | None,
        option("HxW", "Height and width that images are resized to.", default="the model's"),
    ] = None
    device: DeviceOption = "auto"

    def arguments(self) -> dict[str, Any]:
        """What was given of the arguments of `weakspot.load`, beside the model and the device; None for the others."""
        return {
            "weights": None if self.weights is None else str(self.weights),
            "mean": parse_numbers("--mean", self.mean),
            "std": parse_numbers("--std", self.std),
            "input_size": parse_size(self.size),
            "class_names": read_class_names(self.classes),
        }


@dataclass(frozen=True)
class OutputOptions:
    """How a command reports."""

    panel: ClassVar[str | None] = OUTPUT

    as_json: Annotated[bool, flag("--json", "Print the results as JSON.")] = False
    quiet: Annotated[bool, flag("--quiet -q", "Print nothing but errors.")] = False
    debug: Annotated[bool, flag("--debug", "Show the traceback of an error.")] = False

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
    # The long name: "--model" of ("--model", "-m").
    spelled = {parameter.name: max(parameter.opts, key=len) for parameter in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in names}
    return {
        name: spelled[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"
    }


def repeated(context: typer.Context, names: Sequence[str]) -> str:
    """The options among these parameters that differ from their defaults, as they would be typed again."""
    parameters = {parameter.name: parameter for parameter in context.command.params}
    words = [
        word
        for name, option_name in given(context, names).items()
        if context.params[name] != parameters[name].default
        for word in (option_name, str(context.params[name]))
    ]
    return shlex.join(words)


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


def trial_sentence(steps: object = None) -> str:
    """What --quick did: on how many images, and in how many steps if the attack takes steps."""
    fewer = f" and {steps} steps" if steps else ""
    return f"--quick: at most {QUICK_IMAGES} images{fewer}, which shows that it works, not how well."


def refuse_fraction(context: typer.Context, regions: Sequence[str], option: str = "--region") -> None:
    """Refuse --fraction if none of the regions depends on it."""
    if not any(RegionSpec.parse(region).depends_on_fraction for region in regions):
        refuse(context, ["fraction"], f"without {' or '.join(BY_FRACTION)} in {option}")


def parse_number(name: str, text: str) -> float:
    """A number such as 0.03 or 8/255."""
    with suppress(ValueError):
        number = read_amount(text.replace(" ", ""))
        if math.isfinite(number):
            return number
    raise Failure(f"{name} must be a number such as 0.03 or 8/255, got {text!r}")


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
    # To `isdigit` alone, superscripts are digits, too, which `int` does not read.
    if not all(side.isascii() and side.isdigit() and int(side) for side in (height, width or height)):
        raise Failure(f"--size must be HEIGHTxWIDTH in pixels such as 224x224, got {text!r}")
    return int(height), int(width or height)


def parse_names(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_settings(
    settings: Sequence[str] | None, *, form: str = "NAME=VALUE", texts: Sequence[str] = ()
) -> dict[str, Value]:
    """The values of --set: numbers (+1 and -.5 too), true, false and null as in JSON, anything else as text.

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
            # JSON knows neither a plus nor a number without digits before the point.
            number = re.sub(r"^(?:\+|(-))?\.(?=\d)", r"\g<1>0.", text)
            value = json.loads(re.sub(r"^\+(?=\d)", "", number))
        except (ValueError, RecursionError):
            value = text
        # Lists and objects stay text: only an attack knows what they mean.
        plain = name not in texts and isinstance(value, int | float | bool | None)
        values[name] = value if plain else text
    return values


def read_class_names(path: Path | None) -> list[str] | None:
    """Names from a text file with one per line, or from a JSON list or object of number to name."""
    if path is None:
        return None
    if not path.is_file():
        raise Failure(f"--classes: {path} {'is a folder' if path.is_dir() else 'does not exist'}", UNREADABLE)
    text = path.read_text("utf-8-sig", errors="replace")
    if path.suffix != ".json":
        return text.splitlines()
    try:
        names = json.loads(text)
        # transformers and torchvision also write {"0": "cat", "1": "dog"}.
        names = [names[key] for key in sorted(names, key=int)] if isinstance(names, Mapping) else names
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
        raise Failure(
            f"--classes: {path} must be a JSON list of names, or an object of class number to name",
            UNREADABLE,
        )
    return [str(name) for name in names]
