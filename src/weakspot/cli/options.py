"""Options that several commands share.

Given options: those that the user wrote, and a refusal of those that cannot take effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from weakspot.cli.app import USAGE, Failure

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="efficientnet_lite0 (embedded), package.module:factory, model.pt2, a folder of `weakspot train`, hf:DIR, "
        "timm:NAME, torchvision:NAME.",
    ),
]
WeightsOption = Annotated[Path | None, typer.Option(help="Weights: .safetensors, or a plain state dict.")]
MeanOption = Annotated[
    str | None, typer.Option(help="Normalization of each channel on the [0, 1] scale: .485,.456,.406")
]
StdOption = Annotated[str | None, typer.Option(help="Likewise: .229,.224,.225")]
ClassesOption = Annotated[
    Path | None, typer.Option(help="Class names: a text file, one per line, or a JSON list.")
]
SizeOption = Annotated[
    str | None, typer.Option(help="HEIGHTxWIDTH that pictures are brought to; the model's own by default.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
TargetOption = Annotated[
    str | None, typer.Option(help="Class to reach, by name or number; any other class by default.")
]
RegionOption = Annotated[
    str,
    typer.Option(
        help="Where the attack may act: none (anywhere), cam, background, border:WIDTH, support, a mask picture "
        "(white); ~ for not, & for and, | for or, matched: for a control of equal area."
    ),
]
FractionOption = Annotated[float, typer.Option(help="Share of the image in --region cam and support.")]
SeedOption = Annotated[int, typer.Option(help="Of everything random.")]
SamplesOption = Annotated[
    bool, typer.Option("--samples", help="Take four photographs that come with scikit-image.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


def given(context: typer.Context, names: Sequence[str]) -> list[str]:
    """Which of these parameters the user gave, as options are written; a default that was spelled out counts as given.

    Args:
        context: of the command that runs.
        names: of parameters of its function.
    """
    spelled = {parameter.name: max(parameter.opts, key=len) for parameter in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in names}
    return [spelled[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"]


def refuse(context: typer.Context, names: Sequence[str], why: str) -> None:
    """What is given and would be ignored is a mistake, not a wish.

    Args:
        context: of the command that runs.
        names: of parameters that do nothing as it is called.
        why: how it is called, and the remedy: "with --pair, which ...; leave out one or the other".

    Raises:
        Failure: when any of them was given, naming all that were.
    """
    found = given(context, names)
    if found:
        *rest, last = found
        listed = f"{', '.join(rest)} and {last}" if rest else last
        raise Failure(f"{listed} {'do' if rest else 'does'} nothing {why}", USAGE)


def refuse_fraction(context: typer.Context, regions: Sequence[str], option: str = "--region") -> None:
    """The share to keep is that of two regions alone.

    Args:
        context: of the command that runs.
        regions: that the attack is confined to, as `read_region` takes them.
        option: that names them.

    Raises:
        Failure: when --fraction was given and none of the regions depends on it.
    """
    from weakspot.regions.spec import RegionSpec

    if not any(RegionSpec.parse(region).depends_on_fraction for region in regions):
        refuse(context, ["fraction"], f"without cam or support in {option}; add one of them, or leave it out")
