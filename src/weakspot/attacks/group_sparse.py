"""Sparse attacks: few channels of few pixels (elastic net), or few groups of pixels (structured)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from weakspot._checks import is_number
from weakspot.attacks.context import Problem, attack_context
from weakspot.attacks.gradient import Progress, check_counts, part_of
from weakspot.attacks.tradeoff import SEARCHES, Round, Smallest, adam_round, check_rates, squared
from weakspot.pairs import AttackResult

Shrink = Callable[
    [Tensor, float], Tensor
]  # a perturbation and a step length to the perturbation made sparser
REFINED = 0.25  # share of the steps that refine within the groups found


def ead(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    region: Tensor | None = None,
    targets: Tensor | None = None,
    beta: float = 0.1,
    steps: int = 1000,
    seed: int = 0,
    learning_rate: float = 0.01,
    confidence: float = 0.0,
    on_grid: bool = True,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> AttackResult:
    """The smallest change in L1, with a little L2 (Chen et al. 2018, arXiv 1709.04114).

    Minimizes |d|^2 + beta |d|_1 + c max(margin + confidence, 0) by accelerated proximal steps; c is bisected for each
    image. Of what fools, the smallest L1 is kept.

    Args:
        model: as for `pgd`, like the other arguments that are not named here.
        images: likewise.
        labels: likewise.
        region: bool (N, 1, H, W) of the sites that may change.
        targets: (N,) classes to reach.
        beta: weight of the L1 part. Every step shrinks by beta x learning_rate, the authors' "beta" of 0.001.
        steps: gradient steps in all.
        seed: kept in the result; nothing is random.
        learning_rate: of the first step; it falls with the square root of the steps left.
        confidence: margin by which the image should fool, in logits.
        on_grid: end on the 8-bit grid, so that a picture file of the image fools too (see `attacks.fmn`).
        batch_size: images at once.
        progress: called with the share done.

    Raises:
        ValueError: when an argument does not fit, naming it.
    """
    check_counts(least=SEARCHES, steps=steps)
    check_rates(learning_rate, confidence)
    _check_weight("beta", beta)

    def shrink(perturbation: Tensor, step: float) -> Tensor:
        return perturbation.sign() * (perturbation.abs() - beta * step).clamp(min=0)

    with attack_context(model, images, labels, region, targets, batch_size, seed) as problem:
        with problem.fused_model():
            found = Smallest(problem, lambda d: d.abs().flatten(1).sum(1), confidence)
            found.search(
                proximal_round(problem, shrink, steps // SEARCHES, learning_rate, confidence), progress
            )
            images = found.settled() if on_grid else found.images
        return problem.result(images)


def strattack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    group: int | Tensor = 16,
    region: Tensor | None = None,
    targets: Tensor | None = None,
    sparsity: float = 1.0,
    steps: int = 1000,
    seed: int = 0,
    learning_rate: float = 0.01,
    confidence: float = 0.0,
    on_grid: bool = True,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> AttackResult:
    """A change in few groups of pixels, in the manner of StrAttack (Xu et al. 2019, arXiv 1808.01664).

    Minimizes |d|^2 + sparsity x sum of |d_group| + c max(margin + confidence, 0), c bisected for each image; of what
    fools, the smallest sum over groups is kept. A last quarter of the steps then minimizes |d|^2 within its groups, as
    the authors' refinement does. Proximal steps take the place of their alternating directions. Nothing is shared
    between images, and groups at the border are cut, not left out.

    Args:
        model: as for `pgd`, like the other arguments that are not named here.
        images: likewise.
        labels: likewise.
        group: side of square cells in pixels, or whole numbers (N, 1, H, W) or (1, 1, H, W) such as
            `regions.superpixels`: the group of each site.
        region: bool (N, 1, H, W) of the sites that may change.
        targets: (N,) classes to reach.
        sparsity: weight of the group part; larger, fewer groups.
        steps: gradient steps in all.
        seed: kept in the result; nothing is random.
        learning_rate: of the first step; it falls with the square root of the steps left.
        confidence: margin by which the image should fool, in logits.
        on_grid: end on the 8-bit grid, so that a picture file of the image fools too (see `attacks.fmn`).
        batch_size: images at once.
        progress: called with the share done.

    Raises:
        ValueError: when an argument does not fit, naming it.
    """
    check_counts(least=2 * SEARCHES, steps=steps)
    check_rates(learning_rate, confidence)
    _check_weight("sparsity", sparsity)
    with attack_context(model, images, labels, region, targets, batch_size, seed) as problem:
        groups = _groups(group, problem.clean)

        def shrink(perturbation: Tensor, step: float) -> Tensor:
            length = group_lengths(perturbation, groups)
            kept = (1 - sparsity * step / length.clamp(min=1e-20)).clamp(min=0)
            return perturbation * kept.gather(1, groups.flatten(1)).view_as(groups)

        refining = max(1, int(REFINED * steps) // SEARCHES)
        fused_model = max(1, steps // SEARCHES - refining)
        with problem.fused_model():
            found = Smallest(problem, lambda d: group_lengths(d, groups).sum(1), confidence)
            found.search(
                proximal_round(problem, shrink, fused_model, learning_rate, confidence),
                part_of(progress, 0, 2),
            )
            changed = (group_lengths(found.images - problem.clean, groups) > 0).gather(1, groups.flatten(1))
            inside = replace(problem, region=problem.region & changed.view_as(groups), whole=False)
            refined = Smallest(inside, squared, confidence)
            refined.images, refined.lowest = found.images, found.lowest
            refined.size = torch.where(found.size.isinf(), torch.inf, squared(found.images - problem.clean))
            refined.search(adam_round(inside, refining, learning_rate, confidence), part_of(progress, 1, 2))
            images = refined.settled() if on_grid else refined.images
        return problem.result(images)


def proximal_round(
    problem: Problem, shrink: Shrink, steps: int, learning_rate: float, confidence: float
) -> Round:
    """Accelerated proximal descent (Beck and Teboulle 2009, doi 10.1137/080716542); what it passes is in the box."""

    def loss_and_gradient(
        weights: Tensor, keep: Callable[[Tensor, Tensor], None], progress: Progress | None
    ) -> None:
        perturbation, ahead = torch.zeros_like(problem.clean), torch.zeros_like(problem.clean)
        for step in range(steps):
            margins, _, falling = problem.loss_and_gradient(problem.apply(ahead))
            active = torch.where(margins + confidence > 0, weights, 0)[:, None, None, None]
            rate = learning_rate * (1 - step / steps) ** 0.5
            sparser = shrink(ahead - rate * (2 * ahead - active * falling), rate)
            # Cut to the box by its ends: a site that is not changed stays exactly so.
            after = torch.where(problem.region, sparser.clamp(-problem.clean, 1 - problem.clean), 0)
            ahead = after + step / (step + 3) * (after - perturbation)
            perturbation = after
            point = problem.apply(perturbation)
            keep(point, problem.evaluate(point))
            if progress is not None:
                progress((step + 1) / steps)

    return loss_and_gradient


def group_lengths(perturbation: Tensor, groups: Tensor) -> Tensor:
    """(N, G) L2 length of the perturbation (N, C, H, W) in every group (N, 1, H, W) of its image."""
    squares = perturbation.square().sum(1).flatten(1)
    count = int(groups.max()) + 1
    sums = squares.new_zeros(len(squares), count).scatter_add_(1, groups.flatten(1), squares)
    return sums.sqrt()


def _check_weight(name: str, value: float) -> None:
    if not is_number(value) or not 0 <= value < float("inf"):
        raise ValueError(f"{name} is {value}; accepted is a finite weight of at least 0")


def _groups(group: int | Tensor, images: Tensor) -> Tensor:
    """(N, 1, H, W) whole numbers from 0, the group of each site."""
    count, _, height, width = images.shape
    if isinstance(group, Tensor):
        whole = not (group.dtype.is_floating_point or group.dtype.is_complex or group.dtype == torch.bool)
        if not whole or tuple(group.shape) not in {(count, 1, height, width), (1, 1, height, width)}:
            raise ValueError(
                f"group is {tuple(group.shape)} {group.dtype}; accepted is a side in pixels, or whole numbers of "
                f"shape ({count}, 1, {height}, {width})"
            )
        if int(group.min()) < 0:
            raise ValueError(f"group holds {int(group.min())}; accepted are whole numbers from 0")
        # Numbered anew: labels of millions would make as many empty groups.
        numbered: Tensor = torch.unique(group, return_inverse=True)[1]
        return numbered.to(images.device).expand(count, -1, -1, -1)
    if not isinstance(group, int) or isinstance(group, bool) or group < 1:
        raise ValueError(f"group is {group!r}; accepted is a side of at least one pixel, or group numbers")
    rows = torch.arange(height, device=images.device)[:, None] // group
    columns = torch.arange(width, device=images.device)[None] // group
    cells = rows * (-(-width // group)) + columns
    return cells.expand(count, 1, -1, -1)
