"""`weakspot reproduce`: the empirical claims of five papers, on your own network and images."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weakspot.cli.app import Failure, command
from weakspot.cli.options import ModelOptions, OutputOptions, SeedOption, argument, flag, option
from weakspot.cli.output import print_text
from weakspot.cli.session import Session, open_session
from weakspot.cli.training_jobs import network_maker

if TYPE_CHECKING:
    from torch import Tensor

    from weakspot.datasets import LabeledImages

# PAPERS of weakspot.reproduction, repeated because importing it takes seconds.
NAMES = "spatial, perceptual, localized, promotion or one-pixel"
PHOTOGRAPH = 96  # pixels a side: from here on, images count as photographs
COUNTS = {"quick": (24, 64), "full": (100, 200)}  # images: photographs, small images


@dataclass(frozen=True)
class Data:
    """What `--data` names."""

    images: Tensor
    labels: Tensor | None
    name: str
    train: LabeledImages | None = None
    test: LabeledImages | None = None


@command(
    "weakspot reproduce one-pixel --data cifar10/ --model my_package.models:build",
    "weakspot reproduce localized --data mnist/ --model mnist_standard",
    "weakspot reproduce spatial --data photos/ --full --out results/",
)
def reproduce(
    context: typer.Context,
    paper: Annotated[str, argument("PAPER", f"{NAMES.capitalize()}.")],
    network: ModelOptions,
    output: OutputOptions,
    data: Annotated[
        Path | None,
        option(
            "FOLDER",
            "Images: a folder of MNIST or CIFAR files, of one folder per class, or of any photographs.",
            default="four sample photographs",
        ),
    ] = None,
    full: Annotated[
        bool, flag("--full", "More images and steps: minutes to hours instead of minutes.")
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
    out: Annotated[Path, option("FOLDER", "Folder for PAPER.json.")] = Path("weakspot-out/reproduce"),
) -> None:
    """Test the empirical claims of a paper, each beside its control.

    Every claim is quoted from the abstract and gets one of four verdicts: confirmed, confirmed with a caution, not
    confirmed, or cannot be tested on this data. Finished claims are stored in --out, so the same command resumes.

    The papers: spatial (arXiv 2011.10794), perceptual (2106.12731), localized (1909.04779), promotion (1904.02057) and
    one-pixel (1902.02947).
    """
    from weakspot._checks import check_choice
    from weakspot.reproduction import PAPERS

    check_choice("PAPER", paper, PAPERS)
    if data is not None and not data.is_dir():
        raise Failure(f"--data must be a folder, got {data}")
    with open_session(context, network, output, out, [f"{paper}.json"]) as session:
        from weakspot.reproduction import Material
        from weakspot.reproduction import reproduce as measure

        source = _read(session, data)
        photographs = min(source.images.shape[2:]) >= PHOTOGRAPH
        count = limit or COUNTS["full" if full else "quick"][0 if photographs else 1]
        images, labels = _correct(session, source, count)
        session.make_folder()
        material = Material(
            session.classifier,
            images,
            labels,
            f"{session.classifier.name}, {len(images)} correctly classified images of {source.name}",
            quick=not full,
            seed=seed,
            train=source.train,
            test=source.test,
            make=network_maker(None, None, source.train, network.device) if source.train else None,
            log=session.display.step,
        )
        result = measure(paper, material, out)
    session.report(
        lambda: asdict(result), lambda: print_text(f"{result}\n\n{out / f'{paper}.json'}{session.ending()}")
    )


def _read(session: Session, folder: Path | None) -> Data:
    """Labeled images if the folder holds some, else photographs without labels."""
    import torch

    from weakspot.datasets import read_labeled
    from weakspot.datasets.labeled import as_float

    classifier = session.classifier
    if folder is None:
        return Data(session.read_images([], samples=True).pixels, None, "the sample photographs")
    try:
        test = read_labeled(folder, split="test", size=classifier.input_size, channels=classifier.channels)
    except (ValueError, FileNotFoundError):
        return Data(session.read_images([folder]).pixels, None, folder.name)
    if test.shape != (classifier.channels, *classifier.input_size):
        raise Failure(
            f"--model {session.network.model} must take the images of {folder}, {_shape(test.shape)}, got a model for "
            f"{_shape((classifier.channels, *classifier.input_size))} (channels x height x width)"
        )
    try:
        train = read_labeled(folder, split="train", size=classifier.input_size, channels=classifier.channels)
    except (ValueError, FileNotFoundError):
        train = None
    rows = torch.arange(min(len(test.labels), 1000))
    return Data(as_float(test.pixels(rows)), test.labels[rows], folder.name, train, test)


def _correct(session: Session, data: Data, count: int) -> tuple[Tensor, Tensor]:
    """The first images that are classified correctly; without labels, the predictions are the labels."""
    from weakspot.classifier import predict

    predicted = predict(session.classifier, data.images).argmax(1)
    labels = predicted if data.labels is None else data.labels
    rows = (predicted == labels).nonzero()[:count, 0]
    if not len(rows):
        raise Failure(
            "no image is classified correctly (check --model, --mean, --std and the labels of --data)"
        )
    return data.images[rows], labels[rows]


def _shape(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))
