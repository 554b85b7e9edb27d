"""What `weakspot train` does: one training judged on its own, or one by each recipe and the matrix."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weakspot.cli.app import USAGE, Failure

if TYPE_CHECKING:
    import pandas as pd

    from weakspot.classifier import Classifier
    from weakspot.datasets import Labelled
    from weakspot.defenses.training import Matrix


def fit_one(
    maker: Callable[[int], Classifier],
    data: Labelled,
    recipe: str,
    seed: int,
    out: Path,
    options: Mapping[str, Any],
    told: Callable[[str, Mapping[str, float]], None] | None,
    advance: Callable[[str, float], None],
) -> dict[str, Any]:
    """Train by one recipe: what training.json says of it, and the trained "model"."""
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


def judge_own(
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


def fit_matrix(
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
    """Train by each recipe, judge all by all tests, and write the matrix's table and picture."""
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


def maker_of(
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


def _usual(data: Labelled) -> str:
    return "two_conv" if data.shape[0] == 1 else "resnet20"


def description(model: str | None, data: Labelled) -> dict[str, Any]:
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
