"""`weakspot reproduce`: the empirical claims of five papers, on your own network and images."""

from __future__ import annotations

import random
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from weakspot._checks import check_choice, require
from weakspot.classifier import predict
from weakspot.cli.app import RESUMABLE, UNREADABLE, Failure, command, one_line
from weakspot.cli.options import ModelOptions, OutputOptions, SeedOption, argument, flag, option
from weakspot.cli.output import print_text
from weakspot.cli.session import Session, open_session
from weakspot.cli.training_jobs import network_maker
from weakspot.datasets import LabeledImages, read_labeled
from weakspot.datasets.folders import array_folder
from weakspot.images import first_copies, open_pictures
from weakspot.statistics.number_format import counted

if TYPE_CHECKING:
    from weakspot.reproduction import Material

# PAPERS of weakspot.reproduction, repeated because importing it takes seconds.
NAMES = "spatial, perceptual, localized, promotion or one-pixel"
PHOTOGRAPH = 96  # pixels a side: from here on, images count as photographs
TRIED_AT_ONCE, MOST_TRIED = 100, 2000  # labeled images that are classified to find correct ones
COUNTS = {"quick": (24, 64), "full": (100, 200)}  # images: photographs, small images


@command(
    "weakspot reproduce one-pixel --data cifar10/ --model my_package.models:build --size 32x32",
    "weakspot reproduce localized --data mnist/ --model mnist_standard",
    "weakspot reproduce spatial --data photos/ --full --out results/",
)
def reproduce(
    context: typer.Context,
    paper: Annotated[str, argument("PAPER", f"One of {NAMES}.")],
    network: ModelOptions,
    output: OutputOptions,
    data: Annotated[
        Path | None,
        option(
            "FOLDER",
            "Images: a folder of MNIST or CIFAR files, of test/CLASS/ folders with images, or of any photographs.",
            default="four sample photographs",
        ),
    ] = None,
    full: Annotated[
        bool, flag("--full/--quick", "More images and steps (minutes to hours), or fewer (minutes).")
    ] = False,
    limit: Annotated[
        int | None,
        option(
            "N",
            "Images, correctly classified ones.",
            default="24 photographs or 64 small images; with --full 100 or 200",
            least=1,
        ),
    ] = None,
    seed: SeedOption = 0,
    out: Annotated[Path, option("FOLDER", "Folder for PAPER.json and PAPER.png.")] = Path(
        "weakspot-out/reproduce"
    ),
) -> None:
    """Test the empirical claims of a paper, each beside its control.

    Every claim is quoted from the abstract and gets one of four verdicts: confirmed, confirmed with a caution, not
    confirmed, or cannot be tested on this data. Finished claims are stored in --out, so the same command resumes.

    The papers: spatial (arXiv 2011.10794), perceptual (2106.12731), localized (1909.04779), promotion (1904.02057) and
    one-pixel (1902.02947). PAPER.png shows the result as a figure. Only localized trains networks, if --data holds
    training images, and then needs pip install 'weakspot[train]'.
    """
    from weakspot.reproduction import PAPERS

    check_choice("PAPER", paper, PAPERS)
    if data is not None and not data.is_dir():
        raise Failure(f"--data must be a folder, got {data}")
    with open_session(context, network, output, out, [f"{paper}.json", f"{paper}.png"]) as session:
        from weakspot.reproduction import reproduce as measure
        from weakspot.reproduction.papers import is_resumable

        material = _material(session, data, limit, full=full, seed=seed)
        if paper == "localized" and material.train is not None and not material.why_not:
            require("reproduce localized", "lightning_fabric", extra="train")
        session.make_folder()
        try:
            result = measure(paper, material, out, command=_command())
        except KeyboardInterrupt:
            if not is_resumable(paper, material, out):
                raise
            raise Failure(f"interrupted; the same command resumes from {out}", RESUMABLE) from None
        files = [f"{paper}.json"]
        if result.drawn:
            files.append(f"{paper}.png")
            result.figure().savefig(out / files[-1], dpi=120)
    written = "\n".join(str(out / name) for name in files)
    session.report(lambda: asdict(result), lambda: print_text(f"{result}\n\n{written}{session.ending()}"))


def _command() -> str:
    """The command as typed, for a page that others read: without its output, and of absolute paths the last part."""
    # --option=value as two words, like the others
    typed = [
        part for word in sys.argv[1:] for part in (word.split("=", 1) if word.startswith("--") else [word])
    ]
    words = [Path(word).name if Path(word).is_absolute() else word for word in typed]
    if "--out" in words:
        place = words.index("--out")
        del words[place : place + 2]
    return shlex.join(["weakspot", *(word for word in words if word not in {"--quiet", "-q", "--json"})])


def _material(session: Session, folder: Path | None, limit: int | None, *, full: bool, seed: int) -> Material:
    """The network and distinct, correctly classified images, drawn at random; labels by default are predictions."""
    from weakspot.reproduction import Material
    from weakspot.reproduction.material import guesses, unsure

    classifier = session.classifier
    source = None if folder is None else _read(session, folder)
    size = min(classifier.input_size)
    count = limit or COUNTS["full" if full else "quick"][0 if size >= PHOTOGRAPH else 1]
    if source is None:
        images = _photographs(session, folder, count, seed)
        logits = predict(classifier, images)
        labels, unusable = logits.argmax(1), unsure(logits)
        name = "the samples" if folder is None else folder.name
        kind, more = "photograph", ", labeled by the network itself"
    else:
        test, name = source[0], folder.name if folder else ""
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))[:MOST_TRIED]
        correct: list[Tensor] = []
        images, labels = torch.empty(0, *test.shape), torch.empty(0, dtype=torch.long)
        # In parts, until enough of the images are classified correctly.
        for rows in order.split(TRIED_AT_ONCE):
            pixels = test.images(rows)
            right = predict(classifier, pixels).argmax(1).cpu() == test.labels[rows]
            correct.append(right)
            images, labels = torch.cat([images, pixels[right]]), torch.cat([labels, test.labels[rows][right]])
            distinct = np.unique(first_copies(images))
            images, labels = images[distinct], labels[distinct]
            if len(images) >= count:
                break
        unusable = guesses(torch.cat(correct), len(test.class_names))
        kind, more = "correctly classified image", ""
        images, labels = images[:count], labels[:count]
        if not len(images):
            raise Failure(
                "no image is classified correctly (check --model, --mean, --std and the labels of --data)"
            )
    return Material(
        classifier,
        images,
        labels.cpu(),
        f"{classifier.name}, {counted(len(images), kind)} of {name}{more}",
        unusable=unusable,
        quick=not full,
        seed=seed,
        train=source[1] if source else None,
        test=source[0] if source else None,
        make=network_maker(None, None, source[1], session.network.device) if source and source[1] else None,
        log=session.display.step,
    )


def _read(session: Session, folder: Path) -> tuple[LabeledImages, LabeledImages | None] | None:
    """Labeled test images and, if there are any, training images; None if the folder holds photographs."""
    classifier = session.classifier
    given = {"size": classifier.input_size, "channels": classifier.channels}
    try:
        test = read_labeled(folder, split="test", **given)  # type: ignore[arg-type]
    except (ValueError, FileNotFoundError) as error:
        if array_folder(folder) is not None:
            raise Failure(str(error), UNREADABLE) from None
        return None
    if test.shape != (classifier.channels, *classifier.input_size):
        wanted = f"{test.shape[1]}x{test.shape[2]}"
        raise Failure(
            f"--model {session.network.model} must take the images of {folder}, {_shape(test.shape)}, got a model for "
            f"{_shape((classifier.channels, *classifier.input_size))} (channels x height x width); if it takes any "
            f"size, add --size {wanted}"
        )
    try:
        return test, read_labeled(folder, split="train", **given)  # type: ignore[arg-type]
    except FileNotFoundError:
        return test, None
    except ValueError as error:
        raise Failure(str(error), UNREADABLE) from None


def _photographs(session: Session, folder: Path | None, count: int, seed: int) -> Tensor:
    """Up to `count` photographs of a folder, drawn at random, each picture once, or the samples."""
    if folder is None:
        return session.read_images([], samples=True).pixels
    session.display.step("reading the images")
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    random.Random(seed).shuffle(files)  # noqa: S311 - a sample, not a secret
    classifier = session.classifier
    read: list[Tensor] = []
    for path in files:
        picture = open_pictures(path, size=classifier.input_size, channels=classifier.channels)[0]
        if picture.pixels is None:
            session.skipped.append(one_line(f"{path}: {picture.remark}"))
        elif not any(torch.equal(picture.pixels, other) for other in read):
            read.append(picture.pixels)
        if len(read) == count:
            break
    if not read:
        raise Failure(f"none of the images in {folder} could be read", UNREADABLE)
    return torch.stack(read)


def _shape(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))
