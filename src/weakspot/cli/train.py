"""`weakspot train`: train a network by a recipe, or one by each of several recipes and compare them."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from weakspot._checks import unknown_choice
from weakspot._interrupts import INTERRUPTED
from weakspot.budgets import read_budget
from weakspot.cli.app import RESUMABLE, Failure, command
from weakspot.cli.options import (
    ATTACK,
    MODEL,
    STEPS,
    DeviceOption,
    OutputOptions,
    SeedOption,
    WeightsOption,
    argument,
    flag,
    option,
    parse_names,
    parse_number,
    parse_size,
    refuse,
)
from weakspot.cli.output import print_choices, print_json, print_text, working
from weakspot.cli.training_jobs import (
    Evaluation,
    TrainingJob,
    describe_network,
    list_choices,
    log_epoch,
    network_maker,
    print_training,
)
from weakspot.datasets import LabeledImages, read_labeled
from weakspot.models.specs import find_device
from weakspot.training import MATRIX_RECIPES, TrainConfig
from weakspot.training.config import find_recipe

EVALUATIONS = ("none", "own", "matrix")
QUICK_LIMIT = 2000
STRONGEST = 500  # images for the ensemble of attacks


@dataclass(frozen=True)
class DataOptions:
    """How image files are read. Arrays are taken as they are."""

    size: Annotated[
        str | None, option("HxW", "Height and width that images are resized to.", default="32x32")
    ] = None
    channels: Annotated[int, option("N", "Read image files as gray (1) or color (3).")] = 3
    workers: Annotated[int, option("N", "Processes that decode image files.", least=0)] = 2
    limit: Annotated[
        int | None,
        option("N", "Use at most N training images, chosen by --seed, and the first N test images.", least=2),
    ] = None


@dataclass(frozen=True)
class TrainingOptions:
    """The recipe and the numbers of the training."""

    recipe: Annotated[
        str, option("--recipe -r NAME", "Which images are attacked, and where; see --list.")
    ] = "localized"
    epochs: Annotated[int, option("N", "Passes over the data.", least=1)] = 10
    batch_size: Annotated[int, option("N", "Images per update.", least=1)] = 128
    learning_rate: Annotated[
        float, option("X", "Learning rate at the start; it falls to zero along a cosine.")
    ] = 0.1
    augment: Annotated[
        str | None, option("NAMES", "none, crop, or crop,flip.", default="none for gray, else crop,flip")
    ] = None
    precision: Annotated[str, option("NAME", "32-true, 16-mixed or bf16-mixed.")] = "32-true"
    attacked_fraction: Annotated[
        float, option("X", "Fraction of each batch that is attacked, 0 to 1.", panel=ATTACK)
    ] = 0.5
    budget: Annotated[
        str | None,
        option(
            "--budget -b KIND:EPS",
            "How much an image may change: linf:8/255, l2:0.5.",
            default="linf:0.3 for gray, else linf:8/255",
            panel=ATTACK,
        ),
    ] = None
    steps: Annotated[
        int | None, option("N", STEPS, default="40 for gray, else 10", least=1, panel=ATTACK)
    ] = None
    step_size: Annotated[
        str | None,
        option(
            "X",
            "Size of each step: 0.01, 2/255.",
            default="0.01 for gray, else 2/255; 2.5 x EPS / steps with --budget",
            panel=ATTACK,
        ),
    ] = None

    def config(self, *, seed: int, workers: int) -> TrainConfig:
        """The configuration that `training.train` takes."""
        return TrainConfig(
            recipe=self.recipe,
            budget=None if self.budget is None else read_budget(self.budget),
            epochs=self.epochs,
            attacked_fraction=self.attacked_fraction,
            seed=seed,
            steps=self.steps,
            step_size=None if self.step_size is None else parse_number("--step-size", self.step_size),
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            augment=self.augment,
            precision=self.precision,
            workers=workers,
        )


@dataclass(frozen=True)
class EvaluationOptions:
    """How the trained network is tested."""

    evaluate: Annotated[
        str,
        option(
            "MODE",
            "none; own: the network on every test; matrix: a network for each of --recipes on every test.",
        ),
    ] = "none"
    recipes: Annotated[
        str | None,
        option("NAMES", "Recipes of the matrix, separated by commas.", default=",".join(MATRIX_RECIPES)),
    ] = None
    seeds: Annotated[int, option("N", "Networks per recipe of the matrix.", least=1)] = 1
    strongest: Annotated[
        int, option("N", "Run the ensemble of attacks on only the first N test images.", least=1)
    ] = STRONGEST

    def check(self, context: typer.Context) -> None:
        """Refuse options that this evaluation would ignore."""
        if self.evaluate not in EVALUATIONS:
            raise Failure(unknown_choice("--evaluate", self.evaluate, EVALUATIONS))
        if self.evaluate == "matrix":
            refuse(context, ["recipe"], "with --evaluate matrix (give --recipes)")
            return
        refuse(context, ["recipes", "seeds"], "without --evaluate matrix")
        if self.evaluate == "none":
            refuse(context, ["strongest"], "without --evaluate own or matrix")

    def chosen(self, recipe: str) -> Sequence[str]:
        """The recipes that networks are trained by."""
        if self.evaluate != "matrix":
            return [recipe]
        return MATRIX_RECIPES if self.recipes is None else parse_names(self.recipes)


@command(
    "weakspot train mnist/ --recipe localized --out runs/localized",
    "weakspot train cifar-10-batches-bin/ --recipe full --model resnet18 --epochs 30 --out runs/full",
    "weakspot train photos/ --size 64x64 --recipe fast --budget linf:4/255 --out runs/fast",
    "weakspot train mnist/ --evaluate matrix --recipes standard,localized,full --out runs/matrix",
    "torchrun --nproc-per-node 4 -m weakspot train cifar/ --precision bf16-mixed --out runs/four",
    "weakspot explain digits/ --model runs/localized",
)
def train(
    context: typer.Context,
    reading: DataOptions,
    training: TrainingOptions,
    evaluation: EvaluationOptions,
    output: OutputOptions,
    data: Annotated[
        str | None,
        argument(
            "DATA",
            "A folder of MNIST's IDX files, of CIFAR's binary files, or of one folder per class; an .npz file; or "
            "hf:DIRECTORY_OR_NAME.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        option(
            "--model -m MODEL",
            "two_conv, resnet20 or resnet18 with fresh weights, or package.module:factory.",
            default="two_conv for gray, else resnet20",
            panel=MODEL,
        ),
    ] = None,
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
    quick: Annotated[
        bool,
        flag("--quick", f"At most {QUICK_LIMIT:,} images and one epoch: shows that it works, not how well."),
    ] = False,
    seed: SeedOption = 0,
    out: Annotated[
        Path, option("FOLDER", "Folder for model.safetensors, training.json and checkpoints.")
    ] = Path("weakspot-train"),
    list_all: Annotated[bool, flag("--list", "List recipes and tests, and exit.")] = False,
) -> None:
    """Train a network; --recipe chooses where part of each batch is attacked first, if at all.

    Writes the weights (safetensors) and how they were made. After each epoch, held-out images are tested with and
    without an attack. If training is interrupted, the same command resumes it, and ends with the same weights.
    """
    if list_all:
        print_choices(list_choices(), as_json=output.as_json)
        return
    if data is None:
        raise Failure("no data was named (give a folder, an .npz file or hf:NAME)")
    evaluation.check(context)
    if quick:
        refuse(context, ["limit", "epochs"], "with --quick, which sets its own (leave out one or the other)")
        reading, training = replace(reading, limit=QUICK_LIMIT), replace(training, epochs=1)
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started
    silent = output.silent or not first
    started = time.perf_counter()
    try:
        with working(quiet=output.quiet, silent=silent) as display:
            where = str(find_device(device))
            size = parse_size(reading.size) or (32, 32)
            recipes = evaluation.chosen(training.recipe)
            _check_attacked(context, recipes, training.attacked_fraction)
            display.step("reading the data")
            images = read_labeled(data, size=size, channels=reading.channels)
            if images.held:
                refuse(
                    context,
                    ["size", "channels", "workers"],
                    f"with {data}, which holds arrays, not image files",
                )
            # The test split is read first, so that an error in it shows before hours of training.
            test = None
            if evaluation.evaluate != "none":
                test = read_labeled(data, split="test", size=size, channels=reading.channels)
            job = TrainingJob(
                make=network_maker(model, weights, images, where),
                data=images if reading.limit is None else _sample(images, reading.limit, seed),
                config=training.config(seed=seed, workers=reading.workers),
                out=out,
                about={"network": describe_network(model, images)},
                on_epoch=None if silent else log_epoch,
                display=display,
            )
            if test is None:
                results = job.train()
            else:
                tests = Evaluation(test, reading.limit, evaluation.strongest)
                matrix = evaluation.evaluate == "matrix"
                results = job.matrix(tests, recipes, evaluation.seeds) if matrix else job.train(tests)
    except KeyboardInterrupt:
        # Written as soon as the data is read; in a folder of its own for each network of a matrix.
        begun = any(out.rglob("training.json"))
        kept = f"the same command resumes from {out}" if begun else "nothing was written"
        raise Failure(f"interrupted; {kept}", RESUMABLE if begun else INTERRUPTED) from None
    if first and output.as_json:
        print_json({**results, "folder": str(out.resolve())})
    elif first and not output.quiet:
        print_training(results, time.perf_counter() - started, out, matrix=evaluation.evaluate == "matrix")
        if quick:
            print_text(
                f"--quick: at most {QUICK_LIMIT:,} images and one epoch, which shows that it works, not how well."
            )


def _sample(images: LabeledImages, limit: int, seed: int) -> LabeledImages:
    """At most so many of the images, in their order."""
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:limit]
    return images.subset(rows.sort().values)


def _check_attacked(context: typer.Context, recipes: Sequence[str], fraction: float) -> None:
    """Refuse options of an attack that no recipe makes."""
    searches = {find_recipe(name).search for name in recipes}
    named = f"the recipe{'s' if len(recipes) > 1 else ''} {', '.join(recipes)}"
    steps = ["steps", "step_size"]
    if searches <= {"none"}:
        refuse(context, ["attacked_fraction", *steps], f"with {named}, which attacks nothing")
    elif "descent" not in searches:
        refuse(context, steps, f"with {named}, which does not use PGD")
    elif not fraction:
        refuse(context, steps, "with --attacked-fraction 0, which attacks nothing")
