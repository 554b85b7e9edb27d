"""`weakspot map`: where images are weak, and the smallest square of each that is enough."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weakspot._checks import check_choice
from weakspot._io.files import write_atomic
from weakspot.budgets import L2, read_budget
from weakspot.classifier import Classifier, evaluating, predict
from weakspot.cli.app import Failure, command
from weakspot.cli.labeled_images import Labels, find_labels, without_failures
from weakspot.cli.options import (
    QUICK_IMAGES,
    BudgetOption,
    ImagesArgument,
    LabelsOption,
    LimitOption,
    ModelOptions,
    OutputOptions,
    QuickImagesOption,
    SamplesOption,
    SeedOption,
    option,
    refuse,
    trial_sentence,
)
from weakspot.cli.output import json_rows, picture_names, print_sentences, print_text, shorten_name
from weakspot.cli.session import check_output, check_sources, draw_rows, open_session
from weakspot.report.robustness_figures import SpotView, spot_figure
from weakspot.statistics.number_format import counted
from weakspot.vulnerability import SmallestSquare, WeakSpots, smallest_square, weak_spots
from weakspot.vulnerability.spot_map import EFFORTS
from weakspot.vulnerability.square import enough, needless, unfound

if TYPE_CHECKING:
    import pandas as pd

FILES = ("maps", "scores.csv", "pairs.safetensors")


@command(
    "weakspot map cat.jpg dog.jpg",
    "weakspot map photos/ --budget linf:8/255 --effort verified --out runs/weak",
    "weakspot explain --pair runs/weak/pairs.safetensors",
)
def map(  # noqa: A001 - the name of the command
    context: typer.Context,
    network: ModelOptions,
    output: OutputOptions,
    images: ImagesArgument = None,
    samples: SamplesOption = False,
    labels: LabelsOption = None,
    budget: BudgetOption = "linf:4/255",
    grid: Annotated[int, option("N", "Cells per side of the map.", least=1)] = 7,
    effort: Annotated[
        str,
        option(
            "EFFORT", "estimate (from gradients), or verified (every cell is searched, which takes longer)."
        ),
    ] = "estimate",
    limit: LimitOption = None,
    quick: QuickImagesOption = False,
    seed: SeedOption = 0,
    out: Annotated[Path, option("FOLDER", f"Folder for {', '.join(FILES)}.")] = Path("weakspot-map"),
) -> None:
    """Find where images are weak: a map of each, and the smallest square found in which the budget is enough.

    `weakspot explain --pair OUT/pairs.safetensors` explains the images changed inside
    their squares.
    """
    sources = list(images or [])
    check_sources(sources, samples=samples)
    check_output(out, sources, folders=FILES[:1])
    if quick:
        refuse(context, ["limit"], "with --quick, which sets it (leave out one of the two)")
        refuse(context, ["effort"], "with --quick, which uses the estimate (leave out one of the two)")
        limit = QUICK_IMAGES
    with open_session(context, network, output, out, FILES) as session:
        spent = read_budget(budget)
        if getattr(spent, "eps", None) == 0:
            raise Failure(
                f"--budget must be above 0, got {budget} (no change of this size changes a decision)"
            )
        check_choice("--effort", effort, EFFORTS)
        classifier = session.classifier
        labeled = find_labels(labels, session, session.read_images(sources, samples=samples))
        labeled = labeled.subset(draw_rows(len(labeled.labels), limit, seed))
        session.make_folder()

        def search(given: Labels) -> tuple[SmallestSquare, WeakSpots]:
            pixels, count = given.images.pixels, len(given.labels)
            squares = smallest_square(
                classifier, pixels, given.labels, budget=spent, seed=seed,
                progress=session.display.step("looking for the smallest squares", total=count),
            )  # fmt: skip
            spots = weak_spots(
                classifier, pixels, given.labels, grid=grid, norm="l2" if isinstance(spent, L2) else "linf",
                effort=effort, seed=seed,
                progress=session.display.step("searching the cells", total=count, counted=False),
            )  # fmt: skip
            return squares, spots

        labeled, (squares, spots) = without_failures(session, labeled, search)
        scores = _table(classifier, labeled.names, squares, spots)
        session.display.step("writing")
        write_atomic(out / "scores.csv", partial(scores.to_csv, index=False))
        squares.pairs.save(out / "pairs.safetensors")
        pictures = _draw(out / FILES[0], scores, squares, spots)

    def show() -> None:
        print_sentences(scores, _summary(scores))
        if quick:
            print_text(f"\n{trial_sentence()}", style="dim")
        print_text(f"\nMaps: {pictures.resolve()}{session.ending()}", style="dim")

    session.report(
        lambda: {"scores": json_rows(scores), "skipped": session.skipped, "maps": str(pictures)}, show
    )


def _table(
    classifier: Classifier, names: Sequence[str], squares: SmallestSquare, spots: WeakSpots
) -> pd.DataFrame:
    """One row per image: the classes, the square, the weakest cells, and the sentence."""
    import pandas as pd

    pairs = squares.pairs
    with evaluating(classifier):
        clean, changed = (
            predict(classifier, images).argmax(1) for images in (pairs.clean, pairs.adversarial)
        )
    rows = []
    for number, side in enumerate(squares.side.tolist()):
        label, before, after = (
            classifier.class_name(int(index[number])) for index in (pairs.labels, clean, changed)
        )
        fraction = float(squares.fraction[number])
        if side:
            sentence = enough(side, fraction, squares.budget, (label, after))
        elif before != label:
            sentence = needless(label, before)
        else:
            sentence = unfound(squares.budget, label)
        found = spots.size[number][spots.size[number].isfinite()]
        rows.append(
            {
                "image": names[number],
                "label": label,
                "classified_as": before,
                "adversarial_class": after if side else None,
                "side": side or None,
                "fraction": fraction if side else None,
                "top": int(squares.top[number]) if side else None,
                "left": int(squares.left[number]) if side else None,
                "weakest_cell_estimate": float(spots.first_order[number].min()),
                "weakest_cell_found": float(found.min()) if len(found) else None,
                "cells_found": len(found) if spots.effort == "verified" else None,
                "sentence": sentence,
            }
        )
    table = pd.DataFrame(rows)
    # Integers of which some are missing: as floats, they would be written with a decimal point.
    whole = ["side", "top", "left", "cells_found"]
    return table.astype(dict.fromkeys(whole, "Int64"))


def _draw(folder: Path, scores: pd.DataFrame, squares: SmallestSquare, spots: WeakSpots) -> Path:
    """Write a picture of each image."""
    folder.mkdir(exist_ok=True)
    names = picture_names(scores["image"].tolist())
    for number, row in scores.iterrows():
        index = int(str(number))
        side, top, left = (int(values[index]) for values in (squares.side, squares.top, squares.left))
        view = SpotView(
            squares.pairs.clean[index].cpu().numpy(),
            spots.first_order[index].cpu().numpy(),
            (side, top, left) if side else None,
            spots.norm,
            spots.size[index].cpu().numpy() if spots.effort == "verified" else None,
            spots.max_size,
        )
        figure = spot_figure(view, shorten_name(row["image"], 60), row["sentence"])
        write_atomic(folder / names[index], partial(figure.savefig, dpi=130, format="png"))
    return folder


def _summary(scores: pd.DataFrame) -> str:
    """One sentence over all images."""
    correct = scores[scores["label"] == scores["classified_as"]]
    if not len(correct):
        return "No image is classified as its label without a change."
    found = correct["side"].dropna()
    kind = "image" if len(correct) == len(scores) else "correctly classified image"
    if not len(found):
        images = f"any of {counted(len(correct), kind)}" if len(correct) > 1 else f"the one {kind}"
        return f"No square was found in {images}; this does not mean that none exists."
    if len(correct) == 1:
        side = counted(int(found.iloc[0]), "pixel")
        return f"In the one {kind}, a square that is enough was found; it is {side} wide."
    # The smaller one of two in the middle is still at least as large as half of them.
    sides = sorted(found.astype(int))
    half = sides[(len(sides) - 1) // 2]
    width = f"it is {half}" if len(sides) == 1 else f"at least half of these squares are at most {half}"
    return (
        f"In {len(found)} of {counted(len(correct), kind)}, a square that is enough was found; {width} "
        f"{'pixel' if half == 1 else 'pixels'} wide."
    )
