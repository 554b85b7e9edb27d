"""Neutralizing: a classifier that blocks out, in each image it is given, what looks vulnerable and matters little.

After Chattopadhyay et al. 2020 (arXiv 2011.10794), who say that this can be a defence after the fact; how the region
is found, and every parameter, is ours. Judge it by attacks on the defended model itself: attacks on the bare one,
replayed, say nothing of an attacker who knows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weakspot.attribution.cam import class_activations
from weakspot.checks import check_share, closest
from weakspot.classifier import Classifier, as_classifier
from weakspot.defenses.fills import FILLS, neutralize
from weakspot.regions import top
from weakspot.smoothing import gaussian


def neutralizing(model: nn.Module, *, keep: float = 0.2, fill: str = "mean") -> Classifier:
    """The model defended: in every image it is given, a region is blocked out before it is classified.

    The region is found in that very image, which may be an attacked one: the top share of the gradient of the lead of
    the class predicted there (vulnerable), less the top share of that class's activation (important). Attacks on the
    result go through the fill with the region held fixed (BPDA, Athalye et al. 2018, arXiv 1802.00420), so that they
    see gradients; `fill` may have none of its own (`neutralize`).

    Args:
        model: any classifier; its weights are shared, not copied.
        keep: share of the image that counts as vulnerable, and as important.
        fill: as for `neutralize`.

    Raises:
        ValueError: when an argument does not fit, naming it.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    >>> neutralizing(model.eval(), keep=0.1)(torch.rand(2, 3, 16, 16)).shape
    torch.Size([2, 2])
    """
    check_share(keep)
    if fill not in FILLS:
        raise ValueError(f"fill is {fill!r}; {closest(str(fill), FILLS)}")
    classifier = as_classifier(model)
    defended = Classifier(
        _Neutralizing(classifier, keep, fill),
        input_size=classifier.input_size,
        class_names=classifier.class_names,
        name=f"{classifier.name} behind neutralization ({fill})",
    )
    defended.channels = classifier.channels
    defended.training = classifier.training
    return defended


def vulnerable_region(classifier: Classifier, images: Tensor, *, keep: float) -> Tensor:
    """Bool (N, 1, H, W): what `neutralizing` blocks out of these images, seen by nobody but them.

    Args:
        classifier: in eval mode.
        images: (N, C, H, W) in [0, 1].
        keep: share of the image that counts as vulnerable, and as important.
    """
    with torch.inference_mode(mode=False), torch.enable_grad():
        point = images.detach().clone().requires_grad_()
        logits = classifier(point)
        best = logits.topk(2, dim=1)
        (gradient,) = torch.autograd.grad(
            (best.values[:, 0] - best.values[:, 1]).sum(), point, allow_unused=True, materialize_grads=True
        )
        important = class_activations(classifier, point.detach(), best.indices[:, :1])
    sigma = max(0.5, min(images.shape[2:]) / 64)
    steep = gaussian(gradient.norm(dim=1, keepdim=True).double(), sigma, max(1, round(4 * sigma)))
    return top(steep.float(), keep) & ~top(important.float(), keep)


class _Neutralizing(nn.Module):
    """Takes images in [0, 1]; normalisation lives in the classifier that it defends."""

    def __init__(self, defended: Classifier, keep: float, fill: str) -> None:
        super().__init__()
        self.defended, self.keep, self.fill = defended, keep, fill
        self.fixed_batch = defended.fixed_batch
        self.training = defended.training

    def forward(self, images: Tensor) -> Tensor:
        region = vulnerable_region(self.defended, images, keep=self.keep)
        logits: Tensor = self.defended(neutralize(images, region, fill=self.fill))
        return logits
