"""Regions and their controls on a real network: the sentences of an audit, and those of shifted controls alone.

Run: python -m benchmarks.controls [SECTION ...]. Sections: own (PGD in the class activation of 200 CIFAR-10 test
images, in that of other images and in shifted ones), more (the same for minimal norms and for backgrounds), foreign
(the class activation of another image, which is unrelated, tested against both kinds of controls), power (how often a
region that adds some points is detected, by simulation). CIFAR-10 and ResNet-20 of the folder that WEAKSPOT_DATA names.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from benchmarks import real, sections
from weakspot.attacks import pgd
from weakspot.audit import AttackPlan, ModelPlan, Plan, audit, region_contrasts, summarize
from weakspot.budgets import read_budget
from weakspot.classifier import Classifier
from weakspot.regions import cam, matched
from weakspot.statistics import (
    mcnemar,
    mean_interval,
    paired_proportion_interval,
    proportion_interval,
    region_test,
)

NETWORK = "cifar10_resnet20"
MODEL = ModelPlan("benchmarks.real:resnet20", size=(32, 32))
IMAGES = int(os.environ.get("WEAKSPOT_IMAGES", "200"))
BUDGETS = ("linf:1/255", "linf:3/510", "linf:2/255")
DRAWS = 5


def own() -> None:
    """PGD in the class activation and in its controls."""
    _audit_and_print([AttackPlan("pgd", budget) for budget in BUDGETS], ("cam",))


def more() -> None:
    """Minimal norms, and backgrounds."""
    fmn = AttackPlan("fmn", settings=(("steps", 40),))
    _audit_and_print([AttackPlan("pgd", BUDGETS[0]), fmn], ("cam", "background"))


def _audit_and_print(attacks: Sequence[AttackPlan], regions: tuple[str, ...]) -> None:
    if not real.available():
        return
    with TemporaryDirectory() as name:
        folder = Path(name)
        _, images, labels = real.correct(NETWORK, IMAGES)
        pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
        np.savez(folder / "cifar.npz", images=pixels, labels=labels.numpy())
        plan = Plan(
            (str(folder / "cifar.npz"),),
            MODEL,
            tuple(attacks),
            regions,
            controls=True,
            analyses=(),
            maps=False,
        )
        begun = time.process_time()
        run = audit(plan, folder / "run")
        seconds = time.process_time() - begun
        print(sections.table(region_contrasts(run)))
        print(
            "\n".join(["", *summarize(run).regions, "", f"{IMAGES} images in {seconds:.0f} s of CPU"]),
            flush=True,
        )


def foreign() -> None:
    """PGD in the class activation of the next image: weak by shifted controls, but not by other images' regions."""
    if not real.available():
        return
    model, images, labels = real.correct(NETWORK, IMAGES)
    classifier = Classifier.wrap(model)
    region = cam(classifier, images, labels)
    for budget in BUDGETS:
        other, shifted, *others = (
            _fooled(classifier, images, labels, mask, budget)
            for mask in (
                region.roll(1, 0),
                matched(region.roll(1, 0)),
                *(region.roll(2 + 7 * number, 0) for number in range(DRAWS)),
            )
        )
        controls = np.column_stack(others)
        for what, control, p in (
            ("shifted", shifted, mcnemar(other == 1, shifted == 1)),
            (f"{DRAWS} other images'", controls.mean(1), region_test(other, controls)),
        ):
            paired = paired_proportion_interval(other == 1, control == 1)
            mean, low, high = paired if control is shifted else mean_interval(other - control)
            print(
                f"{budget}, another image's class activation: {other.mean():.3f} fooled, {what} {control.mean():.3f} "
                f"({100 * mean:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}], p {p:.3f}), {len(other)} images",
                flush=True,
            )


def power(runs: int = 1000) -> None:
    """Simulated runs of images that are mostly robust or mostly fooled, wherever they are attacked."""
    rng = np.random.default_rng(0)
    rows = []
    for added, draws, images in product((0.1, 0.0), (1, DRAWS), (40, 100, 200)):
        detected = 0
        for _ in range(runs):
            chance = rng.choice([0.05, 0.85], (images, 1))
            others = (rng.random((images, draws)) < chance).astype(float)
            own = (rng.random(images) < chance[:, 0] + added).astype(float)
            detected += abs(own.mean() - others.mean()) >= 0.05 and region_test(own, others) <= 0.05
        rows.append((100 * added, draws, images, *proportion_interval(np.arange(runs) < detected)))
    print(
        sections.table(pd.DataFrame(rows, columns=["points", "draws", "images", "detected", "low", "high"])),
        flush=True,
    )


def _fooled(
    classifier: Classifier, images: Tensor, labels: Tensor, region: Tensor, budget: str
) -> np.ndarray:
    result = pgd(classifier, images, labels, budget=read_budget(budget), region=region, seed=0)
    return result.success.double().numpy()


if __name__ == "__main__":
    torch.set_num_threads(1)
    sections.run({"own": own, "more": more, "foreign": foreign, "power": power})
