"""Class activation: where in the image a network finds evidence for a class."""

import torch
from torch import Tensor, nn

from weakspot._checks import check_choice, check_classes
from weakspot._memory import remembered
from weakspot.attribution.alignment import Grid, effective_grid, place, receptive_grid
from weakspot.attribution.layers import Layer, find_layer
from weakspot.classifier import Classifier, check_images, check_logits, default_batch, evaluating

ALIGNMENTS = ("resize", "receptive_field", "effective")
ROUNDING = 1e-5  # of the sum of absolute gradients


def class_activation(
    model: nn.Module,
    images: Tensor,
    classes: Tensor,
    *,
    layer: str | None = None,
    alignment: str = "resize",
) -> Tensor:
    """Return the evidence for a class, site by site, signed and not normalized.

    If the network ends in pooling + linear this is the plain CAM, sum_c w_kc A_c (Zhou et al. 2016, arXiv 1512.04150,
    equation 2), whose mean over the map is the logit less its bias. Elsewhere it is Grad-CAM (Selvaraju et al. 2017,
    arXiv 1610.02391) with gradients summed over the map instead of averaged, so that both agree where both exist, and
    without its final ReLU, which is clamp(min=0). For a network of tokens, the last normalized tokens that reach the
    logit are used. A network without any map of the image gets gradient times image. Where gradients sum to zero over
    the map but for rounding, as before an instance normalization, Grad-CAM is zero: it shows no evidence.

    Args:
        model: any classifier.
        images: (N, C, H, W) in [0, 1].
        classes: (N,) the class that each image is explained for.
        layer: the module whose output is used; if None, the last one that has a map of the image.
        alignment: "resize" lets the cells tile the image, like other tools; "receptive_field" places each at the center
            of its receptive field, "effective" where it looks according to gradients. The latter two need
            convolutions; other maps are resized.

    Returns:
        (N, 1, H, W).

    Raises:
        ValueError: if an argument does not fit, naming it.
    """
    with evaluating(model) as classifier:
        images = check_images(images, classifier)
        check_classes(classes, len(images), name="classes")
        every = classes.to(images.device, torch.long, copy=True)[:, None]
        return class_activations(classifier, images, every, layer=layer, alignment=alignment)


def class_activations(
    classifier: Classifier,
    images: Tensor,
    classes: Tensor,
    *,
    layer: str | None = None,
    alignment: str = "resize",
) -> Tensor:
    """`class_activation` for several classes of each image from one forward pass.

    Args:
        classifier: in eval mode, gradients on.
        images: (N, C, H, W), checked.
        classes: (N, M).
        layer: as in `class_activation`.
        alignment: as in `class_activation`.

    Returns:
        (N, M, H, W).
    """
    check_choice("alignment", alignment, ALIGNMENTS)
    key = "layer", layer, images.shape[1:]
    last = remembered(classifier, key, lambda: find_layer(classifier, images[:1], layer))
    maps = _drawn(classifier, last, images, classes, alignment)
    if layer is not None or last is None:
        return maps
    # Classes that do not depend on that layer are explained at the last one that they do depend on.
    empty = ~maps.flatten(2).any(2)
    for wanted in classes[empty].unique().tolist():
        other = find_layer(classifier, images[:1], wanted=wanted)
        if other is None or other.call == last.call:
            continue
        for row, column in (empty & (classes == wanted)).nonzero().tolist():
            one, same = slice(row, row + 1), slice(column, column + 1)
            maps[one, same] = _drawn(classifier, other, images[one], classes[one, same], alignment)
    return maps


def _drawn(
    classifier: Classifier, layer: Layer | None, images: Tensor, classes: Tensor, alignment: str
) -> Tensor:
    """(N, M, H, W) evidence at the layer, drawn over the images; gradient times image without a layer."""
    batches = _batches(classifier, images, classes)
    if layer is None:
        return torch.cat([(_gradients(classifier, x, wanted) * x[:, None]).sum(2) for x, wanted in batches])
    grid = _grid(classifier, images[:1], layer, alignment)
    size = (images.shape[2], images.shape[3])
    return torch.cat([place(_evidence(classifier, layer, x, wanted), size, grid) for x, wanted in batches])


def _grid(classifier: Classifier, image: Tensor, layer: Layer, alignment: str) -> Grid | None:
    if alignment == "receptive_field":
        return receptive_grid(classifier, image, layer)
    if alignment == "resize":
        return None
    key = "grid", layer.name, layer.call, image.shape
    return remembered(classifier, key, lambda: effective_grid(classifier, image, layer))


def _batches(classifier: Classifier, images: Tensor, classes: Tensor) -> list[tuple[Tensor, Tensor]]:
    size = classifier.fixed_batch or default_batch(images)
    return list(zip(images.split(size), classes.split(size), strict=True))


def _evidence(classifier: Classifier, layer: Layer, images: Tensor, classes: Tensor) -> Tensor:
    """(n, M, h, w) cells of the layer's own map."""
    count = len(images)
    point = classifier.filled(images).clone().requires_grad_()
    with layer.watched() as seen:
        logits = classifier(point)[:count]
    _check(logits, classes, classifier, images)
    activation = seen[-1]
    maps = layer.layout.maps(activation).detach()[:count]
    if layer.head is not None:
        return torch.einsum("nmc,nchw->nmhw", layer.head[classes], maps).float()
    # Without such a head: Grad-CAM, with one backward pass through the same graph for each class.
    evidence = []
    for wanted in classes.unbind(1):
        # The sum over images has each image's own gradient in its own row.
        picked = logits.gather(1, wanted[:, None]).sum()
        (gradient,) = torch.autograd.grad(
            picked, activation, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        # alpha_c of Grad-CAM (equation 1), without dividing by the number of cells.
        gradients = layer.layout.maps(gradient)[:count]
        weights = gradients.sum((2, 3))
        # Before a normalization over the map, gradients sum to zero: what rounding leaves of them is no evidence.
        rounding = weights.abs().amax(1) <= ROUNDING * gradients.abs().sum((2, 3)).amax(1)
        weights = weights.masked_fill(rounding[:, None], 0)
        evidence.append(torch.einsum("nc,nchw->nhw", weights, maps))
    return torch.stack(evidence, 1).float()


def logit_gradient(classifier: Classifier, images: Tensor, classes: Tensor) -> Tensor:
    """(N, 1, H, W) norm over channels of the gradient of each image's class (N,) (Simonyan et al. 2014, 1312.6034)."""
    batches = _batches(classifier, images, classes[:, None])
    return torch.cat([_gradients(classifier, x, wanted).norm(dim=2) for x, wanted in batches])


def _gradients(classifier: Classifier, images: Tensor, classes: Tensor) -> Tensor:
    """(n, M, C, H, W) gradients of the logits of M classes."""
    point = images.clone().requires_grad_()
    logits = classifier(point)
    _check(logits, classes, classifier, images)
    if not logits.requires_grad:
        return torch.zeros(len(images), classes.shape[1], *images.shape[1:], device=images.device)
    picked = [logits.gather(1, wanted[:, None]).sum() for wanted in classes.unbind(1)]
    gradients = (  # zero of a network that detaches its input
        torch.autograd.grad(logit, point, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
        for logit in picked
    )
    return torch.stack(list(gradients), 1)


def _check(logits: Tensor, classes: Tensor, classifier: Classifier, images: Tensor) -> None:
    check_logits(logits.detach(), classifier, images)
    check_classes(classes.flatten(), classes.numel(), logits.shape[1], name="classes")
