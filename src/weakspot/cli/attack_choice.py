"""The choice of an attack: its name, budget and arguments, and its aim: labels, the class to reach, and the region."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, NamedTuple

import torch
import typer
from torch import Tensor

from weakspot._checks import check_fraction, collected_warnings, unknown_choice
from weakspot._progress import Checkpoints, Progress, part
from weakspot.attacks import Attack, AttackOptions, find_attack
from weakspot.budgets import Budget, read_budget
from weakspot.classifier import Classifier, check_images, default_batch
from weakspot.cli.app import UNREADABLE, Failure, note
from weakspot.cli.labeled_images import NoneLeftError, find_labels, note_together, without_failures
from weakspot.cli.options import (
    ATTACK,
    QUICK_STEPS,
    STEPS,
    BudgetOption,
    FractionOption,
    LabelsOption,
    RegionOption,
    SetOption,
    Value,
    given,
    option,
    parse_settings,
)
from weakspot.cli.output import MOST_ROWS
from weakspot.cli.session import Images, Session
from weakspot.datasets.labels import ClassIndex
from weakspot.pairs import AttackResult
from weakspot.regions import read_region
from weakspot.regions.masks import UnreadableError
from weakspot.regions.spec import REGIONS
from weakspot.statistics.number_format import counted, percent

LEAST = 32  # images that are attacked at once, if there are more


@dataclass(frozen=True)
class AimOptions:
    """What an attack aims at, and where it may act."""

    labels: LabelsOption = None
    target: Annotated[
        str | None,
        option(
            "CLASS",
            "Class that the attack aims at, by name or number.",
            default="any other class",
            panel=ATTACK,
        ),
    ] = None
    region: RegionOption = "none"
    fraction: FractionOption = 0.3


class Aim(NamedTuple):
    """What an attack starts from.

    Attributes:
        images: (N, C, H, W).
        labels: (N,) classes that the images stand for.
        targets: (N,) classes to reach, or None.
        names: N names.
        predicted: (N,) classes of the clean images.
    """

    images: Tensor
    labels: Tensor
    targets: Tensor | None
    names: list[str]
    predicted: Tensor

    @property
    def correct(self) -> Tensor:
        """(N,) bool, whether the clean image is classified as its label."""
        return self.predicted == self.labels

    def subset(self, rows: Sequence[int]) -> Aim:
        """The aim on some of the images."""
        chosen = list(rows)
        return Aim(
            self.images[chosen],
            self.labels[chosen],
            None if self.targets is None else self.targets[chosen],
            [self.names[row] for row in chosen],
            self.predicted[chosen],
        )


def find_aim(session: Session, images: Images, options: AimOptions) -> tuple[Aim, str]:
    """Labels and targets, and the source of the labels. Images that have reached the target already are left out."""
    classifier = session.classifier
    images, labels, logits, source = find_labels(options.labels, session, images)
    pixels = check_images(images.pixels, classifier)
    predicted = logits.argmax(1)
    _note_misclassified(classifier, images.names, labels, predicted)
    if options.target is None:
        return Aim(pixels, labels, None, images.names, predicted), source
    classes = ClassIndex(tuple(classifier.class_names), logits.shape[1])
    target = classes.index(options.target, "--target")
    # An image whose label or prediction is the target leaves nothing to aim at.
    rows = ((labels != target) & (predicted != target)).nonzero().flatten().tolist()
    for row in sorted(set(range(len(labels))) - set(rows)):
        how = "classified" if predicted[row] == target else "labeled"
        note(f"{images.names[row]}: already {how} as {classifier.class_name(target)}; skipped", failure=True)
    if not rows:
        raise Failure(
            "every image is already classified or labeled as the target, "
            f"{classifier.class_name(target)} (give another --target)"
        )
    targets = torch.full_like(labels[rows], target)
    names = [images.names[row] for row in rows]
    return Aim(pixels[rows], labels[rows], targets, names, predicted[rows]), source


def _note_misclassified(
    classifier: Classifier, names: Sequence[str], labels: Tensor, predicted: Tensor
) -> None:
    """Name the images whose label is not what the model predicts, at most five of them."""
    wrong = (labels != predicted).nonzero().flatten().tolist()
    for row in wrong[:MOST_ROWS]:
        label, reached = (classifier.class_name(int(classes[row])) for classes in (labels, predicted))
        note(f"{names[row]}: labeled {label}, classified as {reached} without an attack")
    if len(wrong) > MOST_ROWS:
        more = len(wrong) - MOST_ROWS
        verb = "is" if more == 1 else "are"
        note(f"... and {counted(more, 'more image')} {verb} misclassified without an attack")


class Attacked(NamedTuple):
    """What was attacked, the result, and the attack in one line."""

    aim: Aim
    result: AttackResult
    how: str


def find_region(
    options: AimOptions, classifier: Classifier, aim: Aim, seed: int
) -> tuple[Tensor | None, str]:
    """The region that the options describe, None for the whole image, and its description."""
    text, fraction = options.region, options.fraction
    check_fraction(fraction)
    # None rather than a region of ones, so that attacks that take no region can run.
    if text == "none":
        return None, "whole image"
    try:
        region = read_region(
            text, classifier, aim.images, aim.labels, targets=aim.targets, fraction=fraction, seed=seed
        )
    except (UnreadableError, FileNotFoundError) as error:
        raise Failure(f"region: {error}", UNREADABLE) from None
    if not bool(region.any()):
        raise Failure(f"region must hold at least one pixel, got {text!r} with fraction {fraction}")
    if text == "cam":
        return region, f"the {percent(fraction)} of the image with most evidence for its class"
    if text == "superpixels":
        area = percent(fraction)
        return region, f"the superpixels with most evidence for its class, up to {area} of the image"
    return region, f"the marked part of {text}" if text not in REGIONS and os.path.isfile(text) else text  # noqa: PTH113


@dataclass(frozen=True)
class AttackChoice:
    """Which attack, how much it may change, and its arguments."""

    panel: ClassVar[str | None] = ATTACK

    name: Annotated[
        str,
        option(
            "--attack -a NAME",
            "A name from weakspot attack --list, or foolbox:CLASS, torchattacks:CLASS, art:CLASS.",
        ),
    ] = "pgd"
    budget: BudgetOption = "linf:4/255"
    steps: Annotated[int | None, option("N", STEPS, least=1, default="the attack's own")] = None
    settings: SetOption = None

    def choose(self, context: typer.Context, *, quick: bool = False) -> ChosenAttack:
        """Find the attack, and check its budget and arguments before any work.

        Args:
            context: of the running command.
            quick: whether --quick sets the steps.

        Raises:
            Failure: if the attack does not take one of them.
        """
        attack = find_attack(self.name)
        budget = find_budget(attack, self.budget, given=bool(given(context, ["budget"])))
        settings = list(self.settings or [])
        steps = quick_steps(attack) if quick else self.steps
        if steps is not None:
            if any(setting.partition("=")[0] == "steps" for setting in settings):
                name = "--quick" if quick else "--steps"
                raise Failure(f"{name} and --set steps=N must not both be given (leave out one of the two)")
            if not attack.takes("steps"):
                raise Failure(f"{attack.name} takes no --steps (see weakspot attack --list)")
            settings.append(f"steps={steps}")
        return ChosenAttack(attack, budget, read_settings(attack, settings))


@dataclass(frozen=True)
class ChosenAttack:
    """An attack with its budget and arguments, ready to run.

    Attributes:
        attack: its description.
        budget: None for an attack that has none.
        settings: arguments of its own.
    """

    attack: Attack
    budget: Budget | None
    settings: Mapping[str, Value]

    def run(self, classifier: Classifier, aim: Aim, options: AttackOptions) -> AttackResult:
        """Run the attack, which must take every option that was given and decides the result.

        Raises:
            Failure: if it does not take one of them.
        """
        for name, option_name in (
            ("region", "--region"),
            ("targets", "--target"),
            ("batch_size", "--batch-size"),
        ):
            if getattr(options, name) is not None and name not in self.attack.accepts:
                raise Failure(f"{self.attack.name} takes no {option_name}")
        try:
            return self.attack.run(classifier, aim.images, aim.labels, options, self.settings)
        except TypeError as error:
            raise Failure(f"{self.attack.name} failed with these arguments: {error}") from error

    def describe(self, classifier: Classifier, aim: Aim, where: str) -> str:
        """The attack in one line, for the report and run.json; `where` describes its region."""
        settings = [f"{name}={value}" for name, value in self.settings.items()]
        budget = [] if self.budget is None else [str(self.budget)]
        toward = [] if aim.targets is None else [f"toward {classifier.class_name(int(aim.targets[0]))}"]
        return ", ".join([self.attack.name, *settings, *budget, where, *toward])


def attack_images(
    session: Session,
    aim: Aim,
    options: AimOptions,
    chosen: ChosenAttack,
    *,
    seed: int,
    batch_size: int | None = None,
    keep: Callable[[Attacked], object] | None = None,
) -> Attacked:
    """Attack images inside the region that the options describe, without those that the attack cannot change.

    Images are attacked in parts, which bounds the memory and changes no result; `keep` gets what is done so far about
    every 20 seconds.
    """
    step = session.display.step("attacking", total=len(aim.names), counted=False)

    def attack_part(progress: Progress | None, given: Aim) -> tuple[AttackResult, str]:
        region, where = find_region(options, session.classifier, given, seed)
        shared = AttackOptions(chosen.budget, region, given.targets, seed, batch_size, progress)
        return chosen.run(session.classifier, given, shared), where

    def so_far() -> Attacked:
        how = chosen.describe(session.classifier, aim, where)
        return Attacked(aim.subset(rows), AttackResult.concatenate(results), how)

    save = Checkpoints(keep)
    where = ""
    results: list[AttackResult] = []
    rows: list[int] = []
    remarks: list[list[str]] = []
    size = max(LEAST, 4 * default_batch(aim.images))  # enough for the attack to choose its batch size
    for numbers in (group.tolist() for group in torch.arange(len(aim.names)).split(size)):
        progress = part(step, numbers[0], numbers[-1] + 1, len(aim.names))
        try:
            with collected_warnings() as messages:
                left, (result, where) = without_failures(
                    session, aim.subset(numbers), partial(attack_part, progress)
                )
        except NoneLeftError:
            if not results and numbers[-1] + 1 == len(aim.names):
                raise
            continue
        remarks.append(messages)
        results.append(result)
        kept = set(left.names)
        rows += [number for number in numbers if aim.names[number] in kept]
        save(so_far)
    note_together(remarks, len(rows))
    return so_far()


def quick_steps(attack: Attack) -> int | None:
    """The steps of a trial: at most `QUICK_STEPS`; None if the attack has none of its own."""
    steps = attack.parameters.get("steps")
    if steps is None:
        return None
    return min(QUICK_STEPS, steps.default) if isinstance(steps.default, int) else QUICK_STEPS


def find_budget(attack: Attack, text: str, *, given: bool) -> Budget | None:
    """The budget that was given, or the default one for an attack that must have one."""
    if given and not attack.takes_budget:
        raise Failure(f"{attack.name} takes no --budget")
    # Attacks that search for the smallest change may take a budget, but have none by default.
    needed = attack.takes_budget and attack.default_budget
    return read_budget(text) if given or needed else None


def read_settings(attack: Attack, settings: Sequence[str]) -> dict[str, Value]:
    """The arguments of --set."""
    values = parse_settings(settings)
    for key in values:
        if not attack.takes(key):
            raise Failure(unknown_choice(f"--set of {attack.name}", key, sorted(attack.parameters)))
    return values
