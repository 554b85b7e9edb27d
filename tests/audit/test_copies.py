"""Copies of one image are no independent observations: every finding counts each image once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.audit.fixtures import draw_pictures, networks, small_plan, store_records
from weakspot.audit import AttackPlan, Run, audit, open_run
from weakspot.audit.findings.comparison import compare
from weakspot.audit.findings.contrasts import contrast_sentences, region_contrasts
from weakspot.audit.findings.outcomes import cell_summaries
from weakspot.audit.findings.summary import summarize
from weakspot.audit.page.run_page import run_report
from weakspot.images import first_copies

__all__ = ["networks"]  # a fixture
CONTROLS = ("cam", *(f"other:cam#{number}" for number in range(1, 6)))


@pytest.fixture
def runs(networks: Path) -> tuple[Run, Run]:
    """The same audit of six pictures, and of these with 40 copies of the first."""
    plain, doubled = (draw_pictures(networks / name, 6) for name in ("plain", "doubled"))
    first = min(doubled.rglob("*.png"))
    for number in range(40):
        first.with_name(f"{first.stem} copy {number:02}.png").write_bytes(first.read_bytes())
    plans = (
        small_plan(
            pictures,
            regions=CONTROLS,
            attacks=(AttackPlan("fgsm"),),
            maps=False,
            analyses=(),
            shard=46,
            group=46,
        )
        for pictures in (plain, doubled)
    )
    one, other = (audit(plan, networks / f"run{number}") for number, plan in enumerate(plans))
    return one, other


def test_every_finding_counts_each_image_once(runs: tuple[Run, Run]) -> None:
    plain, doubled = runs
    assert len(doubled.records) == 46 / 6 * len(plain.records)  # all images are attacked and recorded
    for one, other in zip(cell_summaries(plain), cell_summaries(doubled), strict=True):
        known = [(each.images, each.robust_accuracy, each.low, each.high) for each in (one, other)]
        assert known[0] == known[1]
    assert summarize(doubled).images == 6
    contrasts = region_contrasts(doubled)
    assert contrasts["images"].max() <= 6
    assert contrasts["draws"].max() <= 5
    assert compare(plain, doubled).images == compare(doubled, plain).images == 6
    remark = "40 images are copies of another; all findings count each image once."
    assert (summarize(plain).remarks, summarize(doubled).remarks) == ((), (remark,))
    assert (plain.copies, doubled.copies) == (0, 40)
    assert remark in run_report(doubled)


def test_controls_of_an_image_are_regions_of_distinct_images(networks: Path) -> None:
    """Of two images, one of which has many copies, each has a single other image."""
    pictures = draw_pictures(networks / "pictures", 2)
    first = min(pictures.rglob("*.png"))
    for number in range(8):
        first.with_name(f"copy {number}.png").write_bytes(first.read_bytes())
    plan = small_plan(pictures, regions=CONTROLS, attacks=(AttackPlan("fgsm"),), maps=False, analyses=())
    contrasts = region_contrasts(audit(plan, networks / "run"))
    assert contrasts["draws"].max() <= 1
    assert not any("5 other images" in sentence for sentence in contrast_sentences(contrasts))


def test_first_copies_numbers_equal_images_alike() -> None:
    images = torch.rand(3, 3, 4, 4)
    numbers = first_copies(torch.cat([images, images[1:2]]), images[[2, 0]])
    np.testing.assert_array_equal(numbers, [0, 1, 2, 1, 2, 0])


def test_images_of_unknown_content_are_no_copies(runs: tuple[Run, Run]) -> None:
    plain = runs[0]
    records = plain.records.assign(content=None)
    store_records(plain.folder, records.astype({"content": "string"}))
    again = open_run(plain.folder)
    assert again.copies == 0
    assert summarize(again).images == 6


def test_a_picture_under_two_labels_keeps_both(networks: Path) -> None:
    pictures = draw_pictures(networks / "pictures", 4)
    for path in sorted(pictures.rglob("*.png")):
        for name in ("cat", "dog"):
            target = networks / "both" / name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    plan = small_plan(
        networks / "both", labels="folders", attacks=(AttackPlan("fgsm"),), maps=False, analyses=()
    )
    run = audit(plan, networks / "run")
    summary = summarize(run)
    assert (summary.images, run.copies) == (8, 0)
    assert summary.clean_accuracy <= 0.5  # no picture is of both classes
    assert compare(run, run).images == 8
