"""`weakspot explain`: attack pictures, or take a pair, and explain."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weakspot.cli.app import UNREADABLE, USAGE, Failure, app, complain, note, notes_for_people, progress_bar
from weakspot.cli.inputs import (
    check_sources,
    class_index,
    load_classifier,
    number,
    read_mask,
    read_pair,
    read_pictures,
)  # fmt: skip
from weakspot.cli.output import print_json, print_table

if TYPE_CHECKING:
    from torch import Tensor

    from weakspot.classifier import Classifier
    from weakspot.pairs import Pairs

LABELS = "the model's own predictions on the clean images"
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="efficientnet_lite0 (embedded), package.module:factory, model.pt2, hf:DIR, timm:NAME, torchvision:NAME.",
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

EXAMPLES = """

[bold]Examples[/bold]

weakspot explain cat.jpg dog.jpg

weakspot explain photos/ --region cam --eps 8/255 --out runs/cam

weakspot explain --pair clean.png adversarial.png --model my_package.models:build

weakspot explain --samples --json > scores.json
"""


@app.command(epilog=EXAMPLES)
def explain(
    images: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Pictures or folders of pictures; with --pair CLEAN and ADVERSARIAL.", show_default=False
        ),
    ] = None,
    pair: Annotated[
        bool,
        typer.Option(
            "--pair", help="Explain a pair made by any tool: CLEAN ADVERSARIAL, or one pairs.safetensors."
        ),
    ] = False,
    samples: Annotated[
        bool, typer.Option("--samples", help="Take four photographs that come with scikit-image.")
    ] = False,
    model: ModelOption = "efficientnet_lite0",
    weights: WeightsOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    classes: ClassesOption = None,
    size: SizeOption = None,
    region: Annotated[
        str, typer.Option(help="Where the attack may act: none (anywhere), cam, or a mask picture (white).")
    ] = "none",
    keep: Annotated[float, typer.Option(help="Share of the image in --region cam.")] = 0.3,
    norm: Annotated[str, typer.Option(help="How change is measured: linf or l2.")] = "linf",
    eps: Annotated[
        str, typer.Option(help="How much may change: 4/255, 0.02; for l2 a length such as 1.5.")
    ] = "4/255",
    steps: Annotated[int, typer.Option(help="Steps of the attack.", min=1)] = 20,
    target: Annotated[
        str | None, typer.Option(help="Class to reach, by name or number; any other class by default.")
    ] = None,
    analyses: Annotated[
        str | None, typer.Option(help="Which analyses, separated by commas; all by default.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for report.html, scores.csv, pairs.safetensors, maps.npz, run.json.")
    ] = Path("weakspot-out"),
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print scores as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    debug: DebugOption = False,
) -> None:
    """Attack pictures, or take a pair as it is, and explain where the change acts and whether the model looks there.

    Labels are the model's own predictions on the clean pictures. Files that cannot be read are named and skipped.
    """
    del debug
    started = time.perf_counter()
    sources = list(images or [])
    check_sources(sources, pair=pair, samples=samples)
    budget_eps = number(eps)
    if region not in {"none", "cam"} and not Path(region).is_file():
        raise Failure(f"region is {region!r}; accepted are none, cam, or the path of a mask picture", USAGE)
    if out.exists() and not out.is_dir():
        raise Failure(f"out is {out}, which is a file; accepted is a folder", USAGE)
    for source in sources:
        if not source.exists():
            complain(f"{source}: there is no such file or folder")
    if sources and not any(source.exists() for source in sources):
        raise typer.Exit(UNREADABLE)

    # Whatever a model prints must not end up among the scores.
    with redirect_stdout(sys.stderr), notes_for_people(quiet), progress_bar(quiet or as_json) as advance:
        advance("loading the model", 0.0)
        classifier = load_classifier(model, weights, mean, std, classes, size, device)
        if pair:
            (pairs, names), how = read_pair(classifier, sources), "a pair taken as it is"
            skipped: list[str] = []
            unread: list[Path] = []
            _make_folder(out)
        else:
            batch, names, skipped, unread = read_pictures(classifier, sources, samples=samples)
            _make_folder(out)
            pairs, names, how = _attack(
                classifier, batch, names, region, keep, norm, budget_eps, steps, target, seed,
                lambda share: advance("attacking", 0.1 + 0.4 * share),
            )  # fmt: skip
        from weakspot.explanations import explain as explain_pairs
        from weakspot.runs import fingerprint, write_run
        from weakspot.runs.folder import versions

        made = {
            "attack": how,
            "labels": "as the file has them" if pair and len(sources) == 1 else LABELS,
            "model": f"{classifier.name} ({model}), weights {fingerprint(classifier)}",
            "seed": str(seed),
            "device": str(classifier.mean.device),
            "command": shlex.join(["weakspot", *sys.argv[1:]]),
            "versions": ", ".join(f"{name} {value}" for name, value in versions().items()),
            "made at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        }
        if skipped:
            made["skipped"] = "; ".join(skipped)
        explanation = explain_pairs(
            classifier,
            pairs,
            analyses=[name.strip() for name in analyses.split(",")] if analyses else None,
            seed=seed,
            names=names,
            made=made,
            progress=lambda share: advance("explaining", 0.5 + 0.45 * share),
        )
        advance("writing", 0.97)
        seconds = time.perf_counter() - started
        about = {**made, "images": list(names), "skipped": skipped, "seconds": round(seconds, 2)}
        paths = write_run(explanation, out, about)
    if as_json:
        print_json(explanation, paths, skipped)
    elif not quiet:
        print_table(explanation, seconds, len(skipped))
        typer.echo(f"\nReport: {paths['report.html'].resolve()}")
    if unread:
        raise typer.Exit(UNREADABLE)


def _make_folder(out: Path) -> None:
    """Before the work, so that nothing is computed that cannot be kept."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"out is {out}, which cannot be made ({error.strerror})", USAGE) from None
    if not os.access(out, os.W_OK):
        raise Failure(f"out is {out}, where you may not write", USAGE)


def _attack(
    classifier: Classifier,
    images: Tensor,
    names: list[str],
    region: str,
    keep: float,
    norm: str,
    eps: float,
    steps: int,
    target: str | None,
    seed: int,
    progress: Callable[[float], None],
) -> tuple[Pairs, list[str], str]:
    """The pairs, their names, and in words how they were made."""
    import torch

    from weakspot import regions
    from weakspot.attacks import pgd
    from weakspot.budgets import L2, Linf
    from weakspot.classifier import check_images, evaluating, predict

    if norm not in {"linf", "l2"}:
        raise Failure(f"norm is {norm!r}; accepted are linf and l2", USAGE)
    budget = Linf(eps) if norm == "linf" else L2(eps)
    with evaluating(classifier):
        images = check_images(images, classifier)
        logits = predict(classifier, images)
    labels = logits.argmax(1)
    targets = None
    if target is not None:
        wanted = class_index(classifier, target, logits.shape[1])
        others = labels != wanted
        for name, other in zip(names, others.tolist(), strict=True):
            if not other:
                note(f"{name}: already read as {classifier.class_name(wanted)}; skipped")
        if not bool(others.any()):
            raise Failure(
                f"every picture is already read as {classifier.class_name(wanted)}, the target", USAGE
            )
        images, labels = images[others], labels[others]
        names = [name for name, other in zip(names, others.tolist(), strict=True) if other]
        targets = torch.full_like(labels, wanted)
    if region == "cam":
        mask = regions.cam(classifier, images, labels, keep=keep)
        where = f"the {keep:.0%} of the image with most evidence for its class"
        if not bool(mask.any()):
            raise Failure(
                f"keep is {keep}, which leaves no pixel to change; accepted is more, up to 1", USAGE
            )
    elif region == "none":
        mask, where = None, "whole image"
    else:
        mask, where = read_mask(Path(region), images), f"the white part of {region}"
    pairs = pgd(
        classifier,
        images,
        labels,
        budget=budget,
        region=mask,
        targets=targets,
        steps=steps,
        seed=seed,
        progress=progress,
    )
    asked = "" if targets is None else f", towards {classifier.class_name(int(targets[0]))}"
    return pairs, names, f"PGD, {budget}, {steps} steps, {where}{asked}"
