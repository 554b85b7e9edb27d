"""The choice of an attack: its name, its budget and its arguments, in one dialect for all commands that attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from weakspot.cli.app import Failure
from weakspot.cli.options import (
    ATTACK,
    QUICK_STEPS,
    STEPS,
    BudgetOption,
    SetOption,
    Value,
    given,
    option,
    parse_settings,
)

if TYPE_CHECKING:
    from weakspot.attacks import Attack, AttackOptions
    from weakspot.budgets import Budget
    from weakspot.classifier import Classifier
    from weakspot.cli.aims import Aim
    from weakspot.pairs import AttackResult


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
        from weakspot.attacks import find_attack

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


def quick_steps(attack: Attack) -> int | None:
    """The steps of a trial: at most `QUICK_STEPS`; None if the attack has none of its own."""
    steps = attack.parameters.get("steps")
    if steps is None:
        return None
    return min(QUICK_STEPS, steps.default) if isinstance(steps.default, int) else QUICK_STEPS


def find_budget(attack: Attack, text: str, *, given: bool) -> Budget | None:
    """The budget that was given, or the default one for an attack that must have one."""
    from weakspot.budgets import read_budget

    if given and not attack.takes_budget:
        raise Failure(f"{attack.name} takes no --budget")
    # Attacks that search for the smallest change may take a budget, but have none by default.
    needed = attack.takes_budget and attack.default_budget
    return read_budget(text) if given or needed else None


def read_settings(attack: Attack, settings: Sequence[str]) -> dict[str, Value]:
    """The arguments of --set."""
    from weakspot._checks import unknown_choice

    values = parse_settings(settings)
    for key in values:
        if not attack.takes(key):
            raise Failure(unknown_choice(f"--set of {attack.name}", key, sorted(attack.parameters)))
    return values
