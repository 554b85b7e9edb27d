"""`weakspot explain`: attack images, or read pairs, and explain them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from weakspot.cli.aims import AimOptions, find_aim, find_region
from weakspot.cli.app import UNREADABLE, Failure, command, one_line
from weakspot.cli.attack_choice import AttackChoice, ChosenAttack
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
)
from weakspot.cli.output import (
    add_row,
    first_rows,
    json_rows,
    make_table,
    print_table,
    print_text,
    shorten_name,
)
from weakspot.cli.session import Images, Session, check_existing, check_sources, open_session

if TYPE_CHECKING:
    from torch import Tensor

    from weakspot.classifier import Classifier
    from weakspot.explanations import Explanation
    from weakspot.pairs import Pairs

FILES = ("report.html", "scores.csv", "pairs.safetensors", "maps.npz", "locality.csv", "run.json")
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
    chosen = None if analyses == "all" else [] if analyses == "none" else parse_names(analyses)
    with open_session(context, network, output, out, FILES) as session:
        from weakspot._io.files import write_atomic
        from weakspot.audit import write_run
        from weakspot.explanations import explain as explain_pairs
        from weakspot.explanations.locality_by_radius import locality_of, locality_sentence

        if pair:
            pairs, names, source = _read_pairs(session.classifier, sources)
            how = "pairs as given"
            session.make_folder()
        else:
            attack = choice.choose(context)
            images_read = session.read_images(sources, samples=samples)
            pairs, names, source, how = _attack(session, images_read, aims, attack, seed)
        others = None if reference is None else _read_reference(session, reference)
        made = {
            "attack": how,
            "labels": source,
            **({} if others is None else {"reference": f"{len(others)} images in {reference}"}),
            **session.provenance(seed),
        }
        explanation = explain_pairs(
            session.classifier,
            pairs,
            analyses=chosen,
            seed=seed,
            names=names,
            made=made,
            reference=others,
            progress=session.display.step("explaining"),
        )
        session.display.step("writing")
        about = {
            **made,
            "images": list(names),
            "skipped": session.skipped,
            "seconds": round(session.seconds, 2),
        }
        paths = write_run(explanation, out, about)
        locality = locality_of(explanation.scores)
        if locality is not None:
            paths["locality.csv"] = out / "locality.csv"
            write_atomic(paths["locality.csv"], partial(locality.to_csv, index=False))

    def show() -> None:
        _print(explanation, session.ending(), every=every)
        if locality is not None:
            print_text(f"\n{locality_sentence(locality)}")
        print_text(f"\nReport: {paths['report.html'].resolve()}")

    session.report(lambda: _document(explanation, paths, session.skipped), show)


def _check_pair(sources: Sequence[Path], *, pair: bool, samples: bool) -> None:
    """Check that the paths fit the options."""
    saved = len(sources) == 1 and sources[0].suffix == ".safetensors"
    if pair and samples:
        raise Failure("--samples has no effect with --pair (leave out one of the two)")
    if pair and len(sources) != 2 and not saved:
        raise Failure(
            f"--pair needs two images, CLEAN ADVERSARIAL, or one pairs.safetensors, got {len(sources)} paths"
        )
    if saved and not pair:
        raise Failure(f"{sources[0]} is not an image (add --pair to explain saved pairs)")
    if pair:
        check_existing(sources)
    else:
        check_sources(sources, samples=samples)


def _attack(
    session: Session, images: Images, aims: AimOptions, attack: ChosenAttack, seed: int
) -> tuple[Pairs, list[str], str, str]:
    """The pairs, their names, where the labels are from, and how the pairs were made."""
    from weakspot.attacks import AttackOptions

    classifier = session.classifier
    aim, source = find_aim(classifier, images, aims)
    session.make_folder()
    mask, where = find_region(aims, classifier, aim, seed)
    step = session.display.step("attacking", total=len(aim.images), counted=False)
    options = AttackOptions(attack.budget, mask, aim.targets, seed, None, step)
    pairs = attack.run(classifier, aim, options)
    return pairs, aim.names, source, attack.describe(classifier, aim, where)


def _read_pairs(classifier: Classifier, sources: Sequence[Path]) -> tuple[Pairs, list[str], str]:
    """The pair in two images, or the pairs in one file of `Pairs.save`; names, and where the labels are from."""
    from weakspot._checks import warn
    from weakspot.pairs import AttackResult, Pairs

    if len(sources) == 1:
        try:
            pairs: Pairs = AttackResult.load(sources[0])
        except (
            ValueError
        ):  # pairs of another tool, without success and counts; or no pairs, which load reports
            pairs = Pairs.load(sources[0])
        names = pairs.names or [f"{sources[0].stem} {number}" for number in range(len(pairs))]
        return pairs, list(names), "from the file"
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
    return Pairs.of(classifier, clean[None], adversarial[None]), names, "the model's predictions"


def _read_image(path: Path, channels: int, size: tuple[int, int] | None = None) -> Tensor:
    """One image file (C, H, W), of its own size by default."""
    from weakspot.images import open_pictures

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
    return session.read_images([folder]).pixels


def _document(explanation: Explanation, paths: dict[str, Path], skipped: Sequence[str]) -> dict[str, object]:
    """Scores, verdicts and files for --json."""
    rows = json_rows(explanation.scores)
    for index, row in enumerate(rows):
        row["verdict"] = explanation.verdict(index)
    files = {name: str(path.resolve()) for name, path in paths.items()}
    return {"scores": rows, "skipped": list(skipped), "files": files}


def _print(explanation: Explanation, ending: str, *, every: bool) -> None:
    """How many images were fooled, a table, then the verdict on each image of the table."""
    from weakspot.report.image_verdict import headline
    from weakspot.statistics.number_format import p_value, percent

    scores = explanation.scores
    # An image that is misclassified without an attack is no success of the attack.
    right = scores["read_clean_as"] == scores["label"]
    fooled = int((scores["success_8bit"] & right).sum())
    which = "images" if right.all() else "correctly classified images"
    print_text(f"{fooled} of {int(right.sum())} {which} fooled as 8-bit files{ending}.\n")
    placed = "effect_in_roi" in scores and bool(scores["effect_in_roi_shift_p"].notna().any())
    compared = "relation" in scores and bool(scores["relation"].notna().any())
    headings = ["image", "before → after"]
    headings += ["effect where it looks"] if placed else []
    headings += ["in other images", "p"] if compared else []
    table = make_table(headings)
    rows, more = first_rows([row for _, row in scores.iterrows()], every=every)
    for row in rows:
        failed = "" if row["success_8bit"] or row["linf"] == 0 else " (failed)"
        failed = failed if row["read_clean_as"] == row["label"] else " (wrong before)"
        name = str(row["image"]) if every else shorten_name(str(row["image"]))
        cells: list[str | Text] = [name, Text.assemble(one_line(headline(row)), (failed, "yellow"))]
        if placed:  # NaN if the attack is confined to a region, which decides where it acts
            cells.append(percent(row["effect_in_roi"]) if row["effect_in_roi_shift_p"] >= 0 else "")
        if compared:
            tested = row["relation_p"] >= 0
            cells.append(percent(row["effect_in_roi_null"]) if tested else "")
            cells.append(p_value(row["relation_p"]).removeprefix("p = ").removeprefix("p ") if tested else "")
        add_row(table, *cells)
    print_table(table, whole=every)
    for index, row in enumerate(rows):
        print_text(f"\n{row['image']}", style="bold")
        print_text(explanation.verdict(index))
    if more:
        print_text(f"\n... and {more} more images (show them with --all; all are in the report)", style="dim")
