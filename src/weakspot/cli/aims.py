"""Aims: what an attack on the command line is to reach, and where it may act."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from weakspot.cli.app import UNREADABLE, USAGE, Failure, note
from weakspot.cli.inputs import class_index

if TYPE_CHECKING:
    from torch import Tensor

    from weakspot.classifier import Classifier


class Aim(NamedTuple):
    """Images (N, C, H, W), what the model reads them as (N,), the classes to reach (N,) or None, and N names."""

    images: Tensor
    labels: Tensor
    targets: Tensor | None
    names: list[str]


def find_aim(classifier: Classifier, images: Tensor, names: list[str], target: str | None) -> Aim:
    """The labels are the model's own predictions; pictures that it reads as the target already are left out."""
    import torch

    from weakspot.classifier import check_images, evaluating, predict

    with evaluating(classifier):
        images = check_images(images, classifier)
        logits = predict(classifier, images)
    labels = logits.argmax(1)
    if target is None:
        return Aim(images, labels, None, names)
    wanted = class_index(classifier, target, logits.shape[1])
    others = labels != wanted
    for name, other in zip(names, others.tolist(), strict=True):
        if not other:
            note(f"{name}: already read as {classifier.class_name(wanted)}; skipped")
    if not bool(others.any()):
        raise Failure(f"every picture is already read as {classifier.class_name(wanted)}, the target", USAGE)
    left = [name for name, other in zip(names, others.tolist(), strict=True) if other]
    return Aim(images[others], labels[others], torch.full_like(labels[others], wanted), left)


def find_region(
    text: str, keep: float, classifier: Classifier, aim: Aim, seed: int
) -> tuple[Tensor | None, str]:
    """The region that the option names, None where that is everywhere, and the region in words."""
    from weakspot.checks import check_share
    from weakspot.regions import read_region
    from weakspot.regions.files import UnreadableError
    from weakspot.regions.reading import NAMES

    check_share(keep)
    if text == "none":
        return None, "whole image"
    try:
        region = read_region(
            text, classifier, aim.images, aim.labels, targets=aim.targets, keep=keep, seed=seed
        )
    except (UnreadableError, FileNotFoundError) as error:
        raise Failure(f"region: {error}", UNREADABLE) from None
    except ValueError as error:
        said = str(error)
        raise Failure(said if said.startswith("region") else f"region: {said}", USAGE) from None
    if not bool(region.any()):
        raise Failure(
            f"region is {text!r} and keep is {keep}, which leaves no pixel to change; accepted is more", USAGE
        )
    if text == "cam":
        return region, f"the {keep:.0%} of the image with most evidence for its class"
    return region, f"the white part of {text}" if text not in NAMES and os.path.isfile(text) else text  # noqa: PTH113
