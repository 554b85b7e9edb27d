"""Panels: what one analysis says about a pair, drawn as in the report, computed when it is asked for."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from weakspot._checks import collected_warnings
from weakspot.explanations import explain
from weakspot.explanations.analysis import accepted_options, available_analyses, find_analyses
from weakspot.explorer.bench import Bench, Exhibit
from weakspot.explorer.messages import Message, Request, RequestError
from weakspot.report.page_sections import panel
from weakspot.statistics.number_format import number

REFERENCES = (19, 60)  # other images of the bench that a pair is compared with: at least and at most


def explain_pair(bench: Bench, request: Request) -> Message:
    """The panel of one analysis of the last attack on an image, or of its control."""
    exhibit = bench.exhibit(request.whole("image", 0, 10**6, 0))
    side = request.choice("side", ("attack", "control"), "attack")
    pair = exhibit.pair if side == "attack" else exhibit.control
    if pair is None:
        raise RequestError("there is no perturbation yet (attack the image first)")
    name = request.choice("analysis", available_analyses())
    compares = accepted_options(find_analyses([name])[name], {"reference": None})
    with collected_warnings() as cautions:
        explanation = explain(
            bench.classifier,
            pair,
            analyses=[name],
            seed=request.whole("seed", 0, 2**53, 0),
            names=[exhibit.name],
            reference=_references(bench, exhibit) if compares else None,
        )
    drawn = panel(explanation)
    row = explanation.scores.iloc[0]
    scores = [
        {"name": name.replace("_", " "), "value": number(float(row[name])), "meaning": meaning}
        for name, meaning in explanation.meanings.items()
        if name in row and isinstance(row[name], float | int | np.number)
    ]
    return {
        "html": drawn.html,
        "data": dict(drawn.data),
        "sentences": [*drawn.sentences, *(f"Caution: {text}." for text in cautions)],
        "scores": scores,
    }


def _references(bench: Bench, exhibit: Exhibit) -> Tensor | None:
    """The other images that were on the bench from the start; None if they are too few for a test."""
    others = [
        one.pixels
        for one in bench.exhibits
        if one is not exhibit and not one.uploaded and one.pixels.shape == exhibit.pixels.shape
    ]
    if exhibit.uploaded or bench.origin.samples or len(others) < REFERENCES[0]:
        return None
    return torch.cat(others[: REFERENCES[1]])
