"""Weak spots over a data set: a planted place is found, one that moves with the content is not, squares are counted."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from tests.audit.fixtures import Audited, audited, networks, small_plan
from tests.audit.planted import draw_quarters, planted, planted_plan
from weakspot.audit import AttackPlan, ModelPlan, Run, audit
from weakspot.audit.findings import weak_places as findings
from weakspot.audit.findings.weak_places import WeakPlaces, weak_places
from weakspot.audit.page.run_page import run_report
from weakspot.audit.page.spot_section import spot_section

__all__ = ["audited", "networks", "planted"]  # fixtures
ALIKE = np.ones((7, 7), dtype=np.int64)  # areas of cells


def spotted(planted: Path, audited: Audited, network: str) -> Run:
    plan = planted_plan(
        draw_quarters(planted / "quarters", 12),
        network,
        regions=("none",),
        controls=False,
        analyses=("weak_spots",),
        maps=True,
        attacks=(AttackPlan("pgd", "linf:8/255", (("steps", 2),)),),
    )
    return audited(f"spots {network}", plan, planted / network)


@pytest.mark.slow
def test_a_place_that_is_weak_in_every_image_is_found(planted: Path, audited: Audited) -> None:
    places = weak_places(spotted(planted, audited, "central"))
    assert places is not None
    assert places.median.shape == (7, 7)
    assert places.weakest == (3, 3)
    assert places.p < 0.05
    assert "row 4 of 7, column 4 of 7" in places.sentences()[1]


@pytest.mark.slow
def test_a_network_that_is_weak_where_the_subject_is_has_no_weak_place(
    planted: Path, audited: Audited
) -> None:
    """The bright quarter decides, and is in each of the four equally often."""
    run = spotted(planted, audited, "spot")
    places = weak_places(run)
    assert places is not None
    assert places.p > 0.05
    square, place = places.sentences()
    assert "No place was found" in place
    records = run.records
    assert len(places.squares) == len(records) == 12
    assert places.budget == pytest.approx(8 / 255)
    sides = records["smallest_square_side"].to_numpy(float)
    assert places.squares["side"].iloc[0] == np.nanmin(sides)
    assert f"The smallest square found has {np.nanmin(sides):.0f} x {np.nanmin(sides):.0f} pixels" in square
    page = run_report(run)
    assert page.index('id="spots"') < page.index('id="robust"')
    assert page.count(square) == 1  # at the top, directly above the map
    assert "the square, outlined" in page


@pytest.mark.slow
def test_a_network_of_which_every_pixel_counts_alike_has_no_weak_place(
    planted: Path, audited: Audited
) -> None:
    places = weak_places(spotted(planted, audited, "even"))
    assert places is not None
    assert places.p > 0.05


def test_random_maps_have_no_common_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Smooth maps, as neighboring cells of an image are alike: p errs upward."""
    monkeypatch.setattr(findings, "PERMUTATIONS", 199)
    rng = np.random.default_rng(0)
    found = [
        findings._common_place(np.exp(gaussian_filter(rng.normal(-5, 1, (15, 7, 7)), (0, 1, 1))), ALIKE, 0)[1]
        < 0.05
        for _ in range(60)
    ]
    assert np.mean(found) <= 0.1
    few = findings._common_place(rng.uniform(size=(9, 7, 7)), ALIKE, 0)[1]
    assert math.isnan(few)
    assert math.isnan(findings._common_place(np.empty((0, 7, 7)), ALIKE, 0)[1])


def test_cells_of_unequal_area_are_no_weak_place() -> None:
    """Of 24 pixels, cells have 3 or 4: if all pixels count alike, the larger cells need less change."""
    areas = findings._areas((24, 28))
    assert areas.sum() == 24 * 28
    assert set(areas[:, 0] // 4) == {3, 4}
    rng = np.random.default_rng(0)
    sizes = (rng.uniform(0.5, 1, (20, 1, 1)) / areas).astype(np.float16).astype(float)
    assert findings._common_place(sizes, np.ones_like(areas), 0)[1] < 0.05
    assert findings._common_place(sizes, areas, 0)[1] > 0.5


def made_up(sides: list[float], p: float = 0.4) -> WeakPlaces:
    squares = pd.DataFrame(
        {"index": range(len(sides)), "image": "a.png", "side": sides, "top": 0.0, "left": 0.0}
    )
    squares["fraction"] = squares["side"] ** 2 / 32**2
    return WeakPlaces((0, 0), 8 / 255, squares, 0, np.full((7, 7), 0.1), (0, 0), p)


def test_sentences_claim_only_the_squares_that_were_found() -> None:
    none = made_up([math.nan, math.nan]).sentences()[0]
    assert none.startswith("In none of 2 correctly classified images was a square found")
    assert "this does not mean that none exists" in none
    most = made_up([3, 5, 8, math.nan]).sentences()[0]
    assert "3 x 3 pixels, 0.9% of the image a.png: changed by at most 8/255" in most
    assert "In at least half of 4 correctly classified images, one of at most 5 x 5 pixels" in most
    assert "No square was found in 1 image." in most
    few = made_up([3, math.nan, math.nan]).sentences()[0]
    assert "half of" not in few  # of three images, two have none
    assert "No square was found in 2 images." in few
    one = made_up([3]).sentences()[0]
    assert "half of" not in one
    assert (
        made_up([math.nan])
        .sentences()[0]
        .startswith(
            "In the one correctly classified image, no square was found that is enough to change the decision"
        )
    )
    assert "was not tested" in made_up([3], math.nan).sentences()[1]


def test_images_and_maps_that_are_missing_are_named() -> None:
    assert "Left out" not in made_up([3]).sentences()[0]
    assert "Left out: 2 images" in replace(made_up([3]), left_out=2).sentences()[0]
    unmapped = replace(made_up([3] * 20, math.nan), median=np.empty((0, 0)))
    assert unmapped.sentences()[1].endswith("the run stored no maps (--maps).")
    assert not spot_section(unmapped).charts


def test_a_run_without_the_analysis_names_it() -> None:
    section = spot_section(None)
    assert section.is_empty
    assert "--analyses weak_spots" in section.sentences[0]
    (searched,) = spot_section(None, searched=True).sentences
    assert "--analyses" not in searched  # it ran, and no image was correctly classified


@pytest.mark.slow
def test_odd_runs_have_weak_spots(networks: Path) -> None:
    """One gray image that is not square; an attack whose changes differ in size; no whole image; no maps."""
    rng = np.random.default_rng(0)
    folder = networks / "gray"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (20, 28), dtype=np.uint8)).save(folder / f"{number}.png")
    (networks / "gray_network.py").write_text(
        "import torch\nfrom torch import nn\n\ndef build():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), "
        "nn.Linear(16, 2)).eval()\n"
    )
    for changes in (
        {"limit": 1},
        {"attacks": (AttackPlan("few_pixel", settings=(("generations", 2), ("population", 4))),)},
        {"regions": ("cam",), "maps": False},
    ):
        usual: dict[str, Any] = {
            "model": ModelPlan("gray_network:build", size=(20, 28)), "regions": ("none",), "labels": "predictions",
            "attacks": (AttackPlan("pgd", "linf:8/255", (("steps", 2),)),), "analyses": ("weak_spots",),
        }  # fmt: skip
        run = audit(small_plan(folder, **{**usual, **changes}), networks / f"run {'-'.join(changes)}")
        places = weak_places(run)
        assert places is not None
        assert len(places.squares) + places.left_out == len(run.records)
        text = " ".join(places.sentences())
        assert "nan" not in text
        assert ("no maps" in text) == ("maps" in changes)
        assert 'id="spots"' in run_report(run)
    sys.modules.pop("gray_network", None)


def test_equal_cells_are_drawn_alike() -> None:
    (chart,) = spot_section(made_up([3, 4])).charts
    rows = chart.spec["datasets"]["rows"]  # type: ignore[index]
    assert {row["text"] for row in rows} == {"26"}
    assert {row["strength"] for row in rows} == {0}
