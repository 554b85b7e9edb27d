"""What an attack drives down: a loss of the logits, or the size of the change."""

from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from weakspot._checks import unknown_choice
from weakspot.logits import margin as margin_of

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Logits (N, K), labels (N,), targets (N,) or None -> (N,) values, which fall as the attack gets nearer to its goal."""

Norm = Literal["linf", "l2", "l1", "l0"]
Minimized = Norm | Literal["other"]
Function = TypeVar("Function", bound=Callable[..., object])


def minimizes(norm: Minimized, *, argument: str | None = None) -> Callable[[Function], Function]:
    """Declare that an attack looks for the smallest change instead of spending a budget.

    An audit then reports the sizes that it found, and counts robust accuracy by them.

    Args:
        norm: in which it measures a change; "other" if that is none of the four norms.
        argument: the name of the attack's argument that overrides `norm`, if there is one.

    >>> @minimizes("l2")
    ... def attack(model, images, labels, *, region=None): ...
    """

    def declare(function: Function) -> Function:
        setattr(function, "minimizes", norm)  # noqa: B010 - functions have no such attribute for mypy
        setattr(function, "norm_argument", argument)  # noqa: B010
        return function

    return declare


def margin(logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """(N,) z_label - max other z; targeted: max other z - z_target (Carlini and Wagner 2017, arXiv 1608.04644)."""
    return margin_of(logits, labels) if targets is None else -margin_of(logits, targets)


def cross_entropy(logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """(N,) log-probability of the label; targeted: minus that of the target."""
    logs = F.log_softmax(logits, 1)
    if targets is None:
        return logs.gather(1, labels[:, None])[:, 0]
    return -logs.gather(1, targets[:, None])[:, 0]


def log_odds(logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """(N,) log of p / (1 - p), where p is the label's probability; targeted: minus that of the target.

    It has the order of p, and still distinguishes images for which p is 1 in float32.
    """
    classes = labels if targets is None else targets
    # In p / (1 - p) the softmax's denominator cancels: exp z over the sum of the other exponentials.
    others = logits.scatter(1, classes[:, None], -torch.inf).logsumexp(1)
    odds = logits.gather(1, classes[:, None])[:, 0] - others
    return odds if targets is None else -odds


def dlr(logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """(N,) difference of logits ratio, which is invariant to the scale of the logits (arXiv 2003.01690, section 4).

    With logits in falling order z1, z2, ...: (z_label - max other z) / (z1 - z3); targeted: (z_label - z_target) /
    (z1 - (z3 + z4) / 2). With fewer than three classes, targeted four, the ratio is constant and has no gradient; the
    numerator is then returned alone.
    """
    difference = margin_of(logits, labels, targets)
    needed = 3 if targets is None else 4
    if logits.shape[1] < needed:
        return difference
    ordered = logits.topk(needed, 1).values
    below = ordered[:, 2] if targets is None else (ordered[:, 2] + ordered[:, 3]) / 2
    return difference / (ordered[:, 0] - below).clamp(min=1e-12)


LOSSES: dict[str, Loss] = {"margin": margin, "cross_entropy": cross_entropy, "dlr": dlr}


def find_loss(loss: str | Loss) -> Loss:
    """The loss of that name, or the function itself.

    Raises:
        ValueError: if the name is unknown, or it is neither a name nor a function.
    """
    if isinstance(loss, str) and loss in LOSSES:
        return LOSSES[loss]
    if isinstance(loss, str) or not callable(loss):
        remedy = "or a function (logits, labels, targets) -> values (N,), which the attack drives down"
        raise ValueError(unknown_choice("loss", loss, LOSSES, remedy=remedy))
    return loss


def check_values(values: Tensor, count: int) -> None:
    """Raises ValueError unless a loss returned one number per image."""
    if not isinstance(values, Tensor) or values.shape != (count,):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"loss must return a tensor of shape ({count},), one value per image, got {got}")


def conservative_margin(logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """(N,) the margin plus the error that rounding may make: if it is below zero, the image fools in any batch."""
    with torch.no_grad():
        # A logit may be off by 1e-5 of the largest (`fusion.TOLERANCE`), and a margin is the difference of two logits.
        return margin(logits, labels, targets) + 2e-5 * logits.abs().amax(1)
