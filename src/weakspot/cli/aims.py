"""Aims: the labels of images, the class that an attack aims at, and the region that it may change."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from weakspot.cli.app import UNREADABLE, Failure, note
from weakspot.cli.options import FractionOption, LabelsOption, RegionOption, TargetOption
from weakspot.cli.output import MOST_ROWS
from weakspot.cli.session import Images

if TYPE_CHECKING:
    from torch import Tensor

    from weakspot.classifier import Classifier


@dataclass(frozen=True)
class AimOptions:
    """What an attack aims at, and where it may act."""

    labels: LabelsOption = None
    target: TargetOption = None
    region: RegionOption = "none"
    fraction: FractionOption = 0.3


class Labels(NamedTuple):
    """Labels of images.

    Attributes:
        labels: (N,) classes that the images stand for.
        logits: (N, K) of the images.
        source: where the labels are from.
    """

    labels: Tensor
    logits: Tensor
    source: str


class Aim(NamedTuple):
    """What an attack starts from.

    Attributes:
        images: (N, C, H, W).
        labels: (N,) classes that the images stand for.
        targets: (N,) classes to reach, or None.
        names: N names.
        predicted: (N,) classes of the clean images.
    """

    images: Tensor
    labels: Tensor
    targets: Tensor | None
    names: list[str]
    predicted: Tensor

    @property
    def correct(self) -> Tensor:
        """(N,) bool, whether the clean image is classified as its label."""
        return self.predicted == self.labels

    def subset(self, rows: Sequence[int]) -> Aim:
        """The aim on some of the images."""
        chosen = list(rows)
        return Aim(
            self.images[chosen],
            self.labels[chosen],
            None if self.targets is None else self.targets[chosen],
            [self.names[row] for row in chosen],
            self.predicted[chosen],
        )


def find_labels(text: str | None, classifier: Classifier, images: Images) -> Labels:
    """Labels as --labels describes them: from a label file, "folders", or None for the model's predictions."""
    import torch

    from weakspot.classifier import check_images, evaluating, predict
    from weakspot.datasets.labels import FOLDERS, ClassIndex, folder_classes, read_labels

    with evaluating(classifier):
        logits = predict(classifier, check_images(images.pixels, classifier))
    if text is None:
        return Labels(logits.argmax(1), logits, "the model's predictions on the clean images")
    classes = ClassIndex(tuple(classifier.class_names), logits.shape[1])
    files = [Path(path).absolute() for path in images.paths]
    if text != FOLDERS:
        by_file = read_labels(Path(text), classes).find_all(files, complete=True)
        labels, source = [by_file[file] for file in files], text
    else:
        by_folder = folder_classes((file.parent.name for file in files), classes, sorted_order=True)
        labels, source = [by_folder[file.parent.name] for file in files], "names of the images' folders"
        first = min(by_folder)
        if classes.find(first) is None:
            note(
                f"labels: the {classes.count} folders stand for the {classes.count} classes in sorted order ({first} "
                "is class 0)"
            )
    return Labels(torch.tensor(labels, device=logits.device), logits, source)


def find_aim(classifier: Classifier, images: Images, options: AimOptions) -> tuple[Aim, str]:
    """Labels and targets, and the source of the labels. Images that have reached the target already are left out."""
    import torch

    from weakspot.classifier import check_images
    from weakspot.datasets.labels import ClassIndex

    labels, logits, source = find_labels(options.labels, classifier, images)
    pixels = check_images(images.pixels, classifier)
    predicted = logits.argmax(1)
    _note_misclassified(classifier, images.names, labels, predicted)
    if options.target is None:
        return Aim(pixels, labels, None, images.names, predicted), source
    classes = ClassIndex(tuple(classifier.class_names), logits.shape[1])
    target = classes.index(options.target, "--target")
    # An image whose label or prediction is the target leaves nothing to aim at.
    rows = ((labels != target) & (predicted != target)).nonzero().flatten().tolist()
    for row in sorted(set(range(len(labels))) - set(rows)):
        how = "classified" if predicted[row] == target else "labeled"
        note(f"{images.names[row]}: already {how} as {classifier.class_name(target)}; skipped", failure=True)
    if not rows:
        raise Failure(
            "every image is already classified or labeled as the target, "
            f"{classifier.class_name(target)} (give another --target)"
        )
    targets = torch.full_like(labels[rows], target)
    names = [images.names[row] for row in rows]
    return Aim(pixels[rows], labels[rows], targets, names, predicted[rows]), source


def _note_misclassified(
    classifier: Classifier, names: Sequence[str], labels: Tensor, predicted: Tensor
) -> None:
    """Name the images whose label is not what the model predicts, at most five of them."""
    from weakspot.statistics.number_format import counted

    wrong = (labels != predicted).nonzero().flatten().tolist()
    for row in wrong[:MOST_ROWS]:
        label, reached = (classifier.class_name(int(classes[row])) for classes in (labels, predicted))
        note(f"{names[row]}: labeled {label}, classified as {reached} without an attack")
    if len(wrong) > MOST_ROWS:
        more = len(wrong) - MOST_ROWS
        verb = "is" if more == 1 else "are"
        note(f"... and {counted(more, 'more image')} {verb} misclassified without an attack")


def find_region(
    options: AimOptions, classifier: Classifier, aim: Aim, seed: int
) -> tuple[Tensor | None, str]:
    """The region that the options describe, None for the whole image, and its description."""
    from weakspot._checks import check_fraction
    from weakspot.regions import read_region
    from weakspot.regions.masks import UnreadableError
    from weakspot.regions.spec import REGIONS
    from weakspot.statistics.number_format import percent

    text, fraction = options.region, options.fraction
    check_fraction(fraction)
    # None rather than a region of ones, so that attacks that take no region can run.
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
        return region, f"the {percent(fraction)} of the image with most evidence for its class"
    if text == "superpixels":
        area = percent(fraction)
        return region, f"the superpixels with most evidence for its class, up to {area} of the image"
    return region, f"the marked part of {text}" if text not in REGIONS and os.path.isfile(text) else text  # noqa: PTH113
