"""The units of a dissected network under attack: what `weakspot dissect --images` adds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from weakspot.cli.app import USAGE, Failure
from weakspot.cli.inputs import read_pictures

if TYPE_CHECKING:
    from torch import Tensor, nn

    from weakspot.budgets import Budget
    from weakspot.classifier import Classifier
    from weakspot.defenses.unit_study import UnitStudy
    from weakspot.dissection import Dissection

BUDGET = "linf:4/255"
OPTIONS = ("budget", "steps", "mask", "seed")  # that do nothing without --images
FEWEST = 2  # images, for a spread; four with units to be chosen and judged


@dataclass(frozen=True, eq=False)
class Asked:
    """What is to be attacked, and how.

    Attributes:
        pictures: (N, C, H, W).
        budget: of the attack.
        steps: of the attack.
        mask: as `unit_study` takes it.
        seed: of everything random.
        skipped: one sentence for each file that could not be read.
        unread: sources of which nothing could be read.
    """

    pictures: Tensor
    budget: Budget
    steps: int
    mask: int | list[int] | None
    seed: int
    skipped: list[str]
    unread: list[Path]


@dataclass(frozen=True, eq=False)
class AttackedUnits:
    """What was found under attack; empty where nothing was attacked.

    Attributes:
        studies: layer to study.
        sentences: on all layers together, where there are several.
        attack: in words.
    """

    studies: Mapping[str, UnitStudy] = field(default_factory=dict)
    sentences: Sequence[str] = ()
    attack: str = ""

    def as_json(self) -> dict[str, object]:
        """The sentences of each layer and the tables of masking; nothing where nothing was attacked."""
        if not self.studies:
            return {}
        tables = {name: study.masking for name, study in self.studies.items() if study.masking is not None}
        return {
            "attack": self.attack,
            "sentences": {name: list(study.sentences) for name, study in self.studies.items()},
            "all_layers": list(self.sentences),
            "masking": {
                name: json.loads(table.to_json(orient="records", double_precision=9))
                for name, table in tables.items()
            },
        }

    def lines(self) -> list[str]:
        """For people: one paragraph for each layer, and one for all of them."""
        lines = [f"{name}: {' '.join(study.sentences)}" for name, study in self.studies.items()]
        return [*lines, *([f"All layers: {' '.join(self.sentences)}"] if self.sentences else [])]


def read_mask(text: str | None, layers: int) -> int | list[int] | None:
    """What --mask stands for: a number of sensitive units (0 for a fifth of the layer), or these units.

    Args:
        text: as given.
        layers: how many were named; units given by number belong to one.

    Raises:
        Failure: if the text is neither.
    """
    if text is None:
        return None
    kind, colon, count = text.partition(":")
    if kind == "sensitive" and (not colon or (count.isdecimal() and int(count))):
        return int(count or 0)
    numbers = [part.strip() for part in text.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise Failure(
            f"--mask must be sensitive, sensitive:COUNT or unit numbers such as 3,17, got {text!r}", USAGE
        )
    if layers != 1:
        raise Failure(f"--mask {text} must go with exactly one --layer, got {layers}", USAGE)
    return [int(number) for number in numbers]


def read_asked(
    classifier: Classifier,
    images: list[Path],
    budget: str | None,
    steps: int,
    mask: int | list[int] | None,
    seed: int,
) -> Asked:
    """The pictures of --images and what is to be done with them."""
    from weakspot.budgets import read_budget

    spent = read_budget(budget or BUDGET)
    batch, _, skipped, unread = read_pictures(classifier, images, samples=False)
    fewest = 2 * FEWEST if isinstance(mask, int) else FEWEST
    if len(batch) < fewest:
        raise Failure(f"--images must hold at least {fewest} pictures, got {len(batch)}", USAGE)
    return Asked(batch, spent, steps, mask, seed, skipped, unread)


def attack_units(
    classifier: Classifier,
    found: Mapping[str, Dissection],
    asked: Asked | None,
    progress: Callable[[float], None],
) -> AttackedUnits:
    """Attack the pictures with PGD, and study the units of every dissected layer."""
    if asked is None:
        return AttackedUnits()
    import pandas as pd

    from weakspot.attacks import pgd
    from weakspot.classifier import check_images, evaluating, predict
    from weakspot.defenses.unit_study import association_sentences, unit_study
    from weakspot.pairs import Pairs

    with evaluating(classifier):
        images = check_images(asked.pictures, classifier)
        labels = predict(classifier, images).argmax(1)

    def attack(network: nn.Module, shown: Tensor, wanted: Tensor) -> Pairs:
        return pgd(network, shown, wanted, budget=asked.budget, steps=asked.steps, seed=asked.seed)

    pairs = attack(classifier, images, labels)
    progress(0.2)
    studies = {}
    for number, (name, one) in enumerate(found.items()):
        step = partial(_share, progress, number, len(found))
        studies[name] = unit_study(
            classifier, one, pairs, mask=asked.mask, attack=attack, seed=asked.seed, progress=step
        )
    together = []
    if len(studies) > 1:
        tables = [study.units.assign(layer=name) for name, study in studies.items()]
        together = association_sentences(pd.concat(tables, ignore_index=True))
    words = f"PGD, {asked.budget}, {asked.steps} steps, on {len(images)} pictures whose labels are the model's own"
    return AttackedUnits(studies, together, f"{words} predictions")


def _share(progress: Callable[[float], None], number: int, count: int, done: float) -> None:
    progress(0.2 + 0.8 * (number + done) / count)
