"""Controls for the SSIM map of an attack: what it shows without knowing where the network looks.

To first order 1 - SSIM of an attack within a bound on SSIM is (2 x local variance + C2) x gradient energy, and a PGD
attack of the same SSIM has a map of its own. Alignment with a class activation map counts only beyond these.

What `ssim_alignment` found, in sentences: the finding, then other images, then each control.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weakspot.attacks import pgd
from weakspot.classifier import Classifier, default_batch
from weakspot.similarity import C2, RADIUS, SIGMA, gaussian, luma, ssim_map
from weakspot.statistics import LEAST_RUN
from weakspot.statistics.number_format import p_value

if TYPE_CHECKING:
    from weakspot.explanations.visible_change import SsimAlignment


STEPS = 5  # of the PGD control
ROUNDS = 8  # of the search for equal SSIM; 1 - SSIM grows with the square of the change, so few are enough
EQUAL = 0.02  # relative difference of mean 1 - SSIM up to which the control has the SSIM of the attack


def margin_gradient(classifier: Classifier, images: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """(N, C, H, W) gradient of z_target - z_label at the images; zero where the network gives none."""
    size = classifier.fixed_batch or default_batch(images)
    found = []
    for part, label, target in zip(images.split(size), labels.split(size), targets.split(size), strict=True):
        point = classifier.filled(part).clone().requires_grad_()
        logits = classifier(point)[: len(part)]
        rise = (logits.gather(1, target[:, None]) - logits.gather(1, label[:, None])).sum()
        if rise.requires_grad:
            (gradient,) = torch.autograd.grad(rise, point, allow_unused=True, materialize_grads=True)
            found.append(gradient[: len(part)])
        else:
            found.append(torch.zeros_like(part))
    return torch.cat(found)


def variance_gradient(images: Tensor, gradient: Tensor) -> Tensor:
    """(N, 1, H, W) local variance x gradient energy under the windows of `ssim_map`.

    The 1 - SSIM of the steepest step: a change of (2 s^2 + C2) g has |change|^2 / (2 s^2 + C2) = (2 s^2 + C2) |g|^2.
    """
    precision = torch.float32 if images.device.type == "mps" else torch.float64
    gray = luma(images.to(precision))
    mean, square = gaussian(torch.cat([gray, gray**2], 1), SIGMA, RADIUS).split(1, 1)
    variance = (square - mean**2).clamp(min=0)
    energy = gaussian(gradient.to(precision).square().sum(1, keepdim=True), SIGMA, RADIUS)
    first_order: Tensor = (2 * variance + C2) * energy
    return first_order


def pgd_of_equal_ssim(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    targets: Tensor,
    gradient: Tensor,
    loss: Tensor,
    *,
    seed: int,
) -> Tensor:
    """1 - SSIM of an L-infinity PGD attack whose mean over the image is that of the attack under study.

    A radius is searched at which the sign of the gradient has that loss of SSIM, PGD runs with it, and its
    perturbation is scaled to the loss exactly.

    Args:
        classifier: in eval mode.
        images: (N, C, H, W).
        labels: (N,) classes to leave.
        targets: (N,) classes to reach, unlike the labels.
        gradient: (N, C, H, W) of `margin_gradient`.
        loss: (N,) mean 1 - SSIM that is asked for.
        seed: of the random start.

    Returns:
        (N, 1, H, W); NaN where no such attack has that loss within 2%.
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
    """A copy whose weights are permuted within each tensor: the same values, nothing of what was learned.

    After Adebayo et al. 2018 (arXiv 1810.03292), who draw them anew; permuting them needs no rule of initialization
    and fits every module.
    """
    shuffled = copy.deepcopy(classifier)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in shuffled.parameters():
            if parameter.ndim > 1:
                order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
                parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return shuffled


def _visible(images: Tensor, change: Tensor) -> Tensor:
    return 1 - ssim_map(images, (images + change).clamp(0, 1))


def _scale_to_loss(images: Tensor, direction: Tensor, loss: Tensor, *, first: float) -> Tensor:
    """(N, 1, 1, 1) factors at which the direction's mean 1 - SSIM is the loss, as far as they are found."""
    scale = torch.full_like(images[:, :1, :1, :1], first)
    for _ in range(ROUNDS):
        reached = _visible(images, scale * direction).mean((1, 2, 3))
        ratio = (loss / reached.clamp(min=1e-12)).sqrt().clamp(0.1, 10)
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


MEANINGS = {
    "ssim_windowed": "Mean structural similarity of the two images over sliding windows (11 x 11, Gaussian); 1 means "
    "that they look the same. An SSIM budget bounds another quantity, which records call ssim_budget_spent.",
    "ssim_windowed_min": "Structural similarity in the window where it is lowest, where the change is most visible.",
    "ssim_pointing": "Pointing game: 1 if the most visibly changed site lies where the label's class activation "
    "exceeds half its maximum.",
    "ssim_concentration": "How many times denser the visible change is where the label's class activation exceeds half "
    "its maximum than in the whole image; 1 is no concentration.",
    "ssim_spearman": "Rank correlation of the visible change and the label's class activation over all sites.",
}
CONTROLS = {
    "variance_gradient": "Local variance x gradient energy, which any attack bounded in SSIM follows to first order,",
    "pgd": "The change of an L-infinity PGD attack of equal mean SSIM",
    "random_weights": "Where the class activation of the network with permuted weights exceeds half its maximum, the "
    "same change",
}
SHORT = {
    "other images": "other images' class activations",
    "variance_gradient": "local variance x gradient energy",
    "pgd": "PGD of equal SSIM",
    "random_weights": "the network with permuted weights",
}
OF_CONTROL = {
    "ssim_pointing": "The pointing game for {}.",
    "ssim_concentration": "The same density for {}.",
    "ssim_spearman": "The same rank correlation for {}.",
}


def meanings(columns: list[str], found: SsimAlignment) -> dict[str, str]:
    """Column to what it means, of those that stand for themselves, and what its test over all images found."""
    every = dict(MEANINGS)
    for control in CONTROLS:
        for name, text in OF_CONTROL.items():
            every[f"{name}_{control}"] = text.format(SHORT[control])
        every[f"ssim_concentration_over_{control}"] = (
            f"Density of the visible change less that for {SHORT[control]}; alignment beyond it is above 0 and above "
            "the value with other images' class activations."
        )
    for name, sentence in beside(found).items():
        column = "ssim_concentration" if name == "other images" else f"ssim_concentration_over_{name}"
        every[column] += f" {sentence}"
    return {name: every[name] for name in columns if name in every}


def describe(found: SsimAlignment) -> tuple[str, ...]:
    """The sentences of `SsimAlignment.sentences`."""
    left_out = tuple(
        f"{_images(count)} {'is' if count == 1 else 'are'} left out: {reason}."
        for reason, count in Counter(found.why_not).most_common()
        if reason
    )
    return (_finding(found), *beside(found).values(), *_by_themselves(found), *left_out)


def _finding(found: SsimAlignment) -> str:
    if not found.runs:
        return "The images were not compared with each other."
    own = found.runs["other images"]
    if not own.images:
        return "No image can be compared."
    if own.images < LEAST_RUN:
        return (
            f"At least {LEAST_RUN} images are needed to say whether the visible change lies where the network looks; "
            f"{own.images} can be compared."
        )
    if found.aligned_overall:
        return (
            f"The visible change lies where the network looks, on the mean over {own.images} images, and beyond "
            f"{_listed([SHORT[name] for name in found.runs])}."
        )
    short_of = [SHORT[name] for name in found.runs if name not in found.exceeded]
    return (
        f"It is not shown that the visible change lies where the network looks ({own.images} images): it does not "
        f"clearly exceed {_listed(short_of, 'or')}."
    )


def beside(found: SsimAlignment) -> dict[str, str]:
    """One sentence for other images and one for each control; none if no image can be compared."""
    if not found.runs or not found.runs["other images"].images:
        return {}
    sentences = {}
    for name, test in found.runs.items():
        doubt = f" ({p_value(test.p)})." if test.images >= LEAST_RUN else "."
        over = f"Over {_images(test.images)}"
        if name == "other images":
            sentences[name] = (
                f"{over} the change is {test.value:.2f} times as dense where the class activation exceeds half its "
                f"maximum as in the whole image, and {test.null:.2f} times where other images' class activations "
                f"do{doubt}"
            )
        elif not test.images:
            sentences[name] = f"{CONTROLS[name]} could not be compared."
        else:
            sentences[name] = (
                f"{CONTROLS[name]} is {found.control_level(name):.2f} times as dense there ({_images(test.images)}); "
                f"the attack's change less this is {test.value:+.2f}, and {test.null:+.2f} with other images' class "
                f"activations{doubt}"
            )
    return sentences


def _by_themselves(found: SsimAlignment) -> list[str]:
    known = found.scores["ssim_concentration_p"].notna().sum() if found.runs else 0
    if not known:
        return []
    return [f"In {int(found.aligned.sum())} of {known} images the same is shown for the image by itself."]


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _listed(parts: list[str], word: str = "and") -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {word} {parts[-1]}"
