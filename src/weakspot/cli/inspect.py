"""`weakspot models` and `weakspot doctor`: what is here and whether it works."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from weakspot.cli.app import app
from weakspot.cli.output import print_rows


@app.command()
def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List the models that can be named with --model, and whether what they need is here.

    [bold]Example[/bold]: weakspot models
    """
    from weakspot.models import available_models

    rows = [{"model": name, "what": "installed", "usable": "yes"} for name in available_models()]
    rows += [
        {
            "model": "package.module:factory",
            "what": "your own function or class that makes a module",
            "usable": "yes",
        },
        {"model": "model.pt2", "what": "saved by torch.export.save", "usable": "yes"},
    ]
    hubs = {"hf:DIRECTORY": "transformers", "timm:NAME": "timm", "torchvision:NAME": "torchvision"}
    rows += [
        {"model": form, "what": f"from {package}", "usable": _importable(package)}
        for form, package in hubs.items()
    ]
    print_rows(rows, as_json)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Check that weakspot works here: versions, device, embedded network, speed, optional packages.

    [bold]Example[/bold]: weakspot doctor
    """
    import torch

    from weakspot.attacks import pgd
    from weakspot.audit.store.run_info import versions
    from weakspot.classifier import predict
    from weakspot.explanations.analysis import available_analyses
    from weakspot.images import sample_images
    from weakspot.models import load

    rows = [{"check": name, "found": value} for name, value in versions().items()]
    classifier = load("efficientnet_lite0")
    images, _ = sample_images()
    images = images.to(classifier.mean.device)
    rows.append({"check": "device", "found": f"{classifier.mean.device}, {torch.get_num_threads()} threads"})
    predict(classifier, images)
    begun = time.perf_counter()
    said = [classifier.class_name(int(index)) for index in predict(classifier, images).argmax(1)]
    forward = (time.perf_counter() - begun) / len(images)
    begun = time.perf_counter()
    fooled = pgd(classifier, images, predict(classifier, images).argmax(1), steps=3).success
    attack = time.perf_counter() - begun
    expected = ["Egyptian cat", "espresso", "missile", "moped"]
    well = said == expected and bool(fooled.any())
    rows += [
        {"check": "embedded network", "found": "says " + ", ".join(said)},
        {"check": "speed", "found": f"{1000 * forward:.0f} ms for a forward pass of one 224 x 224 image"},
        {
            "check": "attack",
            "found": f"{int(fooled.sum())} of 4 photographs fooled in 3 steps, {attack:.1f} s",
        },
        {"check": "analyses", "found": ", ".join(available_analyses())},
    ]
    rows += [{"check": name, "found": _importable(name)} for name in ("transformers", "timm", "torchvision")]
    rows.append(
        {
            "check": "verdict",
            "found": "all is well" if well else f"the network should say {', '.join(expected)}",
        }
    )
    print_rows(rows, as_json)
    if not well:
        raise typer.Exit(1)


def _importable(package: str) -> str:
    """What becomes of importing the package: "yes" and its version, or why not."""
    import importlib

    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError:
        return f"not installed (pip install 'weakspot[{package}]')"
    except Exception as error:  # noqa: BLE001 - a broken package may raise anything, and that is the finding
        return f"installed, but does not import: {str(error).splitlines()[0][:100]}"
    return f"yes, {getattr(module, '__version__', 'version unknown')}"
