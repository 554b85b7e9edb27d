"""Images as 8-bit files store them, and the nearest such image within a budget."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from weakspot._checks import is_number
from weakspot.budgets import L1, L2, SSIM, Budget, Linf
from weakspot.classifier import Classifier, as_wrapped_classifier

TOP = 255  # the highest of the 256 levels
# Tried from the left until a rounded perturbation is inside the budget; the last one always is.
SCALES = (1.0, 0.995, 0.99, 0.98, 0.96, 0.93, 0.9, 0.85, 0.8, 0.7, 0.5, 0.0)
CLOSE = 1e-6  # relative rounding error of a budget
NEAR = 1e-3  # of a level: less is rounding of float32
OVER = 1e-5  # of a budget: less is rounding of float32
# The same for tiny budgets: the difference of two values in [0, 1] is rounded by up to half of this.
LEAST = 1e-7


def rounded(images: Tensor) -> Tensor:
    """Images in [0, 1] at the nearest of 256 levels."""
    return (images * TOP).round() / TOP


def on_8bit_images(classifier: Classifier) -> Classifier:
    """The classifier's logits of the rounded images; gradients pass the rounding unchanged."""
    return as_wrapped_classifier(_Rounding(classifier), classifier, classifier.name)


class _Rounding(nn.Module):
    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        # The rounded images to the last bit, with the gradient of the identity (straight-through).
        shown = rounded(images.detach()) + (images - images.detach())
        logits: Tensor = self.classifier(shown)
        return logits


def whole_levels(budget: Budget) -> Budget:
    """The same budget for 8-bit images: L-infinity is cut to whole levels, so that rounding cannot exceed it.

    Raises:
        ValueError: if an L-infinity budget is smaller than one level.
    """
    if not isinstance(budget, Linf):
        return budget
    levels = int(budget.eps * TOP + CLOSE)
    if not levels:
        raise ValueError(
            f"budget must be at least 1/255 in L-infinity, got {budget.eps:g}: attacked images are rounded to 8 bits "
            "and a smaller budget changes none of them"
        )
    return Linf(levels / TOP)


def fit(images: Tensor, clean: Tensor, budget: Budget) -> Tensor:
    """Attacked images rounded to 8 bits and inside the budget, the perturbation scaled down where rounding exceeds it.

    Args:
        images: (N, C, H, W), within the budget around `clean` before they are rounded.
        clean: (N, C, H, W), already rounded.
        budget: as `whole_levels` gives it.
    """
    fitted, pending = clean.clone(), torch.arange(len(clean), device=clean.device)
    for scale in SCALES:
        start = clean[pending]
        tried = rounded(start + scale * (images[pending] - start))
        change = tried - start
        inside = is_inside(change, start, budget)
        fitted[pending[inside]] = tried[inside]
        pending = pending[~inside]
        if not len(pending):
            break
    return fitted


def is_inside(change: Tensor, clean: Tensor, budget: Budget) -> Tensor:
    """(N,) bool, whether perturbations (N, C, H, W) are inside the budget, up to rounding of float32."""
    limit = getattr(budget, "eps", None)
    if limit is not None and is_number(limit):
        return budget.distance(change, clean) <= float(limit) * (1 + OVER) + LEAST
    # A user's budget need not have a limit of this name: what is inside is projected on itself.
    return (budget.project(change, clean) - change).flatten(1).abs().amax(1) <= CLOSE


def stored(images: Tensor, clean: Tensor, budget: Budget | None = None) -> tuple[Tensor, Tensor]:
    """Round attacked images like 8-bit files, and say whether the files are within the budget.

    Each value is rounded to the nearest of 256 levels. A budget holds between files, from the file of the clean image
    to that of the attacked one. Rounding can overspend it by up to half a level per value (never for `Linf(4 / 255)`,
    but for `Linf(1.5 / 255)` or an `L2`). Then values that it moved away from the clean image go one level back,
    starting with those that it moved farthest, as few of them as bisection finds.

    Args:
        images: (N, C, H, W) in [0, 1], each within the budget of its clean image.
        clean: (N, C, H, W) in [0, 1].
        budget: of the attack; None if it has none, and images are rounded to the nearest levels.

    Returns:
        Images (N, C, H, W) on the grid, and bool (N,), false if no file within the budget was found, which can only
        happen for budgets that are not norms.

    >>> import torch
    >>> from weakspot import Linf
    >>> clean, attacked = torch.full((1, 1, 2, 2), 100 / 255), torch.full((1, 1, 2, 2), 101.6 / 255)
    >>> for budget in (None, Linf(1.6 / 255)):
    ...     print(round(255 * float(stored(attacked, clean, budget)[0].max())))
    102
    101
    """
    levels, fits = (TOP * images).round(), torch.ones(len(images), dtype=torch.bool, device=images.device)
    if budget is None:
        return levels / TOP, fits
    before = (TOP * clean).round()
    # The limit of a user's budget is unknown, but the attack is within it.
    most = budget.distance(images - clean, clean)
    if isinstance(budget, Linf | L2 | L1 | SSIM):
        most = torch.full_like(most, budget.eps)

    def over(files: Tensor, rows: Tensor) -> Tensor:
        # Of the whole batch: a budget may have a limit for each image.
        every = levels.index_copy(0, rows, files)
        spent = budget.distance((every - before) / TOP, before / TOP)
        return (spent > most * (1 + OVER) + LEAST)[rows]

    rows = over(levels, fits.nonzero()[:, 0]).nonzero()[:, 0]
    if len(rows):
        levels[rows] = _within(levels[rows], before[rows], TOP * (images - clean)[rows], rows, over)
        fits[rows] = ~over(levels[rows], rows)
    return levels / TOP, fits


def _within(
    levels: Tensor, before: Tensor, asked: Tensor, rows: Tensor, over: Callable[..., Tensor]
) -> Tensor:
    """Levels (n, C, H, W) with as few as possible of those that rounding moved outward moved back toward `before`."""
    moved = levels - before
    excess = torch.where(moved != 0, moved.abs() - asked.abs(), 0)
    back = excess > NEAR
    # The place of each value in the order of its excess.
    rank = torch.where(back, excess, 0).flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    rank = rank.view_as(levels)

    def nearer(count: Tensor) -> Tensor:
        return torch.where(back & (rank < count[:, None, None, None]), levels - moved.sign(), levels)

    # Bisect: `few` moves are not enough, `enough` are.
    few, enough = torch.zeros_like(rows), back.flatten(1).sum(1)
    while bool((open_ := enough - few > 1).any()):
        middle = (few + enough) // 2
        spent = over(nearer(middle), rows)
        few = torch.where(open_ & spent, middle, few)
        enough = torch.where(open_ & ~spent, middle, enough)
    return nearer(enough)
