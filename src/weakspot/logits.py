"""Logits: finding them in what a network returns, margins between classes, and telling probabilities from logits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

ROUNDING = 1e-4  # by which a row of probabilities may miss a sum of 1
VIEWS = (
    "View",
    "UnsafeView",
    "ReshapeAlias",
    "Squeeze",
    "Alias",
    "Clone",
    "ToCopy",
)  # autograd steps without arithmetic


def logits_of(output: object) -> Tensor:
    """The logits (N, K) in what a network returned.

    Args:
        output: a tensor (N, K) or (N, K, 1, 1), a tuple or mapping that holds one, or an object with `.logits`.

    Raises:
        ValueError: if there is no tensor of this shape with at least two classes.
    """
    logits = _find_logits(output)
    if logits is None:
        value = (
            f"a tensor of shape {tuple(output.shape)}"
            if isinstance(output, Tensor)
            else type(output).__name__
        )
        raise ValueError(
            "the network must return logits of shape (images, classes) with at least two classes, a tuple or mapping "
            f"that holds them, or an object with .logits, got {value}"
        )
    return logits.flatten(1)


def _find_logits(output: object) -> Tensor | None:
    if isinstance(output, Tensor):
        is_map = output.ndim == 4 and output.shape[2:] == (1, 1)
        return output if (output.ndim == 2 or is_map) and output.shape[1] >= 2 else None
    named = getattr(output, "logits", None)
    if named is not None:
        return _find_logits(named)
    parts: list[object] = []
    if isinstance(output, Mapping):
        parts = [output[key] for key in ("logits", "out") if key in output] or list(output.values())
    elif isinstance(output, tuple | list):
        parts = list(output)
    return next((logits for logits in map(_find_logits, parts) if logits is not None), None)


def margin(logits: Tensor, labels: Tensor, others: Tensor | None = None) -> Tensor:
    """z_label - z_other, (N,); negative if the other class wins.

    Args:
        logits: (N, K).
        labels: (N,).
        others: (N,) the other class; by default the one with the largest logit.

    >>> margin(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
    tensor([1.])
    """
    own = logits.gather(1, labels[:, None])[:, 0]
    if others is not None:
        return own - logits.gather(1, others[:, None])[:, 0]
    return own - runner_up(logits, labels)[0]


def runner_up(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of a class other than the label, and that class, each (N,)."""
    best = logits.scatter(1, labels[:, None], -torch.inf).max(1)
    return best.values, best.indices


def may_be_probabilities(logits: Tensor) -> bool:
    """Whether all values lie in [0, 1]."""
    return float(logits.min()) >= 0 and float(logits.max()) <= 1 + ROUNDING


def probability_layer(output: Tensor) -> str | None:
    """The layer that made probabilities of logits, "softmax" or "sigmoid", or None if the values are logits.

    Args:
        output: (N, K) of `probe_images`, with its autograd history: logits of a few images may lie between 0 and 1 by
            chance, those of all the probes do not.
    """
    values = output.detach()
    values = values[values.isfinite().all(1)]
    if not len(values) or not may_be_probabilities(values):
        return None
    if bool(((values.sum(1) - 1).abs() < ROUNDING).all()):
        return "softmax"
    saturates = float(values.min()) < 0.001 and float(values.max()) > 0.999
    return "sigmoid" if saturates or _ends_in_sigmoid(output) else None


def probe_images(images: Tensor) -> Tensor:
    """Probes (8, C, H, W): two of noise, gray, black, white, then three of noise so strong that a sigmoid saturates."""
    noise = torch.rand((2, *images.shape[1:]), generator=torch.Generator().manual_seed(0)).to(images)
    flat = torch.tensor([0.5, 0.0, 1.0]).to(images).view(3, 1, 1, 1).expand(3, *images.shape[1:])
    strong = 1e4 * (noise - 0.5)
    return torch.cat([noise, flat, strong, -strong[:1]])


def _ends_in_sigmoid(output: Tensor) -> bool:
    """Whether autograd recorded a sigmoid as the last computation."""
    step = output.grad_fn
    while step is not None and step.name().startswith(VIEWS) and step.next_functions:
        step = step.next_functions[0][0]
    return step is not None and step.name().startswith(("Sigmoid", "Hardsigmoid"))
