"""SSIM alignment: does the visible change of an attack lie where the network looks?

Compares the SSIM map of a perturbation with the class activation map, after Pochimireddy et al. 2021 (arXiv
2106.12731), re-specified from the abstract: the statistics, their nulls and the controls are ours. Photographs and
attacks both favor the center of an image, so the result counts only against other images' maps and two controls.
To first order, 1 - SSIM of an attack within a bound on SSIM is (2 x local variance + C2) x gradient energy, and a PGD
attack with the same SSIM has a map of its own: alignment must exceed both.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weakspot._checks import check_seed
from weakspot.attacks import pgd
from weakspot.attribution.cam import class_activation
from weakspot.classifier import Classifier, default_batch, evaluating, predict
from weakspot.explanations.agreement import WHOLE, comparable, other_images, reached_fraction
from weakspot.explanations.alignment_findings import (
    STATISTICS,
    TESTED,
    SsimAlignment,
    alignment,
    column_meanings,
)
from weakspot.explanations.analysis import Analysis, Picture, check_pairs, competing_classes, prepare_pairs
from weakspot.pairs import AttackResult, Pairs
from weakspot.similarity import C2, RADIUS, SIGMA, gaussian, luma, ssim_map
from weakspot.statistics import RunTest, other_image_test, run_test

if TYPE_CHECKING:
    import pandas as pd

INVISIBLE = 1e-5  # 1 - SSIM below which a change is rounding
STEPS = 5  # of the PGD control
ROUNDS = 8  # of the search for equal SSIM; 1 - SSIM grows with the square of the change, so few are enough
EQUAL = 0.02  # relative difference of mean 1 - SSIM up to which the control counts as equal to the attack


def ssim_alignment(
    model: nn.Module,
    pairs: Pairs,
    *,
    reference: Tensor | None = None,
    random_weights: bool = False,
    compare: bool = True,
    seed: int = 0,
) -> SsimAlignment:
    """Measure whether the visible change of a pair, 1 - SSIM, lies where the class activation of its label is strong.

    Three statistics compare the two maps:

    - ssim_pointing, the pointing game (Zhang et al. 2016, arXiv 1608.00507) without the paper's tolerance: 1 if the
      most changed site lies where the activation exceeds half its maximum, 0 if not.
    - ssim_concentration: how much denser the change is in that area than in the whole image, as the fraction of the
      change that lies there over the fraction of the sites. 1 means no concentration.
    - ssim_spearman: rank correlation of the two maps over all sites.

    p is the pooled rank among other images' activation maps, with at least 19 other images
    (`statistics.other_image_test`). Over the whole batch, p comes from permuting the maps, with at least 10 images
    (`statistics.run_test`). Two controls replace the attack's map: "variance_gradient" is local variance x gradient
    energy at the clean image, which is 1 - SSIM to first order for any attack bounded in SSIM; "pgd" is the map of an
    L-infinity PGD attack with the same target and the same mean SSIM. The optional control "random_weights" replaces
    the network's activation by that of the network with permuted weights, for the class that it predicts. Alignment is
    stated only if it exceeds other images' maps and every control, with p <= .05 and by a quarter.

    The statistics are NaN if the activation is nowhere positive, if nothing changed visibly, and for attacks with the
    budget `SSIM(..., mode="local")`, which spend it in every patch whatever the network does. They are also NaN for an
    attack that did not reach the whole image: where it acts follows from where it was allowed to act.

    Args:
        model: any classifier. It is not changed.
        pairs: N pairs. Only an `AttackResult` records that its budget was local.
        reference: (R, C, H, W) other images from the same source. Their activation is that of the predicted class.
        random_weights: whether to add the control of that name, at the cost of a copy of the network.
        compare: False omits everything that depends on the other images of the batch.
        seed: of the random start of PGD, of the permuted weights and of the permutations.

    Raises:
        ValueError: if an argument is invalid; the message names it.

    >>> from weakspot.attacks import pgd
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    >>> result = pgd(net.eval(), torch.rand(2, 3, 16, 16), torch.tensor([0, 1]), steps=2)
    >>> bool(ssim_alignment(net, result).scores["ssim_concentration_p"].isna().all())  # two images have no p
    True
    """
    check_pairs(pairs, model)
    check_seed(seed)
    with evaluating(model) as classifier:
        pairs = prepare_pairs(classifier, pairs)
        labels, targets = pairs.labels, competing_classes(classifier, pairs)
        change = 1 - ssim_map(pairs.clean, pairs.adversarial)
        others = other_images(classifier, pairs, reference if compare else None)
        images = torch.cat([pairs.clean, others])
        classes = torch.cat([labels, predict(classifier, others).argmax(1) if len(others) else labels[:0]])
        maps = class_activation(classifier, images, classes, alignment="effective")
        gradient = margin_gradient(classifier, pairs.clean, labels, targets)
        # Each control is a map of change and the maps it is compared with.
        pgd_change = pgd_of_equal_ssim(
            classifier, pairs.clean, labels, targets, gradient, loss=change.mean((1, 2, 3)), seed=seed
        )
        controls = {
            "variance_gradient": (variance_gradient(pairs.clean, gradient), maps),
            "pgd": (pgd_change, maps),
        }
        if random_weights:
            shuffled = with_shuffled_weights(classifier, seed)
            predicted = predict(shuffled, images).argmax(1)
            unlearned = class_activation(shuffled, images, predicted, alignment="effective")
            controls["random_weights"] = (change, unlearned)
    local = isinstance(pairs, AttackResult) and pairs.ssim_local_budget_spent is not None
    own = maps[: len(pairs)]
    # A change inside an allowed region lies where it was allowed to, so it says nothing about the network.
    confined = reached_fraction(pairs) < WHOLE
    why_not = tuple(_why_not(local, *row) for row in zip(change, own, confined.tolist(), strict=True))
    invisible = change.amax((1, 2, 3), keepdim=True) <= INVISIBLE
    tested = change.masked_fill(invisible | local | confined[:, None, None, None], torch.nan)
    allowed = comparable(pairs.clean, others, confined)
    columns, matrices = _compare(tested, maps, controls, allowed, compare=compare)
    return SsimAlignment(change, own, columns, _run_tests(matrices, allowed, seed=seed), why_not)


def _compare(
    change: Tensor,
    maps: Tensor,
    controls: Mapping[str, tuple[Tensor, Tensor]],
    allowed: Tensor,
    *,
    compare: bool,
) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """The columns of the scores, and for other images and each control the matrix (N, N + R) that is tested.

    Args:
        change: (N, 1, H, W) 1 - SSIM, NaN for images without statistics.
        maps: (N + R, 1, H, W) activation of the images, then of the references.
        controls: name to the change and the maps that it compares.
        allowed: bool (N, N + R), from `comparable`.
        compare: False gives the own values only, and no matrices.
    """
    import pandas as pd

    # Without comparison the matrices are (N, N), and only their diagonals are used.
    columns = slice(None) if compare else slice(0, len(change))
    results = alignment(change, maps[columns])
    parts, matrices = [], {}
    for name, matrix in results.items():
        if compare:
            parts.append(other_image_test(matrix.masked_fill(~allowed, torch.nan)).columns(name))
        else:
            parts.append(pd.DataFrame({name: matrix.diagonal().cpu().numpy()}))
    if compare:
        matrices["other images"] = results[TESTED]
    for control, (control_change, control_maps) in controls.items():
        control_results = alignment(control_change, control_maps[columns])
        for name in STATISTICS:
            # If the attack has no statistic, its control has none either: NaN times 0 is NaN.
            value = control_results[name].diagonal() + 0 * results[name].diagonal()
            parts.append(pd.DataFrame({f"{name}_{control}": value.cpu().numpy()}))
        if compare:
            excess = (results[TESTED] - control_results[TESTED]).masked_fill(~allowed, torch.nan)
            parts.append(other_image_test(excess).columns(f"{TESTED}_over_{control}"))
            matrices[control] = excess
    return pd.concat(parts, axis=1), matrices


def _run_tests(matrices: Mapping[str, Tensor], allowed: Tensor, *, seed: int) -> dict[str, RunTest]:
    """The test of each matrix over all images; an image counts once, however many copies of it the batch holds."""
    count = len(allowed)
    among = allowed[:, :count]
    # Of several copies only one may represent the image (`comparable`): its column is allowed beyond the diagonal.
    counted = among & (among & ~torch.eye(count, dtype=torch.bool, device=among.device)).any(0)[:, None]
    return {
        name: run_test(matrix[:, :count].masked_fill(~counted, torch.nan), seed=seed)
        for name, matrix in matrices.items()
    }


def _why_not(local: bool, change: Tensor, importance: Tensor, confined: bool) -> str:
    """Why an image has no statistics; empty if it has them."""
    if local:
        return "the attack's budget bounds SSIM in every patch, and the attack spends it in every patch"
    if float(change.max()) <= INVISIBLE:
        return "nothing changed visibly"
    if float(importance.max()) <= 0:
        return "the class activation is nowhere positive, so no region matters most"
    if bool((importance > importance.max() / 2).all()):
        return "the class activation exceeds half its maximum everywhere"
    if float(change.max() - change.min()) <= INVISIBLE:
        return "the change is equally visible everywhere"
    return "the attack changed only a part of the image" if confined else ""


# ---------------------------------------------------------------- controls


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
    generator = torch.Generator().manual_seed(int(seed))
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


def analyze_ssim(
    model: nn.Module, pairs: Pairs, *, seed: int = 0, reference: Tensor | None = None, compare: bool = True
) -> Analysis:
    """SSIM maps, their means and minima, and `ssim_alignment`, as the report shows them."""
    import pandas as pd

    result = ssim_alignment(model, pairs, reference=reference, compare=compare, seed=seed)
    similarity = (1 - result.change).flatten(1)
    windowed = {"ssim_windowed": similarity.mean(1), "ssim_windowed_min": similarity.amin(1)}
    plain = pd.DataFrame({name: values.cpu().numpy() for name, values in windowed.items()})
    scores = pd.concat([plain, result.scores], axis=1)
    meaning = "Where the two images look different; 0 means no visible change."
    return Analysis(
        scores=scores,
        maps={"ssim": result.change},
        meanings=column_meanings([str(name) for name in scores], result),
        pictures={
            "ssim": Picture(
                "Visible change (1 - SSIM)",
                meaning=f"{meaning} {result.sentences[0]}" if compare else meaning,
            )
        },
    )
