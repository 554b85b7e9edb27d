"""Minimal-norm attacks as 8-bit files: how many survive rounding, and the cost of ending on the grid.

Run: WEAKSPOT_DATA=FOLDER python -m benchmarks.grid [IMAGES [ATTACK ...]]. Intervals are exact for fractions and by
bootstrap for medians.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.stats import bootstrap
from torch import Tensor

from benchmarks import real
from weakspot import attacks
from weakspot.pairs import AttackResult
from weakspot.statistics import proportion_interval

NETWORK = "cifar10_resnet20"
JOBS: dict[str, tuple[Callable[..., AttackResult], dict[str, object]]] = {
    "fmn, L-infinity, 100 steps": (attacks.fmn, {}),
    "fmn, L2, 100 steps": (attacks.fmn, {"norm": "l2"}),
    "carlini_wagner, 200 steps": (attacks.carlini_wagner, {"steps": 200}),
    "ead, 200 steps": (attacks.ead, {"steps": 200}),
    "strattack, cells of 4, 200 steps": (attacks.strattack, {"steps": 200, "group": 4}),
}


def fraction(hits: Tensor) -> str:
    """A fraction with its interval."""
    value, low, high = proportion_interval(hits.numpy())
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def median(values: Tensor) -> str:
    """A median with its interval."""
    result = bootstrap(
        (values.numpy(),), np.median, n_resamples=2000, method="percentile", rng=np.random.default_rng(0)
    )
    low, high = result.confidence_interval
    return f"{float(values.median()):.2f} [{low:.2f}, {high:.2f}]"


def lengths(result: AttackResult) -> Tensor:
    """(N,) L2 norms of the perturbations."""
    norms: Tensor = torch.linalg.vector_norm(result.perturbation.flatten(1), dim=1)
    return norms


def main(count: int, names: Sequence[str]) -> None:
    """Print the table of the attacks whose names start with one of `names`; of all, if there are none."""
    if not real.available():
        return
    model, images, labels = real.correct(NETWORK, count)
    print(f"\nAs 8-bit files: {NETWORK}, first {count} correct CIFAR-10 test images\n")
    print(
        "| attack | fooled in floats | nearest levels fool | ended on the grid fool | L2, times the float's, median "
        "| over ceil(255 size) | forwards more | backwards more |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, (attack, options) in JOBS.items():
        if names and not name.startswith(tuple(names)):
            continue
        floats, ended = (
            attack(model, images, labels, on_grid=on_grid, **options) for on_grid in (False, True)
        )
        fools = floats.success
        both = fools & ended.fooled
        most = (255 * floats.perturbation.abs().amax((1, 2, 3)) - 1e-3).ceil()
        over = (255 * ended.perturbation.abs().amax((1, 2, 3)) > most + 1e-3)[both]
        more = [
            float((one - other).double().mean())
            for one, other in ((ended.n_forward, floats.n_forward), (ended.n_backward, floats.n_backward))
        ]
        print(
            f"| {name} | {int(fools.sum())} of {count} | {fraction(floats.fooled[fools])} | "
            f"{fraction(ended.fooled[fools])} | {median((lengths(ended) / lengths(floats))[both])} | "
            f"{int(over.sum())} | {more[0]:.1f} | {more[1]:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100, sys.argv[2:])
