"""`weakspot map`: where images are weak, and the smallest square of each that is enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from torch import Tensor

from weakspot._checks import NotFiniteError, check_choice, collected_warnings
from weakspot._io.files import write_atomic
from weakspot._progress import Checkpoints, Progress, part
from weakspot.budgets import read_budget
from weakspot.classifier import Classifier, evaluating, predict
from weakspot.cli.app import Failure, command
from weakspot.cli.labeled_images import NONE_LEFT, Labels, find_labels, note_together, skip_changed
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
from weakspot.cli.output import (
    earlier_texts,
    json_rows,
    picture_names,
    print_sentences,
    print_text,
    remove_stale,
    shorten_name,
)
from weakspot.cli.session import Session, check_output, check_sources, draw_rows, open_session
from weakspot.pairs import AttackResult
from weakspot.report.robustness_figures import SpotView, spot_figure
from weakspot.statistics.number_format import counted
from weakspot.vulnerability import SmallestSquare, WeakSpots, smallest_square, weak_spots
from weakspot.vulnerability.spot_map import EFFORTS, norm_and_reach
from weakspot.vulnerability.square import enough, needless, unfound

if TYPE_CHECKING:
    import pandas as pd

# Of the time of an image, the part that the search for the smallest square takes, about.
SQUARES_SHARE = {"estimate": 0.9, "verified": 0.1}
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

        def search(
            image: Tensor, label: Tensor, progress: Progress | None
        ) -> tuple[SmallestSquare, WeakSpots]:
            share = SQUARES_SHARE[effort]
            square = smallest_square(
                classifier, image, label, budget=spent, seed=seed, progress=part(progress, 0, share)
            )
            norm, max_size = norm_and_reach(spent)
            spots = weak_spots(
                classifier, image, label, grid=grid, norm=norm, max_size=max_size, effort=effort, seed=seed,
                progress=part(progress, share, 1),
            )  # fmt: skip
            return square, spots

        scores = _search(session, labeled, search)

    def show() -> None:
        print_sentences(scores, _summary(scores))
        if quick:
            print_text(f"\n{trial_sentence()}", style="dim")
        print_text(f"\nMaps: {(out / FILES[0]).resolve()}{session.ending()}", style="dim")

    session.report(
        lambda: {"scores": json_rows(scores), "skipped": session.skipped, "maps": str(out / FILES[0])}, show
    )


def _search(
    session: Session,
    labeled: Labels,
    search: Callable[[Tensor, Tensor, Progress | None], tuple[SmallestSquare, WeakSpots]],
) -> pd.DataFrame:
    """Search one image after the other, so that those that are done are kept, whatever may end the command.

    Args:
        session: of the command.
        labeled: N images.
        search: (image (1, C, H, W), label (1,), progress) -> what was found.

    Returns:
        The table of scores.csv.
    """
    out, names, total = session.out, labeled.names, len(labeled.names)
    rows: list[dict[str, object]] = []
    found: list[AttackResult] = []
    remarks: list[list[str]] = []

    def write(rows: list[dict[str, object]]) -> pd.DataFrame:
        scores = _table(rows)
        write_atomic(out / "scores.csv", partial(scores.to_csv, index=False))
        AttackResult.concatenate(found).save(out / "pairs.safetensors")
        return scores

    save = Checkpoints(write)
    pictures, earlier = picture_names(names), picture_names(earlier_texts(out / "scores.csv", "image"))
    step = session.display.step("looking for weak spots", total=total)
    for number, picture in enumerate(pictures):
        image, label = (whole[number : number + 1] for whole in (labeled.images.pixels, labeled.labels))
        try:
            with collected_warnings() as messages:
                square, spots = search(image, label, part(step, number, number + 1, total))
        except NotFiniteError:
            skip_changed(session, names[number])
            continue
        remarks.append(messages)
        rows.append(_row(session.classifier, names[number], square, spots))
        found.append(square.pairs)
        _draw(out / FILES[0] / picture, rows[-1], square, spots)
        save(lambda: rows)
    if not rows:
        raise Failure(NONE_LEFT.format(session.classifier.name))
    remove_stale(out / FILES[0], earlier, pictures)
    note_together(remarks, sum(row["label"] == row["classified_as"] for row in rows))
    return write(rows)


def _row(classifier: Classifier, name: str, square: SmallestSquare, spots: WeakSpots) -> dict[str, object]:
    """Of one image: the classes, the square, the weakest cells, and the sentence."""
    pairs = square.pairs
    with evaluating(classifier):
        index = [
            pairs.labels,
            *(predict(classifier, images).argmax(1) for images in (pairs.clean, pairs.adversarial)),
        ]
    label, before, after = (classifier.class_name(int(one)) for one in index)
    side, fraction = int(square.side), float(square.fraction)
    if side:
        sentence = enough(side, fraction, square.budget, (label, after))
    elif before != label:
        sentence = needless(label, before)
    else:
        sentence = unfound(square.budget, label)
    sizes = spots.size[spots.size.isfinite()]
    return {
        "image": name,
        "label": label,
        "classified_as": before,
        "adversarial_class": after if side else None,
        "side": side or None,
        "fraction": fraction if side else None,
        "top": int(square.top) if side else None,
        "left": int(square.left) if side else None,
        "weakest_cell_estimate": float(spots.first_order.min()),
        "weakest_cell_found": float(sizes.min()) if len(sizes) else None,
        "cells_found": len(sizes) if spots.effort == "verified" else None,
        "sentence": sentence,
    }


def _table(rows: Sequence[Mapping[str, object]]) -> pd.DataFrame:
    """One row per image. Integers of which some are missing would be written with a decimal point as floats."""
    import pandas as pd

    return pd.DataFrame(rows).astype(dict.fromkeys(["side", "top", "left", "cells_found"], "Int64"))


def _draw(path: Path, row: Mapping[str, object], square: SmallestSquare, spots: WeakSpots) -> None:
    """Write the picture of one image."""
    path.parent.mkdir(exist_ok=True)
    side, top, left = (int(values) for values in (square.side, square.top, square.left))
    view = SpotView(
        square.pairs.clean[0].cpu().numpy(),
        spots.first_order[0].cpu().numpy(),
        (side, top, left) if side else None,
        spots.norm,
        spots.size[0].cpu().numpy() if spots.effort == "verified" else None,
        spots.max_size,
    )
    figure = spot_figure(view, shorten_name(str(row["image"]), 60), str(row["sentence"]))
    write_atomic(path, partial(figure.savefig, dpi=130, format="png"))


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
