"""The units of a dissected network under attack: what `weakspot dissect --images` adds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from torch import Tensor, nn

from weakspot._progress import part
from weakspot.attacks import pgd
from weakspot.budgets import Budget
from weakspot.classifier import check_images, evaluating, predict
from weakspot.cli.app import Failure
from weakspot.cli.labeled_images import distinct_rows
from weakspot.cli.options import ATTACK, BudgetOption, StepsOption, option
from weakspot.cli.output import json_rows
from weakspot.cli.session import Session
from weakspot.defenses.unit_study import UnitStudy, association_sentences, unit_study
from weakspot.dissection import Dissection
from weakspot.pairs import Pairs

FEWEST = 2  # images to attack; twice as many if half of them choose the units that are masked


@dataclass(frozen=True)
class UnitAttackOptions:
    """Whether and how images are attacked to see which units move."""

    panel: ClassVar[str | None] = ATTACK

    images: Annotated[
        list[Path] | None,
        option(
            "PATH",
            "Image files or folders to attack; shows which units move more than under noise, and whether units "
            "that detect a concept move more. Repeat for several.",
        ),
    ] = None
    budget: BudgetOption = "linf:4/255"
    steps: StepsOption = 20
    mask: Annotated[
        str | None,
        option(
            "UNITS",
            "Mask units and attack again: sensitive (at most a fifth of the layer), sensitive:COUNT, or numbers "
            "such as 3,17. Sensitive units are chosen on half of --images; masking is evaluated on the other half.",
        ),
    ] = None


@dataclass(frozen=True, eq=False)
class AttackedUnits:
    """Results of the attack; empty if nothing was attacked.

    Attributes:
        studies: one for each layer.
        sentences: on all layers together, if there are several.
        attack: description of the attack.
    """

    studies: Mapping[str, UnitStudy] = field(default_factory=dict)
    sentences: Sequence[str] = ()
    attack: str = ""

    def as_json(self) -> dict[str, object]:
        """The sentences of each layer and the tables of masking."""
        if not self.studies:
            return {}
        tables = {name: study.masking for name, study in self.studies.items() if study.masking is not None}
        return {
            "attack": self.attack,
            "sentences": {name: list(study.sentences) for name, study in self.studies.items()},
            "all_layers": list(self.sentences),
            "masking": {name: json_rows(table) for name, table in tables.items()},
        }

    def paragraphs(self) -> list[str]:
        """One for each layer, and one for all of them."""
        lines = [f"{name}: {' '.join(study.sentences)}" for name, study in self.studies.items()]
        return [*lines, *([f"All layers: {' '.join(self.sentences)}"] if self.sentences else [])]


def parse_mask(text: str | None, layers: int) -> int | list[int] | None:
    """What --mask stands for: a number of sensitive units (0 for a fifth of the layer), or these units.

    Args:
        text: as given.
        layers: how many --layer options were given; unit numbers belong to one.
    """
    if text is None:
        return None
    kind, colon, count = text.partition(":")
    if kind == "sensitive" and (not colon or (count.isdecimal() and int(count))):
        return int(count or 0)
    numbers = [part.strip() for part in text.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise Failure(f"--mask must be sensitive, sensitive:COUNT or unit numbers such as 3,17, got {text!r}")
    if layers != 1:
        raise Failure(f"--mask {text} must go with exactly one --layer, got {layers}")
    return [int(number) for number in numbers]


def read_attacked(session: Session, options: UnitAttackOptions, mask: int | list[int] | None) -> Tensor:
    """The images (N, C, H, W) of --images."""
    read = session.read_images(options.images or [])
    images = read.pixels[distinct_rows(read)]
    fewest = 2 * FEWEST if isinstance(mask, int) else FEWEST
    if len(images) < fewest:
        raise Failure(f"--images must hold at least {fewest} images, got {len(images)}")
    return images


def attack_units(
    session: Session,
    dissections: Mapping[str, Dissection],
    images: Tensor,
    *,
    budget: Budget,
    steps: int,
    mask: int | list[int] | None,
    seed: int,
) -> AttackedUnits:
    """Attack the images with PGD, and study the units of every dissected layer."""
    import pandas as pd

    classifier = session.classifier
    with evaluating(classifier):
        images = check_images(images, classifier)
        labels = predict(classifier, images).argmax(1)

    def attack(model: nn.Module, shown: Tensor, wanted: Tensor) -> Pairs:
        return pgd(model, shown, wanted, budget=budget, steps=steps, seed=seed)

    session.display.step("attacking", total=len(images), counted=False)
    pairs = attack(classifier, images, labels)
    studies = {}
    count = len(dissections)
    step = session.display.step("comparing units", total=count, unit="layer")
    for number, (name, dissection) in enumerate(dissections.items()):
        studies[name] = unit_study(
            classifier,
            dissection,
            pairs,
            mask=mask,
            attack=attack,
            seed=seed,
            progress=part(step, number, number + 1, count),
        )
    sentences: Sequence[str] = ()
    if len(studies) > 1:
        tables = [study.units.assign(layer=name) for name, study in studies.items()]
        sentences = association_sentences(pd.concat(tables, ignore_index=True))
    how = f"PGD, {budget}, {steps} steps, on {len(images)} images labeled by the model's predictions"
    return AttackedUnits(studies, sentences, how)
