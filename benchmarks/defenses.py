"""Defenses against an attacker who knows them. Run: python -m benchmarks.defenses [SECTION ...]

Sections: digits (broken and genuine defenses on 100 digits), imagenet (neutralization on photographs), cifar10
(neutralization, every fill; adversarially trained networks). Real data from the folder that WEAKSPOT_DATA names.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from torch import Tensor, nn

from benchmarks import real, sections
from tests.defenses.digits import NAMES, cases
from weakspot import defenses
from weakspot.budgets import Linf
from weakspot.defenses.neutralization import FILLS

if TYPE_CHECKING:
    import pandas as pd

DIGITS = slice(100, 200)
PHOTOGRAPHS, PICTURES = 40, 100


def digits() -> None:
    """The verdict on every defense in `tests/defenses/digits.py`."""
    if not real.available():
        return
    networks = real.networks()
    nets = {short: networks.network(name) for short, name in NAMES.items()}
    images, labels = (tensor[DIGITS] for tensor in networks.mnist("test", DIGITS.stop))
    print(f"\nDigits {DIGITS.start} to {DIGITS.stop - 1} of the test set\n")
    print("| defense | eps | undefended | defended | status | why |\n|---|---|---|---|---|---|", flush=True)
    for title, case in cases(nets, networks.mnist("train", 2000)[0]).items():
        table = defenses.evaluate_defense(
            nets["nat"], case.build().eval(), images, labels, budget=Linf(case.eps)
        )
        verdict = defenses.verdict(table)
        sides = " | ".join(_with_interval(table, side) for side in ("undefended", "defended"))
        print(f"| {title} | {case.eps} | {sides} | {verdict.status} | {verdict} |", flush=True)


def imagenet() -> None:
    """EfficientNet-Lite0 behind neutralization by the mean, at 1/255."""
    if not real.available():
        return
    model, images, labels = real.embedded(PHOTOGRAPHS)
    defended = defenses.neutralizing(model, fraction=0.2, fill="mean")
    _evaluate("EfficientNet-Lite0, neutralization by mean", model, defended, images, labels, 1 / 255)


def cifar10() -> None:
    """ResNet-20 behind neutralization by every fill at 1/255, and adversarially trained networks at 2/255."""
    if not real.available():
        return
    model, images, labels = real.correct("cifar10_resnet20", PICTURES)
    for fill in FILLS:
        defended = defenses.neutralizing(model, fraction=0.2, fill=fill)
        _evaluate(f"ResNet-20, neutralization by {fill}", model, defended, images, labels, 1 / 255)
    for name in ("cifar10_resnet2b_adv", "cifar10_cnn_a_adv"):
        _evaluate(name, model, real.networks().network(name), images, labels, 2 / 255)


def _evaluate(
    name: str, model: nn.Module, defended: nn.Module, images: Tensor, labels: Tensor, eps: float
) -> None:
    begun = time.perf_counter()
    table = defenses.evaluate_defense(model, defended, images, labels, budget=Linf(eps))
    print(f"\n{name}, {len(images)} images at {eps * 255:.3g}/255\n")
    print(sections.table(table))
    print(f"\n{defenses.verdict(table)} ({time.perf_counter() - begun:.0f} s)", flush=True)


def _with_interval(table: pd.DataFrame, side: str) -> str:
    last = table.iloc[-1]
    return f"{last[side]:.2f} [{last[f'{side}_low']:.2f}, {last[f'{side}_high']:.2f}]"


SECTIONS = {"digits": digits, "imagenet": imagenet, "cifar10": cifar10}

if __name__ == "__main__":
    sections.run(SECTIONS)
