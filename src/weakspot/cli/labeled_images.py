"""Labels of the images of a command, and which of the images are left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor

from weakspot._checks import ModelWarning, NotFiniteError, collected_warnings, warn
from weakspot.classifier import Classifier, check_images, evaluating, gives_again, predict
from weakspot.cli.app import Failure, note
from weakspot.cli.session import Images, Session
from weakspot.datasets.labels import FOLDERS, ClassIndex, folder_classes, read_labels
from weakspot.images import first_copies
from weakspot.statistics.number_format import counted

_COUNT = re.compile(r"for (\d+) of \d+ images?")
NONE_LEFT = (
    "{} returned NaN or infinity for a changed version of each image that was left (check its weights and "
    "normalization)"
)


class NoneLeftError(Failure):
    """The model returns NaN or infinity for a changed version of every image."""


class NamedImages(Protocol):
    """Images with names, and what belongs to them."""

    @property
    def names(self) -> list[str]: ...

    def subset(self, rows: Sequence[int]) -> Self: ...


Given = TypeVar("Given", bound=NamedImages)
Made = TypeVar("Made")


class Labels(NamedTuple):
    """Images and their labels.

    Attributes:
        images: those for which the model returns finite logits.
        labels: (N,) classes that the images stand for.
        logits: (N, K) of the images.
        source: where the labels are from.
    """

    images: Images
    labels: Tensor
    logits: Tensor
    source: str

    @property
    def names(self) -> list[str]:
        """N names."""
        return self.images.names

    def subset(self, rows: Sequence[int]) -> Labels:
        """Some of the images."""
        chosen = list(rows)
        return Labels(self.images.subset(chosen), self.labels[chosen], self.logits[chosen], self.source)


def find_labels(text: str | None, session: Session, images: Images) -> Labels:
    """Labels as --labels describes them: from a label file, "folders", or None for the model's predictions.

    Images for which the model returns NaN or infinity are noted and skipped.
    """
    classifier, (logits, finite) = session.classifier, session.predict(images)
    _note_randomness(classifier, images.pixels[finite[:1]])
    if text is None:
        source = "the model's predictions on the clean images"
        return Labels(images, logits.argmax(1), logits, source).subset(finite)
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
    # Only now, because folders stand for classes in the order of all of them.
    return Labels(images, torch.tensor(labels, device=logits.device), logits, source).subset(finite)


def _note_randomness(classifier: Classifier, image: Tensor) -> None:
    """Note that the network gives an image (1, C, H, W) other logits when it is asked again."""
    with evaluating(classifier):
        image = check_images(image, classifier)
        same = gives_again(classifier, image, predict(classifier, image, finite=False))
    if not same:
        note(
            f"{classifier.name} returns different logits for the same image: results are one random draw of many, and "
            "another run may give others"
        )


def distinct_rows(images: Images) -> list[int]:
    """The rows of images that are no copies of an earlier one, for statistics; a note counts the copies."""
    rows = sorted(set(first_copies(images.pixels).tolist()))
    if copies := len(images.names) - len(rows):
        verb = "is a copy" if copies == 1 else "are copies"
        note(f"{counted(copies)} {verb} of another: each image counts once")
    return rows


def note_together(groups: Sequence[Sequence[str]], total: int) -> None:
    """Note what was remarked about groups of images, each remark once, with the counts of images added.

    Args:
        groups: the remarks about each, such as "... is zero everywhere for 3 of 32 images: ...". Of several that differ
            in their counts only, such as those of an attack in stages, the one about most images counts.
        total: number of images in all groups.
    """
    counts: Counter[str] = Counter()
    for remarks in groups:
        most: dict[str, int] = {}
        for remark in remarks:
            found, text = _COUNT.search(remark), _COUNT.sub("for {}", remark)
            most[text] = max(most.get(text, 0), int(found[1]) if found else 0)
        counts.update(most)
    for text, count in counts.items():
        warn(text.replace("for {}", f"for {count} of {counted(total)}"), ModelWarning)


def skip_changed(session: Session, name: str) -> None:
    """Note an image that cannot be changed."""
    session.skip(f"{name}: {session.classifier.name} returned NaN or infinity for a changed version; skipped")


def without_failures(session: Session, given: Given, run: Callable[[Given], Made]) -> tuple[Given, Made]:
    """What `run` makes of the images, and those images: without the ones that it cannot change.

    Images for which the model returns NaN or infinity while they are changed are noted and skipped. They are looked for
    one by one, only if the run of all fails.

    Args:
        session: of the command.
        given: images and what belongs to them.
        run: must not depend on which images run together.
    """
    try:
        with collected_warnings() as remarks:
            made = run(given)
    except NotFiniteError:
        left = []
        for row, name in enumerate(given.names):
            try:
                with collected_warnings():  # said by the run of all that are left
                    run(given.subset([row]))
            except NotFiniteError:
                skip_changed(session, name)
            else:
                left.append(row)
        if not left:
            raise NoneLeftError(NONE_LEFT.format(session.classifier.name)) from None
        chosen = given.subset(left)
        return chosen, run(chosen)
    for remark in remarks:
        warn(remark, ModelWarning)
    return given, made
