"""Judging: a defence beside the bare model, by an attacker who does not know of it and by one who does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weakspot.attacks import auto, pgd
from weakspot.budgets import Budget, Linf
from weakspot.checks import check_classes, check_seed
from weakspot.classifier import check_images, evaluating, predict
from weakspot.regions import cam
from weakspot.statistics import mean_interval

if TYPE_CHECKING:
    import pandas as pd

CLOSE = 0.05  # of accuracy: a defence that an informed attacker leaves no better than this is none


def judge_defense(
    model: nn.Module,
    defended: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    budget: Budget | None = None,
    steps: int = 20,
    keep: float = 0.3,
    thorough: bool = False,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> pd.DataFrame:
    """Accuracy of the bare and of the defended model under the same attacks.

    Args:
        model: the bare classifier.
        defended: the defended one, such as `neutralizing(model)`; gradients go through it as it defines them.
        images: (N, C, H, W).
        labels: (N,).
        budget: of every attack; 4/255 in L-infinity where not given.
        steps: of PGD.
        keep: share of the image that the attack inside the region of importance may change.
        thorough: also `attacks.auto` on the defended model, which ends with a search that needs no gradients.
        seed: of the attacks.
        progress: called with the share done.

    Returns:
        One row per attack: attack, bare, bare_low, bare_high, defended, defended_low, defended_high (accuracy and 95%
        interval over images), worst: "clean"; "replayed", made for the bare model; "white box", made for each itself;
        "inside the region of importance", likewise and only there; "worst of all", images that stand against every
        attack.

    Raises:
        ValueError: when an argument does not fit, naming it.
    """
    import pandas as pd

    check_seed(seed)
    budget = Linf(4 / 255) if budget is None else budget
    with evaluating(model) as classifier:
        images = check_images(images, classifier)
        check_classes(labels, len(images))
        labels = labels.to(images.device, torch.long)
    region = cam(model, images, labels, keep=keep)
    told = _Told(progress, 5 + thorough)
    made_for_bare = pgd(model, images, labels, budget=budget, steps=steps, seed=seed).adversarial
    told.step()
    shown: dict[str, tuple[Tensor, Tensor]] = {
        "clean": (images, images),
        "replayed": (made_for_bare, made_for_bare),
    }
    aware = pgd(defended, images, labels, budget=budget, steps=steps, seed=seed).adversarial
    told.step()
    shown["white box"] = (made_for_bare, aware)
    inside = []
    for network in (model, defended):
        inside.append(
            pgd(network, images, labels, budget=budget, region=region, steps=steps, seed=seed).adversarial
        )
        told.step()
    shown["inside the region of importance"] = (inside[0], inside[1])
    if thorough:
        shown["ensemble"] = (
            made_for_bare,
            auto(defended, images, labels, budget=budget, seed=seed).adversarial,
        )
        told.step()
    rows = []
    standing = [torch.ones_like(labels, dtype=torch.bool) for _ in range(2)]
    for name, both in shown.items():
        row: dict[str, object] = {"attack": name}
        for number, (title, network) in enumerate((("bare", model), ("defended", defended))):
            with evaluating(network) as classifier:
                right = predict(classifier, both[number]).argmax(1) == labels
            standing[number] &= right
            row |= _accuracy(title, right)
        rows.append(row)
    told.step()
    rows.append(
        {"attack": "worst of all", **_accuracy("bare", standing[0]), **_accuracy("defended", standing[1])}
    )
    return pd.DataFrame(rows)


def verdict(judged: pd.DataFrame) -> str:
    """One sentence: what the defence is worth against an attacker who knows of it.

    Protection counts where it is over five points and the intervals of the two accuracies do not overlap.
    """
    table = {str(row["attack"]): row for _, row in judged.iterrows()}
    naive, worst = float(table["replayed"]["defended"]), float(table["worst of all"]["defended"])
    bare = float(table["worst of all"]["bare"])
    numbers = f"replayed attacks {naive:.0%}, informed attacks {worst:.0%}, without the defence {bare:.0%}"
    if worst <= bare + CLOSE:
        return f"{numbers[0].upper()}{numbers[1:]}: no protection against an informed attacker."
    if float(table["worst of all"]["defended_low"]) <= float(table["worst of all"]["bare_high"]):
        return f"{numbers[0].upper()}{numbers[1:]}: no protection beyond doubt against an informed attacker."
    cost = float(table["clean"]["bare"]) - float(table["clean"]["defended"])
    price = f", at {cost:.0%} of clean accuracy" if cost > 0.005 else ""
    return f"{numbers[0].upper()}{numbers[1:]}: some protection against these attacks{price}."


def _accuracy(title: str, right: Tensor) -> dict[str, object]:
    found = mean_interval(right.double().cpu().numpy())
    return dict(zip((title, f"{title}_low", f"{title}_high"), found, strict=True))


class _Told:
    """Progress in equal steps."""

    def __init__(self, progress: Callable[[float], None] | None, steps: int) -> None:
        self.progress, self.steps, self.done = progress, steps, 0

    def step(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(min(1.0, self.done / self.steps))
