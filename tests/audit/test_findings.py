"""What a run says beyond single images: planted weak places are found, even ones are not accused, numbers are those of
the records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.audit.fixtures import (
    Audited,
    audited,
    draw_pictures,
    networks,
    pictures,
    small_plan,
    store_records,
)
from weakspot.audit import AttackPlan, ModelPlan, Plan, Run, audit, open_run, summarize
from weakspot.audit.findings.comparison import compare
from weakspot.audit.findings.contrasts import WEAK, contrast_sentences, region_contrasts
from weakspot.audit.findings.curves import budget_curves
from weakspot.audit.findings.outcomes import CellSummary
from weakspot.audit.findings.scores import score_findings
from weakspot.audit.findings.summary import strongest_attack_sentence
from weakspot.regions.spec import RegionSpec
from weakspot.statistics import false_discovery, paired_proportion_interval

__all__ = ["audited", "networks", "pictures"]  # fixtures
QUADRANT = """
import torch
from torch import nn


class Quadrant(nn.Module):
    # Everything hangs on the upper left quarter.
    def forward(self, images):
        lead = images[:, :, :12, :12].mean((1, 2, 3)) * 20 - 8
        return torch.stack([lead, -lead], 1)


def quadrant():
    return Quadrant().eval()


class Even(nn.Module):
    # Every pixel counts alike.
    def forward(self, images):
        lead = images.mean((1, 2, 3)) * 20 - 8
        return torch.stack([lead, -lead], 1)


def even():
    return Even().eval()
"""
SIZE = (24, 24)
PLACE = "weaker than the same region shifted within the image; this says nothing about image content."


def rows(frame: pd.DataFrame) -> Iterator[Any]:
    """As named tuples."""
    return iter(frame.itertuples(index=False))


@pytest.fixture
def planted(networks: Path) -> Path:
    """Where a network with a weak quarter, and one without, can be imported; quarter.png is that quarter."""
    (networks / "planted_networks.py").write_text(QUADRANT)
    mask = np.zeros(SIZE, np.uint8)
    mask[:12, :12] = 255
    Image.fromarray(mask).save(networks / "quarter.png")
    draw_pictures(networks / "many", 40)
    return networks


def plan_for(folder: Path, network: str, **changes: object) -> Plan:
    steps = (("steps", 20),)
    usual = {
        "model": ModelPlan(f"planted_networks:{network}", size=SIZE),
        "attacks": (
            AttackPlan("fmn", settings=steps),
            *(AttackPlan("pgd", f"linf:{amount}/255", steps) for amount in (2, 8, 24)),
        ),
        "regions": (str(folder / "quarter.png"),),
        "controls": True,
        "analyses": (),
        "maps": False,
        "labels": "predictions",
        "shard": 16,
        "group": 16,
    }
    return small_plan(folder / "many", **{**usual, **changes})


@pytest.fixture
def weak(planted: Path, audited: Audited) -> Run:
    return audited("weak", plan_for(planted, "quadrant"), planted / "weak")


@pytest.mark.filterwarnings("ignore:the gradient of")
def test_a_planted_weak_place_is_found_and_reported(weak: Run) -> None:
    contrasts = region_contrasts(weak)
    assert set(contrasts["control"]) == {
        "shifted"
    }  # a region that is the same in every image has no other images'
    smallest = contrasts.set_index("attack").loc["fmn"]
    assert smallest["measure"] == "smallest size"
    assert smallest["region_fraction"] == smallest["control_fraction"] == 0.25
    assert smallest["low"] > 0
    assert smallest["q"] < 0.01
    assert smallest["region_value"] < smallest["control_value"]
    assert all(
        sentence.endswith(PLACE) for sentence in contrast_sentences(contrasts) if sentence.startswith("fmn")
    )
    assert any(
        sentence.endswith(PLACE) for sentence in contrast_sentences(contrasts) if sentence.startswith("pgd")
    )
    assert not any(WEAK in sentence for sentence in contrast_sentences(contrasts))


@pytest.mark.filterwarnings("ignore:the gradient of")
def test_a_network_without_a_weak_place_is_not_accused(planted: Path) -> None:
    run = audit(plan_for(planted, "even"), planted / "sound")
    contrasts = region_contrasts(run)
    assert (contrasts["q"] > 0.05).all()
    assert not any(
        "weaker than the same region" in sentence or WEAK in sentence
        for sentence in contrast_sentences(contrasts)
    )


@pytest.mark.filterwarnings("ignore:the gradient of")
def test_contrasts_are_paired_differences_of_the_records(weak: Run) -> None:
    contrasts = region_contrasts(weak)
    records = weak.records
    for row in rows(contrasts[contrasts["measure"] == "fooled"]):
        sides = [
            records[(records["attack"] == row.attack) & (records["region"] == region)].set_index("index")[
                "success_8bit"
            ]
            for region in (row.region, RegionSpec.parse(row.region).shifted().text)
        ]
        assert (row.region_value, row.control_value) == (sides[0].mean(), sides[1].mean())
        expected = paired_proportion_interval(*(side.to_numpy(bool) for side in sides))
        assert (row.difference, row.low, row.high) == pytest.approx(expected)
    np.testing.assert_allclose(contrasts["q"], false_discovery(contrasts["p"].to_numpy()))


@pytest.mark.filterwarnings("ignore:the gradient of")
def test_curves_count_images_fooled_up_to_a_size(weak: Run) -> None:
    curves = budget_curves(weak)
    records = weak.records
    assert set(curves["attack"]) == {"fmn", "pgd steps=20"}
    assert curves.loc[curves["region"].str.startswith("matched:"), "control"].all()
    for (attack, region), curve in curves.groupby(["attack", "region"]):
        assert curve["size"].is_monotonic_increasing
        assert curve["fooled"].is_monotonic_increasing
        selected = records[records["region"] == region]
        last = curve.iloc[-1]
        if attack == "fmn":
            selected = selected[selected["attack"] == "fmn"]
            fell = selected["success_8bit"] & (selected["linf"] <= last["size"] * 1.0001)
            assert last["fooled"] == fell.mean()
        else:
            fell = selected[selected["attack"] != "fmn"].groupby("index")["success_8bit"].any()
            assert last["fooled"] == fell.mean()
            assert curve["size"].tolist() == pytest.approx([2 / 255, 8 / 255, 24 / 255])
        assert ((curve["low"] <= curve["fooled"]) & (curve["fooled"] <= curve["high"])).all()


def test_a_run_without_controls_budgets_or_analyses_has_no_findings(pictures: Path) -> None:
    run = audit(small_plan(pictures, analyses=(), maps=False), pictures.parent / "run")
    assert region_contrasts(run).empty
    assert budget_curves(run).empty
    assert set(score_findings(run)["score"]) == {
        "confidence_adversarial",
        "margin_adversarial",
        "ssim_windowed",
    }
    assert contrast_sentences(region_contrasts(run)) == []


@pytest.mark.filterwarnings("ignore:the gradient of")
def test_an_image_fooled_in_one_place_counts_with_the_largest_size_elsewhere(weak: Run) -> None:
    records = weak.records
    region = weak.plan.regions[0]
    records = records[records["attack"] == "fmn"].copy()
    index = records["index"]
    records["success_8bit"] = (records["region"] == region) | (index == 0)
    records["linf"] = np.where(records["region"] == region, 0.1, 0.4)
    store_records(weak.folder, records)
    about = json.loads((weak.folder / "run.json").read_text())
    about["plan"]["attacks"] = [one for one in about["plan"]["attacks"] if one["name"] == "fmn"]
    (weak.folder / "run.json").write_text(json.dumps(about))
    (row,) = rows(region_contrasts(open_run(weak.folder)))
    assert row.region_value == pytest.approx(0.1)
    assert row.control_value == pytest.approx(0.4)
    assert row.difference == pytest.approx(2.0)
    assert row.images == 40


def test_sizes_are_given_in_the_norm_of_the_attack() -> None:
    row: dict[str, Any] = dict(  # noqa: C408 - shorter
        attack="fmn", region="cam", control="shifted", draws=1, region_fraction=0.3, control_fraction=0.3, images=40,
        measure="smallest size", norm="linf", region_value=0.002, control_value=0.5, region_censored=0.0,
        control_censored=0.0, difference=8.0, low=7.9, high=8.1, p=0.001,
        q=0.002,
    )  # fmt: skip
    (steps,) = contrast_sentences(pd.DataFrame([row]))
    assert "needs 0.51/255 (geometric mean over 40 images)" in steps
    assert "confined to the region shifted within the image, 128/255 (256.00 times as much" in steps
    (length,) = contrast_sentences(pd.DataFrame([{**row, "norm": "l2"}]))
    assert "needs 0.002 in L2 (geometric" in length
    assert "0.5 in L2 (" in length


@pytest.mark.filterwarnings("ignore:the gradient of")
def test_the_norm_of_sizes_is_that_of_the_attack_whatever_its_label(planted: Path) -> None:
    steps = ("steps", 20)
    attacks = (
        AttackPlan("fmn", settings=(steps,), label="short"),
        AttackPlan("fmn", settings=(steps, ("norm", "l2"))),
    )
    contrasts = region_contrasts(audit(plan_for(planted, "quadrant", attacks=attacks), planted / "norms"))
    assert list(contrasts["norm"]) == ["linf", "l2"]
    linf, l2 = contrast_sentences(contrasts.assign(difference=[2.0, 1.0]))
    assert "/255" in linf
    assert "/255" not in l2
    assert "in L2" in l2


def test_if_nothing_is_fooled_no_region_is_called_the_weakest(planted: Path) -> None:
    attacks = tuple(AttackPlan("pgd", f"linf:{eps}", (("steps", 1),)) for eps in ("0.0001", "0.0002"))
    sentence = summarize(audit(plan_for(planted, "even", attacks=attacks), planted / "strong")).weakest
    assert sentence.startswith("None of 40 images was fooled by pgd")
    assert "quarter.png" in sentence
    assert "matched" not in sentence


@pytest.mark.filterwarnings("ignore:the gradient of")
def test_attacks_that_always_succeed_have_no_robust_accuracy_without_one_budget(
    weak: Run, planted: Path
) -> None:
    assert weak.plan.bounded_attacks == [f"pgd linf:{amount}/255 steps=20" for amount in (2, 8, 24)]
    assert not summarize(weak).weakest.startswith("fmn")
    assert all(np.isnan(cell.robust_accuracy) for cell in summarize(weak).cells if cell.attack == "fmn")
    alone = plan_for(planted, "quadrant", attacks=weak.plan.attacks[:1])
    assert alone.bounded_attacks == []
    assert summarize(audit(alone, planted / "alone")).weakest == (
        "fmn is a minimal-norm attack and has no robust accuracy without one stated budget (such as "
        "--budget linf:4/255)."
    )


@pytest.mark.filterwarnings("ignore:the gradient of")
def test_findings_of_a_complete_run_are_cached_and_copied(weak: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(weak.folder)
    asked: list[str] = []
    own = Run.sql

    def ask(self: Run, query: str, **values: object) -> object:
        asked.append(query)
        return own(self, query, **values)

    monkeypatch.setattr(Run, "sql", ask)
    first = region_contrasts(run)
    assert asked
    asked.clear()
    first["difference"] = 0.0
    again = region_contrasts(run)
    assert not asked
    pd.testing.assert_frame_equal(again, region_contrasts(open_run(weak.folder)))
    run.info = replace(run.info, status="running")
    asked.clear()
    region_contrasts(run)
    assert asked


@pytest.mark.filterwarnings("ignore:the gradient of")
def test_a_place_where_nothing_is_fooled_has_a_flat_curve_and_a_censored_size(weak: Run) -> None:
    records = weak.records
    region = weak.plan.regions[0]
    smallest = records["attack"] == "fmn"
    records.loc[smallest, "success_8bit"] = records["region"] == region
    records.loc[smallest, "linf"] = 0.1
    store_records(weak.folder, records)
    run = open_run(weak.folder)
    curves = budget_curves(run)
    (flat,) = rows(curves[(curves["attack"] == "fmn") & curves["control"]])
    assert (flat.size, flat.fooled, flat.images) == (0.1, 0.0, 40)
    contrasts = region_contrasts(run)
    (row,) = rows(contrasts[contrasts["attack"] == "fmn"])
    assert (row.region_censored, row.control_censored) == (0.0, 1.0)
    assert any(
        "confined to the region shifted within the image, at least 26/255" in sentence
        for sentence in contrast_sentences(region_contrasts(run))
    )


@pytest.mark.filterwarnings("ignore:the gradient of")
def test_an_image_with_an_unknown_outcome_at_a_smaller_budget_is_in_no_curve(weak: Run) -> None:
    records = weak.records
    lost = (records["attack"] == "pgd linf:8/255 steps=20") & (records["index"] < 10)
    records["success_8bit"] = records["success_8bit"].astype("boolean").mask(lost)
    held = (records["attack"] == "pgd linf:2/255 steps=20") & (records["index"] == 0)
    records["success_8bit"] = records["success_8bit"].mask(
        records["attack"] == "pgd linf:2/255 steps=20", held
    )
    store_records(weak.folder, records)
    curves = budget_curves(open_run(weak.folder))
    assert set(curves[curves["attack"] == "pgd steps=20"]["images"]) == {
        31
    }  # the first fell before it was lost


def test_regions_are_listed_in_the_order_of_the_plan() -> None:
    """First the small region is the weaker one by far, then the large one: the sentence is in the plan's order."""
    for left in ((0.3, 0.9), (0.9, 0.3)):
        cells = [
            CellSummary("pgd", "linf:1/255", region, area, 100, held, held - 0.1, held + 0.1, 0)
            for region, area, held in (
                ("cam", 0.3, left[0]),
                ("background", 0.7, left[1]),
                ("matched:cam", 0.3, 0.1),
            )
        ]
        cam, rest = (f"{fraction:.0%} [{fraction - 0.1:.0%}, {fraction + 0.1:.0%}]" for fraction in left)
        assert strongest_attack_sentence(cells, 0.99) == (
            f"Under pgd at linf:1/255 confined to cam (30% of the image), {cam} of 100 images remain correctly "
            f"classified (99% without an attack); confined to background (70% of the image), {rest}."
        )


def test_a_run_without_any_outcome_has_no_areas_and_no_robustness(networks: Path) -> None:
    draw_pictures(networks / "few", 3)
    plan = small_plan(
        networks / "few", model=ModelPlan("audited_networks:mute", size=SIZE), controls=True, regions=("cam",),
        analyses=(), maps=False,
    )  # fmt: skip
    run = audit(plan, networks / "mute")
    summary = summarize(run)
    assert all(np.isnan(cell.region_fraction) for cell in summary.cells)
    assert all("no correctly classified image was attacked" in sentence for sentence in summary.regions)
    compared = compare(run, run)
    assert compared.images == 3
    assert compared.sentence().startswith("No image has a known attack outcome in both runs")
