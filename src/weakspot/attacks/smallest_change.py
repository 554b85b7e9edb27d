"""The smallest change that fools, by steps in a ball whose radius follows the outcome, one class at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from weakspot._checks import check_choice, check_count
from weakspot._progress import Progress, ProgressOption
from weakspot._progress import part as part_of
from weakspot.attacks.context import AttackOptions, Problem, attack_context
from weakspot.attacks.first_order import estimate_places, linearize
from weakspot.attacks.losses import margin, minimizes
from weakspot.attacks.minimum_norm import NORMS, annealed, spread
from weakspot.attacks.tradeoff import BestSoFar
from weakspot.classifier import default_batch
from weakspot.edits import Crops, bounding_boxes, differentiable_engine
from weakspot.pairs import AttackResult

# By how much the ball grows or shrinks per step, at first and at last. Twenty equal outcomes in a row move the radius
# by a factor of more than 50, so that no first guess is too far off.
GROWTH = (0.3, 0.01)
STEPS = (1.0, 0.1)  # in units of the ball's radius, at first and at last
MOMENTUM = 0.75
PATIENCE = 10  # steps without a smaller change, after which a descent has converged
FARTHEST = 4.0  # times the smallest first-order size: classes beyond are not tried
LARGEST_CROP = 0.5  # of an image: crops that are larger save nothing
CROPS_AT_ONCE = 6  # times as many crops as whole images go through the model at once


@dataclass(frozen=True)
class Starts:
    """Where searches begin.

    Attributes:
        classes: (M, T) the competing classes, those that are nearest to first order first.
        sizes: (M, T) their distances to first order; infinite where the class cannot win to first order.
    """

    classes: Tensor
    sizes: Tensor

    @classmethod
    def nearest(cls, classes: Tensor, sizes: Tensor, count: int) -> Starts:
        """The nearest `count` of these classes (M, T) by their sizes (M, T)."""
        order = sizes.argsort(dim=1, stable=True)[:, :count]
        return cls(classes.gather(1, order), sizes.gather(1, order))


@minimizes("linf", argument="norm")
def minimal_pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    norm: str = "linf",
    region: Tensor | None = None,
    targets: Tensor | None = None,
    steps: int = 40,
    classes: int = 3,
    seed: int = 0,
    on_grid: bool = True,
    batch_size: int | None = None,
    progress: ProgressOption = None,
) -> AttackResult:
    """Find the smallest L-infinity or L2 change that fools, in any region, by PGD whose radius adapts to each image.

    Each descent aims at one class. It takes steepest steps with momentum inside a ball that shrinks where the image
    fools and grows where it does not, by a factor of 1.3 at first and 1.01 at last. In `fmn`, the radius moves by a few
    percent per step, which is too little where the first-order guess is far off, as in small regions. The descent is
    repeated for the classes that are nearest to first order, inside the smallest change so far. Regions that fit into
    half of the image are searched as crops, whose passes recompute only what they reach. Nothing is random. Shared
    arguments are described in `AttackOptions`.

    Args:
        norm: "linf" or "l2".
        steps: gradient steps toward each class.
        classes: how many competing classes; with `targets`, these are the only ones.
        on_grid: whether to end on the 8-bit grid, as described at `attacks.fmn`.

    Returns:
        An AttackResult whose images are the smallest change found that fools, else the one nearest to fooling. The size
        is an upper bound of the smallest change: no search finds that for certain.
    """
    check_count("steps", steps)
    check_count("classes", classes)
    check_choice("norm", norm, NORMS)
    with attack_context(
        model, images, labels, AttackOptions(None, region, targets, seed, batch_size, progress)
    ) as problem:
        adversarial = problem.clean.clone()
        with problem.fused_model():
            groups = torch.arange(len(problem), device=problem.clean.device).split(default_batch(images) * 4)
            for number, rows in enumerate(groups):
                part = problem.select(rows)
                linear = linearize(part, classes)
                sizes = estimate_places(linear, part.region[:, None], norm)[:, 0]
                starts = Starts.nearest(linear.classes, sizes, classes)
                search = SmallestChange(
                    cropped(part, part.region, torch.arange(len(rows), device=rows.device)), norm, steps=steps
                )
                best = search.run(starts, part_of(problem.progress, number, number + 1, len(groups)))
                found = best.on_8bit_grid() if on_grid else best.images
                crops = best.problem.crops
                adversarial[rows] = found if crops is None else crops.whole(found)
        return problem.result(adversarial)


class SmallestChange:
    """The search for the smallest change of each image of a problem.

    Attributes:
        problem: of whole images or of crops, each of which is one search.
        best: the smallest changes so far.
    """

    def __init__(self, problem: Problem, norm: str, *, steps: int, max_size: float = math.inf) -> None:
        self.problem, self.norm, self.steps, self.max_size = problem, NORMS[norm], steps, max_size
        self.best = BestSoFar(problem, self.norm.size, 0.0)

    def run(self, starts: Starts, progress: Progress | None = None) -> BestSoFar:
        """Descend toward each class in turn; a class that is much farther than another to first order is left out."""
        farthest = FARTHEST * starts.sizes.amin(1)
        count = starts.classes.shape[1]
        for number in range(count):
            size = starts.sizes[:, number]
            wanted = (self.best.size > 0) & ((size <= farthest) if number else True)
            rows = wanted.nonzero()[:, 0]
            if len(rows):
                targets = starts.classes[rows, number]
                self._descend(rows, targets, size[rows], part_of(progress, number, number + 1, count))
        return self.best

    def _descend(self, rows: Tensor, targets: Tensor, radius: Tensor, progress: Progress | None) -> None:
        """One descent of the searches `rows` (n,), each toward its own class, from a first radius each."""
        norm, best = self.norm, self.best
        part = replace(self.problem.select(rows), loss_targets=targets)
        largest = norm.size(torch.maximum(part.clean, 1 - part.clean)).clamp(max=self.max_size)
        radius = torch.minimum(radius, largest)
        change = velocity = torch.zeros_like(part.clean)
        idle = torch.zeros_like(rows)
        for step in range(self.steps):
            points = part.apply(change)
            margins, _, direction = part.loss_and_gradient(points, margin)
            before = best.size[rows]
            best.record(points, margins, rows)
            growth, length = (annealed(*ends, step / self.steps) for ends in (GROWTH, STEPS))
            if step:  # the first point is the clean image
                fools = margins < 0
                inward = torch.minimum(radius, norm.size(points - part.clean)) * (1 - growth)
                radius = torch.where(fools, inward, radius * (1 + growth))
                # A larger change than the smallest so far is of no use.
                radius = torch.minimum(radius, best.size[rows] * (1 - GROWTH[1])).clamp(max=self.max_size)
                radius = torch.minimum(radius, largest)
                improved = best.size[rows] < before
                idle = torch.where(improved | best.size[rows].isinf(), 0, idle + 1)
            mean = direction.abs().mean((1, 2, 3), keepdim=True)
            velocity = MOMENTUM * velocity + direction / mean.clamp(min=1e-30)
            ball = spread(radius)
            change = norm.into(change + length * ball * norm.unit(velocity), ball)
            change = (part.clean + change).clamp(0, 1) - part.clean
            going = idle < PATIENCE
            if not bool(going.all()):
                if not bool(going.any()):
                    break
                part, rows, idle = part.select(going), rows[going], idle[going]
                radius, largest, change, velocity = (
                    radius[going], largest[going], change[going], velocity[going],
                )  # fmt: skip
            if progress is not None:
                progress((step + 1) / self.steps)


def cropped(problem: Problem, masks: Tensor, owners: Tensor) -> Problem:
    """The problem of changing each mask alone. Small masks become crops, whose passes recompute only what they reach.

    Args:
        problem: of whole images.
        masks: bool (M, 1, H, W), the sites that may change.
        owners: (M,) the number of each mask's image within the problem.

    Returns:
        A problem of M images, or of the parts of them that hold the masks.
    """
    part = replace(problem.select(owners), region=masks, everywhere=bool(masks.all()))
    tops, lefts, (height, width) = bounding_boxes(masks[:, 0])
    if height * width > LARGEST_CROP * masks[0].numel():
        return part
    engine = differentiable_engine(problem.classifier, problem.clean)
    crops = Crops(problem.classifier, problem.clean, engine, owners, tops, lefts)
    region = crops.cut(masks, (height, width), torch.arange(len(masks), device=owners.device))
    at_once = CROPS_AT_ONCE * problem.batch_size
    return replace(
        part,
        clean=crops.cut(problem.clean, (height, width), owners),
        region=region,
        everywhere=bool(region.all()),
        crops=crops,
        batch_size=problem.batch_size if engine is None else at_once,
    )
