"""Inputs: what options and paths on the command line stand for."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from weakspot._checks import ModelError
from weakspot.cli.app import UNREADABLE, USAGE, Failure, complain, note

if TYPE_CHECKING:
    from torch import Tensor

    from weakspot.classifier import Classifier
    from weakspot.pairs import Pairs


def check_sources(sources: Sequence[Path], *, pair: bool, samples: bool) -> None:
    """Raises Failure unless the paths fit the options."""
    if samples and (sources or pair):
        raise Failure("--samples takes no pictures besides; give either", USAGE)
    saved = len(sources) == 1 and sources[0].suffix == ".safetensors"
    if pair and len(sources) != 2 and not saved:
        raise Failure(
            f"--pair takes CLEAN ADVERSARIAL or one pairs.safetensors; {len(sources)} paths were given", USAGE
        )
    if saved and not pair:
        raise Failure(f"{sources[0]} is no picture; to explain saved pairs again add --pair", USAGE)
    if not sources and not samples:
        raise Failure("no pictures were named; give files, folders, or --samples", USAGE)


def check_existing(sources: Sequence[Path]) -> None:
    """Names what is not there; ends the program where nothing is."""
    for source in sources:
        if not source.exists():
            complain(f"{source}: there is no such file or folder")
    if sources and not any(source.exists() for source in sources):
        raise typer.Exit(UNREADABLE)


def number(text: str, name: str = "eps") -> float:
    """0.03 or 8/255; `name` is what the option is called."""
    try:
        return float(Fraction(text.replace(" ", "")))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise Failure(f"{name} is {text!r}; accepted is a number such as 0.03 or 8/255", USAGE) from None


def load_classifier(
    model: str,
    weights: Path | None,
    mean: str | None,
    std: str | None,
    classes: Path | None,
    size: str | None,
    device: str,
) -> Classifier:
    """The classifier that the options name."""
    import torch

    from weakspot.classifier import evaluating, predict
    from weakspot.models import load

    classifier = load(
        model,
        weights=weights,
        device=device,
        mean=numbers("mean", mean),
        std=numbers("std", std),
        input_size=image_size(size),
        class_names=None if classes is None else class_names(classes),
    )
    height, width = classifier.input_size
    gray = torch.full((1, classifier.channels, height, width), 0.5, device=classifier.mean.device)
    try:
        with evaluating(classifier):
            predict(classifier, gray)
    except ModelError:
        raise
    except (RuntimeError, AssertionError) as error:
        raise Failure(
            f"model {model} does not take images of {classifier.channels} x {height} x {width} (channels x height x "
            f"width): {str(error).strip().splitlines()[0][:120]}; give --size, or --mean with one value per channel",
            USAGE,
        ) from None
    return classifier


def setting_value(text: str) -> Any:
    """What stands after NAME= in --set: a number, true, false or null as JSON writes them, else the text itself."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float | bool | None) else text


def numbers(name: str, text: str | None) -> list[float] | None:
    """Numbers separated by commas, or None."""
    if text is None:
        return None
    try:
        return [float(Fraction(part.strip())) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        raise Failure(
            f"{name} is {text!r}; accepted are numbers separated by commas, one per channel", USAGE
        ) from None


def image_size(text: str | None) -> tuple[int, int] | None:
    """HEIGHTxWIDTH as (height, width), or None."""
    if text is None:
        return None
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and (width or height).isdigit() and int(height) and int(width or height)):
        raise Failure(f"size is {text!r}; accepted is HEIGHTxWIDTH in pixels, such as 224x224", USAGE)
    return int(height), int(width or height)


def class_names(path: Path) -> list[str]:
    """Names in a text file, one per line, or in a JSON list or mapping from number to name."""
    if not path.is_file():
        raise Failure(f"classes: {path}: there is no such file", UNREADABLE)
    text = path.read_text("utf-8", errors="replace")
    if path.suffix != ".json":
        return text.splitlines()
    try:
        names = json.loads(text)
    except ValueError:
        raise Failure(f"classes: {path} is no JSON; accepted is a list of names", UNREADABLE) from None
    names = [names[key] for key in sorted(names, key=int)] if isinstance(names, dict) else names
    return [str(name) for name in names]


def read_pictures(
    classifier: Classifier, sources: Sequence[Path], *, samples: bool
) -> tuple[Tensor, list[str], list[str], list[Path]]:
    """Images, their names, one sentence for each file skipped, and the sources of which nothing could be read."""
    batch, paths, skipped, unread = located_pictures(classifier, sources, samples=samples)
    return batch, paths if samples else shortened(paths), skipped, unread


def read_reference(classifier: Classifier, folder: Path) -> Tensor:
    """(R, C, H, W) the pictures in a folder; those that cannot be read are named."""
    if not folder.is_dir():
        what = "a file" if folder.exists() else "not there"
        raise Failure(f"reference must be a folder of pictures, got {folder}, which is {what}", UNREADABLE)
    return read_pictures(classifier, [folder], samples=False)[0]


def located_pictures(
    classifier: Classifier, sources: Sequence[Path], *, samples: bool
) -> tuple[Tensor, list[str], list[str], list[Path]]:
    """As `read_pictures`, with whole paths for names, but of samples."""
    import torch

    from weakspot.images import open_pictures, sample_images

    if samples:
        batch, names = sample_images(classifier.input_size)
        return _with_channels(batch, classifier), names, [], []
    good, skipped, unread = [], [], []
    for source in sources:
        pictures = (
            open_pictures(source, size=classifier.input_size, channels=classifier.channels)
            if source.exists()
            else []
        )
        for picture in pictures:
            name = str(source / picture.name) if source.is_dir() else str(source)
            if picture.remark:
                note(_printable(f"{name}: {picture.remark}"))
            if picture.pixels is None:
                skipped.append(_printable(f"{name}: {picture.remark}"))
            else:
                good.append((name, picture.pixels))
        if not any(picture.pixels is not None for picture in pictures):
            unread.append(source)
            if not pictures and source.exists():
                note(f"{source}: the folder holds no files")
    if not good:
        raise Failure("none of the pictures could be read", UNREADABLE)
    return torch.stack([pixels for _, pixels in good]), [name for name, _ in good], skipped, unread


def shortened(names: list[str]) -> list[str]:
    """Paths less the folders they all share; bytes that are no text are spelled out."""
    paths = [Path(name).absolute() for name in names]
    common = os.path.commonpath([path.parent for path in paths])
    return [_printable(os.path.relpath(path, common)) for path in paths]


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _with_channels(batch: Tensor, classifier: Classifier) -> Tensor:
    from weakspot.similarity import luma

    return luma(batch) if classifier.channels == 1 else batch


def read_pair(classifier: Classifier, sources: Sequence[Path]) -> tuple[Pairs, list[str]]:
    """The pair in two pictures, or the pairs in one file of `Pairs.save`, and their names."""
    from weakspot.images import open_pictures
    from weakspot.pairs import AttackResult, Pairs

    if len(sources) == 1:
        try:
            pairs: Pairs = AttackResult.load(sources[0])
        except (
            ValueError
        ):  # pairs of another tool, without success and counts; or no pairs at all, which is said
            pairs = Pairs.load(sources[0])
        return pairs, [f"{sources[0].stem} {number}" for number in range(len(pairs))]
    both = []
    for source in sources:
        if source.is_dir() or not source.exists():
            raise Failure(f"{source}: --pair takes two picture files", UNREADABLE)
        (native,) = open_pictures(source, channels=classifier.channels)
        if native.pixels is None:
            raise Failure(f"{source}: {native.remark}", UNREADABLE)
        both.append(native.pixels)
    clean, adversarial = both
    if clean.shape != adversarial.shape:
        sizes = " and ".join(f"{pixels.shape[1]} x {pixels.shape[2]}" for pixels in both)
        raise Failure(
            f"the two pictures differ in size ({sizes}, height x width); accepted is one size", UNREADABLE
        )
    if clean.shape[1:] != classifier.input_size:
        from weakspot._checks import warn

        warn(
            f"both pictures are brought from {clean.shape[1]} x {clean.shape[2]} to {classifier.input_size[0]} x "
            f"{classifier.input_size[1]}, which weakens a perturbation; save adversarial images at the model's size",
            UserWarning,
        )
        both = [
            pixels
            for source in sources
            for picture in open_pictures(source, size=classifier.input_size, channels=classifier.channels)
            if (pixels := picture.pixels) is not None
        ]
        clean, adversarial = both
    return Pairs.of(classifier, clean[None], adversarial[None]), [f"{sources[0].name} → {sources[1].name}"]


def class_index(classifier: Classifier, target: str, count: int, name: str = "target") -> int:
    """The number of the class that `target` names or is; `name` is what an error calls it."""
    from weakspot.datasets.labels import ClassIndex

    return ClassIndex(tuple(classifier.class_names), count).index(target, name)


def find_labels(
    text: str | None, classifier: Classifier, images: Tensor, paths: Sequence[str]
) -> tuple[Tensor, str]:
    """Labels (N,) and a description of their source.

    Args:
        text: path of a CSV table, "folders", or None for the model's predictions.
        classifier: whose classes the labels are.
        images: (N, C, H, W).
        paths: of the images.
    """
    import torch

    from weakspot.classifier import check_images, evaluating, predict
    from weakspot.datasets.labels import FOLDERS, ClassIndex, LabelTable, folder_classes

    with evaluating(classifier):
        logits = predict(classifier, check_images(images, classifier))
    if text is None:
        return logits.argmax(1), "the model's own predictions on the clean pictures"
    classes = ClassIndex(tuple(classifier.class_names), logits.shape[1])
    files = [Path(path).absolute() for path in paths]
    if text != FOLDERS:
        by_file = LabelTable.read(Path(text), classes).find_all(files, complete=True)
        return torch.tensor([by_file[file] for file in files], device=logits.device), text
    by_folder = folder_classes((file.parent.name for file in files), classes, sorted_order=True)
    first = min(by_folder)
    if classes.find(first) is None:
        note(
            f"labels: the {classes.count} folders stand for the {classes.count} classes in sorted order ({first} is "
            "class 0)"
        )
    labels = [by_folder[file.parent.name] for file in files]
    return torch.tensor(labels, device=logits.device), "names of the pictures' folders"
