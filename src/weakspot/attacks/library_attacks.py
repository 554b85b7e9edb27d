"""Attacks of other libraries (foolbox, torchattacks, ART), held to the contract of ours."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout

import torch
from torch import Tensor, nn

from weakspot._checks import ModelWarning, quiet, warn
from weakspot._errors import first_line
from weakspot._progress import ProgressOption
from weakspot._state import seeded, without_parameter_gradients
from weakspot.attacks.context import AttackOptions, Problem, attack_context
from weakspot.attacks.gray_levels import settle
from weakspot.attacks.libraries import ONE_BY_ONE, Library, Task, eps_of, find, takes_eps
from weakspot.attacks.tradeoff import squared
from weakspot.budgets import Budget
from weakspot.pairs import AttackResult

ROUNDING = 1e-5  # fraction of a budget that an attack may overspend before its result is projected
LONGEST = 200  # characters of another library's error that ours repeats


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
    progress: ProgressOption = None,
    **options: object,
) -> AttackResult:
    """Run an attack of another library, verify its result and count its cost.

    Whatever the attack does, the result is in [0, 1], inside the budget and untouched outside the region; success comes
    from a fresh forward pass of ours. Every image that goes through the model is counted for the sample that it is
    nearest to. The attack draws from the global random generators, which are seeded before and restored afterward.

    These attacks know no regions: with one, each image is attacked by itself, through a model that sees no change
    outside it, so that the search is confined and not only its outcome. Shared arguments are described in
    `AttackOptions`.

    Args:
        name: library and class: "foolbox:LinfPGD", "torchattacks:PGD" or "art:ProjectedGradientDescent".
        budget: Linf, L2 or L1, passed as the attack's own epsilon; if None, that keeps its default. An attack without
            an epsilon looks for the smallest change, which then ends on the 8-bit grid as described at `attacks.fmn`,
            with the smallest L2 length.
        options: further arguments of the attack's class, such as steps=20.

    Raises:
        ValueError: if the library is not installed or has no such attack, or the attack cannot do what is asked or
            fails on every image.

    Warns:
        ModelWarning: if it fails on some images, which then stay clean.

    >>> external("foolbox:LinfPGD", model, images, labels, budget=Linf(4 / 255), steps=10)  # doctest: +SKIP
    """
    library, attack = find(name)
    eps = None if budget is None else eps_of(name, budget)
    shared = AttackOptions(budget, region, targets, seed, batch_size, progress)
    with attack_context(model, images, labels, shared) as problem:
        adversarial = problem.clean.clone()
        failures: list[ValueError] = []

        def run(rows: Tensor) -> None:
            """Attack these images; if that fails, each by itself, so that one failure does not cost the others."""
            part = problem.select(rows)
            if not bool(part.region.any()) or eps == 0:
                return
            try:
                adversarial[rows] = _run(library, Task(name, attack, part, eps, dict(options)))
            except ValueError as error:
                if len(rows) == 1:
                    failures.append(error)
                    return
                for row in rows.split(1):
                    run(row)

        with problem.fused_model(), without_parameter_gradients(problem.classifier):
            alone = not problem.everywhere or attack.__name__ in ONE_BY_ONE
            parts = problem.rows.split(1 if alone else problem.batch_size)
            for number, rows in enumerate(parts):
                run(rows)
                if problem.progress is not None:
                    problem.progress((number + 1) / len(parts))
        if len(failures) == len(problem):
            raise failures[0]
        if failures:
            warn(f"{len(failures)} of {len(problem)} images stay clean: {failures[0]}", ModelWarning)
        adversarial = _within(problem, eps, adversarial)
        if budget is None and not takes_eps(attack) and "epsilons" not in options:
            with problem.fused_model():
                margins = problem.evaluate(adversarial)
                none = torch.zeros_like(margins)
                adversarial = settle(problem, adversarial, squared, fools=margins < 0, needed=none)
        return problem.result(adversarial)


class _Watched(nn.Module):
    """The classifier as another library's attack sees it: blind outside the region, every image counted."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.classifier = problem.classifier
        self.problem = problem
        self.training = False

    def forward(self, images: Tensor) -> Tensor:
        problem = self.problem
        images = images.to(problem.clean).clone(memory_format=torch.contiguous_format)
        if images.requires_grad:
            images.register_hook(torch.Tensor.contiguous)  # the fused form's gradient is channels last
        with torch.no_grad():
            owners = _nearest(images, problem.clean)
        if not problem.everywhere:
            images = torch.where(problem.region, images, problem.clean)
        logits: Tensor = self.classifier(images)
        problem.count_forwards(owners)
        if problem.observer is not None:
            problem.observer(None)  # what the library evaluates may lie outside the budget
        if logits.requires_grad:
            logits.register_hook(lambda _: problem.count_backwards(owners))
        return logits

    def train(self, mode: bool = True) -> _Watched:  # noqa: ARG002 - attacks switch modes; this stays in eval mode
        return self


def _nearest(images: Tensor, clean: Tensor) -> Tensor:
    """(M,) the number of the clean image that each of (M, C, H, W) is an attempt on."""
    rows = torch.arange(len(clean), device=clean.device)
    # A batch as large as the given one is taken to hold one attempt on each image, in order.
    if len(clean) == 1 or len(images) == len(clean):
        return rows.expand(len(images))
    return torch.cdist(images.flatten(1), clean.flatten(1)).argmin(1)


def _run(library: Library, task: Task) -> Tensor:
    """Images (N, C, H, W) in [0, 1], from whatever the attack returned."""
    clean = task.problem.clean
    number = int(task.problem.keys[0]) % 2**32
    try:
        # Warnings about the library's own insides are not ours to pass on. Random generators and standard output belong
        # to the whole process: `seeded` lets one thread in at a time.
        with seeded(number, clean.device), quiet(), redirect_stdout(sys.stderr):
            made = library(task, _Watched(task.problem))
    except ValueError as error:
        # A sentence of `Task.refuse` already.
        if str(error).startswith(f"attack {task.name}"):
            raise
        raise task.refuse(f"failed: {first_line(error)[:LONGEST]}") from error
    except Exception as error:
        raise task.refuse(f"failed: {type(error).__name__}: {first_line(error)[:LONGEST]}") from error
    adversarial = torch.as_tensor(made).detach().to(clean)
    if adversarial.shape != clean.shape:
        raise task.refuse(f"returned shape {tuple(adversarial.shape)} for images of {tuple(clean.shape)}")
    return torch.where(adversarial.isfinite(), adversarial, clean).clamp(0, 1)


def _within(problem: Problem, eps: float | None, images: Tensor) -> Tensor:
    """The images, untouched outside the region, those that overspend the budget projected on it."""
    change = torch.where(problem.region, images - problem.clean, 0)
    inside = torch.where(problem.region, images, problem.clean)
    if eps is None:
        return inside
    over = problem.ball.distance(change) > eps * (1 + ROUNDING) + 1e-7
    projected = problem.apply(problem.project(change))
    return torch.where(over[:, None, None, None], projected, inside)
