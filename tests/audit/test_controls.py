"""Controls of regions: a weak region is found; neither an even network nor the middle of images is accused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tests.audit.fixtures import same_maps, same_records
from tests.audit.planted import SIDE, SIZE, draw_quarters, planted, planted_plan
from weakspot.audit import AttackPlan, Run, audit, region_contrasts, resume, summarize
from weakspot.audit.execution.batches import AuditModel
from weakspot.audit.execution.job import Job
from weakspot.audit.execution.opened_images import Donors, OpenedImages
from weakspot.audit.execution.preparation import load_planned
from weakspot.audit.findings.contrasts import (
    OTHERS,
    SHIFTED,
    STRONG,
    UNCLEAR,
    WEAK,
    Contrast,
    contrast_sentences,
    verdict,
)
from weakspot.audit.findings.distributions import class_distributions, distributions, extremes
from weakspot.audit.plan.image_list import list_images
from weakspot.classifier import predict
from weakspot.regions import cam
from weakspot.statistics import region_test

__all__ = ["planted"]  # a fixture
IMAGES = 48


@pytest.fixture
def quarters(planted: Path) -> Path:
    return draw_quarters(planted / "quarters", IMAGES)


def found_in(network: str, quarters: Path) -> tuple[str, pd.DataFrame]:
    run = audit(planted_plan(quarters, network), quarters.parent / network)
    contrasts = region_contrasts(run)
    assert contrasts["control"].tolist() == [OTHERS, SHIFTED]
    assert (contrasts["images"] == IMAGES).all()
    np.testing.assert_allclose(contrasts["control_fraction"], 0.25)
    (sentence,) = summarize(run).regions
    return sentence, contrasts.set_index("control")


def test_a_region_that_decides_is_a_weak_region(quarters: Path) -> None:
    sentence, found = found_in("spot", quarters)
    assert sentence.endswith(f"Verdict: {WEAK}.")
    assert (found["low"] > 0.05).all()
    assert (found["q"] < 0.001).all()


def test_a_network_of_which_every_pixel_counts_alike_has_no_weak_region(quarters: Path) -> None:
    sentence, found = found_in("even", quarters)
    assert sentence.endswith(f"Verdict: {UNCLEAR}.")
    assert (found["difference"].abs() < 0.05).all()


def test_the_middle_of_images_is_no_weak_region_though_it_falls_more_than_shifted_ones(
    quarters: Path,
) -> None:
    """The defect: by the shifted control alone, even another image's class activation was a weak region."""
    sentence, found = found_in("central", quarters)
    assert found["low"][SHIFTED] > 0.5
    assert found["q"][SHIFTED] < 0.001
    assert found["p"][OTHERS] > 0.05
    assert sentence.endswith(f"Verdict: {UNCLEAR}.")


def contrasts(**changes: Any) -> list[Contrast]:
    """Both contrasts of a weak region; changes for both, or for one as (other images, shifted)."""
    usual: dict[str, Any] = {
        "attack": "pgd", "region": "cam", "region_fraction": 0.3, "control_fraction": 0.3, "images": 40,
        "measure": "fooled", "norm": "", "region_value": 0.5, "control_value": 0.45, "region_censored": 0.0,
        "control_censored": 0.0, "difference": 0.05, "low": 0.01, "high": 0.09, "p": 0.01, "q": 0.05,
    }  # fmt: skip
    rows = [
        {"control": control, "draws": draws, **usual}
        | {key: value[place] if isinstance(value, tuple) else value for key, value in changes.items()}
        for place, (control, draws) in enumerate(((OTHERS, 5), (SHIFTED, 1)))
    ]
    return [Contrast(**row) for row in rows]


SIZES = {"measure": "smallest size", "norm": "linf", "difference": np.log2(1.1)}


@pytest.mark.parametrize("changes", [{}, SIZES])
def test_a_weak_region_takes_both_controls(changes: dict[str, Any]) -> None:
    assert verdict(contrasts(**changes)) == WEAK
    strong = {"difference": -changes.get("difference", 0.05), "low": -0.3, "high": -0.01}
    assert verdict(contrasts(**{**changes, **strong})) == STRONG


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    "change",
    [
        {"q": 0.051}, {"low": -0.001}, {"low": np.nan, "high": np.nan}, {"q": np.nan},
        {"difference": -0.05, "low": -0.09, "high": -0.01},
    ],
)  # fmt: skip
def test_what_falls_short_against_one_control_is_no_weak_region(change: dict[str, Any], side: int) -> None:
    usual = contrasts()[0]._asdict()
    both = {
        key: tuple(value if place == side else usual[key] for place in (0, 1))
        for key, value in change.items()
    }
    assert verdict(contrasts(**both)) == UNCLEAR


@pytest.mark.parametrize("side", [0, 1])
def test_a_difference_below_the_floor_is_said_and_is_no_weak_region(side: int) -> None:
    def one_sided(small: float, usual: float) -> tuple[float, ...]:
        return tuple(small if place == side else usual for place in (0, 1))

    points = verdict(contrasts(difference=one_sided(0.049, 0.2)))
    assert points == "weaker than its controls, but not by the 5 points that a verdict needs"
    sizes = SIZES | {"difference": one_sided(np.log2(1.09), 2.0)}
    assert (
        verdict(contrasts(**sizes))
        == "weaker than its controls, but not by the factor of 1.1 that a verdict needs"
    )
    down = {"difference": one_sided(-0.049, -0.2), "low": -0.3, "high": -0.01}
    assert verdict(contrasts(**down)).startswith("stronger than its controls, but not by the 5 points")


def test_too_few_images_or_a_missing_control_allow_no_verdict() -> None:
    assert verdict(contrasts(images=(39, 40))) == "none (at least 40 images are needed, 39 are available)"
    assert verdict(contrasts(images=(1, 40))) == "none (at least 40 images are needed, 1 is available)"
    assert verdict(contrasts(images=(0, 40), q=(np.nan, 0.001))).endswith("0 are available)")
    others, shifted = contrasts()
    assert "no other images' regions" in verdict([shifted])
    assert "no shifted regions" in verdict([others])


def test_a_region_that_is_the_same_in_every_image_is_judged_as_a_place_only() -> None:
    _, shifted = contrasts(region="border:4", difference=0.2, low=0.1)
    message = verdict([shifted])
    assert (
        message
        == "weaker than the same region shifted within the image; this says nothing about image content"
    )
    assert WEAK not in message


def test_the_sentence_says_numbers_intervals_and_images() -> None:
    rows = contrasts(
        difference=(0.05, 0.12),
        control_value=(0.45, 0.38),
        high=(0.09, 0.2),
        q=(0.05, 0.0004),
        images=(40, 44),
    )
    (sentence,) = contrast_sentences(pd.DataFrame(rows))
    assert sentence == (
        "pgd confined to cam (30% of the image) fools 50% of 40 images; confined to 5 other images' regions, 45% (+5.0 "
        "points [+1.0, +9.0], q = .050); confined to the region shifted within the image, on 44 images, 38% (+12.0 "
        "points [+1.0, +20.0], q < .001). Verdict: a weak region."
    )
    (blank,) = contrast_sentences(pd.DataFrame(contrasts(low=np.nan, high=np.nan)))
    assert "[" not in blank
    (untested,) = contrast_sentences(pd.DataFrame(contrasts(low=np.nan, high=np.nan, q=np.nan)))
    assert "45% (+5.0 points); confined to" in untested
    assert "not defined" not in untested


@pytest.mark.parametrize(("images", "power"), [(40, 0.35), (100, 0.7), (200, 0.9)])
def test_ten_points_are_found_and_none_are_not_invented(images: int, power: float) -> None:
    """Most images nearly always hold or fall, wherever they are attacked; the own region adds ten points, or none."""
    rng = np.random.default_rng(images)
    rates = []
    for planted_points in (0.1, 0.0):
        spoken = 0
        for _ in range(200):
            chance = rng.choice([0.05, 0.85], (images, 1))
            others = (rng.random((images, 5)) < chance).astype(float)
            own = (rng.random(images) < chance[:, 0] + planted_points).astype(float)
            enough = abs(own.mean() - others.mean()) >= 0.05
            spoken += enough and region_test(own, others) <= 0.05
        rates.append(spoken / 200)
    assert rates[0] >= power
    assert rates[1] <= 0.085


def pictured(quarters: Path, **changes: Any) -> Run:
    name = "run-" + "-".join(f"{key}{value}" for key, value in changes.items() if key != "maps")
    return audit(planted_plan(quarters, "spot", **{"limit": 18, **changes}), quarters.parent / name)


@pytest.mark.slow
def test_controls_are_independent_of_shards_batches_and_interruptions(quarters: Path) -> None:
    whole, other = pictured(quarters, shard=18), pictured(quarters, shard=6, control_images=2)
    both = [
        run.records.set_index(["image", "region"])[["region_fraction", "success", "linf", "l2"]]
        for run in (whole, other)
    ]
    assert len(both[1]) == 18 * len(other.plan.regions)
    pd.testing.assert_frame_equal(both[0].reindex(both[1].index), both[1], rtol=1e-3)

    def stop(standing: Any) -> None:
        if standing.done >= 8:
            raise KeyboardInterrupt

    folder = quarters.parent / "stopped"
    plan = planted_plan(quarters, "spot", limit=18, shard=4, maps=True)
    with pytest.raises(KeyboardInterrupt):
        audit(plan, folder, watch=stop)
    resumed = resume(folder)
    straight = audit(plan, quarters.parent / "straight")
    same_records(resumed, straight)
    same_maps(resumed, straight)


def donors_of(quarters: Path, run: Run) -> tuple[Donors, Any, Iterator[tuple[int, OpenedImages]]]:
    classifier = load_planned(run.plan.model)
    listing = list_images(run.plan.sources, (), 2, labels="predictions")
    machine = AuditModel(Job.of(run.plan, classifier, listing))

    def make(opened: OpenedImages) -> torch.Tensor:
        labels = predict(classifier, opened.images).argmax(1)
        return cam(classifier, opened.images, labels, fraction=0.25)[0]

    from weakspot.audit.execution.opened_images import open_entries
    from weakspot.audit.plan.image_list import entries

    each = ((n, open_entries(entries(listing, n, 1), classifier)) for n in range(len(listing)))
    return machine.donors, make, each


def test_controls_are_the_regions_of_other_images(quarters: Path) -> None:
    run = audit(planted_plan(quarters, "spot", maps=True, control_images=3), quarters.parent / "run")
    donors, make, each = donors_of(quarters, run)
    own: dict[int, torch.Tensor] = {}
    drawn: dict[int, list[torch.Tensor]] = {}
    for number, opened in each:
        own[number] = make(opened)
        drawn[number] = donors.regions("cam", make, opened.contents[0], own[number], 3)[0]
    changed = (run.maps["adversarial"][:] != run.maps["clean"][:][:, None, None]).any(3)
    regions = list(run.plan.regions)
    for number, masks in drawn.items():
        assert len(masks) == 3
        for place, mask in enumerate(masks):
            seen = changed[number, 0, regions.index(f"other:cam#{place + 1}")]
            assert not (seen & ~mask[0].numpy()).any()
            assert seen.sum() > 0.8 * int(mask.sum())
            assert any(torch.equal(mask, other) for n, other in own.items() if n != number)
    # One in four pictures has its bright quarter in the same place; more would mean that images are their own donors.
    alike = np.mean([torch.equal(mask, own[number]) for number, masks in drawn.items() for mask in masks])
    assert 0.1 < alike < 0.4


def test_copies_unreadable_images_and_other_areas_are_no_donors(quarters: Path) -> None:
    files = sorted(quarters.glob("*.png"))
    few = quarters.parent / "few"
    few.mkdir()
    for number in range(4):
        shutil.copy(files[0], few / f"copy{number}.png")  # the same content
    (few / "broken.png").write_bytes(b"no picture")
    shutil.copy(files[1], few / "other.png")
    run = audit(planted_plan(few, "spot"), quarters.parent / "run")
    records = run.records.set_index(["image", "region"])
    first, second = (("copy0.png", f"other:cam#{number}") for number in (1, 2))
    assert pd.notna(records["success"][first])
    assert pd.isna(records["success"][second])
    assert records["error"][second] == "fewer than 2 other images have a region cam of similar area"
    assert all("none (at least 40 images are needed" in sentence for sentence in summarize(run).regions)
    assert summarize(run).cells[0].errors == 0
    listing = list_images(run.plan.sources, (), 2, labels="predictions")
    donors = Donors(listing, load_planned(run.plan.model), 0)
    own = torch.zeros(1, *SIZE, dtype=torch.bool)
    own[:, :10, :10] = True
    for side, count in ((10, 1), (11, 0), (9, 0)):  # 121 and 81 sites are not within a tenth of 100

        def make(opened: OpenedImages, side: int = side) -> torch.Tensor:
            mask = torch.zeros(1, *SIZE, dtype=torch.bool)
            mask[:, -side:, -side:] = True
            return mask

        assert len(donors.regions(f"side {side}", make, "of another image", own, 1)[0]) == count


@pytest.mark.filterwarnings("ignore:GrabCut found")
def test_backgrounds_are_controlled_by_backgrounds_of_their_area(quarters: Path) -> None:
    plan = planted_plan(quarters, "spot", regions=("background",), limit=12, control_images=1)
    records = audit(plan, quarters.parent / "run").records.set_index(["image", "region"])["region_fraction"]
    own, other = (records.xs(region, level="region") for region in ("background", "other:background#1"))
    known = other[other > 0]
    assert len(known)
    assert ((known - own[known.index]).abs() <= 0.1 * own[known.index] + 1e-9).all()


def test_regions_of_other_images_count_only_as_controls(quarters: Path) -> None:
    attacks = tuple(AttackPlan("pgd", f"linf:{eps}/255", (("steps", 2),)) for eps in (4, 8))
    plan = planted_plan(
        quarters, "spot", limit=10, attacks=attacks, maps=True, analyses=("overlap",), control_images=1
    )
    run = audit(plan, quarters.parent / "run")
    records = run.records
    assert records.loc[records["region"] == "other:cam#1", "success"].notna().all()
    assert records.loc[records["region"] == "other:cam#1", "margin_drop"].isna().all()
    assert records.loc[records["region"] == "cam", "margin_drop"].notna().all()
    summary = summarize(run)
    assert {cell.region for cell in summary.cells} == {"cam", "matched:cam"}
    assert set(distributions(run).summaries["region"]) == {"cam", "matched:cam"}
    assert set(class_distributions(run).cells["region"]) == {"cam", "matched:cam"}
    ends = extremes(run)
    assert set(pd.concat([ends.easiest, ends.hardest])["region"]) <= {"cam", "matched:cam"}
    without = records[records["region"] != "other:cam#1"]
    adversarial = class_distributions(run).adversarial
    assert adversarial["of"].sum() == (without["success"] & without["correct"]).sum()


def test_gray_pictures_of_other_shapes_have_donors(planted: Path) -> None:
    folder = planted / "odd"
    folder.mkdir()
    rng = np.random.default_rng(1)
    for number in range(6):
        Image.fromarray(rng.integers(80, 170, (17, 40), dtype=np.uint8)).save(folder / f"{number}.png")
    run = audit(planted_plan(folder, "even", control_images=2), planted / "run")
    assert run.records["success"].notna().all()
    assert run.info.model
    assert run.info.model.input_size == (SIDE, SIDE)


def test_a_missing_donor_makes_its_image_missing(quarters: Path) -> None:
    """Otherwise an audit resumed without some files would get other controls than one that had them."""
    run = audit(planted_plan(quarters, "spot"), quarters.parent / "run")
    listing = list_images(run.plan.sources, (), 2, labels="predictions")
    own = torch.zeros(1, *SIZE, dtype=torch.bool)
    own[:, :4, :4] = True

    def make(_: OpenedImages) -> torch.Tensor:
        return own

    donors = Donors(listing, load_planned(run.plan.model), 0)
    whole, missing = donors.regions("corner", make, "of another image", own, 2)
    assert len(whole) == 2
    assert not missing
    for path in quarters.glob("*.png"):
        path.unlink()
    found, missing = Donors(listing, load_planned(run.plan.model), 0).regions("corner", make, "x", own, 2)
    assert not found
    assert missing
