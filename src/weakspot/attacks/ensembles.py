"""The ensemble: several attacks without parameters, each on the images that the earlier ones did not fool."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from weakspot._checks import ModelWarning, check_budget, warn
from weakspot._progress import Progress, ProgressOption, part
from weakspot.attacks.auto_pgd import adaptive_descent
from weakspot.attacks.context import DEFAULT_BUDGET, AttackOptions, Problem, attack_context
from weakspot.attacks.losses import Loss, cross_entropy, dlr
from weakspot.attacks.square_search import square_search
from weakspot.budgets import Budget
from weakspot.pairs import AttackResult
from weakspot.statistics import proportion_interval
from weakspot.statistics.number_format import counted

# Half of AutoAttack's "standard" version; twice as much fooled no more in `benchmarks`.
STEPS, QUERIES, CLASSES = 50, 2000, 9
SUSPICIOUS = 0.05  # fraction of images that only a search without gradients fools

Stage = Callable[[Tensor, Progress | None], tuple[Tensor, Tensor]]


def ensemble(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    budget: Budget = DEFAULT_BUDGET,
    region: Tensor | None = None,
    targets: Tensor | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: ProgressOption = None,
) -> AttackResult:
    """Judge robustness: the worst case of several attacks per image, with nothing to tune.

    After AutoAttack (Croce and Hein 2020, arXiv 2003.01690): Auto-PGD on cross-entropy and on the difference of logits
    ratio, then on the latter targeted at each of the nine most likely other classes, 50 steps each, then 2000 queries
    of square search, which needs no gradients. FAB is omitted; every attack here obeys the one region and any budget.
    An image is passed on only while nothing has fooled the model on both it and its 8-bit file.

    The arguments are described in `AttackOptions`. With targets, all attacks aim at these only.

    Returns:
        An AttackResult: for each image the first success, else the attempt with the lowest margin.

    Warns:
        ModelWarning: if gradients are zero, or if clearly more than 5% of the images fall only to the search without
            gradients (the 95% interval lies above): the model may then hide its gradients.
    """
    check_budget(budget)  # also where every image is misclassified from the start, so that no stage runs
    options = AttackOptions(budget, region, targets, seed, batch_size, progress)
    with attack_context(model, images, labels, options) as problem:
        with problem.fused_model():
            best = problem.clean.clone()
            lowest, logits = problem.logits(best)
            lowest = problem.file_margins(best, lowest)
            # The label itself comes last in the order of classes.
            others = logits.scatter(1, problem.labels[:, None], -torch.inf)
            stages = _stages(problem, others.argsort(dim=1, descending=True, stable=True))
            for number, stage in enumerate(stages):
                active = (lowest >= 0).nonzero()[:, 0]
                if not len(active):
                    break
                before = len(active)
                points, margins = stage(active, part(problem.progress, number, number + 1, len(stages)))
                better = margins < lowest[active]
                best[active[better]], lowest[active[better]] = points[better], margins[better]
            else:  # only if the last stage, which needs no gradients, was run
                _warn_of_hidden_gradients(problem, before - int((lowest >= 0).sum()))
        return problem.result(best)


def _stages(problem: Problem, order: Tensor) -> list[Stage]:
    """The attacks in turn; each takes the numbers of the images that nothing has fooled.

    Args:
        problem: of all images.
        order: (N, K) other classes of each image, the most likely first.
    """
    count = order.shape[1]

    def descent(loss: Loss, stream: int, place: int | None = None) -> Stage:
        def stage(active: Tensor, progress: Progress | None) -> tuple[Tensor, Tensor]:
            part = problem.select(active)
            if place is not None:
                part = replace(part, loss_targets=order[active, place])
            return adaptive_descent(part, loss, steps=STEPS, stream=stream, progress=progress)

        return stage

    def squares(active: Tensor, progress: Progress | None) -> tuple[Tensor, Tensor]:
        # The descents' starts draw from streams below a thousand.
        return square_search(problem.select(active), queries=QUERIES, stream=1000, progress=progress)

    stages = [descent(cross_entropy, 0), descent(dlr, 1)]
    # With two classes, the untargeted descents aim at the only other one already.
    if problem.targets is None and count > 2:
        stages += [descent(dlr, 2 + place, place) for place in range(min(CLASSES, count - 1))]
    return [*stages, squares]


def _warn_of_hidden_gradients(problem: Problem, fallen: int) -> None:
    # A few images fall only to such a search on networks that hide nothing.
    if proportion_interval(np.arange(len(problem)) < fallen)[1] > SUSPICIOUS:
        warn(
            f"{problem.classifier.name} may hide its gradients: {fallen} of {counted(len(problem))} fall to a search "
            "without gradients though every attack that follows them failed, so gradients alone may overrate it",
            ModelWarning,
        )
