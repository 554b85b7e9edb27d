"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
    str | None, typer.Option(help="Normalisation of each channel on the [0, 1] scale: .485,.456,.406")
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
KeepOption = Annotated[float, typer.Option(help="Share of the image in --region cam and support.")]
SeedOption = Annotated[int, typer.Option(help="Of everything random.")]
SamplesOption = Annotated[
    bool, typer.Option("--samples", help="Take four photographs that come with scikit-image.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
