"""Attacks of other packages, found by entry point: what they return is held to the contract of ours."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from weakspot.attacks.context import AttackOptions, attack_context
from weakspot.attacks.eight_bit import is_inside
from weakspot.pairs import AttackResult


def verified(
    name: str,
    returned: object,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    options: AttackOptions,
) -> AttackResult:
    """The result of a plug-in, with its success by fresh forward passes, as it is and as an 8-bit file.

    These two passes are added to those that the plug-in counted.

    Args:
        name: of the attack.
        returned: by the attack.
        model: that was attacked.
        images: (N, C, H, W) that it was given.
        labels: (N,) that it was given.
        options: that it was given.

    Raises:
        ValueError: if it is no AttackResult of these images, or changes pixels outside the region, or more than the
            budget.
    """
    if not isinstance(returned, AttackResult):
        kind = type(returned).__name__
        raise ValueError(f"attack {name} must return an AttackResult, got {kind}")
    with attack_context(model, images, labels, replace(options, progress=None)) as problem:
        adversarial = returned.adversarial.detach().to(problem.clean)
        if adversarial.shape != problem.clean.shape:
            shapes = tuple(adversarial.shape), tuple(problem.clean.shape)
            raise ValueError(f"attack {name} must return images of shape {shapes[1]}, got {shapes[0]}")
        change = adversarial - problem.clean
        outside = ((change != 0).any(1, keepdim=True) & ~problem.region).flatten(1).sum(1)
        if bool(outside.any()):
            row = int(outside.argmax())
            raise ValueError(
                f"attack {name} must leave pixels outside the region as they are, got {int(outside[row])} changed "
                f"in image {row} (without a region of its own, it should not take the argument region)"
            )
        if problem.budget is not None:
            over = ~is_inside(change, problem.clean, problem.budget)
            if bool(over.any()):
                row = int(over.to(torch.uint8).argmax())
                spent = float(problem.ball.distance(change)[row])
                raise ValueError(
                    f"attack {name} must stay inside its budget of {problem.budget}, got {spent:.3g} in image {row}"
                )
        result = problem.result(adversarial)
        # The passes of the plug-in, and the two of `problem.result`.
        return replace(
            result,
            n_forward=returned.n_forward.to(result.n_forward) + result.n_forward,
            n_backward=returned.n_backward.to(result.n_backward),
        )
