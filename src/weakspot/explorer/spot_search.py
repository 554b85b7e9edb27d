"""The weak-spot map of one image: an estimate at once, then the search of every cell, which can be stopped."""

from __future__ import annotations

import math
from collections.abc import Callable

from weakspot._checks import collected_warnings
from weakspot.attacks.observers import observed
from weakspot.budgets import L2, read_budget
from weakspot.explorer.bench import Bench, Exhibit
from weakspot.explorer.messages import Message, Request, finite, floats
from weakspot.explorer.pair_sentences import with_cautions
from weakspot.report.map_views import cell_edges
from weakspot.statistics.number_format import counted, size_of_change
from weakspot.vulnerability import WeakSpots, weak_spots

MOST_CELLS = 32  # a side


def search_spots(
    bench: Bench, request: Request, send: Callable[[Message], None], pause: Callable[[], None]
) -> Message:
    """Send the estimate, then if asked for the verified sizes; returns the last event.

    Args:
        bench: with the image.
        request: image, grid, budget (its kind decides the norm) and verify.
        send: takes the events.
        pause: called between evaluations; raises to end the search.
    """
    exhibit = bench.exhibit(request.whole("image", 0, 10**6, 0))
    grid = request.whole("grid", 1, MOST_CELLS, 7)
    norm = "l2" if isinstance(read_budget(request.text("budget", "linf:4/255")), L2) else "linf"
    verify = request.flag("verify")

    def search(effort: str, progress: Callable[[float], None] | None = None) -> WeakSpots:
        return weak_spots(
            bench.classifier, exhibit.pixels, exhibit.label_tensor, grid=grid, norm=norm, effort=effort,
            progress=progress,
        )  # fmt: skip

    with collected_warnings() as cautions:
        estimate = search("estimate")
    tops, lefts = cell_edges(exhibit.size, grid)
    send(
        {
            "event": "estimate",
            "size": floats(estimate.first_order[0].where(estimate.first_order[0].isfinite(), math.nan)),
            "norm": norm,
            "tops": tops,
            "lefts": lefts,
        }
    )
    if not verify:
        sentence = "Estimates from gradients alone; no cell was searched."
        return {"event": "done", "sentence": with_cautions(cautions) + sentence}
    with observed(lambda _: pause()), collected_warnings() as cautions:
        spots = search("verified", lambda fraction: send({"event": "progress", "fraction": fraction}))
    for row, column in ((row, column) for row in range(len(tops) - 1) for column in range(len(lefts) - 1)):
        send(
            {
                "event": "cell",
                "row": row,
                "column": column,
                "size": finite(float(spots.size[0, row, column])),
                "levels": int(spots.levels[0, row, column]),
            }
        )
    return {"event": "done", "sentence": with_cautions(cautions) + spots_sentence(bench, exhibit, spots)}


def spots_sentence(bench: Bench, exhibit: Exhibit, spots: WeakSpots) -> str:
    """The weakest cell that was found, and in how many cells nothing was found."""
    if int(exhibit.logits.argmax()) != exhibit.label:
        return "The image is misclassified without a change, so that no cell needs one."
    sizes = spots.size[0]
    found, cells = sizes.isfinite(), sizes.numel()
    missing = cells - int(found.sum())
    none = f"No change was found in {counted(missing, 'cell')}; this does not mean that none exists."
    if not bool(found.any()):
        return none
    weakest = int(sizes.where(found, math.inf).argmin())
    row, column = divmod(weakest, sizes.shape[1])
    reached = bench.classifier.class_name(int(spots.adversarial_class[0, row, column]))
    size = size_of_change(float(sizes[row, column]), spots.norm)
    first = (
        f"Weakest of {counted(cells, 'cell')}: row {row + 1}, column {column + 1}, where a change of {size} was found "
        f"that makes it {reached}."
    )
    return f"{first} {none}" if missing else first
