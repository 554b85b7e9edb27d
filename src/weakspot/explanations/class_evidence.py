"""Class evidence: where class activation lies before and after the attack, and how well a perturbation fits it.

`analyze_cam` shows the class activation of both classes in both images. `interpretability_score` is that of Xu et al.
2019 (arXiv 1904.02057): the fraction of the perturbation's length in the top fraction of a class activation map. Its
controls, other images' maps and shifts of the own map, are ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weakspot._checks import check_choice, check_fraction
from weakspot.attribution.cam import class_activation, class_activations
from weakspot.classifier import evaluating, predict
from weakspot.explanations.agreement import (
    WHOLE,
    comparable,
    other_images,
    reached_fraction,
    tested_columns,
)
from weakspot.explanations.analysis import Analysis, Picture, check_pairs, competing_classes, prepare_pairs
from weakspot.logits import runner_up
from weakspot.pairs import Pairs
from weakspot.regions import top
from weakspot.statistics import other_image_test, products_over_shifts, shift_test, standardized

if TYPE_CHECKING:
    import pandas as pd

MEANING = (
    "Where the network gathers evidence for this class (class activation map). The maps share one scale."
)


def analyze_cam(model: nn.Module, pairs: Pairs, *, seed: int = 0) -> Analysis:  # noqa: ARG001 - the contract's signature
    """Class activation of label and target, in the clean and in the adversarial image.

    Both images are explained for both classes, so that the four maps of a pair can be compared.
    """
    import pandas as pd

    with evaluating(model) as classifier:
        both = torch.stack([pairs.labels, competing_classes(classifier, pairs)], 1)
        images, classes = torch.cat([pairs.clean, pairs.adversarial]), torch.cat([both, both])
        evidence = class_activations(classifier, images, classes, alignment="effective")
        clean, adversarial = evidence.chunk(2)
    names = ("cam_label_clean", "cam_target_clean", "cam_label_adversarial", "cam_target_adversarial")
    maps = dict(zip(names, (*clean.split(1, 1), *adversarial.split(1, 1)), strict=True))
    # Pearson's correlation: the mean product of two standardized maps.
    correlation = (standardized(clean[:, 0]) * standardized(adversarial[:, 0])).mean((1, 2))
    return Analysis(
        scores=pd.DataFrame({"evidence_kept": correlation.cpu().numpy()}),
        maps=maps,
        meanings={
            "evidence_kept": "Correlation of the label's class activation before and after the attack; 1 means that "
            "the network looks at the same places for it."
        },
        pictures={
            name: Picture(f"{{{role}}}, {image} image", scale="class activation", meaning=MEANING)
            for name in names
            # A name such as cam_label_clean says whose evidence it is, and in which image.
            for _, role, image in [name.split("_")]
        },
    )


def interpretability_score(
    model: nn.Module, pairs: Pairs, *, fraction: float = 0.3, of: str = "label"
) -> Tensor:
    """(N,) fraction of the perturbation's length where the network sees evidence for a class: ||B * d||_2 / ||d||_2.

    B is the top `fraction` of the class activation of label or target in the clean image (Xu et al. 2019, arXiv
    1904.02057). A perturbation spread evenly has sqrt(fraction) by area alone, .548 for .3, and one confined to a
    region has what that region allows; `interpretability_test` compares with controls. NaN if nothing is perturbed.

    Args:
        model: any classifier. It is not changed.
        pairs: N pairs.
        fraction: of the image in B.
        of: "label" or "target".

    Raises:
        ValueError: if an argument is invalid; the message names it.
    """
    scores = interpretability_test(model, pairs, fraction=fraction, of=of, compare=False)
    return torch.tensor(scores[f"interpretability_{of}"].to_numpy(), dtype=torch.float32)


def interpretability_test(
    model: nn.Module,
    pairs: Pairs,
    *,
    fraction: float = 0.3,
    of: str = "label",
    reference: Tensor | None = None,
    compare: bool = True,
) -> pd.DataFrame:
    """`interpretability_score` compared with its values for the class activation of other images.

    Args:
        model: any classifier. It is not changed.
        pairs: N pairs.
        fraction: of the image in B.
        of: "label" or "target"; for a reference image, the predicted class or the runner-up.
        reference: (R, C, H, W) other images from the same source, in addition to those of the batch.
        compare: False omits the columns that depend on other images.

    Returns:
        One row per pair: interpretability_OF; with the suffixes _null, _p and _q its test by other images (p needs 19
        of them); with _shift_null and _shift_p its test by shifting B over the image. Attacks that did not reach the
        whole image are not tested.

    Raises:
        ValueError: if an argument is invalid; the message names it.
    """
    check_pairs(pairs, model)
    check_fraction(fraction)
    check_choice("of", of, ("label", "target"))
    with evaluating(model) as classifier:
        pairs = prepare_pairs(classifier, pairs)
        others = other_images(classifier, pairs, reference if compare else None)
        images = torch.cat([pairs.clean, others])
        classes = pairs.labels if of == "label" else competing_classes(classifier, pairs)
        if len(others):
            logits = predict(classifier, others)
            # A reference image has no attack: its runner-up stands for the target.
            first = logits.argmax(1)
            classes = torch.cat([classes, first if of == "label" else runner_up(logits, first)[1]])
        evidence = class_activation(classifier, images, classes, alignment="effective")
    # IS_c = ||B_c * d||_2 / ||d||_2 (Xu et al. 2019), with the squares of d summed over channels.
    energy = pairs.perturbation.double().square().sum(1)
    confined = reached_fraction(pairs) < WHOLE
    test = None
    if compare:
        matrix = interpretability_matrix(evidence, energy, fraction=fraction)
        allowed = comparable(pairs.clean, others, confined)
        test = other_image_test(matrix.masked_fill(~allowed, torch.nan))
    own = evidence[: len(pairs)]
    total = energy.sum((1, 2), keepdim=True)
    # The score at every circular shift of B; the first one, without a shift, is the score itself.
    inside = products_over_shifts(top(own, fraction)[:, 0], energy)
    fractions = inside / total.where(total > 0, torch.nan) + _blank(own)
    # Negated, so that NaN, which compares as false, stays NaN.
    fractions = fractions.where(
        ~(fractions < 1e-12), 0
    )  # the Fourier transform leaves rounding where nothing is
    return tested_columns(f"interpretability_{of}", test, shift_test(fractions.clamp(0, 1).sqrt()), confined)


def interpretability_matrix(evidence: Tensor, energy: Tensor, *, fraction: float) -> Tensor:
    """(N, M) the score of every perturbation with every map.

    Args:
        evidence: (M, 1, H, W).
        energy: (N, H, W) squared perturbations, summed over channels.
        fraction: of the image in B.
    """
    # A map without contrast is NaN at every site, so every score with it is NaN.
    region = (top(evidence, fraction).double() + _blank(evidence)[:, None]).flatten(1)
    total = energy.sum((1, 2))
    return (energy.flatten(1) @ region.T / total.where(total > 0, torch.nan)[:, None]).clamp(0, 1).sqrt()


def _blank(evidence: Tensor) -> Tensor:
    """(N, 1, 1) 0, or NaN for evidence without contrast, which has no top fraction."""
    return 0 * standardized(evidence[:, 0]).mean((1, 2), keepdim=True)
