"""Bypassing: a defence answers, the bare model says which way is down."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weakspot.classifier import Classifier, as_classifier
from weakspot.defenses.wrapping import around


def bypassing(model: nn.Module, defended: nn.Module) -> Classifier:
    """The defended model's logits with the bare model's gradients (BPDA, Athalye et al. 2018, arXiv 1802.00420).

    A defence that changes an image little, and whose gradient is none or misleads (rounding, compression, a saturated
    output), is passed through as if it left the image as it is. This needs no knowledge of the defence but the bare
    model; where the defence changes what the network computes, the gradients are only those of a related model.

    Args:
        model: the bare classifier.
        defended: the same classes, in the same order.
    """
    bare, answering = as_classifier(model), as_classifier(defended)
    name = f"{answering.name} by gradients of {bare.name}"
    return around(_Bypassing(bare, answering), answering, name)


class _Bypassing(nn.Module):
    def __init__(self, bare: Classifier, answering: Classifier) -> None:
        super().__init__()
        self.bare, self.answering = bare, answering

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            answer: Tensor = self.answering(images)
        if not (torch.is_grad_enabled() and images.requires_grad):
            return answer
        slope: Tensor = self.bare(images)
        # Zero, with the bare model's gradient: the answer keeps its own bits.
        return answer + (slope - slope.detach())
