"""The smallest change that fools, by steps in a ball whose radius follows the outcome, one class at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from weakspot._checks import check_choice, check_count
from weakspot._progress import Progress, ProgressOption
from weakspot._progress import part as part_of
from weakspot._random import float32_noise
from weakspot.attacks.best_so_far import BestSoFar
from weakspot.attacks.confined import cropped
from weakspot.attacks.context import AttackOptions, Problem, attack_context
from weakspot.attacks.first_order import estimate_places, linearize
from weakspot.attacks.losses import margin, minimizes
from weakspot.attacks.minimum_norm import NORMS, annealed, spread, walk
from weakspot.classifier import default_batch
from weakspot.pairs import AttackResult


@dataclass(frozen=True)
class Pace:
    """How a round begins and ends; in between, annealed by a cosine.

    Attributes:
        growth: by how much the ball grows or shrinks per step.
        steps: their length, in units of the ball's radius.
        longer: times the usual number of steps.
    """

    growth: tuple[float, float]
    steps: tuple[float, float]
    longer: float = 1.0


# Ten equal outcomes in a row move the first radius by a factor of more than 20: no first guess is too far off.
FIRST, LATER = Pace((0.5, 0.01), (1.0, 0.1)), Pace((0.1, 0.01), (1.0, 0.1))
LAST = Pace((0.02, 0.002), (0.25, 0.02))
SLOW, MEDIUM = Pace((0.1, 0.01), (0.5, 0.05)), Pace((0.3, 0.02), (0.5, 0.05))
# At the largest size, values that are best between black and white need steps that end short.
SHORT, WIDE = Pace((0.1, 0.01), (0.1, 0.01), 1.5), Pace((0.1, 0.01), (1.0, 0.02), 1.5)
NEARLY = 0.2  # of the clean margin: searches that got it lower without fooling are worth more passes
BOX_CORNERS = 4  # that are tried for them
# Changes beyond CURVED times their first-order size, or not found, are searched by so many times the usual steps along
# the gradient itself: far from linear, steepest steps, which move all values alike, end much too high.
WALK = 15
MOMENTUM = 0.75
PATIENCE = 10  # steps of a first round toward a further class that may go by without a smaller change
WORTH = 1.5  # times the smallest size so far: a class whose first-order size is beyond it is not tried
FAR = 2.0  # times the first-order size: sizes beyond it are rare where descents do well
CURVED = 1.5  # times the first-order size: beyond it, small steps and corners are tried as well
NEAR = 1.25  # times the first-order size: up to it, a single later round comes within a few percent
GAIN = 0.02  # of the size: a round that gained less was the last


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
    steps: int = 20,
    rounds: int = 5,
    classes: int = 3,
    seed: int = 0,
    on_grid: bool = True,
    batch_size: int | None = None,
    progress: ProgressOption = None,
) -> AttackResult:
    """Find the smallest L-infinity or L2 change that fools, in any region, by PGD whose radius adapts to each image.

    A round takes steepest steps with momentum toward one class, inside a ball that shrinks where the image fools
    and grows where it does not, at first by half, at last by a hundredth. In `fmn`, the radius moves by a few
    percent per step, which is too little where the first-order guess is far off, as in small regions. The first
    rounds try the classes that are nearest to first order. More rounds start at the smallest change so far, as long
    as they gain 2%. If that change is far from its first-order size, the boundary is approached from corners of a
    smaller ball as well, and by many small steps along the gradient itself, as in the paper of `fmn`. Where nothing
    fools but came near, shorter steps and a few corners of the box are tried. A last round takes shorter steps. Regions
    that fit into half of the image are searched as crops, whose passes recompute only what they reach. Nothing is
    random. Shared arguments are described in `AttackOptions`.

    Args:
        norm: "linf" or "l2".
        steps: gradient steps of a round.
        rounds: at most so many from the smallest change so far.
        classes: how many competing classes are tried; with `targets`, these are the only ones.
        on_grid: whether to end on the 8-bit grid, as described at `attacks.fmn`.

    Returns:
        An AttackResult whose images are the smallest change found that fools, else the one nearest to fooling. The size
        is an upper bound of the smallest change: no search finds that for certain.
    """
    check_count("steps", steps)
    check_count("rounds", rounds, least=0)
    check_count("classes", classes)
    check_choice("norm", norm, NORMS)
    with attack_context(
        model, images, labels, AttackOptions(None, region, targets, seed, batch_size, progress)
    ) as problem:
        adversarial = problem.clean.clone()
        correct, moving = torch.ones(2, len(problem), dtype=torch.bool, device=problem.clean.device)
        with problem.fused_model():
            groups = torch.arange(len(problem), device=problem.clean.device).split(default_batch(images) * 4)
            for number, rows in enumerate(groups):
                part = problem.select(rows)
                linear = linearize(part, classes)
                correct[rows], moving[rows] = linear.correct, linear.moving
                sizes = estimate_places(linear, part.region[:, None], norm)[:, 0]
                starts = Starts.nearest(linear.classes, sizes, classes)
                search = SmallestChange(
                    cropped(part, part.region, torch.arange(len(rows), device=rows.device)),
                    norm,
                    steps=steps,
                    rounds=rounds,
                )
                search.run(starts, part_of(problem.progress, number, number + 1, len(groups)))
                found = search.best.on_8bit_grid() if on_grid else search.best.images
                crops = search.problem.crops
                adversarial[rows] = found if crops is None else crops.whole(found)
                if problem.progress is not None:
                    problem.progress((number + 1) / len(groups))
        problem.select(correct).warn_of_zero_gradients(moving[correct, None])
        return problem.result(adversarial)


class SmallestChange:
    """The search for the smallest change of each image of a problem.

    Attributes:
        problem: of whole images or of crops, each of which is one search.
        best: the smallest changes so far.
        toward: (M,) the class of the round that found them.
        thorough: whether changes near their first-order size get more than one later round, and all of them a last one
            with shorter steps, which gains about 3% for twice the passes.
    """

    def __init__(
        self,
        problem: Problem,
        norm: str,
        *,
        steps: int = 20,
        rounds: int = 5,
        thorough: bool = True,
        max_size: float = math.inf,
    ) -> None:
        self.thorough = thorough
        self.problem, self.norm, self.steps, self.rounds = problem, NORMS[norm], steps, rounds
        self.best = BestSoFar(problem, self.norm.size, 0.0)
        self.clean_margins = self.best.lowest.clone()
        self.toward = problem.labels.clone()
        clean = problem.clean
        largest = self.norm.size(torch.where(problem.region, torch.maximum(clean, 1 - clean), 0))
        self.largest = largest.clamp(max=max_size)

    def run(self, starts: Starts, progress: Progress | None = None) -> None:
        """Try the classes in turn, then extremes if none was reached, then go on from the smallest change."""
        best, count = self.best, starts.classes.shape[1]
        whole = count + self.rounds + 2
        self.toward = starts.classes[:, 0].clone()
        for number in range(count):
            # Size 0 is that of an image that is misclassified without a change, for which no class is tried.
            wanted = starts.sizes[:, number] < WORTH * best.size if number else best.size > 0
            rows = wanted.nonzero()[:, 0]
            # A further class must need less than the best class so far, so its round starts inside that change.
            radius = torch.minimum(starts.sizes[rows, number], 0.99 * best.size[rows])
            part = part_of(progress, number, number + 1, whole)
            self._round(rows, starts.classes[rows, number], radius, progress=part)
        self._try_extremes(best.size.isinf().nonzero()[:, 0])
        # Far from the first-order size, a descent may have run past a nearer change: approach it slowly, from inside.
        nearest = starts.sizes.amin(1)
        rows = ((best.size > FAR * nearest) & nearest.isfinite()).nonzero()[:, 0]
        for pace in (SLOW, MEDIUM):
            self._round(rows, None, nearest[rows], pace=pace)
        self._try_harder()
        fooled = (best.size.isfinite() & (best.size > 0)).nonzero()[:, 0]
        rows = fooled
        for number in range(count, count + self.rounds):
            before = best.size[rows]
            self._go_on(rows, LATER, part_of(progress, number, number + 1, whole))
            rows = rows[best.size[rows] < (1 - GAIN) * before]
            if not self.thorough:
                rows = rows[best.size[rows] > NEAR * nearest[rows]]
        rows = ((best.size > CURVED * nearest) & nearest.isfinite()).nonzero()[:, 0]
        self._walk(rows, part_of(progress, whole - 2, whole - 1, whole))
        fooled = (best.size.isfinite() & (best.size > 0)).nonzero()[:, 0]
        far = fooled[best.size[fooled] > CURVED * nearest[fooled]]
        self._try_corners(far, starts.classes[far])
        if self.thorough:
            self._go_on(fooled, LAST, part_of(progress, whole - 1, whole, whole))

    def _go_on(self, rows: Tensor, pace: Pace, progress: Progress | None) -> None:
        """A round from the smallest changes so far."""
        start = self.best.images[rows] - self.problem.clean[rows]
        radius = self.best.size[rows] * (1 - pace.growth[0] / 2)
        self._round(rows, self.toward[rows], radius, start=start, pace=pace, progress=progress)

    def _try_extremes(self, rows: Tensor) -> None:
        """Start at the largest changes to black, to white and to the farther of both, where gradients led nowhere."""
        if not len(rows):
            return
        part, radius = self.problem.select(rows), self.largest[rows]
        start = self._nearest_extreme(rows, radius, None)
        highest = part.logits(part.apply(start))[1].scatter(1, part.labels[:, None], -torch.inf).argmax(1)
        self.toward[rows] = highest if part.targets is None else part.targets
        self._round(rows, self.toward[rows], radius, start=start)

    def _try_harder(self) -> None:
        """Go on at the largest size where nothing fooled but came near: in short steps, then from corners of the box.

        The corners are fixed patterns, neither of the image nor of its gradients, which led elsewhere.
        """
        for number in (None, *range(BOX_CORNERS)):
            near = self.best.lowest < NEARLY * self.clean_margins
            rows = (self.best.size.isinf() & near).nonzero()[:, 0]
            clean, start, pace = self.problem.clean[rows], self.best.images[rows], SHORT
            if number is not None:
                generator = torch.Generator().manual_seed(number)
                pattern = float32_noise(generator, *clean.shape[1:])
                start, pace = torch.where(self.problem.region[rows], pattern.to(clean).round(), clean), WIDE
            self._round(rows, None, self.largest[rows], start=start - clean, pace=pace)

    def _walk(self, rows: Tensor, progress: Progress | None) -> None:
        """Small steps along the gradient itself, from the clean image, to whichever class is next."""
        if not len(rows):
            return
        part, before = replace(self.problem.select(rows), loss_targets=None), self.best.size[rows]
        found = BestSoFar(part, self.norm.size, 0.0)
        walk(self.norm, found, WALK * self.steps, progress, largest=self.largest[rows], smooth=True)
        margins, logits = part.logits(found.images)
        self.best.record(found.images, margins, rows)
        better = self.best.size[rows] < before
        self.toward[rows[better]] = logits[better].argmax(1)
        self._go_on(rows[better], LATER, None)

    def _try_corners(self, rows: Tensor, classes: Tensor) -> None:
        """Approach the boundary from corners of a smaller ball, toward each of the classes (n, T).

        Where the network is far from linear, a descent from the clean image ends at whichever change it meets first.
        """
        before = self.best.size[rows]
        for targets in classes.unbind(1) if len(rows) else ():
            radius = 0.95 * self.best.size[rows]
            self._round(
                rows, targets, radius, start=self._nearest_extreme(rows, radius, targets), pace=MEDIUM
            )
        self._go_on(rows[self.best.size[rows] < (1 - GAIN) * before], LATER, None)

    def _nearest_extreme(self, rows: Tensor, radius: Tensor, targets: Tensor | None) -> Tensor:
        """The change (n, C, h, w) to black, white or the farther of both that is nearest to its class, or to any."""
        part, ball = self.problem.select(rows), spread(radius)
        lowest, nearest = torch.full_like(radius, torch.inf), torch.zeros_like(part.clean)
        for extreme in (0.0, 1.0, 1 - part.clean.round()):
            change = self.norm.into((extreme - part.clean).where(part.region, 0), ball)
            margins, logits = part.logits(part.apply(change))
            self.best.record(part.apply(change), margins, rows)
            if targets is not None:
                own, wanted = logits.gather(1, part.labels[:, None]), logits.gather(1, targets[:, None])
                # Nearest to the class that is aimed at, whichever class is next.
                margins = (own - wanted)[:, 0]
            lower = margins < lowest
            nearest, lowest = torch.where(spread(lower), change, nearest), torch.where(lower, margins, lowest)
        return nearest

    def _round(
        self,
        rows: Tensor,
        targets: Tensor | None,
        radius: Tensor,
        *,
        start: Tensor | None = None,
        pace: Pace = FIRST,
        progress: Progress | None = None,
    ) -> None:
        """Steps of the searches `rows` (n,), each toward its own class from a radius of its own (n,).

        Without changes (n, C, h, w) to start at, a round begins at the clean image.
        """
        norm, best, first = self.norm, self.best, start is None
        part, largest = replace(self.problem.select(rows), loss_targets=targets), self.largest[rows]
        radius = torch.minimum(radius, largest)
        change = torch.zeros_like(part.clean) if start is None else norm.into(start, spread(radius))
        velocity, idle = torch.zeros_like(change), torch.zeros_like(rows)
        for step in range(steps := round(pace.longer * self.steps)):
            if not len(rows):
                break
            points = part.apply(change)
            margins, _, direction = part.loss_and_gradient(points, margin)
            before = best.size[rows]
            best.record(points, margins, rows)
            improved = best.size[rows] < before
            if targets is None:  # whichever class is next; a later round aims at the one that won
                if bool(improved.any()):
                    won = part.select(improved).logits(points[improved])[1]
                    self.toward[rows[improved]] = won.argmax(1)
            else:
                self.toward[rows[improved]] = targets[improved]
            factor, length = (annealed(*ends, step / steps) for ends in (pace.growth, pace.steps))
            if step or not first:  # the clean image says nothing about the radius
                shrunk = torch.minimum(radius, norm.size(points - part.clean)) * (1 - factor)
                radius = torch.where(margins < 0, shrunk, radius * (1 + factor))
            # A larger change than the smallest so far is of no use.
            radius = torch.minimum(torch.minimum(radius, (1 - pace.growth[1]) * best.size[rows]), largest)
            mean = direction.abs().mean((1, 2, 3), keepdim=True)
            velocity = MOMENTUM * velocity + direction / mean.clamp(min=1e-30)
            ball = spread(radius)
            change = norm.into(change + length * ball * norm.unit(velocity), ball)
            change = (part.clean + change).clamp(0, 1) - part.clean
            idle = torch.where(improved | best.size[rows].isinf(), 0, idle + 1)
            # Searches that have fooled, but found nothing smaller for so many steps, leave the round.
            if pace is FIRST and first and bool((idle >= PATIENCE).any()):
                on = idle < PATIENCE
                part, rows, idle = part.select(on), rows[on], idle[on]
                targets = None if targets is None else targets[on]
                radius, largest, change, velocity = radius[on], largest[on], change[on], velocity[on]
            if progress is not None:
                progress((step + 1) / steps)
