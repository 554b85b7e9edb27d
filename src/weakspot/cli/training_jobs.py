"""Training jobs: one network, alone or tested, or one for each recipe of the matrix, and how their results print."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weakspot._checks import unknown_choice
from weakspot._io.files import write_atomic
from weakspot._progress import Display
from weakspot.classifier import Classifier
from weakspot.cli.app import Failure, console, notes
from weakspot.cli.output import add_row, json_rows, make_table, print_table, print_text
from weakspot.datasets import LabeledImages
from weakspot.models import load
from weakspot.statistics import proportion_interval
from weakspot.statistics.number_format import counted
from weakspot.training import (
    RECIPES,
    TESTS,
    Matrix,
    TestConfig,
    TrainConfig,
    judged_images,
    outcomes,
    robustness_matrix,
    train,
)
from weakspot.training.checkpoint import read_record
from weakspot.zoo import ALIASES, NETWORKS, build

Results = dict[str, Any]  # the document of --json
OnEpoch = Callable[[str, Mapping[str, float]], None]
WIDE = 125  # columns of a terminal on which the table has intervals
TITLES = {
    "clean": "clean",
    "localized": "PGD, background",
    "full": "PGD, everywhere",
    "strongest": "ensemble, everywhere",
    "swapped": "background swapped",
}


@dataclass(frozen=True)
class Evaluation:
    """What networks are tested on.

    Attributes:
        images: of the test split.
        limit: how many of them, the first; None for all.
        strongest: how many of these the ensemble of attacks gets, the first.
    """

    images: LabeledImages
    limit: int | None
    strongest: int


@dataclass(frozen=True)
class TrainingJob:
    """What is trained, and how.

    Attributes:
        make: seed to a network with fresh weights.
        data: images to train on.
        config: recipe, budget and all numbers.
        out: folder of the results.
        about: more entries for training.json.
        on_epoch: called with a network's name and its row after each epoch.
        display: of the current step.
    """

    make: Callable[[int], Classifier]
    data: LabeledImages
    config: TrainConfig
    out: Path
    about: dict[str, object]
    on_epoch: OnEpoch | None
    display: Display

    def train(self, evaluation: Evaluation | None = None) -> Results:
        """Train one network: the content of training.json, and the accuracy on every test."""
        recipe, on_epoch = self.config.recipe, self.on_epoch
        trained = train(
            self.make(self.config.seed),
            self.data,
            self.config,
            out=self.out,
            about=self.about,
            on_epoch=None if on_epoch is None else (lambda row: on_epoch(recipe, row)),
            progress=self.display.step(f"training ({recipe})"),
        )
        results = dict(read_record(self.out) or {})
        if evaluation is None:
            return results

        channels = self.data.shape[0]
        budget = self.config.resolved(channels).budget
        rows = []
        tested = outcomes(
            trained,
            judged_images(evaluation.images, limit=evaluation.limit, cache=self.out),
            TestConfig.usual(budget, channels, strongest=evaluation.strongest),
            progress=self.display.step("testing"),
        )
        for name, correct in tested.items():
            mean, low, high = proportion_interval(correct.numpy())
            rows.append({"test": name, "accuracy": mean, "low": low, "high": high, "images": len(correct)})
        return results | {"tests": rows}

    def matrix(self, evaluation: Evaluation, recipes: Sequence[str], seeds: int) -> Results:
        """Train networks by each recipe, test all of them, and write the tables and the figure."""
        step = self.display.step("training networks")

        def report(activity: str, fraction: float) -> None:
            step.name = activity
            step(fraction)

        matrix = robustness_matrix(
            self.make,
            self.data,
            evaluation.images,
            self.config,
            out=self.out,
            recipes=recipes,
            seeds=seeds,
            limit=evaluation.limit,
            strongest=evaluation.strongest,
            about=self.about,
            on_epoch=self.on_epoch,
            progress=report,
        )
        _write(matrix, self.out)
        return {
            "accuracy": json_rows(matrix.accuracy, digits=6),
            "differences": json_rows(matrix.differences, digits=6),
            "stopped": dict(matrix.stopped),
        }


def _write(matrix: Matrix, out: Path) -> None:
    from weakspot.report.figures import matrix_figure

    for name, table in (("accuracy.csv", matrix.accuracy), ("differences.csv", matrix.differences)):
        # The default binds the table of this turn of the loop.
        write_atomic(out / name, lambda draft, table=table: table.to_csv(draft, index=False))  # type: ignore[misc]
    images = matrix.accuracy.groupby("test")["images"].first()
    titles = {test: f"{title}\n{images[test]:,} images" for test, title in TITLES.items() if test in images}
    figure = matrix_figure(matrix.accuracy, titles)
    write_atomic(out / "matrix.png", lambda draft: figure.savefig(draft, dpi=150, format="png"))


def network_maker(
    model: str | None, weights: Path | None, data: LabeledImages, device: str
) -> Callable[[int], Classifier]:
    """A function from a seed to a network for the data.

    Args:
        model: a network of the zoo, or package.module:factory.
        weights: file of initial weights, or None for fresh ones.
        data: decides the default network, its classes, channels and size.
        device: of the network.
    """
    name = model or _default_network(data)
    if name in NETWORKS or name in ALIASES:
        classes, (channels, *size) = len(data.class_names), data.shape

        def make(seed: int) -> Classifier:
            fresh = build(name, classes=classes, channels=channels, size=(size[0], size[1]), seed=seed)
            return load(fresh, weights=weights, device=device, class_names=data.class_names)

        return make
    if ":" not in name:
        choices = [*NETWORKS, *ALIASES]
        raise Failure(unknown_choice("--model", name, choices, remedy="or give package.module:factory"))

    def make_own(seed: int) -> Classifier:
        # A factory draws its weights from the global generator.
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return load(
                name, weights=weights, device=device, input_size=data.shape[1:], class_names=data.class_names
            )

    return make_own


def _default_network(data: LabeledImages) -> str:
    return "two_conv" if data.shape[0] == 1 else "resnet20"


def describe_network(model: str | None, data: LabeledImages) -> dict[str, object]:
    """The network's entry of training.json, enough to build one of the zoo again."""
    name = model or _default_network(data)
    name = ALIASES.get(name, name)
    return {
        "zoo" if name in NETWORKS else "spec": name,
        "classes": len(data.class_names),
        "channels": data.shape[0],
        "size": list(data.shape[1:]),
        "class_names": list(data.class_names),
    }


def log_epoch(name: str, row: Mapping[str, float]) -> None:
    """Print a line to standard error for an epoch, or for the tests at the end."""
    if "epoch" not in row:
        tests = ", ".join(f"{test} {value:.1%}" for test, value in row.items())
        notes.print(f"{name}: {tests}", soft_wrap=True)
        return
    tested = ", ".join(f"{key} {row[key]:.1%}" for key in ("clean", "robust") if key in row)
    notes.print(
        f"{name}, epoch {row['epoch']:.0f}: loss {row['loss']:.3f}, held out: {tested or 'none'}; "
        f"{row['seconds']:.0f} s",
        style="dim",
        soft_wrap=True,
    )


def print_training(results: Results, seconds: float, out: Path, *, matrix: bool) -> None:
    """Print the accuracies, the trainings that stopped early, and what to do next."""
    rows = results.get("accuracy") or results.get("tests") or []
    if rows:
        tests = dict.fromkeys(row["test"] for row in rows)
        table = make_table([*(["recipe"] if matrix else []), *tests], fold=())
        for name in dict.fromkeys(row.get("recipe", "") for row in rows):
            own = [row for row in rows if row.get("recipe", "") == name]
            cells = [_accuracy(row, interval=console().width >= WIDE) for row in own]
            add_row(table, *([name] if matrix else []), *cells)
        print_table(table)
        print_text(_images_sentence(rows), style="dim")
    stopped = results.get("stopped") or {}
    for name, why in stopped.items() if matrix else [("training", stopped)] if stopped else []:
        print_text(f"{name} stopped early: {why}", style="yellow")
    network, use = results.get("network", {}), shlex.quote(str(out))
    if "spec" in network:
        # A factory does not know the size of the images that its network was trained on.
        size = "x".join(map(str, network["size"]))
        weights = shlex.quote(str(out / "model.safetensors"))
        use = f"{network['spec']} --weights {weights} --size {size}"
    following = (
        "look at matrix.png and accuracy.csv" if matrix else f"next: weakspot explain IMAGES --model {use}"
    )
    print_text(f"\nWritten to {out.resolve()} in {seconds:.0f} s; {following}", style="dim")


def _images_sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many images the accuracies are fractions of: a percentage of six images says little."""
    images = {str(row["test"]): int(row["images"]) for row in rows}
    if len(set(images.values())) == 1:
        return f"Tested on {counted(next(iter(images.values())))}."
    return f"Images tested: {', '.join(f'{test} {count:,}' for test, count in images.items())}."


def _accuracy(row: Mapping[str, float | None], *, interval: bool) -> str:
    # low is null in JSON, or NaN, where there is no interval.
    known = interval and row["low"] is not None and row["low"] == row["low"]
    return f"{row['accuracy']:.1%}" + (f" ({row['low']:.1%}-{row['high']:.1%})" if known else "")


def list_choices() -> list[dict[str, str]]:
    """Recipes and tests, one row each."""
    rows = [{"kind": "recipe", "name": name, "what": recipe.summary} for name, recipe in RECIPES.items()]
    return rows + [{"kind": "test", "name": name, "what": summary} for name, summary in TESTS.items()]
