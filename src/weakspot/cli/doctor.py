"""`weakspot models` and `weakspot doctor`: what is installed and whether it works."""

import importlib
import os
import time

import torch
import typer
from torch import Tensor

from weakspot._errors import describe_error
from weakspot.attacks import pgd
from weakspot.classifier import Classifier, predict
from weakspot.cli.app import EXTRAS, command
from weakspot.cli.options import OutputOptions
from weakspot.cli.output import print_rows
from weakspot.explanations.analysis import available_analyses
from weakspot.images import sample_images
from weakspot.models import available_models, load
from weakspot.statistics.number_format import counted

FASTER = 0.8  # one thread is recommended if it takes at most this fraction of the time
BROKEN = "is installed but cannot be imported"
EXPECTED = ("Egyptian cat", "espresso", "missile", "moped")  # classes of the sample images


@command("weakspot models")
def models(output: OutputOptions) -> None:
    """List the models that --model takes, and whether the packages they need are installed."""
    rows = [{"model": name, "source": "installed", "usable": "yes"} for name in available_models()]
    rows += [
        {"model": "package.module:factory", "source": "your function that returns a module", "usable": "yes"},
        {"model": "FOLDER", "source": "written by weakspot train", "usable": "yes"},
        {"model": "model.pt2", "source": "saved by torch.export.save", "usable": "yes"},
    ]
    hubs = {"hf:DIRECTORY": "transformers", "timm:NAME": "timm", "torchvision:NAME": "torchvision"}
    rows += [
        {"model": form, "source": package, "usable": installed([package], package)}
        for form, package in hubs.items()
    ]
    if not output.quiet:
        print_rows(rows, as_json=output.as_json)


@command("weakspot doctor")
def doctor(output: OutputOptions) -> None:
    """Check that weakspot works: versions, device, embedded network, speed and optional extras."""
    from weakspot.audit.store.run_info import versions

    classifier = load("efficientnet_lite0")
    device = classifier.mean.device
    images = sample_images()[0].to(device)
    labels = predict(classifier, images).argmax(1)  # warms up
    forward = _seconds_per_pass(classifier, images)
    started = time.perf_counter()
    fooled = pgd(classifier, images, labels, steps=3).success
    attack = time.perf_counter() - started
    predicted = [classifier.class_name(int(label)) for label in labels]
    troubles = []
    if predicted != [*EXPECTED]:
        troubles.append(f"the network should predict {', '.join(EXPECTED)}")
    if not bool(fooled.any()):
        troubles.append("the attack should fool a photograph")
    extras = {extra: installed(modules, extra) for extra, (modules, _) in EXTRAS.items()}
    broken = [extra for extra, found in extras.items() if BROKEN in found]
    works = f"the network works, but not extra {', '.join(broken)}" if broken else "everything works"
    checks = {
        "result": "; ".join(troubles) or works,
        **versions(),
        "device": f"{device}, {counted(torch.get_num_threads(), 'thread')}",
        "embedded network": f"predicts {', '.join(predicted)}",
        "speed": f"{1000 * forward:.0f} ms for a forward pass of one 224 x 224 image",
        "threads": _compare_threads(classifier, images, forward),
        "attack": f"{int(fooled.sum())} of 4 photographs fooled in 3 steps, {attack:.1f} s",
        "analyses": ", ".join(available_analyses()),
    }
    for extra, (_, purpose) in EXTRAS.items():
        checks[f"extra {extra}"] = f"{extras[extra]}; for {purpose}"
    if not output.quiet:
        print_rows([{"check": name, "result": text} for name, text in checks.items()], as_json=output.as_json)
    if troubles:
        raise typer.Exit(1)


def _seconds_per_pass(classifier: Classifier, images: Tensor) -> float:
    started = time.perf_counter()
    for image in images.split(1):
        predict(classifier, image)
    return (time.perf_counter() - started) / len(images)


def _compare_threads(classifier: Classifier, images: Tensor, seconds: float) -> str:
    """How fast a forward pass is with one thread, compared with `seconds` with all of them."""
    threads = torch.get_num_threads()
    if classifier.mean.device.type != "cpu" or threads == 1:
        return f"{threads}"
    torch.set_num_threads(1)
    try:
        alone = _seconds_per_pass(classifier, images)
    finally:
        torch.set_num_threads(threads)
    load, cores = getattr(os, "getloadavg", lambda: [0.0])()[0], os.cpu_count() or 1
    shown = f", load {load:.1f} on {counted(cores, 'core')}" if hasattr(os, "getloadavg") else ""
    measured = f"{1000 * alone:.0f} ms with 1 thread, {1000 * seconds:.0f} ms with {threads}{shown}"
    if not alone < FASTER * seconds:
        return measured
    if load > cores:
        return f"{measured}: give --threads 1 (or set OMP_WAIT_POLICY=passive) while this machine is busy"
    return f"{measured}: give --threads 1 for single images"


def installed(modules: tuple[str, ...] | list[str], extra: str) -> str:
    """Whether the modules of an extra can be imported: "yes" and the version, or the reason why not."""
    imported = []
    for name in modules:
        try:
            imported.append(importlib.import_module(name))
        except Exception as error:  # noqa: BLE001 - a broken package may raise anything, and this reports it
            # The package itself is missing, and not one that it imports.
            if isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]:
                return f"{name} is not installed; run: pip install 'weakspot[{extra}]'"
            return f"{name} {BROKEN}: {describe_error(error)[:100]}"
    versions = (f"{module.__name__} {getattr(module, '__version__', '')}".strip() for module in imported)
    return f"yes ({', '.join(versions)})"
