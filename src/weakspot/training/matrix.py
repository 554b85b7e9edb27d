"""The evaluation matrix: networks trained by every recipe against every test."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import weakspot
from weakspot._checks import check_count, check_seed
from weakspot._io.files import write_whole
from weakspot.datasets import LabeledImages
from weakspot.models.specs import fingerprint
from weakspot.statistics import mean_interval, paired_proportion_interval, proportion_interval
from weakspot.training.checkpoint import read_record
from weakspot.training.config import defaults, find_recipe
from weakspot.training.outcomes import TESTS, Judged, judged_images, outcomes
from weakspot.training.trainer import train

if TYPE_CHECKING:
    import pandas as pd


RECIPES = ("standard", "localized", "foreground", "random_mask", "full", "noise")
TEST_STEPS = {
    1: 40,
    3: 20,
}  # of PGD by channels: MNIST 40 and CIFAR-10 20, as Madry et al. 2018 test


@dataclass(frozen=True)
class Matrix:
    """What came out.

    Attributes:
        accuracy: a row for each recipe and test: recipe, test, accuracy, low, high (95% interval over images, of the
            mean over seeds), spread (between the seeds, largest less smallest), seeds, images.
        differences: a row for each test and ordered pair of recipes: test, recipe, against, difference, low, high, the
            95% interval over images of the paired difference; NaN where `statistics` gives none.
        stopped: for each network that stopped early, why.
    """

    accuracy: pd.DataFrame
    differences: pd.DataFrame
    stopped: Mapping[str, str]


def robustness_matrix(
    make: Callable[[int], nn.Module],
    data: LabeledImages,
    test: LabeledImages,
    *,
    out: Path,
    recipes: Sequence[str] = RECIPES,
    seeds: int = 1,
    seed: int = 0,
    limit: int | None = None,
    strongest: int = 500,
    about: Mapping[str, Any] | None = None,
    on_epoch: Callable[[str, Mapping[str, float]], None] | None = None,
    progress: Callable[[str, float], None] | None = None,
    **options: Any,
) -> Matrix:
    """Train a network by every recipe and seed, and test each in every way (arXiv 1909.04779).

    All networks of one seed start from the same weights and see the images in the same order. What is finished stays
    finished: called again after any death, the matrix goes on.

    Args:
        make: seed to a network with fresh weights.
        data: images to train on.
        test: images to test on.
        out: folder; each network lies in RECIPE-SEED below it.
        recipes: names of recipes.
        seeds: networks per recipe.
        seed: of the first network of each; those after it have the next.
        limit: test images, the first; all where not given.
        strongest: images for the ensemble of attacks, the first of these.
        about: what every training.json says besides.
        on_epoch: called with a network's name and its row after each epoch and, at last, its accuracies.
        progress: called with what is being done and the share done.
        **options: of `train`.

    Raises:
        ValueError: when an argument does not fit, naming it, or another process trains one of the networks.
    """
    recipes = list(dict.fromkeys(recipes))
    for name in recipes:
        find_recipe(name)
    if not recipes:
        raise ValueError("recipes is empty; accepted is at least one name")
    check_count("seeds", seeds)
    check_count("strongest", strongest)
    check_seed(seed)
    _check_alike(data, test)
    out = Path(out)
    budget = options.get("budget") or defaults(data.shape[0])["budget"]
    steps = TEST_STEPS.get(data.shape[0], 20)
    numbers = range(seed, seed + seeds)
    names = [f"{recipe}-{number}" for number in numbers for recipe in recipes]

    def shown(what: str, start: float, end: float) -> Callable[[float], None] | None:
        return None if progress is None else lambda done: progress(what, start + (end - start) * done)

    tested = judged_images(test, limit=limit, masks=out, progress=shown("finding backgrounds", 0, 0.02))
    found: dict[str, dict[str, Tensor]] = {}
    stopped = {}
    for number, name in enumerate(names):
        recipe, _, own = name.rpartition("-")
        begin, middle, end = (0.02 + 0.98 * (number + part) / len(names) for part in (0, 0.85, 1))
        network = train(
            make(int(own)),
            data,
            recipe=recipe,
            seed=int(own),
            out=out / name,
            masks=out,
            about=about,
            on_epoch=None if on_epoch is None else (lambda row, name=name: on_epoch(name, row)),  # type: ignore[misc]
            progress=shown(f"training {name}", begin, middle),
            **options,
        ).eval()
        why = (read_record(out / name) or {}).get("stopped")
        if why:
            stopped[name] = why
        asked = {"budget": budget, "steps": steps, "strongest": strongest}
        found[name] = _kept_outcomes(
            out / name, network, tested, asked, shown(f"testing {name}", middle, end)
        )
        if on_epoch is not None:
            on_epoch(name, {test: float(right.double().mean()) for test, right in found[name].items()})
    return Matrix(_accuracy(found, recipes, numbers), _differences(found, recipes, numbers), stopped)


def _check_alike(data: LabeledImages, test: LabeledImages) -> None:
    """Raises ValueError unless the test images are of the training's shape and classes."""
    if data.shape != test.shape:
        raise ValueError(
            f"test has images of {test.shape} and data of {data.shape} (channels, height, width); accepted is one shape"
        )
    if int(test.labels.max()) >= len(data.class_names):
        raise ValueError(
            f"test holds class {int(test.labels.max())}; the data has {len(data.class_names)} classes, from 0"
        )


def _kept_outcomes(
    folder: Path,
    network: nn.Module,
    test: Judged,
    asked: Mapping[str, Any],
    progress: Callable[[float], None] | None,
) -> dict[str, Tensor]:
    """The outcomes that an earlier call kept for this network, these images and these attacks, else made now."""
    digest = hashlib.sha256(json.dumps([repr(asked), fingerprint(network), weakspot.__version__]).encode())
    for tensor in test:
        digest.update(tensor.numpy().tobytes())
    path = folder / f"outcomes-{digest.hexdigest()[:16]}.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as kept:
            return {name: torch.from_numpy(kept[name]) for name in TESTS}
    made = outcomes(network, test, **asked, progress=progress)

    def write(draft: Path) -> None:
        with draft.open("wb") as file:
            np.savez_compressed(
                file, allow_pickle=False, **{name: right.numpy() for name, right in made.items()}
            )

    write_whole(path, write, durable=True)
    return made


def _accuracy(
    found: Mapping[str, Mapping[str, Tensor]], recipes: Sequence[str], seeds: Sequence[int]
) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for recipe in recipes:
        for test in TESTS:
            right = _by_image(found, recipe, test, seeds)
            each = right.mean(1)
            mean, low, high = mean_interval(right.mean(0))
            if np.isnan(
                low
            ):  # few images, or hardly any on which the networks differ: bounds from both sides
                low, high = proportion_interval(right.min(0) > 0)[1], proportion_interval(right.max(0) > 0)[2]
            rows.append(
                {
                    "recipe": recipe,
                    "test": test,
                    "accuracy": mean,
                    "low": low,
                    "high": high,
                    "spread": float(each.max() - each.min()),
                    "seeds": len(seeds),
                    "images": right.shape[1],
                }
            )
    return pd.DataFrame(rows)


def _differences(
    found: Mapping[str, Mapping[str, Tensor]], recipes: Sequence[str], seeds: Sequence[int]
) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for test in TESTS:
        for one, other in permutations(recipes, 2):
            first, second = (_by_image(found, recipe, test, seeds) for recipe in (one, other))
            mean, low, high = (
                paired_proportion_interval(first[0] > 0, second[0] > 0)
                if len(seeds) == 1
                else mean_interval((first - second).mean(0))
            )
            rows.append(
                {"test": test, "recipe": one, "against": other, "difference": mean, "low": low, "high": high}
            )
    return pd.DataFrame(rows, columns=["test", "recipe", "against", "difference", "low", "high"])


def _by_image(
    found: Mapping[str, Mapping[str, Tensor]], recipe: str, test: str, seeds: Sequence[int]
) -> np.ndarray:
    """(seeds, images) 1 where right."""
    return np.stack([found[f"{recipe}-{seed}"][test].double().numpy() for seed in seeds])
