"""Evidence: class activation of both classes in both images, on one scale.

The similarity analysis: where the adversarial image looks different, and whether the network looks there.
"""

from __future__ import annotations

import torch
from torch import nn

from weakspot.attribution.cam import class_activations
from weakspot.classifier import evaluating
from weakspot.explanations.analysis import Analysis, Picture, competing_classes
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
        both = torch.stack([pairs.labels, competing_classes(classifier, pairs)], 1)
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
