"""Evidence: class activation of both classes in both images, on one scale.

The similarity analysis: where the adversarial image looks different, and whether the network looks there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weakspot.attribution.cam import class_activations
from weakspot.classifier import evaluating
from weakspot.explanations.alignment import ssim_alignment
from weakspot.explanations.alignment_controls import meanings
from weakspot.explanations.analysis import Analysis, Picture, rivals
from weakspot.pairs import Pairs
from weakspot.statistics import standardized

MEANING = (
    "Where the network gathers evidence for this class (class activation map); the four share one scale."
)


def analyze_cam(model: nn.Module, pairs: Pairs, *, seed: int = 0) -> Analysis:  # noqa: ARG001 - the contract's signature
    """Class activation of label and target, in the clean and in the adversarial image.

    Both images are explained for both classes, so that the four maps of a pair can be compared.
    """
    import pandas as pd

    with evaluating(model) as classifier:
        both = torch.stack([pairs.labels, rivals(classifier, pairs)], 1)
        images, classes = torch.cat([pairs.clean, pairs.adversarial]), torch.cat([both, both])
        evidence = class_activations(classifier, images, classes, registration="effective")
        clean, adversarial = evidence.chunk(2)
    names = ("cam_label_clean", "cam_target_clean", "cam_label_adversarial", "cam_target_adversarial")
    maps = dict(zip(names, (*clean.split(1, 1), *adversarial.split(1, 1)), strict=True))
    kept = (standardized(clean[:, 0]) * standardized(adversarial[:, 0])).mean((1, 2))
    return Analysis(
        scores=pd.DataFrame({"evidence_kept": kept.cpu().numpy()}),
        maps=maps,
        meanings={
            "evidence_kept": "Correlation of the label's class activation before and after the attack; 1 means that "
            "the network looks at the same places for it."
        },
        pictures={
            name: Picture(f"{{{role}}}, {image} image", scale="class activation", meaning=MEANING)
            for name in names
            for _, role, image in [name.split("_")]
        },
    )


def analyze_ssim(
    model: nn.Module, pairs: Pairs, *, seed: int = 0, reference: Tensor | None = None, compare: bool = True
) -> Analysis:
    """SSIM maps, their means and minima, and `ssim_alignment` as the report shows it."""
    import pandas as pd

    found = ssim_alignment(model, pairs, reference=reference, compare=compare, seed=seed)
    similarity = (1 - found.change).flatten(1)
    windowed = {"ssim_windowed": similarity.mean(1), "ssim_windowed_min": similarity.amin(1)}
    plain = pd.DataFrame({name: values.cpu().numpy() for name, values in windowed.items()})
    scores = pd.concat([plain, found.scores], axis=1)
    meaning = "Where the two images look different to the eye: 0 is no visible change."
    return Analysis(
        scores=scores,
        maps={"ssim": found.change},
        meanings=meanings([str(name) for name in scores], found),
        pictures={
            "ssim": Picture(
                "Visible change (1 - SSIM)",
                meaning=f"{meaning} {found.sentences[0]}" if compare else meaning,
            )
        },
    )
