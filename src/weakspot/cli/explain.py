"""`weakspot explain`: attack images, or read pairs, and explain them."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from torch import Tensor

from weakspot._checks import NotFiniteError, warn
from weakspot._interrupts import INTERRUPTED
from weakspot._io.files import write_atomic
from weakspot._progress import Checkpoints
from weakspot.classifier import Classifier
from weakspot.cli.app import UNREADABLE, Failure, command
from weakspot.cli.attack_choice import AimOptions, AttackChoice, attack_images, find_aim
from weakspot.cli.options import (
    AnalysesOption,
    EveryOption,
    ImagesArgument,
    ModelOptions,
    OutputOptions,
    SamplesOption,
    SeedOption,
    flag,
    option,
    parse_names,
    refuse,
    refuse_fraction,
    repeated,
)
from weakspot.cli.output import json_rows, print_text
from weakspot.cli.session import Session, check_existing, check_sources, open_session
from weakspot.cli.verdict_output import VerdictOutput
from weakspot.explanations import Explanation
from weakspot.explanations import explain as explain_pairs
from weakspot.explanations.analysis import QUICK, find_analyses, usual_analyses
from weakspot.explanations.locality_by_radius import locality_of, locality_sentence
from weakspot.images import open_pictures
from weakspot.pairs import AttackResult, Pairs
from weakspot.statistics.number_format import counted

FILES = ("report.html", "scores.csv", "pairs.safetensors", "maps.npz", "locality.csv", "run.json")
GIVEN = "pairs as given"
ATTACK_OPTIONS = ("labels", "target", "region", "fraction", "name", "budget", "steps", "settings")


@command(
    "weakspot explain cat.jpg dog.jpg",
    "weakspot explain photos/ --region cam --budget linf:8/255 --out runs/cam",
    "weakspot explain --pair clean.png adversarial.png --model my_package.models:build",
    "weakspot explain --samples --json > scores.json",
    "weakspot explain photos/ --attack few_pixel --set count=3 --analyses locality",
    "weakspot explain --pair runs/pixels/pairs.safetensors",
)
def explain(
    context: typer.Context,
    aims: AimOptions,
    choice: AttackChoice,
    network: ModelOptions,
    output: OutputOptions,
    images: ImagesArgument = None,
    samples: SamplesOption = False,
    pair: Annotated[
        bool,
        flag(
            "--pair",
            "Explain pairs made by any tool: IMAGES are CLEAN ADVERSARIAL, or one pairs.safetensors.",
        ),
    ] = False,
    reference: Annotated[
        Path | None,
        option(
            "FOLDER",
            "Other images of the same source. Each attack is compared with where the model looks in them; a p "
            "value needs at least 20 images in total, including those explained.",
        ),
    ] = None,
    analyses: AnalysesOption = "all",
    quick: Annotated[
        bool, flag("--quick", f"Run only the analyses of the first verdict: {', '.join(QUICK)}.")
    ] = False,
    seed: SeedOption = 0,
    every: EveryOption = False,
    out: Annotated[Path, option("FOLDER", f"Folder for {', '.join(FILES)}.")] = Path("weakspot-out"),
) -> None:
    """Attack images, or read pairs, and explain where the change acts and whether the model looks there.

    Files that cannot be read are noted and skipped.
    """
    sources = list(images or [])
    _check_pair(sources, pair=pair, samples=samples)
    if pair:
        refuse(context, ATTACK_OPTIONS, "with --pair, which attacks nothing (leave out one of the two)")
    else:
        refuse_fraction(context, [aims.region])
    attack = choice.choose(context)
    if quick:
        refuse(context, ["analyses"], "with --quick (leave out one of the two)")
    every_name = usual_analyses()
    chosen = every_name if analyses == "all" else [] if analyses == "none" else parse_names(analyses)
    planned = list(find_analyses(QUICK if quick else chosen))
    left_out = [name for name in every_name if quick and name not in planned]
    options = repeated(context, ["budget", *(field.name for field in fields(network))])
    with open_session(context, network, output, out, FILES) as session:
        classifier = session.classifier
        if pair:
            attacked = _read_pairs(classifier, sources)
            session.make_folder()
        else:
            read = session.read_images(sources, samples=samples)
            aim, source = find_aim(session, read, aims)
            session.make_folder()
            aim, result, how = attack_images(session, aim, aims, attack, seed=seed)
            attacked = _Attacked(result, aim.names, source, how)
        others = None if reference is None else _read_reference(session, reference)
        screen = VerdictOutput(session, planned, every)

        def write(explanation: Explanation) -> dict[str, Path]:
            absent = [name for name in every_name if name not in explanation.analyses]
            made = {
                "attack": attacked.how,
                "labels": attacked.source,
                **({} if pair or aims.region == "none" else {"region": aims.region}),
                **({} if others is None else {"reference": f"{len(others)} images in {reference}"}),
                **({"analyses left out": ", ".join(absent)} if screen.missing or quick else {}),
                **({"options": options} if options else {}),
                **session.provenance(seed),
            }
            return _write(session, replace(explanation, made=made))

        save = Checkpoints(write)

        def finish(explanation: Explanation) -> None:
            screen.update(explanation)
            # Kept, whatever may end the command; the last one is written below.
            if screen.missing:
                save(lambda: explanation)

        stopped: Failure | None = None
        try:
            explanation = explain_pairs(
                classifier,
                attacked.pairs,
                analyses=planned,
                seed=seed,
                names=attacked.names,
                reference=others,
                progress=session.display.step("explaining", total=len(planned), unit="analysis"),
                on_analysis=finish,
            )
        except (KeyboardInterrupt, NotFiniteError) as error:
            # Finished analyses are written all the same; before the first one, there is nothing to keep.
            if screen.latest is None:
                raise
            explanation = screen.latest
            stopped = (
                Failure("interrupted", INTERRUPTED)
                if isinstance(error, KeyboardInterrupt)
                else Failure(str(error))
            )
        session.display.step("writing")
        paths = write(explanation)
    if stopped is not None:
        kept = f"{paths['report.html']} holds the analyses that had finished, without {', '.join(screen.missing)}"
        raise Failure(f"{stopped}; {kept}", stopped.code)
    session.report(
        lambda: _document(explanation, paths, session.skipped),
        lambda: _print_end(explanation, screen, paths, left_out),
    )


def _write(session: Session, explanation: Explanation) -> dict[str, Path]:
    """Write all files; returns their paths by name."""
    from weakspot.audit import write_run

    about = {
        **explanation.made,
        "images": explanation.scores["image"].tolist(),
        "skipped": session.skipped,
        "seconds": round(session.seconds, 2),
        "seconds_of_analyses": {name: round(seconds, 2) for name, seconds in explanation.seconds.items()},
    }
    paths = write_run(explanation, session.out, about)
    locality = locality_of(explanation.scores, explanation.images)
    if locality is not None:
        paths["locality.csv"] = session.out / "locality.csv"
        write_atomic(paths["locality.csv"], partial(locality.to_csv, index=False))
    return paths


def _print_end(
    explanation: Explanation, screen: VerdictOutput, paths: Mapping[str, Path], left_out: Sequence[str]
) -> None:
    """What deeper analyses add to the first verdict, what --quick left out, and where the report is."""
    screen.finish(explanation)
    locality = locality_of(explanation.scores, explanation.images)
    if locality is not None:
        print_text(f"\n{locality_sentence(locality)}")
    if left_out:
        print_text(f"\nLeft out by --quick: {', '.join(left_out)}", style="dim")
    print_text(f"\nReport: {paths['report.html'].resolve()}")


def _check_pair(sources: Sequence[Path], *, pair: bool, samples: bool) -> None:
    """Check that the paths fit the options."""
    saved = len(sources) == 1 and sources[0].suffix == ".safetensors"
    if pair and samples:
        raise Failure("--samples has no effect with --pair (leave out one of the two)")
    if pair and len(sources) != 2 and not saved:
        raise Failure(
            f"--pair needs two images, CLEAN ADVERSARIAL, or one pairs.safetensors, got {counted(len(sources), 'path')}"
        )
    if saved and not pair:
        raise Failure(f"{sources[0]} is not an image (add --pair to explain saved pairs)")
    if pair:
        check_existing(sources)
    else:
        check_sources(sources, samples=samples)


class _Attacked(NamedTuple):
    """Pairs to explain.

    Attributes:
        pairs: N pairs.
        names: of the images.
        source: where the labels are from.
        how: the pairs were made.
    """

    pairs: Pairs
    names: list[str]
    source: str
    how: str


def _read_pairs(classifier: Classifier, sources: Sequence[Path]) -> _Attacked:
    """The pair in two images, or the pairs in one file of `Pairs.save`."""
    if len(sources) == 1:
        try:
            pairs: Pairs = AttackResult.load(sources[0])
        except (
            ValueError
        ):  # pairs of another tool, without success and counts; or no pairs, which load reports
            pairs = Pairs.load(sources[0])
        names = pairs.names or [f"{sources[0].stem} {number}" for number in range(len(pairs))]
        return _Attacked(pairs, list(names), "from the file", GIVEN)
    clean, adversarial = (_read_image(source, classifier.channels) for source in sources)
    if clean.shape != adversarial.shape:
        sizes = " and ".join(f"{image.shape[1]} x {image.shape[2]}" for image in (clean, adversarial))
        raise Failure(f"the images of a pair must have one size, got {sizes} (height x width)", UNREADABLE)
    # First at their own size, to see whether resizing would weaken the perturbation.
    if clean.shape[1:] != classifier.input_size:
        height, width = classifier.input_size
        warn(
            f"both images are resized from {clean.shape[1]} x {clean.shape[2]} to {height} x {width}, which weakens a "
            "perturbation (save adversarial images at the size that the model takes)",
            UserWarning,
        )
        clean, adversarial = (
            _read_image(source, classifier.channels, classifier.input_size) for source in sources
        )
    names = [f"{sources[0].name} → {sources[1].name}"]
    pairs = Pairs.of(classifier, clean[None], adversarial[None])
    return _Attacked(pairs, names, "the model's predictions", GIVEN)


def _read_image(path: Path, channels: int, size: tuple[int, int] | None = None) -> Tensor:
    """One image file (C, H, W), of its own size by default."""
    if not path.is_file():
        raise Failure(f"--pair needs two image files, got {path}", UNREADABLE)
    (image,) = open_pictures(path, size=size, channels=channels)
    if image.pixels is None:
        raise Failure(f"{path}: {image.remark}", UNREADABLE)
    return image.pixels


def _read_reference(session: Session, folder: Path) -> Tensor:
    """The images (R, C, H, W) in a folder."""
    if not folder.is_dir():
        what = "a file" if folder.exists() else "a path that does not exist"
        raise Failure(f"--reference must be a folder of images, got {folder}, {what}", UNREADABLE)
    read = session.read_images([folder])
    return read.subset(session.predict(read)[1]).pixels


def _document(explanation: Explanation, paths: dict[str, Path], skipped: Sequence[str]) -> dict[str, object]:
    """Scores, verdicts and files for --json."""
    rows = json_rows(explanation.scores)
    for index, row in enumerate(rows):
        row["verdict"] = explanation.verdict(index)
    files = {name: str(path.resolve()) for name, path in paths.items()}
    return {"scores": rows, "skipped": list(skipped), "files": files}
