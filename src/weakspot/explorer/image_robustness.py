"""How robust the clean image is: its weak-spot map, and the certificate of each pixel of a mask, changed alone."""

import base64
import io
import math
from collections.abc import Callable

import numpy as np

from weakspot._checks import collected_warnings
from weakspot.attacks.observers import observed
from weakspot.budgets import read_budget
from weakspot.classifier import evaluating
from weakspot.explorer.bench import Bench, Exhibit
from weakspot.explorer.messages import Message, Request, RequestError, Send, finite, floats, with_cautions
from weakspot.proofs import certify_pixels
from weakspot.proofs.affine_steps import NotSupportedError
from weakspot.proofs.network_steps import bound_network
from weakspot.proofs.rounding_errors import float32_troubles
from weakspot.proofs.sentences import pixel_sentence
from weakspot.report.map_views import cell_edges
from weakspot.statistics.number_format import counted, size_of_change
from weakspot.vulnerability import WeakSpots, weak_spots
from weakspot.vulnerability.spot_map import norm_and_reach

MOST_CELLS = 32  # a side
COLORS = ("full", "8/255")
SECONDS = 60  # after which the pixels that are left are unknown, unless the page asks for more
MOST_SECONDS = 3600


def search_spots(bench: Bench, request: Request, send: Send, pause: Callable[[], None]) -> Message:
    """Send the estimate, then if asked for the verified sizes; returns the last event.

    Args:
        bench: with the image.
        request: image, grid, budget (its kind decides the norm) and verify.
        send: takes the events.
        pause: called between evaluations; raises to end the search.
    """
    exhibit = bench.exhibit(request.whole("image", 0, 10**6, 0))
    grid = request.whole("grid", 1, MOST_CELLS, 7)
    norm, max_size = norm_and_reach(read_budget(request.text("budget", "linf:4/255")))
    verify = request.flag("verify")

    def search(effort: str, progress: Callable[[float], None] | None = None) -> WeakSpots:
        return weak_spots(
            bench.classifier, exhibit.pixels, exhibit.label_tensor, grid=grid, norm=norm, max_size=max_size,
            effort=effort, progress=progress,
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
    most = f" up to {size_of_change(spots.max_size, spots.norm)}" if spots.norm == "l2" else ""
    none = f"No change{most} was found in {counted(missing, 'cell')}; this does not mean that none exists."
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


def provable(bench: Bench, request: Request) -> Message:
    """Why nothing can be proven of this network, in one sentence; None if its layers are supported."""
    exhibit = bench.exhibit(request.whole("image", 0, 10**6, 0))
    with evaluating(bench.classifier) as classifier:
        reason = float32_troubles(classifier)
        if not reason:
            try:
                # Tried on the image, because only the recorded steps tell whether all of them are supported.
                bound_network(classifier, exhibit.pixels)
            except NotSupportedError as error:
                reason = str(error)
    sentence = f"Nothing can be proven of this network: {reason}." if reason else None
    return {"reason": sentence, "seconds": SECONDS}


def certify_mask(bench: Bench, request: Request, send: Send) -> Message:
    """Certify the pixels of a mask of the clean image, drawn as the map of `weakspot certify`.

    Args:
        bench: with the image.
        request: image, mask, colors, and the seconds after which the rest stays unknown.
        send: takes the fraction done.
    """
    from weakspot.report.robustness_figures import CertificateView, certificate_chart

    exhibit = bench.exhibit(request.whole("image", 0, 10**6, 0))
    mask = request.brushed("mask", exhibit.size)
    if (reason := provable(bench, request)["reason"]) is not None:
        raise RequestError(str(reason))
    with collected_warnings() as cautions:
        certificate = certify_pixels(
            bench.classifier,
            exhibit.pixels,
            exhibit.label_tensor,
            region=mask.to(exhibit.pixels.device),
            colors=request.choice("colors", COLORS, COLORS[0]),
            seconds=request.number("seconds", 1, MOST_SECONDS, SECONDS),
            progress=lambda fraction: send({"event": "progress", "fraction": fraction}),
        )
    before = int(exhibit.logits.argmax())
    sentence = pixel_sentence(certificate, 0, before, bench.classifier.class_name)
    view = CertificateView(
        exhibit.pixels[0].cpu().numpy(), certificate.status[0].numpy().astype(np.int8), mask[0, 0].numpy()
    )
    buffer = io.BytesIO()
    certificate_chart(view).savefig(buffer, format="png", dpi=160)
    return {
        "sentence": with_cautions(cautions) + sentence,
        "png": base64.b64encode(buffer.getvalue()).decode("ascii"),
    }
