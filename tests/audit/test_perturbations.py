"""What a run says of perturbations: types and localities equal what the records hold, on the page too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.audit.fixtures import draw_pictures, networks, pictures, small_plan
from tests.audit.test_run_page import Reader
from weakspot.audit import AttackPlan, ModelPlan, Run, audit
from weakspot.audit.findings.scores import TYPE_COLUMNS, perturbation_types, pixel_localities
from weakspot.audit.page.run_page import run_report
from weakspot.audit.page.score_sections import locality_section, type_section
from weakspot.explanations.locality_by_radius import RADII
from weakspot.statistics import proportion_interval

__all__ = ["networks", "pictures"]  # fixtures


BRITTLE = """
import torch
from torch import nn


class Brittle(nn.Module):
    # One bright value in the left half is enough.
    def forward(self, images):
        lead = 20 * (images[..., :12].amax((1, 2, 3)) - 0.93)
        return torch.stack([-lead, lead], 1)


def build():
    return Brittle().eval()
"""


@pytest.fixture
def run(networks: Path) -> Run:
    (networks / "brittle_networks.py").write_text(BRITTLE)
    plan = small_plan(
        draw_pictures(networks / "few", 5),
        model=ModelPlan("brittle_networks:build", size=(24, 24)),  # no class names: labels are predictions
        attacks=(
            AttackPlan("pgd", "linf:64/255", (("steps", 5),)),
            AttackPlan("few_pixel", None, (("generations", 5), ("population", 20))),
        ),
        analyses=("promotion", "locality"),
        regions=("none",),
    )
    return audit(plan, networks / "run")


def test_types_and_localities_equal_the_records_and_are_on_the_page(run: Run) -> None:
    records, types = run.records, perturbation_types(run)
    fooled = records[records["correct"].eq(True) & records["success_8bit"].eq(True)].fillna(
        {"correct": False}
    )
    assert set(fooled["attack"]) == {"pgd", "few_pixel"}
    for row in types.to_dict("records"):
        selected = fooled[fooled["attack"] == row["attack"]]["perturbation_type"].dropna()
        hits = (selected == row["type"]).to_numpy(bool)
        assert (row["count"], row["images"]) == (hits.sum(), len(hits))
        assert [row["fraction"], row["low"], row["high"]] == pytest.approx(
            list(proportion_interval(hits)), nan_ok=True
        )
    ratio = records["promotion_log2_ratio"].astype(float)
    for kind, wanted in (("promotion-dominated", ratio > 1), ("suppression-dominated", ratio < -1)):
        assert (records["perturbation_type"].eq(kind).fillna(value=False) == wanted).all()
    table = pixel_localities(run)
    assert table["attack"].unique().tolist() == ["few_pixel"]
    assert table["radius"].tolist() == [*RADII, "random site"]
    own = fooled[fooled["attack"] == "few_pixel"]["fools_at_radius_1"].dropna()
    assert table["images"][0] == len(own)
    assert table["rate"][0] == pytest.approx(own.mean(), nan_ok=True)
    page = Reader(run_report(run))
    assert len(page.tables["types"]) == 1 + len(types)
    assert len(page.tables["locality"]) == 1 + len(table)
    assert "Promotion and suppression" in page.text


def test_a_run_without_these_analyses_has_no_such_sections(pictures: Path) -> None:
    bare = audit(small_plan(pictures, analyses=(), regions=("none",)), pictures.parent / "bare")
    assert perturbation_types(bare).empty
    assert pixel_localities(bare).empty
    page = Reader(run_report(bare))
    assert not {"types", "locality"} & set(page.tables)


def test_a_sentence_counts_only_images_whose_type_is_known() -> None:
    rows = [
        (
            "pgd",
            "none",
            "suppression-dominated",
            1,
            4,
            *proportion_interval(np.array([True, False, False, False])),
        ),
        ("pgd", "none", "balanced", 0, 4, *proportion_interval(np.zeros(4, dtype=bool))),
        ("pgd", "none", "promotion-dominated", 3, 4, *proportion_interval(np.array([True] * 3 + [False]))),
        ("pgd", "cam", "promotion-dominated", 0, 0, np.nan, np.nan, np.nan),
    ]
    table = pd.DataFrame(rows, columns=list(TYPE_COLUMNS))
    (section,) = type_section(table)
    (sentence,) = section.sentences
    assert sentence == (
        "Of 4 perturbations of known type with which pgd on the whole image fooled an image, 75% [19%, 99.4%] are "
        "promotion-dominated, 25% [0.6%, 81%] are suppression-dominated, 0% [0%, 60%] are balanced."
    )
    assert type_section(table[table["images"] == 0]) == []
    assert locality_section(pd.DataFrame()) == []
