"""What `weakspot train` does: one training judged on its own, or one by each recipe and the matrix.

What `weakspot train` says: a line for every epoch, the table at the end, what there is to choose from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from weakspot.cli.app import USAGE, Failure

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from weakspot.classifier import Classifier
    from weakspot.datasets import LabeledImages
    from weakspot.training import Matrix, TrainConfig


@dataclass(frozen=True)
class TrainingJob:
    """What every evaluation of `weakspot train` needs.

    Attributes:
        maker: seed to a network with fresh weights.
        data: images to train on.
        config: every number of the training.
        out: folder of the results.
        about: more entries for training.json.
        on_epoch: called with a network's name and its row after each epoch.
        advance: called with the current activity and the fraction done.
    """

    maker: Callable[[int], Classifier]
    data: LabeledImages
    config: TrainConfig
    out: Path
    about: Mapping[str, object]
    on_epoch: Callable[[str, Mapping[str, float]], None] | None
    advance: Callable[[str, float], None]


def fit_one(job: TrainingJob) -> tuple[nn.Module, dict[str, Any]]:
    """Train by one recipe: the trained network and the content of training.json."""
    from weakspot.training import train
    from weakspot.training.checkpoint import read_record

    recipe, on_epoch = job.config.recipe, job.on_epoch
    trained = train(
        job.maker(job.config.seed),
        job.data,
        job.config,
        out=job.out,
        about=job.about,
        on_epoch=None if on_epoch is None else (lambda row: on_epoch(recipe, row)),
        progress=lambda done: job.advance(f"training ({recipe})", done),
    )
    return trained, dict(read_record(job.out) or {})


def judge_own(
    job: TrainingJob, model: nn.Module, test: LabeledImages, *, limit: int | None, strongest: int
) -> dict[str, Any]:
    """Accuracy with its interval under every test."""
    from weakspot.statistics import proportion_interval
    from weakspot.training import TestConfig, judged_images, outcomes

    tested = judged_images(test, limit=limit, cache=job.out)
    channels = test.shape[0]
    tests = TestConfig.usual(job.config.resolved(channels).budget, channels, strongest=strongest)
    results = outcomes(model, tested, tests, progress=lambda done: job.advance("testing", done))
    rows = []
    for name, right in results.items():
        mean, low, high = proportion_interval(right.numpy())
        rows.append({"test": name, "accuracy": mean, "low": low, "high": high, "images": len(right)})
    return {"tests": rows}


def fit_matrix(
    job: TrainingJob,
    test: LabeledImages,
    recipes: Sequence[str],
    *,
    seeds: int,
    limit: int | None,
    strongest: int,
) -> dict[str, Any]:
    """Train by each recipe, test all networks, and write the matrix's tables and picture."""
    from weakspot.training import robustness_matrix

    matrix = robustness_matrix(
        job.maker,
        job.data,
        test,
        job.config,
        out=job.out,
        recipes=recipes,
        seeds=seeds,
        limit=limit,
        strongest=strongest,
        about=job.about,
        on_epoch=job.on_epoch,
        progress=job.advance,
    )
    _write(matrix, job.out)
    return {
        "accuracy": json.loads(matrix.accuracy.to_json(orient="records", double_precision=6)),
        "differences": json.loads(matrix.differences.to_json(orient="records", double_precision=6)),
        "stopped": dict(matrix.stopped),
    }


def _write(found: Matrix, out: Path) -> None:
    from weakspot._io.files import write_atomic
    from weakspot.report.figures import matrix_figure
    from weakspot.training import TESTS

    write_atomic(out / "accuracy.csv", lambda draft: found.accuracy.to_csv(draft, index=False))
    write_atomic(out / "differences.csv", lambda draft: found.differences.to_csv(draft, index=False))
    figure = matrix_figure(found.accuracy, _titles(found.accuracy, TESTS))
    write_atomic(out / "matrix.png", lambda draft: figure.savefig(draft, dpi=150, format="png"))


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


def maker_of(
    model: str | None, weights: Path | None, data: LabeledImages, device: str
) -> Callable[[int], Classifier]:
    """Seed to a network for the data: of the zoo with fresh weights, or whatever the spec names."""
    from weakspot.models import load
    from weakspot.zoo import ALIASES, NETWORKS, build

    name = model or _usual(data)
    if name in NETWORKS or name in ALIASES:

        def make(seed: int) -> Classifier:
            fresh = build(
                name, classes=len(data.class_names), channels=data.shape[0], size=data.shape[1:], seed=seed
            )
            return load(fresh, weights=weights, device=device, class_names=data.class_names)

        return make
    if ":" not in name:
        from weakspot._checks import unknown_choice

        raise Failure(
            unknown_choice("--model", name, [*NETWORKS, *ALIASES], remedy="or give package.module:factory"),
            USAGE,
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


def _usual(data: LabeledImages) -> str:
    return "two_conv" if data.shape[0] == 1 else "resnet20"


def description(model: str | None, data: LabeledImages) -> dict[str, Any]:
    """What training.json says of the network, enough to build one of the zoo again."""
    from weakspot.zoo import ALIASES, NETWORKS

    name = model or _usual(data)
    name = ALIASES.get(name, name)
    made = {"zoo": name} if name in NETWORKS else {"spec": name}
    return made | {
        "classes": len(data.class_names),
        "channels": data.shape[0],
        "size": list(data.shape[1:]),
        "class_names": list(data.class_names),
    }


WIDE = 125  # columns of a terminal that takes the table with intervals


def epoch_logger() -> Callable[[str, Mapping[str, float]], None]:
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


def print_training(said: Mapping[str, Any], seconds: float, out: Path, *, matrix: bool) -> None:
    """The table of accuracies, what stopped early, where all is written and what to do next."""
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
                f"{row['accuracy']:.1%}"
                + (
                    f" ({row['low']:.1%}-{row['high']:.1%})"
                    if wide and row["low"] is not None and row["low"] == row["low"]
                    else ""
                )
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


def everything() -> list[dict[str, str]]:
    """Recipes and tests, a row each."""
    from weakspot.training import RECIPES, TESTS

    rows = [{"kind": "recipe", "name": name, "what": recipe.summary} for name, recipe in RECIPES.items()]
    return rows + [{"kind": "test", "name": name, "what": what} for name, what in TESTS.items()]
