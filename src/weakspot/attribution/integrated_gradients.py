"""Integrated gradients: which sites of a perturbation cost the margin."""

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


@dataclass(frozen=True, repr=False)
class MarginDrop:
    """How much of the margin each site of the perturbation took.

    Attributes:
        sites: (N, 1, H, W), signed; sums to `total` within `gap`.
        total: (N,) margin of the clean image less that of the adversarial one.
        gap: (N,) |sum of sites - total| as a fraction of |total|, the completeness error of the integral.
        before: (N,) margin of the clean image.
        points: (N,) points on the path that the integral took.
    """

    sites: Tensor
    total: Tensor
    gap: Tensor
    before: Tensor
    points: Tensor

    def __repr__(self) -> str:
        drop, before, gap = (float(one) for one in (self.total.mean(), self.before.mean(), self.gap.max()))
        shape = tuple(self.sites.shape)
        return f"MarginDrop(sites {shape}, mean drop {drop:.3g} of {before:.3g}, largest gap {gap:.1%})"


@dataclass(frozen=True, eq=False)
class _Paths:
    """Straight paths from clean to adversarial images, and the margins along them.

    Attributes:
        classifier: in eval mode, gradients on.
        clean: (N, C, H, W).
        adversarial: (N, C, H, W).
        labels: (N,) class whose margin is lost.
        competing: (N,) class that it is lost to.
    """

    classifier: Classifier
    clean: Tensor
    adversarial: Tensor
    labels: Tensor
    competing: Tensor

    def margins(self, images: Tensor) -> Tensor:
        """(N,) of one image of each path."""
        with torch.no_grad():
            batches = zip(
                *(one.split(default_batch(images)) for one in (images, self.labels, self.competing)),
                strict=True,
            )
            return torch.cat([margin(self.classifier(x), own, other) for x, own, other in batches]).float()

    def drop(self, paths: Tensor, fractions: Tensor, weights: Tensor) -> Tensor:
        """Integrate the gradient along some paths (equation 1 of arXiv 1703.01365), with the sign of a drop.

        Args:
            paths: (n,) their numbers.
            fractions: (n, P) points, as fractions of the way from the clean to the adversarial image.
            weights: (P,) of the points.

        Returns:
            (n, 1, H, W).
        """
        clean, labels, competing = self.clean[paths], self.labels[paths], self.competing[paths]
        change = self.adversarial[paths] - clean
        count, points = fractions.shape
        # Every image at every point is one row; rows go through the network in batches of the usual size.
        image = torch.arange(count, device=clean.device).repeat_interleave(points)
        point = torch.arange(points, device=clean.device).repeat(count)
        # sum_p w_p dF/dx at x + t_p (x' - x), a quadrature of the integral over t from 0 to 1.
        summed = torch.zeros_like(clean)
        for rows in torch.arange(count * points, device=clean.device).split(default_batch(clean)):
            which, where = image[rows], point[rows]
            position = fractions[which, where][:, None, None, None]
            inputs = (clean[which] + position * change[which]).requires_grad_()
            margins = margin(self.classifier(inputs), labels[which], competing[which])
            # A margin depends on its own row alone, so the gradient of their sum holds each row's own.
            if margins.requires_grad:
                (gradient,) = torch.autograd.grad(
                    margins.sum(), inputs, allow_unused=True, materialize_grads=True
                )
                summed.index_add_(0, which, gradient * weights[where, None, None, None])
        # IG_i = (x'_i - x_i) times that integral is what the margin gains; a drop is its negative, over all channels.
        return -(change * summed).sum(1, keepdim=True)


def margin_drop(
    model: nn.Module, clean: Tensor, adversarial: Tensor, labels: Tensor, competing: Tensor
) -> MarginDrop:
    """Integrate gradients of z_label - z_competing along the straight path from clean to adversarial.

    Sundararajan et al. 2017 (arXiv 1703.01365), with the clean image as baseline and Gauss-Legendre points, so that the
    sites sum to the whole drop whatever the norm of the perturbation (completeness, proposition 1). Points are doubled,
    from 16 to at most 256, for images whose sum is more than 1% off.

    Args:
        model: any classifier.
        clean: (N, C, H, W) in [0, 1].
        adversarial: (N, C, H, W) in [0, 1].
        labels: (N,) class whose margin is lost.
        competing: (N,) class that it is lost to.

    Raises:
        ValueError: if an argument does not fit, naming it.
    """
    with evaluating(model) as classifier:
        clean = check_images(clean, classifier, name="clean")
        adversarial = check_images(adversarial, classifier, name="adversarial")
        if clean.shape != adversarial.shape:
            raise ValueError(
                f"clean and adversarial must have one shape, got {tuple(clean.shape)} and {tuple(adversarial.shape)}"
            )
        with torch.no_grad():
            class_count = classifier(clean[:1]).shape[1]
        for name, classes in (("labels", labels), ("competing", competing)):
            check_classes(classes, len(clean), class_count, name=name)
        own, other = (classes.to(clean.device, torch.long, copy=True) for classes in (labels, competing))
        return _integrate(_Paths(classifier, clean, adversarial, own, other))


def _integrate(paths: _Paths) -> MarginDrop:
    before = paths.margins(paths.clean)
    total = before - paths.margins(paths.adversarial)
    sites = torch.zeros_like(paths.clean[:, :1])
    gap = torch.full_like(total, torch.inf)
    used = torch.zeros_like(paths.labels)
    with fused(paths.classifier, paths.clean[:1]):
        for points in POINTS:
            inexact = (gap > TOLERANCE).nonzero()[:, 0]
            if not len(inexact):
                break
            # Exact for polynomials of degree 2 P - 1 in t; kinks of ReLUs are what asks for more points.
            nodes, weights = np.polynomial.legendre.leggauss(points)
            # From [-1, 1], the interval of Gauss and Legendre, to [0, 1].
            fractions = torch.from_numpy((nodes + 1) / 2).to(paths.clean).expand(len(inexact), -1)
            drop = paths.drop(inexact, fractions, torch.from_numpy(weights / 2).to(paths.clean))
            sites[inexact], used[inexact] = drop, points
            # Completeness: the sites sum to F(x) - F(x'). What is missing is the error of the quadrature.
            missed = (drop.flatten(1).double().sum(1) - total[inexact].double()).abs()
            gap[inexact] = (missed / total[inexact].double().abs().clamp(min=1e-6)).to(gap)
    return MarginDrop(sites, total, gap, before, used)


def sampled_drop(
    classifier: Classifier, clean: Tensor, adversarial: Tensor, classes: Tensor, fractions: Sequence[Tensor]
) -> Tensor:
    """(N, 1, H, W) the margin drop by site again, from the mean gradient at given points of each image's path.

    Args:
        classifier: in eval mode, gradients on.
        clean: (N, C, H, W), on the classifier's device.
        adversarial: (N, C, H, W).
        classes: (N, 2) the label of each image and the class that it is lost to.
        fractions: N tensors, the points as fractions of the way from the clean to the adversarial image.
    """
    sites = torch.zeros_like(clean[:, :1])
    if not len(clean):
        return sites
    paths = _Paths(classifier, clean, adversarial, classes[:, 0], classes[:, 1])
    counts = torch.tensor([len(own) for own in fractions])
    with fused(classifier, clean[:1]):
        # Images with equally many points are integrated together.
        for points in counts.unique().tolist():
            same = (counts == points).nonzero()[:, 0]
            places = torch.stack([fractions[number] for number in same.tolist()]).to(clean)
            rows = same.to(clean.device)
            sites[rows] = paths.drop(rows, places, torch.full((points,), 1 / points).to(clean))
    return sites
