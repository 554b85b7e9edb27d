"""Aims: what an attack on the command line aims at, and where it may act."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from weakspot.cli.app import UNREADABLE, Failure, note
from weakspot.cli.options import FractionOption, RegionOption, TargetOption
from weakspot.cli.session import Images

if TYPE_CHECKING:
    from torch import Tensor

    from weakspot.classifier import Classifier

PREDICTED = "the model's predictions on the clean images"


@dataclass(frozen=True)
class AimOptions:
    """Where an attack may act and what it aims at."""

    region: RegionOption = "none"
    fraction: FractionOption = 0.3
    target: TargetOption = None


class Aim(NamedTuple):
    """Images (N, C, H, W), their predicted classes (N,), the target classes (N,) or None, and N names."""

    images: Tensor
    labels: Tensor
    targets: Tensor | None
    names: list[str]


def find_aim(classifier: Classifier, images: Images, target: str | None) -> Aim:
    """Predict the labels. Images that are already classified as the target are left out."""
    import torch

    from weakspot.classifier import check_images, evaluating, predict

    with evaluating(classifier):
        pixels = check_images(images.pixels, classifier)
        logits = predict(classifier, pixels)
    labels = logits.argmax(1)
    if target is None:
        return Aim(pixels, labels, None, images.names)
    wanted = class_index(classifier, target, logits.shape[1])
    rows = (labels != wanted).nonzero().flatten().tolist()
    for row in sorted(set(range(len(labels))) - set(rows)):
        note(f"{images.names[row]}: already classified as {classifier.class_name(wanted)}; skipped")
    if not rows:
        raise Failure(f"every image is already classified as the target, {classifier.class_name(wanted)}")
    targets = torch.full_like(labels[rows], wanted)
    return Aim(pixels[rows], labels[rows], targets, [images.names[row] for row in rows])


def class_index(classifier: Classifier, text: str, count: int, name: str = "target") -> int:
    """The index of the class that `text` names.

    Args:
        classifier: whose class names count.
        text: a class name in any case, or an index.
        count: number of classes.
        name: of the argument, for the error message.
    """
    from weakspot._checks import unknown_choice

    number = text.lower().removeprefix("class ")
    if number.isascii() and number.isdigit() and int(number) < count:
        return int(number)
    names = [name.lower() for name in classifier.class_names]
    if text.lower() in names:
        return names.index(text.lower())
    remedy = f"or give a number from 0 to {count - 1}"
    raise Failure(unknown_choice(name, text, classifier.class_names, remedy=remedy))


def find_region(
    options: AimOptions, classifier: Classifier, aim: Aim, seed: int
) -> tuple[Tensor | None, str]:
    """The region that the options describe, None for the whole image, and its description."""
    from weakspot._checks import check_fraction
    from weakspot.regions import read_region
    from weakspot.regions.masks import UnreadableError
    from weakspot.regions.spec import NAMES

    text, fraction = options.region, options.fraction
    check_fraction(fraction)
    if text == "none":
        return None, "whole image"
    try:
        region = read_region(
            text, classifier, aim.images, aim.labels, targets=aim.targets, fraction=fraction, seed=seed
        )
    except (UnreadableError, FileNotFoundError) as error:
        raise Failure(f"region: {error}", UNREADABLE) from None
    if not bool(region.any()):
        raise Failure(f"region must hold at least one pixel, got {text!r} with fraction {fraction}")
    if text == "cam":
        return region, f"the {fraction:.0%} of the image with most evidence for its class"
    return region, f"the white part of {text}" if text not in NAMES and os.path.isfile(text) else text  # noqa: PTH113
