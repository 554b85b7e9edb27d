"""Foreign attacks: those of foolbox, torchattacks and ART, where installed, held to our contract."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from weakspot._checks import ModelWarning, quiet, warn
from weakspot._state import SEEDED, without_parameter_gradients
from weakspot.attacks.context import Problem, attack_context
from weakspot.attacks.gray_levels import settle
from weakspot.attacks.libraries import ONE_BY_ONE, Task, eps_of, find, minimizes
from weakspot.attacks.tradeoff import squared
from weakspot.budgets import Budget
from weakspot.pairs import AttackResult

if TYPE_CHECKING:
    from weakspot.attacks.gradient import Progress


ROUNDING = 1e-5  # of a budget, that a foreign attack may overspend before it is brought back


def external(
    name: str,
    /,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    budget: Budget | None = None,
    region: Tensor | None = None,
    targets: Tensor | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> AttackResult:
    """Run an attack of another library, verify what it made and count what it cost.

    What comes back is in [0, 1], inside the budget and untouched outside the region, whatever the attack did; success
    is ours, from a fresh forward pass. Every image that goes through the model is counted, for the sample that it is
    nearest to. Its random numbers are the global ones, which are seeded before and put back after.

    These attacks know no regions: with one, each image is attacked by itself, through a model that sees no change
    outside it, so that the search is confined and not only its outcome.

    Args:
        name: "foolbox:LinfPGD", "torchattacks:PGD" or "art:ProjectedGradientDescent": library and class.
        model: as for `pgd`, like the other arguments that are not named here.
        images: likewise.
        labels: likewise.
        budget: Linf, L2 or L1, handed over as the attack's own epsilon; where not given, that keeps its default. An
            attack without one looks for the smallest change, which is then ended on the 8-bit grid as by `fmn`,
            where the smallest L2 length is kept.
        region: likewise.
        targets: likewise, for attacks that can aim.
        seed: likewise.
        batch_size: images that the attack is given at once.
        progress: likewise.
        options: further arguments of the attack's class, such as steps=20.

    Raises:
        ValueError: when the library is not installed, it has no such attack, that cannot do what is asked, or fails on
            every image.

    Warns:
        ModelWarning: when it fails on some images, which then stay clean.

    >>> external("foolbox:LinfPGD", model, images, labels, budget=Linf(4 / 255), steps=10)  # doctest: +SKIP
    """
    library, attack = find(name)
    eps = None if budget is None else eps_of(name, budget)
    with attack_context(model, images, labels, region, targets, batch_size, seed) as problem:
        adversarial = problem.clean.clone()
        failures: list[ValueError] = []

        def run(rows: Tensor) -> None:
            """Attack these images; where that fails each by itself, so that one does not cost the others theirs."""
            part = problem.select(rows)
            if not bool(part.region.any()) or eps == 0:
                return
            try:
                adversarial[rows] = _run(library, Task(name, attack, part, budget, eps, dict(options)))
            except ValueError as error:
                if len(rows) == 1:
                    failures.append(error)
                    return
                for row in rows.split(1):
                    run(row)

        with problem.fused_model(), without_parameter_gradients(problem.classifier):
            alone = not problem.whole or attack.__name__ in ONE_BY_ONE
            parts = problem.rows.split(1 if alone else problem.batch_size)
            for number, rows in enumerate(parts):
                run(rows)
                if progress is not None:
                    progress((number + 1) / len(parts))
        if len(failures) == len(problem):
            raise failures[0]
        if failures:
            warn(
                f"{len(failures)} of {len(problem)} images stay clean: {failures[0]}",
                ModelWarning,
            )
        adversarial = _brought_back(problem, budget, adversarial)
        if budget is None and minimizes(attack) and "epsilons" not in options:
            with problem.fused_model():
                margins = problem.evaluate(adversarial)
                none = torch.zeros_like(margins)
                adversarial = settle(problem, adversarial, squared, margins < 0, none)
        return problem.result(adversarial, budget)


class Watched(nn.Module):
    """The classifier as a foreign attack sees it: blind outside the region, every image counted on its way."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.classifier = problem.classifier
        self.problem = problem
        self.confined = not problem.whole
        self.training = False

    def forward(self, images: Tensor) -> Tensor:
        problem = self.problem
        images = images.to(problem.clean).clone(memory_format=torch.contiguous_format)
        if images.requires_grad:
            images.register_hook(torch.Tensor.contiguous)  # the fused form's gradient is channels last
        with torch.no_grad():
            owners = _nearest(images, problem.clean)
        if self.confined:
            images = torch.where(problem.region, images, problem.clean)
        logits: Tensor = self.classifier(images)
        problem.count_forwards(owners)
        if logits.requires_grad:
            logits.register_hook(lambda _: problem.count_backwards(owners))
        return logits

    def train(self, mode: bool = True) -> Watched:  # noqa: ARG002 - foreign attacks switch it; it stays in eval mode
        return self


def _nearest(images: Tensor, clean: Tensor) -> Tensor:
    """(M,) which of the clean images each of (M, C, H, W) is an attempt on."""
    rows = torch.arange(len(clean), device=clean.device)
    if len(clean) == 1 or len(images) == len(clean):
        return rows.expand(len(images))
    return torch.cdist(images.flatten(1), clean.flatten(1)).argmin(1)


def _run(library: Callable[[Task, nn.Module], Any], task: Task) -> Tensor:
    """Images (N, C, H, W) in [0, 1], from whatever the attack returned."""
    clean = task.problem.clean
    number = int(task.problem.keys[0]) % 2**32
    try:
        # Warnings about their own insides are not ours to pass on. Random numbers and standard output belong to the
        # whole process: one thread at a time.
        with SEEDED, quiet(), redirect_stdout(sys.stderr):
            torch.manual_seed(number)
            np.random.seed(number)  # noqa: NPY002 - foreign attacks draw from it
            random.seed(number)
            found = library(task, Watched(task.problem))
    except ValueError as error:
        if str(error).startswith(f"attack is {task.name}"):
            raise
        raise task.refuse(f"which failed: {_sentence(error)}") from error
    except Exception as error:
        raise task.refuse(f"which failed: {type(error).__name__}: {_sentence(error)}") from error
    found = torch.as_tensor(found).detach().to(clean)
    if found.shape != clean.shape:
        raise task.refuse(f"which returned {tuple(found.shape)} for images of {tuple(clean.shape)}")
    return torch.where(found.isfinite(), found, clean).clamp(0, 1)


def _brought_back(problem: Problem, budget: Budget | None, images: Tensor) -> Tensor:
    """The images, untouched outside the region, and those that overspend the budget projected on it."""
    change = torch.where(problem.region, images - problem.clean, 0)
    inside = torch.where(problem.region, images, problem.clean)
    if budget is None:
        return inside
    over = budget.distance(change, problem.clean) > eps_of("", budget) * (1 + ROUNDING) + 1e-7
    projected = problem.apply(problem.project(budget, change))
    return torch.where(over[:, None, None, None], projected, inside)


def _sentence(error: Exception) -> str:
    return next((line for line in str(error).strip().splitlines() if line), type(error).__name__)[:200]
