"""Minimal-norm attacks by penalty: minimize size + c * loss, with c tuned for each image.

The size is L2 (Carlini and Wagner), L1 (elastic net), or a sum over groups of pixels (StrAttack).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from weakspot._checks import check_count, is_number
from weakspot._progress import Progress, ProgressOption, part
from weakspot.attacks.best_so_far import SEARCHES, BestSoFar
from weakspot.attacks.context import AttackOptions, attack_context
from weakspot.attacks.losses import minimizes
from weakspot.edits import cells
from weakspot.pairs import AttackResult

REFINING = 0.25  # fraction of the steps of StrAttack that refine within the groups found
Shrink = Callable[[Tensor, float], Tensor]  # a perturbation and a step length to a sparser perturbation


@minimizes("l2")
def carlini_wagner(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    region: Tensor | None = None,
    targets: Tensor | None = None,
    steps: int = 1000,
    seed: int = 0,
    learning_rate: float = 0.01,
    confidence: float = 0.0,
    on_grid: bool = True,
    batch_size: int | None = None,
    progress: ProgressOption = None,
) -> AttackResult:
    """Find the smallest L2 change that fools (Carlini and Wagner 2017, arXiv 1608.04644, section V).

    Minimizes |d|^2 + c max(margin + confidence, 0) by Adam over w, where the image is (tanh(w) + 1) / 2 and so stays in
    [0, 1]. The weight c is bisected for each image over five rounds that share `steps`. Nothing is random. Shared
    arguments are described in `AttackOptions`.

    Args:
        steps: gradient steps in all.
        learning_rate: of Adam.
        confidence: the margin by which the image should fool, in logits.
        on_grid: whether to end on the 8-bit grid, as described at `attacks.fmn`.
    """
    check_count("steps", steps, least=SEARCHES)
    _check_numbers(learning_rate, confidence)
    options = AttackOptions(None, region, targets, seed, batch_size, progress)
    with attack_context(model, images, labels, options) as problem:
        with problem.fused_model():
            best = BestSoFar(problem, squared, confidence)
            descend = partial(adam_descent, steps=steps // SEARCHES, learning_rate=learning_rate)
            best.search(descend, problem.progress)
            adversarial = best.on_8bit_grid() if on_grid else best.images
        return problem.result(adversarial)


def adam_descent(
    best: BestSoFar, weights: Tensor, progress: Progress | None, *, steps: int, learning_rate: float
) -> None:
    """Carlini and Wagner's descent, with Adam (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1)."""
    problem = best.problem
    # Pulled off 0 and 1, where atanh is infinite.
    variable = torch.atanh((2 * problem.clean - 1).clamp(-1 + 1e-6, 1 - 1e-6))
    mean, square = torch.zeros_like(variable), torch.zeros_like(variable)
    for step in range(1, steps + 1):
        bent = torch.tanh(variable)
        point = torch.where(problem.region, (bent + 1) / 2, problem.clean)
        margins, _, falling = problem.loss_and_gradient(point)
        if step == 1:
            best.warn_of_zero_gradients(margins, falling)
        best.record(point, margins)
        active = best.active_weights(margins, weights)
        # The chain rule through (tanh(w) + 1) / 2; `falling` is minus the margin's gradient.
        gradient = (2 * (point - problem.clean) - active * falling) * (1 - bent.square()) / 2
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient.square()
        # Bias correction of both moments.
        rate = learning_rate / (1 - 0.9**step)
        variable = variable - rate * mean / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        if progress is not None:
            progress(step / steps)
    point = torch.where(problem.region, (torch.tanh(variable) + 1) / 2, problem.clean)
    best.record(point, problem.evaluate(point))


@minimizes("l1")
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
    progress: ProgressOption = None,
) -> AttackResult:
    """Find the smallest change in L1, with a little L2 (Chen et al. 2018, arXiv 1709.04114, algorithm 1).

    Minimizes |d|^2 + beta |d|_1 + c max(margin + confidence, 0) by accelerated proximal steps; c is bisected for each
    image. Of what fools, the smallest L1 is returned. Nothing is random. Shared arguments are described in
    `AttackOptions`.

    Args:
        beta: weight of the L1 part. Every step shrinks by beta x learning_rate, the authors' "beta" of 0.001.
        steps: gradient steps in all.
        learning_rate: of the first step; it falls with the square root of the steps left.
        confidence: the margin by which the image should fool, in logits.
        on_grid: whether to end on the 8-bit grid, as described at `attacks.fmn`.
    """
    check_count("steps", steps, least=SEARCHES)
    _check_numbers(learning_rate, confidence, beta=beta)

    def shrink(perturbation: Tensor, step: float) -> Tensor:
        # The proximal operator of the L1 norm is soft thresholding.
        return perturbation.sign() * (perturbation.abs() - beta * step).clamp(min=0)

    options = AttackOptions(None, region, targets, seed, batch_size, progress)
    with attack_context(model, images, labels, options) as problem:
        with problem.fused_model():
            best = BestSoFar(problem, lambda d: d.abs().flatten(1).sum(1), confidence)
            descend = partial(
                proximal_descent, shrink=shrink, steps=steps // SEARCHES, learning_rate=learning_rate
            )
            best.search(descend, problem.progress)
            adversarial = best.on_8bit_grid() if on_grid else best.images
        return problem.result(adversarial)


@minimizes("other")
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
    progress: ProgressOption = None,
) -> AttackResult:
    """Find a change in few groups of pixels, in the manner of StrAttack (Xu et al. 2019, arXiv 1808.01664).

    Minimizes |d|^2 + sparsity x sum of |d_group| + c max(margin + confidence, 0), with c bisected for each image; of
    what fools, the smallest sum over groups is taken. The last quarter of the steps then minimizes |d|^2 within its
    groups, like the authors' refinement. Proximal steps replace their alternating directions. Nothing is shared between
    images, groups at the border are cut instead of left out, and nothing is random. Shared arguments are described in
    `AttackOptions`.

    Args:
        group: side of square cells in pixels, or integers (N, 1, H, W) or (1, 1, H, W), such as
            `regions.superpixels`, that number the group of each site.
        sparsity: weight of the group part; the larger, the fewer groups.
        steps: gradient steps in all.
        learning_rate: of the first step; it falls with the square root of the steps left.
        confidence: the margin by which the image should fool, in logits.
        on_grid: whether to end on the 8-bit grid, as described at `attacks.fmn`.
    """
    check_count("steps", steps, least=2 * SEARCHES)
    _check_numbers(learning_rate, confidence, sparsity=sparsity)
    options = AttackOptions(None, region, targets, seed, batch_size, progress)
    with attack_context(model, images, labels, options) as problem:
        groups = _groups(group, problem.clean)

        def shrink(perturbation: Tensor, step: float) -> Tensor:
            # The proximal operator of a sum of lengths shrinks each group toward zero as a whole.
            length = group_lengths(perturbation, groups)
            left = (1 - sparsity * step / length.clamp(min=1e-20)).clamp(min=0)
            return perturbation * left.gather(1, groups.flatten(1)).view_as(groups)

        # The promised steps are divided among the searches, one for each weight that is tried.
        refining = max(1, int(REFINING * steps) // SEARCHES)
        searching = max(1, steps // SEARCHES - refining)
        with problem.fused_model():
            best = BestSoFar(problem, lambda d: group_lengths(d, groups).sum(1), confidence)
            descend = partial(proximal_descent, shrink=shrink, steps=searching, learning_rate=learning_rate)
            best.search(descend, part(problem.progress, 0, 0.5))
            refined = _within_groups(best, groups)
            refine = partial(adam_descent, steps=refining, learning_rate=learning_rate)
            refined.search(refine, part(problem.progress, 0.5, 1))
            adversarial = refined.on_8bit_grid() if on_grid else refined.images
        return problem.result(adversarial)


def _within_groups(best: BestSoFar, groups: Tensor) -> BestSoFar:
    """The smallest L2 length so far, on a problem whose region is the groups that were changed."""
    problem, images = best.problem, best.images
    # Of each group, and from that of each site: (N, H * W).
    changed = (group_lengths(images - problem.clean, groups) > 0).gather(1, groups.flatten(1))
    inside = replace(problem, region=problem.region & changed.view_as(groups), everywhere=False)
    refined = BestSoFar(inside, squared, best.confidence)
    # The refinement starts from what the search found, and replaces it only by something better.
    refined.images, refined.lowest = images, best.lowest
    refined.size = torch.where(best.size.isinf(), torch.inf, squared(images - problem.clean))
    return refined


def proximal_descent(
    best: BestSoFar,
    weights: Tensor,
    progress: Progress | None,
    *,
    shrink: Shrink,
    steps: int,
    learning_rate: float,
) -> None:
    """Accelerated proximal descent (FISTA: Beck and Teboulle 2009, doi 10.1137/080716542); it stays in the box."""
    problem = best.problem
    perturbation, ahead = torch.zeros_like(problem.clean), torch.zeros_like(problem.clean)
    for step in range(steps):
        margins, _, falling = problem.loss_and_gradient(problem.apply(ahead))
        if step == 0:
            best.warn_of_zero_gradients(margins, falling)
        active = best.active_weights(margins, weights)
        rate = learning_rate * (1 - step / steps) ** 0.5
        # `falling` is minus the margin's gradient.
        sparser = shrink(ahead - rate * (2 * ahead - active * falling), rate)
        # Clipped at the ends of the box instead of as an image, so that zeros stay exactly zero.
        after = torch.where(problem.region, sparser.clamp(-problem.clean, 1 - problem.clean), 0)
        # FISTA's momentum with weights k / (k + 3) instead of the recursion for t_k.
        ahead = after + step / (step + 3) * (after - perturbation)
        perturbation = after
        point = problem.apply(perturbation)
        best.record(point, problem.evaluate(point))
        if progress is not None:
            progress((step + 1) / steps)


def group_lengths(perturbation: Tensor, groups: Tensor) -> Tensor:
    """(N, G) L2 length of the perturbation (N, C, H, W) in every group (N, 1, H, W) of its image."""
    squares = perturbation.square().sum(1).flatten(1)
    sums = squares.new_zeros(len(squares), int(groups.max()) + 1)
    return sums.scatter_add_(1, groups.flatten(1), squares).sqrt()


def _groups(group: int | Tensor, images: Tensor) -> Tensor:
    """(N, 1, H, W) integers from 0, the group of each site."""
    count, _, height, width = images.shape
    if isinstance(group, Tensor):
        integers = not (group.dtype.is_floating_point or group.dtype.is_complex or group.dtype == torch.bool)
        if not integers or tuple(group.shape) not in {(count, 1, height, width), (1, 1, height, width)}:
            raise ValueError(
                f"group must be a side in pixels or integers of shape ({count}, 1, {height}, {width}), got "
                f"{tuple(group.shape)} {group.dtype}"
            )
        if int(group.min()) < 0:
            raise ValueError(f"group must hold integers of at least 0, got {int(group.min())}")
        # Numbered anew: labels in the millions would make as many empty groups.
        numbered: Tensor = torch.unique(group, return_inverse=True)[1]
        return numbered.to(images.device).expand(count, -1, -1, -1)
    check_count("group", group)
    return cells(height, width, group).to(images.device).expand(count, 1, -1, -1)


def _check_numbers(learning_rate: float, confidence: float, **weight: float) -> None:
    """Raises ValueError unless all are numbers that a descent can use."""
    if not (is_number(learning_rate) and 0 < learning_rate < float("inf")):
        raise ValueError(f"learning_rate must be a finite number above 0, got {learning_rate!r}")
    if not (is_number(confidence) and 0 <= confidence < float("inf")):
        raise ValueError(f"confidence must be a finite margin of at least 0, in logits, got {confidence!r}")
    for name, value in weight.items():
        if not is_number(value) or not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a finite weight of at least 0, got {value!r}")


def squared(perturbation: Tensor) -> Tensor:
    """(N,) squared L2 length."""
    return perturbation.square().flatten(1).sum(1)
