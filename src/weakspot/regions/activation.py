"""Activation: where a network gathers evidence for a class, and for the two classes of an attack."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weakspot._checks import ModelWarning, check_classes, check_fraction, warn
from weakspot.attribution.cam import class_activation, class_activations
from weakspot.classifier import check_images, evaluating
from weakspot.regions.masks import top


def cam(
    model: nn.Module, images: Tensor, classes: Tensor, *, fraction: float = 0.3, layer: str | None = None
) -> Tensor:
    """Where the network gathers most evidence for a class: the top share of its class activation.

    Args:
        model: any classifier.
        images: (N, C, H, W) in [0, 1].
        classes: (N,) the class each image is explained for.
        fraction: share of the image, 0 to 1.
        layer: the module whose map is used; the last that keeps one where not given.

    Returns:
        Bool (N, 1, H, W), round(fraction * H * W) sites true in each.

    Warns:
        ModelWarning: if the activation of an image is nowhere positive, as may be with tokens: its region then is not
            one that matters, but the one that speaks least against the class.
    """
    check_fraction(fraction)
    maps = class_activation(model, images, classes, layer=layer, registration="effective")
    against = int((maps.amax((1, 2, 3)) <= 0).sum())
    if against:
        warn(
            f"the class activation of {against} of {len(maps)} images is nowhere positive: no region matters most for "
            "the class there, and the cam region is where the activation is least negative",
            ModelWarning,
        )
    return top(maps, fraction)


def support(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    targets: Tensor,
    *,
    fraction: float = 0.3,
    layer: str | None = None,
) -> Tensor:
    """Where evidence is gathered for the label or for the target: the sites that a refined attack may alter.

    After the refinement of attacks by class activation in Xu et al. 2019 (arXiv 1904.02057), re-specified from the
    abstract; the share is ours. Equals `cam` of the labels | `cam` of the targets.

    Args:
        model: any classifier.
        images: (N, C, H, W) in [0, 1].
        labels: (N,) the true classes.
        targets: (N,) the classes that the attack asks for or reached.
        fraction: share of the image for each of the two classes, 0 to 1.
        layer: the module whose map is used; the last that keeps one where not given.

    Returns:
        Bool (N, 1, H, W), between fraction and 2 * fraction of the sites true in each.

    Raises:
        ValueError: when an argument does not fit, naming it.
    """
    check_fraction(fraction)
    with evaluating(model) as classifier:
        images = check_images(images, classifier)
        for name, classes in (("labels", labels), ("targets", targets)):
            check_classes(classes, len(images), name=name)
        both = torch.stack([classes.to(images.device, torch.long) for classes in (labels, targets)], 1)
        maps = class_activations(classifier, images, both, layer=layer, registration="effective")
    return torch.cat([top(one[:, None], fraction) for one in maps.unbind(1)], 1).any(1, keepdim=True)
