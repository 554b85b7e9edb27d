"""`weakspot train`: train a network by a recipe, or one by each and compare them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from weakspot.cli.app import RESUMABLE, USAGE, Failure, app, complain, notes_for_people, progress_bar
from weakspot.cli.inputs import image_size, number
from weakspot.cli.options import DebugOption, QuietOption, SeedOption, WeightsOption, refuse
from weakspot.cli.output import print_rows
from weakspot.cli.training_jobs import (
    TrainingJob,
    description,
    epoch_logger,
    everything,
    fit_matrix,
    fit_one,
    judge_own,
    maker_of,
    print_training,
)

EVALUATIONS = ("none", "own", "matrix")
EXAMPLES = """

[bold]Examples[/bold]

weakspot train mnist/ --recipe localized --out runs/localized

weakspot train cifar-10-batches-bin/ --recipe full --model resnet18 --epochs 30 --out runs/full

weakspot train photos/ --size 64x64 --recipe fast --budget linf:4/255 --out runs/fast

weakspot train mnist/ --evaluate matrix --recipes standard,localized,random_mask,full --out runs/matrix

torchrun --nproc-per-node 4 -m weakspot train cifar/ --precision bf16-mixed --out runs/four

The same command goes on with a training that was cut off; weakspot explain DIGITS --model runs/localized uses it.
"""


@app.command(epilog=EXAMPLES)
def train(
    context: typer.Context,
    data: Annotated[
        str | None,
        typer.Argument(
            help="A folder of MNIST's IDX files, of CIFAR's batches, or of one folder per class; an .npz file; or "
            "hf:DIRECTORY_OR_NAME.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="One of --list; localized by default.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="two_conv, resnet20, resnet18 (fresh weights), or package.module:factory; two_conv for gray images "
            "and resnet20 for color by default.",
            show_default=False,
        ),
    ] = None,
    weights: WeightsOption = None,
    out: Annotated[
        Path, typer.Option(help="Folder for model.safetensors, training.json and checkpoints.")
    ] = Path("weakspot-train"),
    epochs: Annotated[int, typer.Option(help="Passes over the data.", min=1)] = 10,
    fraction: Annotated[float, typer.Option(help="Of every batch that is attacked, 0 to 1.")] = 0.5,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            "-b",
            help="Of the adversary: linf:8/255, l2:0.5; linf:0.3 for gray images, linf:8/255 for color by default.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Of the adversary; 40 for gray images, 10 for color by default.", min=1),
    ] = None,
    step_size: Annotated[str | None, typer.Option(help="Of each: 0.01, 2/255.", show_default=False)] = None,
    batch_size: Annotated[int, typer.Option(help="Images per update.", min=1)] = 128,
    learning_rate: Annotated[float, typer.Option(help="At the start; it falls along a cosine.")] = 0.1,
    augment: Annotated[
        str | None,
        typer.Option(help="none, crop, or crop,flip; none for gray images and both for color by default."),
    ] = None,
    precision: Annotated[str, typer.Option(help="32-true, 16-mixed, bf16-mixed.")] = "32-true",
    size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH that picture files are brought to; 32x32 by default.")
    ] = None,
    channels: Annotated[int, typer.Option(help="1: picture files are read as gray; 3: as color.")] = 3,
    evaluate: Annotated[
        str,
        typer.Option(
            help="none; own: the network against every test; matrix: a network of each of --recipes against every "
            "test."
        ),
    ] = "none",
    recipes: Annotated[
        str | None, typer.Option(help="Of the matrix, separated by commas.", show_default=False)
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(help="Of the matrix: networks per recipe; 1 by default.", min=1, show_default=False),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Images of the test split, the first; all by default.", min=2)
    ] = None,
    strongest: Annotated[
        int | None,
        typer.Option(
            help="Images for the ensemble of attacks, the first of these; 500 by default.",
            min=1,
            show_default=False,
        ),
    ] = None,
    seed: SeedOption = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    workers: Annotated[int, typer.Option(help="Processes that decode picture files.", min=0)] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
    quiet: QuietOption = False,
    list_all: Annotated[bool, typer.Option("--list", help="List recipes and tests, and stop.")] = False,
    debug: DebugOption = False,
) -> None:
    """Train a network, part of every batch attacked first: in the background, everywhere, or as --recipe says.

    Writes plain weights (safetensors) and how they were made. After every epoch, held-out images are judged as they are
    and attacked. A training that was killed goes on when the same command is given again, to the same weights.
    """
    del debug
    if list_all:
        print_rows(everything(), as_json)
        return
    if data is None:
        raise Failure("no data was named; give a folder, an .npz file or hf:NAME", USAGE)
    if evaluate not in EVALUATIONS:
        from weakspot._checks import unknown_choice

        raise Failure(unknown_choice("--evaluate", evaluate, EVALUATIONS), USAGE)
    _check_used(evaluate, recipe, recipes=recipes, seeds=seeds, limit=limit, strongest=strongest)
    silent = quiet or as_json or os.environ.get("RANK", "0") != "0"
    started = time.perf_counter()
    try:
        with redirect_stdout(sys.stderr), notes_for_people(quiet), progress_bar(silent) as advance:
            from weakspot.budgets import read_budget
            from weakspot.datasets import read_labeled
            from weakspot.models.specs import find_device
            from weakspot.training import TrainConfig

            where = str(find_device(device))
            shape = image_size(size) or (32, 32)
            _check_attacked(
                context, _chosen(recipes) if evaluate == "matrix" else [recipe or "localized"], fraction
            )
            advance("reading the data", 0.0)
            training = read_labeled(data, size=shape, channels=channels)
            if training.held:
                why = f"with {data}, which holds arrays and no picture files; leave it out"
                refuse(context, ["size", "channels", "workers"], why)
            # Read now, so that what is wrong with it is said before hours of work.
            test = (
                None
                if evaluate == "none"
                else read_labeled(data, split="test", size=shape, channels=channels)
            )
            maker = maker_of(model, weights, training, where)
            config = TrainConfig(
                recipe=recipe or "localized",
                budget=None if budget is None else read_budget(budget),
                epochs=epochs,
                attacked_fraction=fraction,
                seed=seed,
                steps=steps,
                step_size=None if step_size is None else number(step_size, "step_size"),
                batch_size=batch_size,
                learning_rate=learning_rate,
                augment=augment,
                precision=precision,
                workers=workers,
            )
            job = TrainingJob(
                maker=maker,
                data=training,
                config=config,
                out=out,
                about={"network": description(model, training)},
                on_epoch=None if silent else epoch_logger(),
                advance=advance,
            )
            strongest = 500 if strongest is None else strongest
            if evaluate == "matrix" and test is not None:
                said = fit_matrix(
                    job, test, _chosen(recipes), seeds=seeds or 1, limit=limit, strongest=strongest
                )
            else:
                trained, said = fit_one(job)
                if test is not None:
                    said |= judge_own(job, trained, test, limit=limit, strongest=strongest)
    except KeyboardInterrupt:
        complain(f"interrupted; the same command goes on from {out}")
        raise typer.Exit(RESUMABLE) from None
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        typer.echo(json.dumps({**said, "folder": str(out.resolve())}, indent=2))
    elif not quiet:
        print_training(said, time.perf_counter() - started, out, matrix=evaluate == "matrix")


def _check_used(evaluate: str, recipe: str | None, **options: object) -> None:
    """Raises Failure where an option was given that this evaluation has no use for."""
    if evaluate == "matrix" and recipe is not None:
        raise Failure("--recipe goes without --evaluate matrix, which takes --recipes", USAGE)
    used = {"none": (), "own": ("limit", "strongest"), "matrix": tuple(options)}[evaluate]
    for name, value in options.items():
        if value is not None and name not in used:
            raise Failure(
                f"--{name} goes with --evaluate {'own or matrix' if name in {'limit', 'strongest'} else 'matrix'}",
                USAGE,
            )


def _chosen(recipes: str | None) -> Sequence[str]:
    """The recipes of the matrix."""
    from weakspot.training import MATRIX_RECIPES

    return (
        MATRIX_RECIPES if recipes is None else [name.strip() for name in recipes.split(",") if name.strip()]
    )


def _check_attacked(context: typer.Context, recipes: Sequence[str], fraction: float) -> None:
    """Raises Failure where an option of the adversary was given and no recipe has an adversary that it is for."""
    from weakspot.training.config import find_recipe

    searches = {find_recipe(name).search for name in recipes}
    named = f"the recipe{'s' if len(recipes) > 1 else ''} {', '.join(recipes)}"
    if searches <= {"none"}:
        refuse(
            context, ["fraction", "steps", "step_size"], f"with {named}: nothing is attacked; leave it out"
        )
    elif "descent" not in searches:
        why = f"with {named}: the adversary takes no steps of that kind; leave it out"
        refuse(context, ["steps", "step_size"], why)
    elif not fraction:
        refuse(context, ["steps", "step_size"], "with --fraction 0: nothing is attacked; leave it out")
