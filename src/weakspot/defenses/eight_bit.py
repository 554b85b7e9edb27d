"""Images as 8-bit files keep them: what a classifier sees of them, and the nearest such image within a budget."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weakspot.budgets import Budget, Linf
from weakspot.checks import is_number
from weakspot.classifier import Classifier
from weakspot.defenses.wrapping import around

LEVELS = 255
# Tried from the left until a rounded perturbation is inside the budget; the last one always is.
SCALES = (1.0, 0.995, 0.99, 0.98, 0.96, 0.93, 0.9, 0.85, 0.8, 0.7, 0.5, 0.0)
CLOSE = 1e-6


def rounded(images: Tensor) -> Tensor:
    """Images in [0, 1] at the nearest of 256 levels."""
    return (images * LEVELS).round() / LEVELS


def on_8bit_images(classifier: Classifier) -> Classifier:
    """The classifier's logits of the rounded images; gradients pass the rounding unchanged."""
    return around(_Rounding(classifier), classifier, classifier.name)


class _Rounding(nn.Module):
    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        # The rounded images to the last bit, with the gradient of the identity.
        shown = rounded(images.detach()) + (images - images.detach())
        logits: Tensor = self.classifier(shown)
        return logits


def whole_levels(budget: Budget) -> Budget:
    """The same budget for 8-bit images: an L-infinity size is cut to whole levels, so that rounding cannot exceed it.

    Raises:
        ValueError: when an L-infinity budget is smaller than one level.
    """
    if not isinstance(budget, Linf):
        return budget
    levels = int(budget.eps * LEVELS + CLOSE)
    if not levels:
        raise ValueError(
            f"budget must be at least 1/255 in L-infinity, got {budget.eps:g}: attacked images are rounded to 8 bits "
            "and a smaller budget changes none of them"
        )
    return Linf(levels / LEVELS)


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
        inside = _is_inside(change, start, budget)
        fitted[pending[inside]] = tried[inside]
        pending = pending[~inside]
        if not len(pending):
            break
    return fitted


def _is_inside(change: Tensor, clean: Tensor, budget: Budget) -> Tensor:
    """(N,) bool, up to rounding."""
    limit = getattr(budget, "eps", None)
    if limit is not None and is_number(limit):
        return budget.size(change, clean) <= float(limit) * (1 + CLOSE)
    # A budget of one's own need not tell its limit: what is inside is projected on itself.
    return (budget.project(change, clean) - change).flatten(1).abs().amax(1) <= CLOSE
