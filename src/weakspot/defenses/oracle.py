"""The oracle: a neutralization that looks at the clean image, which no defender has."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weakspot.checks import check_share
from weakspot.classifier import check_images, evaluating
from weakspot.defenses.fills import check_fill, neutralize
from weakspot.defenses.neutralizing import vulnerable_region


def oracle_neutralized(
    model: nn.Module, images: Tensor, clean: Tensor, *, keep: float = 0.2, fill: str = "mean"
) -> Tensor:
    """Attacked images with the region blocked out that `neutralizing` finds in their *clean* images.

    No defender can do this: he is given the attacked image only. It is what neutralization would be worth if attacks
    did not also move the region, and belongs in a table only under the name of an oracle.

    Args:
        model: the bare classifier.
        images: (N, C, H, W) in [0, 1], as attacked.
        clean: (N, C, H, W) in [0, 1], what they were made of.
        keep: as for `neutralizing`.
        fill: as for `neutralize`.

    Returns:
        (N, C, H, W), for the bare model to classify.

    Raises:
        ValueError: when an argument does not fit, naming it.
    """
    check_share(keep)
    check_fill(fill)
    with evaluating(model) as classifier, torch.no_grad():
        images = check_images(images, classifier)
        clean = check_images(clean, classifier, name="clean")
        if clean.shape != images.shape:
            raise ValueError(
                f"clean has shape {tuple(clean.shape)} and images {tuple(images.shape)}; accepted are two batches of "
                "one shape"
            )
        return neutralize(images, vulnerable_region(classifier, clean, keep=keep), fill=fill)
