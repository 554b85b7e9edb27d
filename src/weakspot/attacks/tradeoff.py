"""Minimal-norm attacks by penalty: minimize size + c * loss, with c tuned for each image."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weakspot._checks import check_count, is_number
from weakspot._progress import Progress, ProgressOption, part
from weakspot.attacks.context import AttackOptions, Problem, attack_context
from weakspot.attacks.gray_levels import settle
from weakspot.attacks.losses import minimizes
from weakspot.pairs import AttackResult

SEARCHES = 5  # weights tried for each image
FIRST_WEIGHT = 1.0
Size = Callable[[Tensor], Tensor]  # perturbations (N, C, H, W) to sizes (N,)
Record = Callable[[Tensor, Tensor], None]  # takes points (N, C, H, W) and their margins (N,)
InnerSearch = Callable[[Tensor, Record, Progress | None], None]
"""One descent with fixed weights (N,), which passes every point that it visits to `record`."""


@dataclass(frozen=True)
class Descent:
    """Settings of one inner search.

    Attributes:
        steps: gradient steps.
        learning_rate: of Adam, or of the first proximal step.
        confidence: the margin by which images should fool, in logits.
    """

    steps: int
    learning_rate: float
    confidence: float

    def active_weights(self, margins: Tensor, weights: Tensor) -> Tensor:
        """(N, 1, 1, 1) weights, zero where max(margin + confidence, 0) is zero and has no gradient."""
        return torch.where(margins + self.confidence > 0, weights, 0)[:, None, None, None]


class BestSoFar:
    """Each image's smallest point so far that fools by `confidence`, or else the one nearest to fooling.

    Attributes:
        images: (N, C, H, W).
        lowest: (N,) the lowest margin seen.
        size: (N,) of the points that fool; infinite where none does.
    """

    def __init__(self, problem: Problem, size: Size, confidence: float) -> None:
        self.problem, self.measure, self.confidence = problem, size, confidence
        self.images = problem.clean.clone()
        self.lowest = problem.evaluate(problem.clean)
        self.fooled = self.lowest < -confidence
        self.size = torch.where(self.fooled, 0, torch.inf).to(self.lowest)

    def record(self, points: Tensor, margins: Tensor, rows: Tensor | None = None) -> None:
        """Update the best points with these points (n, C, H, W) and their margins (n,), of all images or of `rows`."""
        rows = torch.arange(len(points), device=points.device) if rows is None else rows
        size, smallest = self.measure(points - self.problem.clean[rows]), self.size[rows]
        fools = margins < -self.confidence
        better = torch.where(fools, size < smallest, smallest.isinf() & (margins < self.lowest[rows]))
        self.images[rows[better]] = points[better]
        self.lowest[rows] = torch.minimum(margins, self.lowest[rows])
        self.size[rows[better & fools]] = size[better & fools]
        self.fooled[rows[fools]] = True

    def on_8bit_grid(self) -> Tensor:
        """The images (N, C, H, W), moved to the smallest point on the 8-bit grid that still fools, if there is one.

        It must fool by `confidence` if the image does so now.
        """
        needed = torch.where(self.size.isinf(), 0, -self.confidence).to(self.lowest)
        return settle(self.problem, self.images, self.measure, fools=self.lowest < 0, needed=needed)

    def search(self, descend: InnerSearch, progress: Progress | None) -> None:
        """Bisect each image's weight on a logarithmic scale.

        Multiply by ten until an inner search fools (as in arXiv 1608.04644), and divide by ten until one does not: with
        a weight that is far too large, the change that fools is far too large.
        """
        low, high = torch.zeros_like(self.lowest), torch.full_like(self.lowest, torch.inf)
        weights = torch.full_like(self.lowest, FIRST_WEIGHT)
        for number in range(SEARCHES):
            # Whether this weight fools, whatever earlier ones did.
            self.fooled = torch.zeros_like(self.fooled)
            descend(weights, self.record, part(progress, number, number + 1, SEARCHES))
            # A weight that fools is an upper end of the bracket, one that does not a lower end.
            high = torch.where(self.fooled, weights, high)
            low = torch.where(self.fooled, low, weights)
            weights = torch.where(
                high.isinf(), 10 * weights, torch.where(low == 0, weights / 10, (low * high).sqrt())
            )


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
    check_rates(learning_rate, confidence)
    with attack_context(
        model, images, labels, AttackOptions(None, region, targets, seed, batch_size, progress)
    ) as problem:
        with problem.fused_model():
            best = BestSoFar(problem, squared, confidence)
            descent = Descent(steps // SEARCHES, learning_rate, confidence)
            best.search(adam_search(problem, descent), problem.progress)
            adversarial = best.on_8bit_grid() if on_grid else best.images
        return problem.result(adversarial)


def adam_search(problem: Problem, descent: Descent) -> InnerSearch:
    """Carlini and Wagner's descent, with Adam (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1)."""
    # Pulled off 0 and 1, where atanh is infinite.
    start = torch.atanh((2 * problem.clean - 1).clamp(-1 + 1e-6, 1 - 1e-6))

    def descend(weights: Tensor, record: Record, progress: Progress | None) -> None:
        variable, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
        for step in range(1, descent.steps + 1):
            bent = torch.tanh(variable)
            point = torch.where(problem.region, (bent + 1) / 2, problem.clean)
            margins, _, falling = problem.loss_and_gradient(point)
            record(point, margins)
            active = descent.active_weights(margins, weights)
            # The chain rule through (tanh(w) + 1) / 2; `falling` is minus the margin's gradient.
            gradient = (2 * (point - problem.clean) - active * falling) * (1 - bent.square()) / 2
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient.square()
            # Bias correction of both moments.
            rate = descent.learning_rate / (1 - 0.9**step)
            variable = variable - rate * mean / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
            if progress is not None:
                progress(step / descent.steps)
        point = torch.where(problem.region, (torch.tanh(variable) + 1) / 2, problem.clean)
        record(point, problem.evaluate(point))

    return descend


def check_rates(learning_rate: float, confidence: float) -> None:
    """Raises ValueError unless both are numbers that a descent can use."""
    if not (is_number(learning_rate) and 0 < learning_rate < float("inf")):
        raise ValueError(f"learning_rate must be a finite number above 0, got {learning_rate!r}")
    if not (is_number(confidence) and 0 <= confidence < float("inf")):
        raise ValueError(f"confidence must be a finite margin of at least 0, in logits, got {confidence!r}")


def squared(perturbation: Tensor) -> Tensor:
    """(N,) squared L2 length."""
    return perturbation.square().flatten(1).sum(1)
