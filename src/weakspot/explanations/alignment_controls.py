"""Controls for the SSIM map of an attack: what such a map shows for reasons other than where the network looks.

To first order, 1 - SSIM of an attack within a bound on SSIM is (2 x local variance + C2) x gradient energy. A PGD
attack with the same SSIM has a map of its own. Alignment with a class activation map counts only beyond these two.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from weakspot.attacks import pgd
from weakspot.classifier import Classifier, default_batch
from weakspot.similarity import C2, RADIUS, SIGMA, gaussian, luma, ssim_map

STEPS = 5  # of the PGD control
ROUNDS = 8  # of the search for equal SSIM; 1 - SSIM grows with the square of the change, so few are enough
EQUAL = 0.02  # relative difference of mean 1 - SSIM up to which the control counts as equal to the attack


def margin_gradient(classifier: Classifier, images: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """(N, C, H, W) gradient of z_target - z_label at the images; zero if the network has no gradient."""
    size = classifier.fixed_batch or default_batch(images)
    gradients = []
    for part, label, target in zip(images.split(size), labels.split(size), targets.split(size), strict=True):
        point = classifier.filled(part).clone().requires_grad_()
        logits = classifier(point)[: len(part)]
        rise = (logits.gather(1, target[:, None]) - logits.gather(1, label[:, None])).sum()
        if rise.requires_grad:
            (gradient,) = torch.autograd.grad(rise, point, allow_unused=True, materialize_grads=True)
            gradients.append(gradient[: len(part)])
        else:
            gradients.append(torch.zeros_like(part))
    return torch.cat(gradients)


def variance_gradient(images: Tensor, gradient: Tensor) -> Tensor:
    """(N, 1, H, W) local variance x gradient energy under the windows of `ssim_map`.

    This is 1 - SSIM of the steepest step: a change of (2 s^2 + C2) g has |change|^2 / (2 s^2 + C2), which is
    (2 s^2 + C2) |g|^2.
    """
    precision = torch.float32 if images.device.type == "mps" else torch.float64
    gray = luma(images.to(precision))
    mean, square = gaussian(torch.cat([gray, gray**2], 1), SIGMA, RADIUS).split(1, 1)
    variance = (square - mean**2).clamp(min=0)  # rounding can make E[x^2] - E[x]^2 negative
    energy = gaussian(gradient.to(precision).square().sum(1, keepdim=True), SIGMA, RADIUS)
    first_order: Tensor = (2 * variance + C2) * energy
    return first_order


def pgd_of_equal_ssim(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    targets: Tensor,
    gradient: Tensor,
    *,
    loss: Tensor,
    seed: int,
) -> Tensor:
    """1 - SSIM of an L-infinity PGD attack with the same mean 1 - SSIM as the attack under study.

    The radius is the one at which the sign of the gradient has that loss of SSIM. PGD runs with this radius, and its
    perturbation is then scaled to the exact loss.

    Args:
        classifier: in eval mode.
        images: (N, C, H, W).
        labels: (N,) classes to leave.
        targets: (N,) classes to reach, different from the labels.
        gradient: (N, C, H, W) from `margin_gradient`.
        loss: (N,) mean 1 - SSIM to match.
        seed: of the random start.

    Returns:
        (N, 1, H, W); NaN for images where no such attack comes within 2% of the loss.
    """
    radius = _scale_to_loss(images, gradient.sign(), loss, first=2 / 255).clamp(max=1)
    attacked = pgd(
        classifier, images, labels, targets=targets, budget=_OwnRadius(radius), steps=STEPS, seed=seed
    )
    change = attacked.perturbation
    scale = _scale_to_loss(images, change, loss, first=1.0)
    visible = _visible(images, scale * change)
    near = (visible.mean((1, 2, 3)) - loss).abs() <= EQUAL * loss
    return torch.where(near.view(-1, 1, 1, 1), visible, torch.nan)


def with_shuffled_weights(classifier: Classifier, seed: int) -> Classifier:
    """A copy whose weights are permuted within each tensor: the same values without anything learned.

    After Adebayo et al. 2018 (arXiv 1810.03292), who draw new weights. Permuting needs no rule of initialization and
    works for every module.
    """
    shuffled = copy.deepcopy(classifier)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in shuffled.parameters():
            if parameter.ndim > 1:  # biases and the parameters of norms stay
                order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
                parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return shuffled


def _visible(images: Tensor, change: Tensor) -> Tensor:
    return 1 - ssim_map(images, (images + change).clamp(0, 1))


def _scale_to_loss(images: Tensor, direction: Tensor, loss: Tensor, *, first: float) -> Tensor:
    """(N, 1, 1, 1) factors that bring the direction's mean 1 - SSIM to the loss, as closely as `ROUNDS` allow."""
    scale = torch.full_like(images[:, :1, :1, :1], first)
    for _ in range(ROUNDS):
        reached = _visible(images, scale * direction).mean((1, 2, 3))
        ratio = (loss / reached.clamp(min=1e-12)).sqrt().clamp(0.1, 10)  # the loss is quadratic in the scale
        if bool(((ratio - 1).abs() < EQUAL / 20).all()):
            break
        scale = (scale * ratio.view(-1, 1, 1, 1)).clamp(max=10)
    return scale


@dataclass(frozen=True, eq=False)
class _OwnRadius:
    """An L-infinity budget with a radius (N, 1, 1, 1) for each image."""

    radius: Tensor

    def project(self, perturbation: Tensor, images: Tensor, *, region: Tensor | None = None) -> Tensor:
        wanted = perturbation if region is None else torch.where(region, perturbation, 0)
        return (images + wanted.clamp(-self.radius, self.radius)).clamp(0, 1) - images

    def steepest_step(self, gradient: Tensor, perturbation: Tensor, images: Tensor) -> Tensor:  # noqa: ARG002
        return self.radius * gradient.sign()

    def distance(self, perturbation: Tensor, images: Tensor) -> Tensor:  # noqa: ARG002
        """In units of the radius."""
        return (perturbation.abs() / self.radius.clamp(min=1e-12)).flatten(1).amax(1)
