"""The analysis of certificates: a planted pixel, misclassified and large images, and that it runs only on request."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from tests.networks import Wrapped
from weakspot import Pairs, certify_pixels, explain
from weakspot.explanations import certified_pixels
from weakspot.explanations.analysis import available_analyses, find_analyses, usual_analyses
from weakspot.explanations.certified_pixels import CATEGORIES, certificate_finding


def pixel_network() -> nn.Module:
    """Class 1 once the gray pixel in row 1, column 2 is above .75."""

    def logits(images: Tensor) -> Tensor:
        value = images[:, 0, 1, 2] - 0.75
        return torch.stack([-value, value], 1)

    return Wrapped(logits).eval()


def pairs_of(network: nn.Module, clean: Tensor, labels: list[int]) -> Pairs:
    return Pairs.of(network, clean, clean.flip(-1), torch.tensor(labels))


def test_the_planted_pixel_is_refuted_and_fractions_are_those_of_the_certificate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Any network, as run: all 256 grays of each pixel are tried.
    monkeypatch.setattr(
        certified_pixels, "certify_pixels", lambda *given: certify_pixels(*given, colors="8bit")
    )
    network = pixel_network()
    clean = torch.full((2, 1, 3, 4), 0.5)
    clean[1, :, 1, 2] = 1.0
    result = explain(network, pairs_of(network, clean, [0, 0]), analyses=["certificate"])
    first, second = (row for _, row in result.scores.iterrows())
    assert first[["proven_fraction", "refuted_fraction", "unknown_fraction"]].tolist() == [11 / 12, 1 / 12, 0]
    # The second image is misclassified: that each of its colors "refutes" says nothing.
    assert second[["proven_fraction", "refuted_fraction", "unknown_fraction"]].isna().all()
    drawn = result.maps["certificate"][:, 0]
    assert CATEGORIES[int(drawn[0, 1, 2])] == "refuted"
    assert (drawn[0] == CATEGORIES.index("proven")).sum() == 11
    assert not drawn[1].any()
    assert certificate_finding(first) == (
        "Changed alone, 92% of the pixels have no color that turns 'class 0' into another class (proven, float32 as "
        "run); 8% have one."
    )
    assert certificate_finding(second) == ""


def test_large_images_are_left_out() -> None:
    network = Wrapped(lambda images: torch.stack([images.mean((1, 2, 3)), images[:, 0, 0, 0] * 0], 1)).eval()
    clean = torch.rand(1, 1, 65, 64)
    scores = explain(network, pairs_of(network, clean, [0]), analyses=["certificate"]).scores
    assert np.isnan(scores["proven_fraction"]).all()


def test_it_runs_only_if_it_is_named() -> None:
    assert "certificate" in available_analyses()
    assert "certificate" not in usual_analyses()
    assert "certificate" not in find_analyses(None)
    assert list(find_analyses(["certificate"])) == ["certificate"]


TURNS = "of the pixels have no color that turns 'cat' into another class (proven, float32 as run)"


@pytest.mark.parametrize(
    ("fractions", "sentence"),
    [
        ((1.0, 0.0, 0.0), f"Changed alone, 100% {TURNS}."),
        ((0.9996, 0.0, 0.0004), f"Changed alone, over 99.9% {TURNS}; under 0.1% are unknown."),
        ((0.0, 0.25, 0.75), f"Changed alone, 0% {TURNS}; 25% have one; 75% are unknown."),
        ((np.nan, np.nan, np.nan), ""),
    ],
)
def test_sentences(fractions: tuple[float, float, float], sentence: str) -> None:
    names = ("proven_fraction", "refuted_fraction", "unknown_fraction")
    row = pd.Series({"label": "cat", **dict(zip(names, fractions, strict=True))})
    assert certificate_finding(row) == sentence
    assert certificate_finding(pd.Series({"label": "cat"})) == ""


def test_the_page_shows_the_map_and_the_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        certified_pixels, "certify_pixels", lambda *given: certify_pixels(*given, colors="8bit")
    )
    network, clean = pixel_network(), torch.full((1, 1, 8, 8), 0.5)
    pairs = replace(pairs_of(network, clean, [0]), adversarial=clean * 0.9)
    page = explain(network, pairs, analyses=["certificate"])._repr_html_()
    assert "Changed alone, 98% of the pixels have no color that turns" in page
    assert "Pixels of which no color changes the class" in page
