"""Path attribution: which sites of a perturbation cost the margin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from weakspot._checks import check_classes
from weakspot.classifier import Classifier, check_images, default_batch, evaluating
from weakspot.fusion import fused
from weakspot.logits import margin

POINTS = (16, 32, 64, 128, 256)
TOLERANCE = 0.01  # of the margin drop


@dataclass(frozen=True)
class MarginDrop:
    """What each site of the perturbation took from the margin.

    Attributes:
        sites: (N, 1, H, W), signed; sums to `total` within `gap`.
        total: (N,) margin of the clean image less that of the adversarial one.
        gap: (N,) |sum of sites - total| as a share of |total|; the completeness error of the integral.
        before: (N,) margin of the clean image.
        points: (N,) points on the path that the integral took.
    """

    sites: Tensor
    total: Tensor
    gap: Tensor
    before: Tensor
    points: Tensor


def margin_drop(
    model: nn.Module, clean: Tensor, adversarial: Tensor, labels: Tensor, rivals: Tensor
) -> MarginDrop:
    """Integrated gradients of z_label - z_rival along the straight path from clean to adversarial.

    Sundararajan et al. 2017 (arXiv 1703.01365), with the clean image as baseline and Gauss-Legendre points, so
    that the sites sum to the whole drop whatever the norm of the perturbation. Points are doubled, from 16 to
    at most 256, for the images whose sum is more than 1% off.

    Args:
        model: any classifier.
        clean: (N, C, H, W) in [0, 1].
        adversarial: (N, C, H, W) in [0, 1].
        labels: (N,) class whose margin is lost.
        rivals: (N,) class it is lost to.

    Raises:
        ValueError: when an argument does not fit, naming it.
    """
    with evaluating(model) as classifier:
        clean = check_images(clean, classifier, name="clean")
        adversarial = check_images(adversarial, classifier, name="adversarial")
        if clean.shape != adversarial.shape:
            raise ValueError(
                f"clean has shape {tuple(clean.shape)} and adversarial {tuple(adversarial.shape)}; accepted are two "
                "batches of one shape"
            )
        with torch.no_grad():
            class_count = classifier(clean[:1]).shape[1]
        for name, classes in (("labels", labels), ("rivals", rivals)):
            check_classes(classes, len(clean), class_count, name=name)
        device = clean.device
        own, other = (classes.to(device, torch.long, copy=True) for classes in (labels, rivals))
        return _integrate(classifier, clean, adversarial, own, other)


def _integrate(
    classifier: Classifier, clean: Tensor, adversarial: Tensor, labels: Tensor, rivals: Tensor
) -> MarginDrop:
    before = _margins(classifier, clean, labels, rivals)
    total = before - _margins(classifier, adversarial, labels, rivals)
    sites = torch.zeros_like(clean[:, :1])
    gap = torch.full_like(total, torch.inf)
    used = torch.zeros_like(labels)
    with fused(classifier, clean[:1]):
        for points in POINTS:
            open_ = (gap > TOLERANCE).nonzero()[:, 0]
            if not len(open_):
                break
            nodes, weights = np.polynomial.legendre.leggauss(points)
            shares = torch.from_numpy((nodes + 1) / 2).to(clean).expand(len(open_), -1)
            taken = _path_gradient(
                classifier, clean[open_], adversarial[open_] - clean[open_], labels[open_], rivals[open_],
                shares, torch.from_numpy(weights / 2).to(clean),
            )  # fmt: skip
            sites[open_], used[open_] = taken, points
            missed = (taken.flatten(1).double().sum(1) - total[open_].double()).abs()
            gap[open_] = (missed / total[open_].double().abs().clamp(min=1e-6)).to(gap)
    return MarginDrop(sites, total, gap, before, used)


def sampled_drop(
    classifier: Classifier,
    clean: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    rivals: Tensor,
    shares: Sequence[Tensor],
) -> Tensor:
    """(N, 1, H, W) the margin drop by site again, from the mean gradient at given points of each image's path.

    Args:
        classifier: in eval mode, gradients on.
        clean: (N, C, H, W), on the classifier's device.
        adversarial: (N, C, H, W).
        labels: (N,).
        rivals: (N,).
        shares: N tensors, the points as shares of the way from the clean to the adversarial image.
    """
    sites = torch.zeros_like(clean[:, :1])
    if not len(clean):
        return sites
    counts = torch.tensor([len(own) for own in shares])
    with fused(classifier, clean[:1]):
        for points in counts.unique().tolist():
            alike = (counts == points).nonzero()[:, 0]
            places = torch.stack([shares[number] for number in alike.tolist()]).to(clean)
            rows = alike.to(clean.device)
            sites[rows] = _path_gradient(
                classifier, clean[rows], adversarial[rows] - clean[rows], labels[rows], rivals[rows],
                places, torch.full((points,), 1 / points).to(clean),
            )  # fmt: skip
    return sites


def _margins(classifier: Classifier, images: Tensor, labels: Tensor, rivals: Tensor) -> Tensor:
    with torch.no_grad():
        batches = zip(
            *(tensor.split(default_batch(images)) for tensor in (images, labels, rivals)), strict=True
        )
        return torch.cat([margin(classifier(x), own, other) for x, own, other in batches]).float()


def _path_gradient(
    classifier: Classifier,
    clean: Tensor,
    change: Tensor,
    labels: Tensor,
    rivals: Tensor,
    shares: Tensor,
    portions: Tensor,
) -> Tensor:
    """-change times the gradients at shares (N, P) of the path, weighted by portions (P,): (N, 1, H, W)."""
    count, points = shares.shape
    # Every image at every point is one row; rows go through the network in batches of the usual size.
    image = torch.arange(count, device=clean.device).repeat_interleave(points)
    point = torch.arange(points, device=clean.device).repeat(count)
    summed = torch.zeros_like(clean)
    for rows in torch.arange(count * points, device=clean.device).split(default_batch(clean)):
        which, where = image[rows], point[rows]
        inputs = (clean[which] + shares[which, where][:, None, None, None] * change[which]).requires_grad_()
        margins = margin(classifier(inputs), labels[which], rivals[which])
        if margins.requires_grad:
            (gradient,) = torch.autograd.grad(
                margins.sum(), inputs, allow_unused=True, materialize_grads=True
            )
            summed.index_add_(0, which, gradient * portions[where, None, None, None])
    return -(change * summed).sum(1, keepdim=True)
