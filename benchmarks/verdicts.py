"""How often is an attack said to act where the network looks? Run: python -m benchmarks.verdicts [CACHE]

Own pairs (the attack and the importance map of one image) and unrelated ones (the attack of one image, the importance
map of another, by a fixed derangement), on a trained CIFAR-10 network, on the same network with random weights and on
a trained ImageNet network. Networks and images are those of the folder that WEAKSPOT_DATA names. Attacks and maps are
kept in CACHE, a folder, if one is given.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from weakspot import Linf, attacks, class_activation
from weakspot.attribution import margin_drop
from weakspot.classifier import evaluating, predict
from weakspot.explanations.agreement import (
    STATISTICS,
    agreed,
    agreement,
    attack_region,
    second_path,
    setting_tests,
    shift_tests,
    top_region,
)
from weakspot.explanations.analysis import competing_classes
from weakspot.explanations.class_evidence import interpretability_matrix
from weakspot.explanations.region_overlap import spread
from weakspot.statistics import nulls, other_image_test, proportion_interval, run_test

RUNS, RUN = 300, 20
nulls.PERMUTATIONS = 999  # of 300 runs; the law asks for no more


@dataclass(frozen=True)
class Maps:
    """Of N images, attacked away from their predicted class.

    Attributes:
        importances: (N, 1, H, W), aligned by gradients and resized.
        vulnerabilities: (N, 1, H, W), by quadrature and by half as many random points.
        energy: (N, H, W) squared perturbation.
        success: (N,) bool.
    """

    importances: list[Tensor]
    vulnerabilities: list[Tensor]
    energy: Tensor
    success: Tensor


def maps_of(model: nn.Module, images: Tensor, eps: float, *, attack_seed: int, seed: int) -> Maps:
    """PGD-10 on every image, and all maps that a verdict is made of."""
    with evaluating(model) as classifier:
        labels = predict(classifier, images).argmax(1)
    pairs = attacks.pgd(model, images, labels, budget=Linf(eps), steps=10, seed=attack_seed)
    with evaluating(model) as classifier:
        losing = competing_classes(classifier, pairs)
        drop = margin_drop(classifier, pairs.clean, pairs.adversarial, labels, losing)
        rows = torch.arange(len(pairs))
        again = second_path(classifier, pairs, losing, drop, rows, seed=seed)
        importances = [
            class_activation(classifier, images, labels, alignment=name) for name in ("effective", "resize")
        ]
    energy = pairs.perturbation.double().square().sum(1)
    return Maps(importances, [spread(drop.sites), spread(again)], energy, pairs.success)


def cached(path: Path | None, make: Callable[[], Maps]) -> Maps:
    """What is in the file, or made and written there."""
    if path is None:
        return make()
    if not path.is_file():
        made = make()
        torch.save(vars(made), path)
    return Maps(**torch.load(path))


def matrices(maps: Maps) -> dict[str, Tensor]:
    """Every statistic (N, N) of attack j with importance map i."""
    found = agreement(maps.importances[0], maps.vulnerabilities[0])
    found["interpretability_label"] = interpretability_matrix(maps.importances[0], maps.energy, fraction=0.3)
    return found


def rate(hits: Tensor | np.ndarray | list[bool]) -> str:
    """A share with its interval."""
    share, low, high = proportion_interval(np.asarray(hits, dtype=bool))
    return f"{share:.3f} [{low:.3f}, {high:.3f}]"


def unrelated(count: int) -> tuple[Tensor, Tensor]:
    """Whose map stands beside each attack, and which maps (N, N) may: all but that of the attack's own image."""
    others = torch.arange(count).roll(count // 2)
    return others, others[None] != torch.arange(count)[:, None]


def per_image(name: str, found: Mapping[str, Tensor], maps: Maps) -> None:
    """Rates of p <= .05 for own and unrelated pairs, by other images and by shifts."""
    count = len(maps.success)
    others, allowed = unrelated(count)
    shifted = {}
    for whose in (torch.arange(count), others):
        important, vulnerable = maps.importances[0][whose], maps.vulnerabilities[0]
        regions = top_region(important, 0.2)[:, 0], attack_region(vulnerable, 0.2)[:, 0]
        tests = shift_tests(important[:, 0], vulnerable[:, 0], *regions)
        shifted[whose is others] = {
            key: rate(test.p[test.p.isfinite()] <= 0.05) for key, test in tests.items()
        }
    for key, matrix in found.items():
        apart = other_image_test(matrix[:, others].masked_fill(~allowed, torch.nan))
        own = other_image_test(matrix)
        cells = [rate(test.p[test.p.isfinite()] <= 0.05) for test in (apart, own)]
        cells += [shifted[way][key] if key in STATISTICS else "" for way in (True, False)]
        cells.append(f"{float((own.q <= 0.1).double().mean()):.3f}")
        print(f"| {name} | {key} | {' | '.join(cells)} |", flush=True)


def per_run(name: str, found: Mapping[str, Tensor]) -> None:
    """Rates of p <= .05 over runs of 20 images: attacks of 20 and maps of 20 others, and own pairs of 20."""
    count = len(found["jaccard"])
    rng = np.random.default_rng(0)
    drawn = [torch.from_numpy(rng.permutation(count)[: 2 * RUN]) for _ in range(RUNS)]
    for key, matrix in found.items():
        apart = np.array([run_test(matrix[rows[:RUN]][:, rows[RUN:]]).p for rows in drawn])
        own = np.array([run_test(matrix[rows[:RUN]][:, rows[:RUN]]).p for rows in drawn])
        any_q = [bool((other_image_test(matrix[rows[:RUN]][:, rows[RUN:]]).q <= 0.1).any()) for rows in drawn]
        print(f"| {name} | {key} | {rate(apart <= 0.05)} | {rate(any_q)} | {rate(own <= 0.05)} |", flush=True)


def stated(maps: Maps, whose: Tensor, allowed: Tensor) -> pd.DataFrame:
    """relation, relation_p and relation_q with these importance maps."""
    importances = [one[whose] for one in maps.importances]
    matrix = agreement(importances[0], maps.vulnerabilities[0])["effect_in_roi"]
    first = other_image_test(matrix.masked_fill(~allowed, torch.nan))
    return agreed([first, *setting_tests(importances, maps.vulnerabilities, allowed)])


def verdicts(name: str, maps: Maps, again: Sequence[Maps]) -> None:
    """How many relations are stated, of unrelated pairs too, and how many of them again with fresh seeds."""
    count = len(maps.success)
    all_allowed = torch.ones(count, count, dtype=torch.bool)
    own = stated(maps, torch.arange(count), all_allowed)["relation"].to_numpy()
    apart = stated(maps, *unrelated(count))["relation"].to_numpy()
    cells = [rate(own == 1), rate(own == -1), rate(np.nan_to_num(apart) != 0)]
    for other in again:
        anew = stated(other, torch.arange(count), all_allowed)["relation"].to_numpy()
        spoken = np.nan_to_num(own) != 0
        back = np.nan_to_num(anew) != 0
        both = [(own == anew)[spoken], (own == anew)[back]]
        cells.append(f"{both[0].sum()} of {len(both[0])}; {both[1].sum()} of {len(both[1])}")
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def randomized(model: nn.Module) -> nn.Module:
    """The same network with new weights."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()
    return model.eval()


def cases() -> dict[str, tuple[nn.Module, Tensor, float]]:
    """Name to network, images and size of the attack."""
    folder = Path(os.environ.get("WEAKSPOT_DATA", "../shared/data"))
    if not (folder / "networks.py").is_file():
        sys.exit(f"no real data at {folder}; set WEAKSPOT_DATA")
    sys.path.insert(0, str(folder))
    import networks  # type: ignore[import-not-found]

    cifar, photographs = networks.cifar10(count=200)[0], networks.imagenet(count=100)[0]
    return {
        "ResNet-20": (networks.network("cifar10_resnet20"), cifar, 2 / 255),
        "ResNet-20, random weights": (randomized(networks.network("cifar10_resnet20")), cifar, 2 / 255),
        "MobileNetV2": (networks.network("mobilenet_v2_1.0_224"), photographs, 4 / 255),
    }


def table(*columns: str) -> None:
    """Print the head of a table."""
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def main() -> None:
    """Print the tables."""
    cache = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    if cache is not None:
        cache.mkdir(exist_ok=True)
    made: dict[str, list[Maps]] = {}
    for name, (model, images, eps) in cases().items():
        made[name] = []
        for attack_seed, seed in ((0, 0), (0, 1), (1, 1)):
            make = partial(maps_of, model, images, eps, attack_seed=attack_seed, seed=seed)
            made[name].append(cached(cache / f"{name}-{attack_seed}-{seed}.pt" if cache else None, make))
    found = {name: matrices(maps[0]) for name, maps in made.items()}
    table(
        "network", "statistic", "unrelated, p <= .05", "own, p <= .05", "unrelated, by shifts", "own, by shifts",
        "own, q <= .1",
    )  # fmt: skip
    for name, maps in made.items():
        per_image(name, found[name], maps[0])
    table(
        "network",
        "statistic",
        f"{RUNS} unrelated runs of {RUN}, p <= .05",
        "any q <= .1",
        "own runs, p <= .05",
    )
    for name in made:
        per_run(name, found[name])
    table(
        "network",
        "where it looks",
        "away",
        "unrelated, either",
        "again, fresh path",
        "again, fresh attack and path",
    )
    for name, maps in made.items():
        verdicts(name, maps[0], maps[1:])


if __name__ == "__main__":
    main()
