"""Objectives: what an attack drives down. Any function (logits, labels, targets) -> values will do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from weakspot._checks import check_choice
from weakspot.classifier import margin as margin_of

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Logits (N, K), labels (N,), targets (N,) or None -> (N,) values; the lower, the nearer to what is wanted."""


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
    """(N,) log of p / (1 - p) of the label's probability p; targeted: minus the target's.

    It orders as p does, and goes on where p is one in float32.
    """
    classes = labels if targets is None else targets
    others = logits.scatter(1, classes[:, None], -torch.inf).logsumexp(1)
    odds = logits.gather(1, classes[:, None])[:, 0] - others
    return odds if targets is None else -odds


def dlr(logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """(N,) difference of logits ratio, which no scaling of the logits changes (Croce and Hein 2020, arXiv 2003.01690).

    With logits in falling order z1, z2, ...: (z_label - max other z) / (z1 - z3); targeted: (z_label - z_target) /
    (z1 - (z3 + z4) / 2). Of fewer than three classes, targeted four, ratios are constant and have no gradient; the
    difference above the line is then returned as it is.
    """
    difference = margin_of(logits, labels, targets)
    if logits.shape[1] < (3 if targets is None else 4):
        return difference
    ordered = logits.topk(3 if targets is None else 4, 1).values
    below = ordered[:, 2] if targets is None else (ordered[:, 2] + ordered[:, 3]) / 2
    return difference / (ordered[:, 0] - below).clamp(min=1e-12)


LOSSES: dict[str, Loss] = {"margin": margin, "cross_entropy": cross_entropy, "dlr": dlr}


def find_loss(loss: str | Loss) -> Loss:
    """The objective of that name, or the function itself.

    Raises:
        ValueError: when the name is unknown or it is no function.
    """
    if isinstance(loss, str):
        check_choice("loss", loss, LOSSES)
        return LOSSES[loss]
    if not callable(loss):
        raise ValueError(
            f"loss is a {type(loss).__name__}; accepted is {', '.join(LOSSES)} or a function "
            "(logits, labels, targets) -> values (N,), which the attack drives down"
        )
    return loss


def check_values(values: Tensor, count: int) -> None:
    """Raises ValueError unless an objective returned one number per image."""
    if not isinstance(values, Tensor) or values.shape != (count,):
        what = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"loss returned {what}; accepted is a tensor of shape ({count},), one per image")


def conservative_margin(logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """(N,) the margin, and as much more as rounding may take: below zero, the image fools in any batch."""
    with torch.no_grad():
        return margin(logits, labels, targets) + 2e-5 * logits.abs().amax(1)
