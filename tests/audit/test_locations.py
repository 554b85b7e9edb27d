"""Whether attacks act where the network looks: said of planted runs, not of shuffled, confined, or small ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from tests.audit.fixtures import Audited, audited, store_records
from tests.audit.planted import draw_quarters, planted, planted_plan
from weakspot.audit import AttackPlan, Plan, Run, audit, open_run, score_findings
from weakspot.audit.findings import outcomes, scores
from weakspot.audit.findings.scores import IMPORTANCE, VULNERABILITY, location_findings, not_tested_because
from weakspot.audit.page.run_page import run_report
from weakspot.audit.page.score_sections import finding_section
from weakspot.audit.store.records import TIMES
from weakspot.audit.store.stored_maps import MapCheck
from weakspot.explanations.agreement import STATISTICS, agreement
from weakspot.statistics import other_image_test, run_test

__all__ = ["audited", "planted"]  # fixtures
LOOKS = "acts more where the network looks"


def looked_plan(planted: Path, count: int = 24, **changes: object) -> Plan:
    """Attacks on the whole image of bright quarters, where the network looks."""
    usual = {"regions": ("none", "cam"), "controls": False, "analyses": ("overlap",), "maps": True}
    source = draw_quarters(planted / f"quarters{count}", count)
    return planted_plan(source, "spot", **{**usual, **changes})


def sentences(run: Run) -> str:
    return " ".join(finding_section(score_findings(run), not_tested_because(run)).sentences)


@pytest.fixture
def looked(planted: Path, audited: Audited) -> Run:
    return audited("looked", looked_plan(planted), planted / "looked")


def shuffled(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The same run, its importance maps given to other images, as if an audit had found them."""
    monkeypatch.setattr(MapCheck, "__call__", lambda *_: None)
    group = zarr.open_group(run.folder / "maps.zarr", mode="r+")
    stored: Any = group[IMPORTANCE]
    values = np.asarray(stored[:])
    stored[:] = values[np.random.default_rng(2).permutation(len(values))]
    return open_run(run.folder)


def test_attacks_where_the_network_looks_are_found(looked: Run) -> None:
    findings = score_findings(looked).set_index(["region", "score"])
    for score in STATISTICS:
        row: Any = findings.loc[("none", score)]
        assert row["p"] <= row["q"] < 0.01
        assert row["excess_low"] > 0
        assert row["against"] == "other images"
        assert row["mean"] == pytest.approx(row["null"] + row["excess"], abs=2e-3)
    assert LOOKS in sentences(looked)
    assert LOOKS in run_report(looked)


def test_attacks_beside_unrelated_maps_are_not(looked: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = shuffled(looked, monkeypatch)
    assert (location_findings(run)["p"] > 0.05).all()
    assert (
        "There is not enough evidence that pgd on the whole image acts more, or less, where the network looks"
        in sentences(run)
    )
    assert LOOKS not in sentences(run)


def test_the_tests_equal_those_on_the_stored_maps(looked: Run) -> None:
    findings = location_findings(looked).set_index("score")
    maps = [torch.from_numpy(looked.maps[name][:, 0, 0])[:, None] for name in (IMPORTANCE, VULNERABILITY)]
    records = looked.records[looked.records["region"] == "none"]
    for score, matrix in agreement(*maps).items():
        row: Any = findings.loc[score]
        whole, single = run_test(matrix), other_image_test(matrix)
        assert (row["compared"], row["value"], row["p"]) == (24, whole.value, whole.p)
        assert row["alone"] == int(((single.q <= 0.1) & (single.value > single.null)).sum())
        own, others = matrix.diagonal(), matrix[~torch.eye(24, dtype=torch.bool)].view(24, 23)
        np.testing.assert_allclose(row["excess"], own - others.mean(1), atol=1e-6)
        assert row["null"] == pytest.approx(float(others.mean()))
        assert whole.value == pytest.approx(records[score].mean(), abs=2e-3)


def test_confined_attacks_are_not_tested(looked: Run) -> None:
    """The defect: an attack confined to the class activation "has its effect in the region of importance"."""
    findings = score_findings(looked)
    confined = findings[findings["region"] == "cam"].set_index("score")
    assert confined["mean"]["effect_in_roi"] > 0.5
    assert confined[["null", "excess", "p", "q", "shifted"]].isna().all(axis=None)
    assert "confined to cam" not in sentences(looked)
    assert set(findings.loc[findings["p"].notna(), "region"]) == {"none"}


def test_a_score_with_its_own_null_is_tested_on_the_whole_image_only(looked: Run) -> None:
    records = looked.records
    rng = np.random.default_rng(0)
    records["planted"] = rng.normal(1, 0.2, len(records))
    records["planted_null"] = 0.5
    store_records(looked.folder, records)
    findings = score_findings(open_run(looked.folder))
    selected = findings[findings["score"] == "planted"].set_index("region")
    assert selected["q"]["none"] < 0.001
    assert selected["against"]["none"] == "its null"
    assert np.isnan(selected["q"]["cam"])
    assert "The mean planted of pgd on the whole image is" in sentences(open_run(looked.folder))


def test_records_do_not_depend_on_the_other_images_of_their_shard(planted: Path) -> None:
    whole, parts = (audit(looked_plan(planted, 8, shard=shard), planted / f"by{shard}") for shard in (8, 3))
    assert {f"{score}_shift_p" for score in STATISTICS} <= set(whole.records)
    names = list(map(str, whole.records))
    assert not [name for name in names if name.removesuffix("_shift_null").endswith(("_null", "_q"))]
    assert not [name for name in names if name.removesuffix("_shift_p").endswith("_p")]
    one, other = (
        run.records.drop(columns=list(TIMES)).select_dtypes("number").to_numpy(float)
        for run in (whole, parts)
    )
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"count": 9}, "needs 10 images"),
        ({"regions": ("cam",)}, "needs the region none"),
        ({"maps": False}, "(--analyses overlap, --maps)"),
        ({"analyses": ()}, "(--analyses overlap, --maps)"),
    ],
)
def test_a_missing_test_names_what_it_needs(planted: Path, changes: dict[str, object], why: str) -> None:
    run = audit(looked_plan(planted, **{"count": 12, **changes}), planted / "run")  # type: ignore[arg-type]
    assert score_findings(run)["p"].isna().all()
    assert why in sentences(run)
    assert LOOKS not in sentences(run)


def test_many_images_are_sampled_evenly_and_large_maps_averaged(
    looked: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcomes, "MAX_IMAGES", 12)
    monkeypatch.setattr(scores, "MAX_SIDE", 8)
    findings = location_findings(open_run(looked.folder))
    assert (findings["compared"] == 12).all()
    assert (findings["p"] < 0.05).all()


def test_each_attack_has_a_test_of_its_own(planted: Path) -> None:
    attacks = tuple(AttackPlan("pgd", f"linf:{eps}/255", (("steps", 2),)) for eps in (4, 8))
    run = audit(looked_plan(planted, 12, attacks=attacks, regions=("cam", "none")), planted / "run")
    findings = location_findings(run)
    assert len(findings) == 2 * len(STATISTICS)
    first, second = (
        findings[findings["attack"] == attack.label]["value"].tolist() for attack in run.plan.attacks
    )
    assert first != second
