"""`weakspot explain`: attack pictures, or take a pair, and explain.

Aims: what an attack on the command line is to reach, and where it may act.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from weakspot.cli.app import UNREADABLE, USAGE, Failure, app, note, notes_for_people, progress_bar, watch
from weakspot.cli.inputs import (
    check_existing,
    check_sources,
    class_index,
    load_classifier,
    number,
    read_pair,
    read_pictures,
    read_reference,
)
from weakspot.cli.options import (
    ClassesOption,
    DebugOption,
    DeviceOption,
    FractionOption,
    MeanOption,
    ModelOption,
    QuietOption,
    RegionOption,
    SamplesOption,
    SeedOption,
    SizeOption,
    StdOption,
    TargetOption,
    WeightsOption,
    refuse,
    refuse_fraction,
)
from weakspot.cli.output import check_folder, describe_run, make_folder, print_json, print_table

if TYPE_CHECKING:
    from torch import Tensor

    from weakspot.classifier import Classifier
    from weakspot.pairs import Pairs


class Aim(NamedTuple):
    """Images (N, C, H, W), what the model reads them as (N,), the classes to reach (N,) or None, and N names."""

    images: Tensor
    labels: Tensor
    targets: Tensor | None
    names: list[str]


def find_aim(classifier: Classifier, images: Tensor, names: list[str], target: str | None) -> Aim:
    """The labels are the model's own predictions; pictures that it reads as the target already are left out."""
    import torch

    from weakspot.classifier import check_images, evaluating, predict

    with evaluating(classifier):
        images = check_images(images, classifier)
        logits = predict(classifier, images)
    labels = logits.argmax(1)
    if target is None:
        return Aim(images, labels, None, names)
    wanted = class_index(classifier, target, logits.shape[1])
    others = labels != wanted
    for name, other in zip(names, others.tolist(), strict=True):
        if not other:
            note(f"{name}: already read as {classifier.class_name(wanted)}; skipped")
    if not bool(others.any()):
        raise Failure(f"every picture is already read as {classifier.class_name(wanted)}, the target", USAGE)
    left = [name for name, other in zip(names, others.tolist(), strict=True) if other]
    return Aim(images[others], labels[others], torch.full_like(labels[others], wanted), left)


def find_region(
    text: str, fraction: float, classifier: Classifier, aim: Aim, seed: int
) -> tuple[Tensor | None, str]:
    """The region that the option names, None where that is everywhere, and the region in words."""
    from weakspot._checks import check_fraction
    from weakspot.regions import read_region
    from weakspot.regions.masks import UnreadableError
    from weakspot.regions.spec import NAMES

    check_fraction(fraction)
    if text == "none":
        return None, "whole image"
    try:
        region = read_region(
            text, classifier, aim.images, aim.labels, targets=aim.targets, fraction=fraction, seed=seed
        )
    except (UnreadableError, FileNotFoundError) as error:
        raise Failure(f"region: {error}", UNREADABLE) from None
    except ValueError as error:
        said = str(error)
        raise Failure(said if said.startswith("region") else f"region: {said}", USAGE) from None
    if not bool(region.any()):
        raise Failure(
            f"region is {text!r} and fraction is {fraction}, which leaves no pixel to change; accepted is more",
            USAGE,
        )
    if text == "cam":
        return region, f"the {fraction:.0%} of the image with most evidence for its class"
    return region, f"the white part of {text}" if text not in NAMES and os.path.isfile(text) else text  # noqa: PTH113


FILES = ("report.html", "scores.csv", "pairs.safetensors", "maps.npz", "locality.csv", "run.json")
OF_ATTACK = ("region", "fraction", "norm", "eps", "steps", "target")
LABELS = "the model's own predictions on the clean images"
EXAMPLES = """

[bold]Examples[/bold]

weakspot explain cat.jpg dog.jpg

weakspot explain photos/ --region cam --eps 8/255 --out runs/cam

weakspot explain --pair clean.png adversarial.png --model my_package.models:build

weakspot explain --samples --json > scores.json

weakspot attack photos/ --attack pixels --out runs/pixels

weakspot explain --pair runs/pixels/pairs.safetensors --analyses locality
"""


@app.command(epilog=EXAMPLES)
def explain(
    context: typer.Context,
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
    samples: SamplesOption = False,
    model: ModelOption = "efficientnet_lite0",
    weights: WeightsOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    classes: ClassesOption = None,
    size: SizeOption = None,
    region: RegionOption = "none",
    fraction: FractionOption = 0.3,
    norm: Annotated[str, typer.Option(help="How change is measured: linf or l2.")] = "linf",
    eps: Annotated[
        str, typer.Option(help="How much may change: 4/255, 0.02; for l2 a length such as 1.5.")
    ] = "4/255",
    steps: Annotated[int, typer.Option(help="Steps of the attack.", min=1)] = 20,
    target: TargetOption = None,
    analyses: Annotated[
        str | None, typer.Option(help="Which analyses, separated by commas; all by default.")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Folder of other pictures of the same source. Attacks are compared with where the network looks in "
            "them; a p value needs 19 other pictures, the ones that are explained included.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help=f"Folder for {', '.join(FILES)}.")] = Path("weakspot-out"),
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print scores as JSON.")] = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Attack pictures, or take a pair as it is, and explain where the change acts and whether the model looks there.

    Labels are the model's own predictions on the clean pictures. Files that cannot be read are named and skipped.
    """
    del debug
    started = time.perf_counter()
    sources = list(images or [])
    check_sources(sources, pair=pair, samples=samples)
    watch(context, out, FILES)
    if pair:
        refuse(context, OF_ATTACK, "with --pair, which takes the pair as it is; leave out one or the other")
    budget_eps = number(eps)
    check_folder(out)
    check_existing(sources)

    # Whatever a model prints must not end up among the scores.
    with redirect_stdout(sys.stderr), notes_for_people(quiet), progress_bar(quiet or as_json) as advance:
        if not pair:
            refuse_fraction(context, [region])
        advance("loading the model", 0.0)
        classifier = load_classifier(model, weights, mean, std, classes, size, device)
        if pair:
            (pairs, names), how = read_pair(classifier, sources), "a pair taken as it is"
            skipped: list[str] = []
            unread: list[Path] = []
            make_folder(out)
        else:
            batch, names, skipped, unread = read_pictures(classifier, sources, samples=samples)
            make_folder(out)
            pairs, names, how = _attack(
                classifier, batch, names, region, fraction, norm, budget_eps, steps, target, seed,
                lambda share: advance("attacking", 0.1 + 0.4 * share),
            )  # fmt: skip
        others = None if reference is None else read_reference(classifier, reference)
        from weakspot._io.files import write_atomic
        from weakspot.audit import write_run
        from weakspot.explanations import explain as explain_pairs
        from weakspot.explanations.locality_by_radius import locality_of, locality_sentence

        made = {
            "attack": how,
            "labels": "as the file has them" if pair and len(sources) == 1 else LABELS,
            **({} if others is None else {"reference": f"{len(others)} pictures in {reference}"}),
            **describe_run(classifier, model, seed, skipped),
        }
        explanation = explain_pairs(
            classifier,
            pairs,
            analyses=[name.strip() for name in analyses.split(",")] if analyses else None,
            seed=seed,
            names=names,
            made=made,
            reference=others,
            progress=lambda share: advance("explaining", 0.5 + 0.45 * share),
        )
        advance("writing", 0.97)
        seconds = time.perf_counter() - started
        about = {**made, "images": list(names), "skipped": skipped, "seconds": round(seconds, 2)}
        paths = write_run(explanation, out, about)
        moved = locality_of(explanation.scores)
        if moved is not None:
            paths["locality.csv"] = out / "locality.csv"
            write_atomic(paths["locality.csv"], partial(moved.to_csv, index=False))
    if as_json:
        print_json(explanation, paths, skipped)
    elif not quiet:
        print_table(explanation, seconds, len(skipped))
        if moved is not None:
            typer.echo(f"\n{locality_sentence(moved)}")
        typer.echo(f"\nReport: {paths['report.html'].resolve()}")
    if unread:
        raise typer.Exit(UNREADABLE)


def _attack(
    classifier: Classifier,
    images: Tensor,
    names: list[str],
    region: str,
    fraction: float,
    norm: str,
    eps: float,
    steps: int,
    target: str | None,
    seed: int,
    progress: Callable[[float], None],
) -> tuple[Pairs, list[str], str]:
    """The pairs, their names, and in words how they were made."""
    from weakspot.attacks import pgd
    from weakspot.budgets import L2, Linf

    if norm not in {"linf", "l2"}:
        raise Failure(f"norm is {norm!r}; accepted are linf and l2", USAGE)
    budget = Linf(eps) if norm == "linf" else L2(eps)
    aim = find_aim(classifier, images, names, target)
    mask, where = find_region(region, fraction, classifier, aim, seed)
    pairs = pgd(
        classifier,
        aim.images,
        aim.labels,
        budget=budget,
        region=mask,
        targets=aim.targets,
        steps=steps,
        seed=seed,
        progress=progress,
    )
    asked = "" if aim.targets is None else f", toward {classifier.class_name(int(aim.targets[0]))}"
    return pairs, aim.names, f"PGD, {budget}, {steps} steps, {where}{asked}"
