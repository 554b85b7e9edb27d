"""Regions of activation: where a network finds evidence for a class, and for the two classes of an attack."""

import torch
from torch import Tensor, nn

from weakspot._checks import ImageWarning, ModelWarning, check_classes, check_fraction, warn
from weakspot.attribution.cam import class_activation, class_activations
from weakspot.classifier import check_images, evaluating
from weakspot.regions.masks import superpixels, top
from weakspot.statistics.number_format import counted

STEPS = 8192  # that a class activation is ranked in


def cam(
    model: nn.Module, images: Tensor, classes: Tensor, *, fraction: float = 0.3, layer: str | None = None
) -> Tensor:
    """Return where the network finds most evidence for a class: the sites of highest class activation.

    Args:
        model: any classifier.
        images: (N, C, H, W) in [0, 1].
        classes: (N,) the class that each image is explained for.
        fraction: fraction of the image, 0 to 1.
        layer: the module whose map is used; if None, the last one that has a map of the image.

    Returns:
        Bool (N, 1, H, W), with round(fraction * H * W) sites true in each image.

    Warns:
        ModelWarning: if the activation of an image is nowhere positive, which happens with tokens. Its region then does
            not matter for the class, but speaks least against it.
    """
    check_fraction(fraction)
    maps = class_activation(model, images, classes, layer=layer, alignment="effective")
    against = int((maps.amax((1, 2, 3)) <= 0).sum())
    if against:
        warn(
            f"the class activation of {against} of {counted(len(maps))} is nowhere positive: no region matters most "
            "for the class there, and the cam region is where the activation is least negative",
            ModelWarning,
        )
    return top(_without_rounding(maps), fraction)


def _without_rounding(maps: Tensor) -> Tensor:
    """Maps (N, 1, H, W) in steps of their largest value / 8192, so that equal evidence is a tie for `top`.

    Rounding, which differs between batch sizes, would break ties otherwise: on a black background, everywhere.
    """
    maps = maps.float()  # in half precision, a step could be zero
    step = (maps.abs().amax((1, 2, 3), keepdim=True) / STEPS).clamp(min=torch.finfo(maps.dtype).tiny)
    return (maps / step).round()


def important_superpixels(
    model: nn.Module, images: Tensor, classes: Tensor, *, fraction: float = 0.3, count: int = 100
) -> Tensor:
    """Return the superpixels in which the network finds most evidence for a class, as whole pieces of the image.

    Superpixels are taken in the order of their mean class activation, until the next one would exceed the fraction.
    The first one is taken whatever its size. Unlike `cam`, the region follows the outlines of the image.

    Args:
        model: any classifier.
        images: (N, C, H, W) in [0, 1], with 1 or 3 channels.
        classes: (N,) the class that each image is explained for.
        fraction: the most that the region covers of an image of several superpixels, 0 to 1; 0 gives an empty region.
        count: the approximate number of superpixels that `superpixels` cuts an image into.

    Returns:
        Bool (N, 1, H, W).

    Raises:
        ValueError: if an argument does not fit, naming it.

    Warns:
        ImageWarning: if the first superpixel of an image alone is larger than the fraction.
    """
    check_fraction(fraction)
    groups = superpixels(images, count=count)
    maps = class_activation(model, images, classes, alignment="effective").to(groups.device)
    region = torch.stack(
        [
            _highest_groups(own, map_, fraction)
            for own, map_ in zip(groups, _without_rounding(maps), strict=True)
        ]
    )
    larger = int((region.flatten(1).double().mean(1) > fraction + 1e-9).sum())
    if larger:
        warn(
            f"the first superpixel of {larger} of {len(region)} images is larger than the fraction {fraction:g} and "
            "is the whole region there (give more superpixels, as in superpixels:400)",
            ImageWarning,
        )
    return region


def _highest_groups(groups: Tensor, scores: Tensor, fraction: float) -> Tensor:
    """Bool (1, H, W): the groups (1, H, W) of highest mean score (1, H, W), in order, while they fit."""
    areas = groups.flatten().bincount()
    sums = torch.zeros(len(areas), dtype=torch.float64, device=groups.device)
    means = sums.index_add_(0, groups.flatten(), scores.flatten().double()) / areas
    # A stable sort breaks ties by number, so that the same image always gives the same region.
    order = means.argsort(descending=True, stable=True)
    covered = areas[order].cumsum(0)
    taken = int((covered <= fraction * groups.numel()).sum())
    kept = order[: max(taken, 1 if fraction > 0 else 0)]
    return torch.isin(groups, kept)


def support(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    targets: Tensor,
    *,
    fraction: float = 0.3,
    layer: str | None = None,
) -> Tensor:
    """Return where the network finds evidence for the label or for the target: the sites of a refined attack.

    After the refinement of attacks by class activation in Xu et al. 2019 (arXiv 1904.02057), re-specified from the
    abstract; the fraction is ours. Equals `cam` of the labels | `cam` of the targets.

    Args:
        model: any classifier.
        images: (N, C, H, W) in [0, 1].
        labels: (N,) the true classes.
        targets: (N,) the classes that the attack aims at or reached.
        fraction: fraction of the image for each of the two classes, 0 to 1.
        layer: the module whose map is used; if None, the last one that has a map of the image.

    Returns:
        Bool (N, 1, H, W), with between fraction and 2 * fraction of the sites true in each image.

    Raises:
        ValueError: if an argument does not fit, naming it.
    """
    check_fraction(fraction)
    with evaluating(model) as classifier:
        images = check_images(images, classifier)
        for name, classes in (("labels", labels), ("targets", targets)):
            check_classes(classes, len(images), name=name)
        both = torch.stack([classes.to(images.device, torch.long) for classes in (labels, targets)], 1)
        maps = class_activations(classifier, images, both, layer=layer, alignment="effective")
    of_each = [top(_without_rounding(one[:, None]), fraction) for one in maps.unbind(1)]
    return torch.cat(of_each, 1).any(1, keepdim=True)
