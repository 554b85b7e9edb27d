"""The robustness matrix: networks trained by every recipe against every test."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from weakspot._checks import check_count
from weakspot._io.files import write_atomic
from weakspot._progress import Progress
from weakspot.datasets import LabeledImages
from weakspot.models.identity import fingerprint
from weakspot.statistics import mean_interval, paired_proportion_interval, proportion_interval
from weakspot.training.checkpoint import Record, read_record
from weakspot.training.config import TrainConfig, find_recipe
from weakspot.training.robust_accuracy import TESTS, Judged, TestConfig, judged_images, outcomes
from weakspot.training.trainer import train

if TYPE_CHECKING:
    import pandas as pd

MATRIX_RECIPES = ("standard", "localized", "foreground", "random_mask", "full", "noise")
MASK_PROGRESS, TRAIN_PROGRESS = 0.02, 0.85  # fraction of the whole; fraction of one network
Outcomes = Mapping[str, Mapping[str, Tensor]]
"""By "RECIPE-SEED" and test: bool (N,), whether each image is classified correctly."""


@dataclass(frozen=True, eq=False, repr=False)
class Matrix:
    """Accuracies of networks trained by several recipes.

    Attributes:
        accuracy: a row for each recipe and test: recipe, test, accuracy, low, high (95% interval over images, of the
            mean over seeds), spread (largest less smallest over seeds), seeds, images.
        differences: a row for each test and ordered pair of recipes: test, recipe, against, difference, low, high (95%
            interval over images of the paired difference; NaN where `statistics` gives none).
        stopped: for each network that stopped early, the reason.
    """

    accuracy: pd.DataFrame
    differences: pd.DataFrame
    stopped: Mapping[str, str]

    def __repr__(self) -> str:
        rates = self.accuracy.pivot_table("accuracy", "recipe", "test", sort=False)
        lines = [
            f"  {recipe}: " + ", ".join(f"{test} {rate:.1%}" for test, rate in row.items())
            for recipe, row in rates.iterrows()
        ]
        stopped = [f"  stopped early: {', '.join(self.stopped)}"] if self.stopped else []
        return "\n".join([f"Matrix({len(rates)} recipes, {rates.shape[1]} tests)", *lines, *stopped])


def robustness_matrix(
    make: Callable[[int], nn.Module],
    data: LabeledImages,
    test: LabeledImages,
    config: TrainConfig = TrainConfig(),  # noqa: B008 - frozen
    *,
    out: Path | str,
    recipes: Sequence[str] = MATRIX_RECIPES,
    seeds: int = 1,
    limit: int | None = None,
    strongest: int = 500,
    equal_passes: bool = False,
    about: Record | None = None,
    on_epoch: Callable[[str, Mapping[str, float]], None] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Matrix:
    """Train a network by every recipe and seed, and test each in every way (after arXiv 1909.04779).

    All networks of one seed start from the same weights and see the images in the same order. Finished networks and
    tests are stored: the same call resumes after a crash.

    Args:
        make: seed to a network with fresh weights.
        data: images to train on.
        test: images to test on.
        config: of all trainings. Its `recipe` is replaced by each of `recipes`; its `seed` is that of the first
            network of each recipe, and further networks have the following seeds.
        out: folder. Each network has a folder RECIPE-SEED in it.
        recipes: names of recipes.
        seeds: networks per recipe.
        limit: test only this many images, the first ones. Default: all.
        strongest: images for the ensemble of attacks, the first ones.
        equal_passes: train recipes that cost less per epoch for more epochs, so that all networks see as many forward
            and backward passes. `config.epochs` is then that of the most expensive recipe.
        about: more entries for every training.json.
        on_epoch: called with a network's name and its row after each epoch and, at the end, its accuracies.
        progress: called with the current activity and the fraction done.

    Raises:
        ValueError: if an argument does not fit, or another process trains one of the networks.
    """
    recipes = list(dict.fromkeys(recipes))
    if not recipes:
        raise ValueError("recipes must have at least one name, got none")
    for name in recipes:
        find_recipe(name)
    check_count("seeds", seeds)
    _check_alike(data, test)
    out = Path(out)
    tests = TestConfig.usual(config.resolved(data.shape[0]).budget, data.shape[0], strongest=strongest)
    epochs = dict.fromkeys(recipes, config.epochs)
    if equal_passes:
        passes = {recipe: replace(config, recipe=recipe).resolved(data.shape[0]).passes for recipe in recipes}
        epochs = {
            recipe: round(config.epochs * max(passes.values()) / cost) for recipe, cost in passes.items()
        }

    def part(activity: str, start: float, end: float) -> Callable[[float], None] | None:
        return None if progress is None else lambda done: progress(activity, start + (end - start) * done)

    tested = judged_images(
        test, limit=limit, cache=out, progress=part("finding backgrounds", 0, MASK_PROGRESS)
    )
    numbers = range(config.seed, config.seed + seeds)
    names = [f"{recipe}-{number}" for number in numbers for recipe in recipes]
    results: dict[str, dict[str, Tensor]] = {}
    stopped = {}
    for position, name in enumerate(names):
        # One seed means one start and one order of images for all recipes, which makes the differences paired.
        recipe, _, seed = name.rpartition("-")
        begin, middle, end = (
            MASK_PROGRESS + (1 - MASK_PROGRESS) * (position + fraction) / len(names)
            for fraction in (0, TRAIN_PROGRESS, 1)
        )
        network = train(
            make(int(seed)),
            data,
            replace(config, recipe=recipe, seed=int(seed), epochs=epochs[recipe]),
            out=out / name,
            cache=out,
            about=about,
            on_epoch=None if on_epoch is None else (lambda row, name=name: on_epoch(name, row)),  # type: ignore[misc]
            progress=part(f"training {name}", begin, middle),
        ).eval()
        reason = (read_record(out / name) or {}).get("stopped")
        if reason:
            stopped[name] = str(reason)
        results[name] = stored_outcomes(
            out / name, network, tested, tests, progress=part(f"testing {name}", middle, end)
        )
        if on_epoch is not None:
            on_epoch(name, {test: float(right.double().mean()) for test, right in results[name].items()})
    return Matrix(
        accuracy_table(results, recipes, numbers), difference_table(results, recipes, numbers), stopped
    )


def _check_alike(data: LabeledImages, test: LabeledImages) -> None:
    """Raises ValueError unless the test images have the shape and the classes of the training images."""
    if data.shape != test.shape:
        raise ValueError(
            f"test must have images of {data.shape} (channels, height, width) as data, got {test.shape}"
        )
    if int(test.labels.max()) >= len(data.class_names):
        raise ValueError(
            f"test must have the {len(data.class_names)} classes of data, got class {int(test.labels.max())}"
        )


def stored_outcomes(
    folder: Path,
    network: nn.Module,
    test: Judged,
    tests: TestConfig,
    *,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The outcomes that an earlier call stored for this network, these images and these attacks, else new ones."""
    key = [repr(tests), fingerprint(network), version("weakspot")]
    digest = hashlib.sha256(json.dumps(key).encode())
    for tensor in (test.images, test.labels, test.backgrounds):
        digest.update(tensor.numpy().tobytes())
    path = folder / f"outcomes-{digest.hexdigest()[:16]}.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as stored:
            return {name: torch.from_numpy(stored[name]) for name in TESTS}
    result = outcomes(network, test, tests, progress=progress)
    arrays = {name: right.numpy() for name, right in result.items()}

    def write(draft: Path) -> None:
        with draft.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    write_atomic(path, write, durable=True)
    return result


def accuracy_table(results: Outcomes, recipes: Sequence[str], seeds: Sequence[int]) -> pd.DataFrame:
    """`Matrix.accuracy`."""
    import pandas as pd

    rows = []
    for recipe in recipes:
        for test in TESTS:
            right = _by_image(results, recipe, test, seeds)
            by_seed = right.mean(1)
            mean, low, high = mean_interval(right.mean(0))
            if np.isnan(low):
                # Few images, or seeds that hardly differ: bounds from the images that all or any seed gets right.
                low, high = proportion_interval(right.min(0) > 0)[1], proportion_interval(right.max(0) > 0)[2]
            rows.append(
                {
                    "recipe": recipe,
                    "test": test,
                    "accuracy": mean,
                    "low": low,
                    "high": high,
                    "spread": float(by_seed.max() - by_seed.min()),
                    "seeds": len(seeds),
                    "images": right.shape[1],
                }
            )
    return pd.DataFrame(rows)


def difference_table(results: Outcomes, recipes: Sequence[str], seeds: Sequence[int]) -> pd.DataFrame:
    """`Matrix.differences`."""
    import pandas as pd

    rows = []
    for test in TESTS:
        for one, other in permutations(recipes, 2):
            first, second = (_by_image(results, recipe, test, seeds) for recipe in (one, other))
            # Bonett and Price's adjusted Wald interval for the paired yes/no outcomes of one seed.
            mean, low, high = (
                paired_proportion_interval(first[0] > 0, second[0] > 0)
                if len(seeds) == 1
                else mean_interval((first - second).mean(0))
            )
            rows.append(
                {"test": test, "recipe": one, "against": other, "difference": mean, "low": low, "high": high}
            )
    return pd.DataFrame(rows, columns=["test", "recipe", "against", "difference", "low", "high"])


def _by_image(results: Outcomes, recipe: str, test: str, seeds: Sequence[int]) -> np.ndarray:
    """(seeds, images), 1 where classified correctly."""
    return np.stack([results[f"{recipe}-{seed}"][test].double().numpy() for seed in seeds])
