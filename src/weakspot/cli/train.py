"""`weakspot train`: train a network by a recipe, or one by each and compare them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from weakspot.cli.app import RESUMABLE, USAGE, Failure, app, complain, notes_for_people, progress_bar
from weakspot.cli.given import refuse
from weakspot.cli.inputs import image_size, number
from weakspot.cli.options import DebugOption, QuietOption, SeedOption, WeightsOption
from weakspot.cli.output import print_rows

if TYPE_CHECKING:
    import pandas as pd

    from weakspot.classifier import Classifier
    from weakspot.datasets import Labelled
    from weakspot.defenses.training import Matrix

WIDE = 125  # columns of a terminal that takes the table with intervals
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
            help="two_conv, resnet20, resnet18 (fresh weights), or package.module:factory; two_conv for grey images "
            "and resnet20 for colour by default.",
            show_default=False,
        ),
    ] = None,
    weights: WeightsOption = None,
    out: Annotated[
        Path, typer.Option(help="Folder for model.safetensors, training.json and checkpoints.")
    ] = Path("weakspot-train"),
    epochs: Annotated[int, typer.Option(help="Passes over the data.", min=1)] = 10,
    share: Annotated[float, typer.Option(help="Of every batch that is attacked, 0 to 1.")] = 0.5,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            "-b",
            help="Of the adversary: linf:8/255, l2:0.5; linf:0.3 for grey images, linf:8/255 for colour by default.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Of the adversary; 40 for grey images, 10 for colour by default.", min=1),
    ] = None,
    step_size: Annotated[str | None, typer.Option(help="Of each: 0.01, 2/255.", show_default=False)] = None,
    batch_size: Annotated[int, typer.Option(help="Images per update.", min=1)] = 128,
    learning_rate: Annotated[float, typer.Option(help="At the start; it falls along a cosine.")] = 0.1,
    augment: Annotated[
        str | None,
        typer.Option(help="none, crop, or crop,flip; none for grey images and both for colour by default."),
    ] = None,
    precision: Annotated[str, typer.Option(help="32-true, 16-mixed, bf16-mixed.")] = "32-true",
    size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH that picture files are brought to; 32x32 by default.")
    ] = None,
    channels: Annotated[int, typer.Option(help="1: picture files are read as grey; 3: as colour.")] = 3,
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
        print_rows(_everything(), as_json)
        return
    if data is None:
        raise Failure("no data was named; give a folder, an .npz file or hf:NAME", USAGE)
    if evaluate not in EVALUATIONS:
        from weakspot.checks import closest

        raise Failure(f"--evaluate is {evaluate!r}; {closest(evaluate, EVALUATIONS)}", USAGE)
    _check_used(evaluate, recipe, recipes=recipes, seeds=seeds, limit=limit, strongest=strongest)
    silent = quiet or as_json or os.environ.get("RANK", "0") != "0"
    started = time.perf_counter()
    try:
        with redirect_stdout(sys.stderr), notes_for_people(quiet), progress_bar(silent) as advance:
            from weakspot.budgets import read_budget
            from weakspot.datasets import read_labelled
            from weakspot.models.specs import find_device

            where = str(find_device(device))
            shape = image_size(size) or (32, 32)
            _check_attacked(
                context, _chosen(recipes) if evaluate == "matrix" else [recipe or "localized"], share
            )
            advance("reading the data", 0.0)
            training = read_labelled(data, size=shape, channels=channels)
            if training.held:
                why = f"with {data}, which holds arrays and no picture files; leave it out"
                refuse(context, ["size", "channels", "workers"], why)
            # Read now, so that what is wrong with it is said before hours of work.
            test = (
                None
                if evaluate == "none"
                else read_labelled(data, split="test", size=shape, channels=channels)
            )
            maker = _maker(model, weights, training, where)
            options: dict[str, Any] = {
                "share": share,
                "epochs": epochs,
                "budget": None if budget is None else read_budget(budget),
                "steps": steps,
                "step_size": None if step_size is None else number(step_size, "step_size"),
                "batch_size": batch_size,
                "learning_rate": learning_rate,
                "augment": augment,
                "precision": precision,
                "workers": workers,
                "about": {"network": _description(model, training)},
            }
            told = None if silent else _teller()
            judged = {"limit": limit, "strongest": 500 if strongest is None else strongest}
            if evaluate == "matrix" and test is not None:
                said = _matrix(
                    maker,
                    training,
                    test,
                    out,
                    _chosen(recipes),
                    seeds or 1,
                    seed,
                    judged,
                    options,
                    told,
                    advance,
                )
            else:
                said = _one(maker, training, recipe or "localized", seed, out, options, told, advance)
                if test is not None:
                    said |= _own(said.pop("model"), test, out, judged, options, advance)
                said.pop("model", None)
    except KeyboardInterrupt:
        complain(f"interrupted; the same command goes on from {out}")
        raise typer.Exit(RESUMABLE) from None
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        typer.echo(json.dumps({**said, "folder": str(out.resolve())}, indent=2))
    elif not quiet:
        _print(said, time.perf_counter() - started, out, matrix=evaluate == "matrix")


def _one(
    maker: Callable[[int], Classifier],
    data: Labelled,
    recipe: str,
    seed: int,
    out: Path,
    options: Mapping[str, Any],
    told: Callable[[str, Mapping[str, float]], None] | None,
    advance: Callable[[str, float], None],
) -> dict[str, Any]:
    from weakspot.defenses import train as fit
    from weakspot.defenses.training.checkpoint import read_record

    trained = fit(
        maker(seed),
        data,
        recipe=recipe,
        seed=seed,
        out=out,
        told=None if told is None else (lambda row: told(recipe, row)),
        progress=lambda done: advance(f"training ({recipe})", done),
        **options,
    )
    return {"model": trained, **(read_record(out) or {})}


def _own(
    model: Classifier,
    test: Labelled,
    out: Path,
    judged: Mapping[str, Any],
    options: Mapping[str, Any],
    advance: Callable[[str, float], None],
) -> dict[str, Any]:
    """Accuracy with its interval under every test."""
    from weakspot.defenses.training import judged_images, outcomes
    from weakspot.defenses.training.matrix import TEST_STEPS
    from weakspot.defenses.training.settings import defaults
    from weakspot.statistics import share_interval

    tested = judged_images(test, limit=judged["limit"], masks=out)
    found = outcomes(
        model,
        tested,
        budget=options["budget"] or defaults(test.shape[0])["budget"],
        steps=TEST_STEPS.get(test.shape[0], 20),
        strongest=judged["strongest"],
        progress=lambda done: advance("testing", done),
    )
    rows = []
    for name, right in found.items():
        mean, low, high = share_interval(right.numpy())
        rows.append({"test": name, "accuracy": mean, "low": low, "high": high, "images": len(right)})
    return {"tests": rows}


def _matrix(
    maker: Callable[[int], Classifier],
    data: Labelled,
    test: Labelled,
    out: Path,
    recipes: Sequence[str],
    seeds: int,
    seed: int,
    judged: Mapping[str, Any],
    options: Mapping[str, Any],
    told: Callable[[str, Mapping[str, float]], None] | None,
    advance: Callable[[str, float], None],
) -> dict[str, Any]:
    from weakspot.defenses.training import evaluation_matrix

    found = evaluation_matrix(
        maker,
        data,
        test,
        out=out,
        recipes=recipes,
        seeds=seeds,
        seed=seed,
        **judged,
        told=told,
        progress=advance,
        **options,
    )
    _write(found, out)
    return {
        "accuracy": json.loads(found.accuracy.to_json(orient="records", double_precision=6)),
        "differences": json.loads(found.differences.to_json(orient="records", double_precision=6)),
        "stopped": dict(found.stopped),
    }


def _write(found: Matrix, out: Path) -> None:
    from weakspot.defenses.training.testing import TESTS
    from weakspot.report.heat import matrix_figure
    from weakspot.writing import write_whole

    write_whole(out / "accuracy.csv", lambda draft: found.accuracy.to_csv(draft, index=False))
    write_whole(out / "differences.csv", lambda draft: found.differences.to_csv(draft, index=False))
    figure = matrix_figure(found.accuracy, _titles(found.accuracy, TESTS))
    write_whole(out / "matrix.png", lambda draft: figure.savefig(draft, dpi=150, format="png"))


def _titles(accuracy: pd.DataFrame, tests: Mapping[str, str]) -> dict[str, str]:
    """A title for each test, with the number of its images."""
    short = {
        "clean": "clean",
        "localized": "PGD, background",
        "full": "PGD, everywhere",
        "strongest": "ensemble, everywhere",
        "swapped": "background swapped",
    }
    images = accuracy.groupby("test")["images"].first()
    return {test: f"{short[test]}\n{images[test]:,} images" for test in tests if test in images}


def _maker(
    model: str | None, weights: Path | None, data: Labelled, device: str
) -> Callable[[int], Classifier]:
    """Seed to a network for the data: of the zoo with fresh weights, or whatever the spec names."""
    from weakspot.models import load
    from weakspot.zoo import NETWORKS, build
    from weakspot.zoo.networks import ALIASES

    name = model or _usual(data)
    if name in NETWORKS or name in ALIASES:

        def make(seed: int) -> Classifier:
            fresh = build(
                name, classes=len(data.class_names), channels=data.shape[0], size=data.shape[1:], seed=seed
            )
            return load(fresh, weights=weights, device=device, class_names=data.class_names)

        return make
    if ":" not in name:
        from weakspot.checks import closest

        raise Failure(
            f"model is {name!r}; {closest(name, [*NETWORKS, *ALIASES])} (or package.module:factory)", USAGE
        )

    def made(seed: int) -> Classifier:
        import torch

        # A factory draws its weights from the global generator.
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return load(
                name, weights=weights, device=device, input_size=data.shape[1:], class_names=data.class_names
            )

    return made


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
    from weakspot.defenses.training.matrix import RECIPES

    return RECIPES if recipes is None else [name.strip() for name in recipes.split(",") if name.strip()]


def _check_attacked(context: typer.Context, recipes: Sequence[str], share: float) -> None:
    """Raises Failure where an option of the adversary was given and no recipe has an adversary that it is for."""
    from weakspot.defenses.training.recipes import find_recipe

    searches = {find_recipe(name).search for name in recipes}
    named = f"the recipe{'s' if len(recipes) > 1 else ''} {', '.join(recipes)}"
    if searches <= {"none"}:
        refuse(context, ["share", "steps", "step_size"], f"with {named}: nothing is attacked; leave it out")
    elif "descent" not in searches:
        why = f"with {named}: the adversary takes no steps of that kind; leave it out"
        refuse(context, ["steps", "step_size"], why)
    elif not share:
        refuse(context, ["steps", "step_size"], "with --share 0: nothing is attacked; leave it out")


def _usual(data: Labelled) -> str:
    return "two_conv" if data.shape[0] == 1 else "resnet20"


def _description(model: str | None, data: Labelled) -> dict[str, Any]:
    """What training.json says of the network, enough to build one of the zoo again."""
    from weakspot.zoo.networks import ALIASES, NETWORKS

    name = model or _usual(data)
    name = ALIASES.get(name, name)
    made = {"zoo": name} if name in NETWORKS else {"spec": name}
    return made | {
        "classes": len(data.class_names),
        "channels": data.shape[0],
        "size": list(data.shape[1:]),
        "class_names": list(data.class_names),
    }


def _teller() -> Callable[[str, Mapping[str, float]], None]:
    """A line on standard error for every epoch."""
    console = Console(stderr=True, highlight=False)

    def tell(name: str, row: Mapping[str, float]) -> None:
        if "epoch" not in row:
            line = ", ".join(f"{test} {value:.1%}" for test, value in row.items())
            console.print(f"{name}: {line}", soft_wrap=True)
            return
        judged = ", ".join(f"{key} {row[key]:.1%}" for key in ("clean", "robust") if key in row)
        console.print(
            f"{name}, epoch {row['epoch']:.0f}: loss {row['loss']:.3f}, held out: {judged or 'none'}; "
            f"{row['seconds']:.0f} s",
            style="dim",
            soft_wrap=True,
        )

    return tell


def _print(said: Mapping[str, Any], seconds: float, out: Path, *, matrix: bool) -> None:
    console = Console(highlight=False)
    rows = said.get("accuracy") or said.get("tests") or []
    if rows:
        tests = list(dict.fromkeys(row["test"] for row in rows))
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        wide = console.width >= WIDE
        for heading in (["trained"] if matrix else []) + tests:
            table.add_column(heading, no_wrap=True)
        names = list(dict.fromkeys(row.get("recipe", "") for row in rows))
        for name in names:
            cells = [
                f"{row['accuracy']:.1%}" + (f" ({row['low']:.1%}-{row['high']:.1%})" if wide else "")
                for row in rows
                if row.get("recipe", "") == name
            ]
            table.add_row(*([name] if matrix else []), *cells)
        console.print(table)
    if said.get("stopped") and not matrix:
        console.print(f"[yellow]stopped early:[/yellow] {said['stopped']}")
    for name, why in said["stopped"].items() if matrix else ():
        console.print(f"[yellow]{name} stopped early:[/yellow] {why}")
    spec = said.get("network", {}).get("spec")
    use = f"{spec} --weights {out / 'model.safetensors'}" if spec else str(out)
    what = "matrix.png and accuracy.csv" if matrix else f"weakspot explain PICTURES --model {use}"
    console.print(f"\nWritten to {out.resolve()} in {seconds:.0f} s; next: {what}", style="dim")


def _everything() -> list[dict[str, str]]:
    from weakspot.defenses.training import RECIPES, TESTS

    rows = [{"kind": "recipe", "name": name, "what": recipe.summary} for name, recipe in RECIPES.items()]
    return rows + [{"kind": "test", "name": name, "what": what} for name, what in TESTS.items()]
