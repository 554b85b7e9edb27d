"""What helps against an attacker who knows the defense. Run: python -m benchmarks.defenses [SECTION ...]

Sections: imagenet (neutralization on 200 photographs), cifar10 (neutralization, every fill). Real data from the folder
that WEAKSPOT_DATA names.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor, nn

from benchmarks import real, sections
from weakspot import defenses
from weakspot.budgets import Linf
from weakspot.defenses.fills import FILLS

IMAGES = 200


def imagenet() -> None:
    """EfficientNet-Lite0 behind neutralization by the mean, PGD-10 at 1/255."""
    if not real.there():
        return
    model, images, labels = real.embedded(IMAGES)
    _judged("EfficientNet-Lite0", model, images, labels, fills=("mean",), eps=1 / 255, steps=10, queries=25)


def cifar10() -> None:
    """ResNet-20 behind neutralization by every fill, PGD-20 at 1/255."""
    if not real.there():
        return
    model, images, labels = real.correct("cifar10_resnet20", IMAGES)
    _judged(
        "ResNet-20, CIFAR-10", model, images, labels, fills=tuple(FILLS), eps=1 / 255, steps=20, queries=100
    )


def _judged(
    name: str,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    fills: Sequence[str],
    eps: float,
    steps: int,
    queries: int,
) -> None:
    for fill in fills:
        begun = time.perf_counter()
        defended = defenses.neutralizing(model, keep=0.2, fill=fill)
        table = defenses.evaluate_defense(
            model, defended, images, labels, budget=Linf(eps), steps=steps, queries=queries
        )
        print(
            f"\n{name}, {len(images)} images, neutralization by {fill}, PGD-{steps} at {eps * 255:.3g}/255\n"
        )
        print(sections.table(table))
        print(f"\n{defenses.verdict(table)} ({time.perf_counter() - begun:.0f} s)", flush=True)


SECTIONS = {"imagenet": imagenet, "cifar10": cifar10}

if __name__ == "__main__":
    sections.run(SECTIONS)
