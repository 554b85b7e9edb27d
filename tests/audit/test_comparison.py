"""Comparison: paired by what images hold, silent where nothing moved, exact where something did."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.audit.fixtures import (
    TINY,
    Audited,
    audited,
    draw_pictures,
    networks,
    pictures,
    small_plan,
    store_records,
)
from weakspot.audit import AttackPlan, Comparison, Run, audit, compare, open_run
from weakspot.audit.findings.comparison import matched_attacks
from weakspot.audit.store.records import RECORDS
from weakspot.cli.compare import _print
from weakspot.statistics import false_discovery, mean_interval, mean_test, paired_proportion_interval

__all__ = ["audited", "networks", "pictures"]  # fixtures
OTHER = replace(TINY, spec="audited_networks:other")


@pytest.fixture
def before(pictures: Path, audited: Audited) -> Run:
    return audited("before", small_plan(pictures, maps=False), pictures.parent / "before")


def test_a_run_repeated_has_not_moved(before: Run, pictures: Path) -> None:
    again = audit(small_plan(pictures, maps=False), pictures.parent / "again")
    comparison = compare(before, again)
    assert comparison.moved.empty
    assert (comparison.table["difference"].dropna() == 0).all()
    assert comparison.images == 14
    assert "both runs use the same weights" in comparison.remarks
    assert comparison.sentence() == (
        "No change of robust accuracy beyond chance was found for any of 4 attacks x regions, on 14 images that both "
        "runs contain."
    )


@pytest.mark.parametrize("images", [4, 6])
def test_a_change_that_so_few_images_cannot_show_is_not_denied(images: int) -> None:
    row = {
        "score": "robust_accuracy",
        "attack": "pgd",
        "region": "cam",
        "images": images,
        "q": 2 * 0.5**images,
    }
    table = pd.DataFrame([row | {"before": 1.0, "after": 0.0, "difference": -1.0, "low": -1.0, "high": -0.4}])
    sentence = Comparison(table.assign(p=table["q"]), images, (), ()).sentence()
    if images == 6:
        assert sentence == (
            "Robust accuracy has moved: pgd confined to cam from 100% to 0% (-100.0 points [-100.0, -40.0])."
        )
    else:
        assert "even a change of all would be within chance" in sentence


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ((14,), "for the attack and region, on 14 images that both runs contain."),
        ((14, 14), "for any of 2 attacks x regions, on 14 images that both runs contain."),
        # Nothing is known of the third, and little of the second.
        (
            (14, 9, 0),
            "for any of 2 attacks x regions, on 9 to 14 of 14 images that both runs contain, where both outcomes are "  # noqa: ISC004
            "known.",
        ),
        (
            (3, 0),
            "for the attack and region, on 3 of 14 images that both runs contain, where both outcomes are known (of 3 "  # noqa: ISC004
            "images, even a change of all would be within chance).",
        ),
    ],
)
def test_only_what_was_tested_is_said_not_to_have_moved(images: tuple[int, ...], words: str) -> None:
    row = {"score": "robust_accuracy", "attack": "pgd", "region": "cam", "q": 1.0, "p": 1.0}
    row |= {"before": 0.5, "after": 0.5, "difference": 0.0, "low": -0.1, "high": 0.1}
    table = pd.DataFrame([row | {"images": count} for count in images])
    assert Comparison(table, 14, (), ()).sentence() == (
        f"No change of robust accuracy beyond chance was found {words}"
    )


@pytest.mark.parametrize(
    ("q", "words"),
    [
        (
            (0.001, 0.9),
            "1 change of a score is significant (q below .05), but without a 95% interval that excludes",
        ),
        ((0.001, 0.002), "2 changes of a score are significant (q below .05), but without a 95% interval"),
        ((0.05, 0.9), "No change of a score is significant (q below .05)."),
    ],
)
def test_a_change_without_an_interval_is_not_denied(
    q: tuple[float, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fourteen margins that fall alike: a small p value, and no interval of the mean."""
    row = {"score": "margin", "attack": "pgd", "region": "cam", "images": 14, "before": 3.0, "after": 0.0}
    row |= {"difference": -3.0, "low": np.nan, "high": np.nan}
    table = pd.DataFrame([row | {"p": one, "q": one} for one in q])
    _print(Comparison(table, 14, (), ()), every=False)
    assert words in capsys.readouterr().out


def test_rows_are_paired_differences_of_the_records(before: Run, pictures: Path) -> None:
    after = audit(small_plan(pictures, model=OTHER, maps=False), pictures.parent / "after")
    comparison = compare(before, after)
    sides = [run.records.set_index(["attack", "region", "index"]).sort_index() for run in (before, after)]
    for row in comparison.table.to_dict("records"):
        if row["score"] == "clean_accuracy":
            values = [side["correct"].groupby("index").first() for side in sides]
        elif row["score"] == "robust_accuracy":
            values = [
                1 - side.loc[(row["attack"], row["region"])]["success_8bit"].astype(float) for side in sides
            ]
        else:
            values = [side.loc[(row["attack"], row["region"])][row["score"]] for side in sides]
        one, other = (side.astype(float).to_numpy() for side in values)
        known = np.isfinite(one) & np.isfinite(other)
        assert row["images"] == known.sum()
        if known.any():
            np.testing.assert_allclose(row["before"], one[known].mean())
            np.testing.assert_allclose(row["difference"], (other - one)[known].mean(), atol=1e-12)
            np.testing.assert_equal(row["p"], mean_test((other - one)[known]))
            paired = all(np.isin(side[known], (0, 1)).all() for side in (one, other))
            exact = (
                paired_proportion_interval((other - one)[known] == 1, (other - one)[known] == -1)
                if paired
                else mean_interval((other - one)[known])
            )
            np.testing.assert_allclose([row["low"], row["high"]], exact[1:])
    tested = comparison.table.dropna(subset=["p"])
    np.testing.assert_allclose(tested["q"], false_discovery(tested["p"].to_numpy()))


def test_images_are_matched_by_content(before: Run, pictures: Path) -> None:
    moved = pictures.parent / "elsewhere"
    for number, path in enumerate(sorted(pictures.rglob("*.png"), reverse=True)):
        target = moved / path.parent.name / f"renamed{number:02d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    first = min(moved.rglob("*.png"))
    shutil.copy(first, first.with_name("twice.png"))  # one more than before
    after = audit(small_plan(moved, maps=False, analyses=()), moved.parent / "after")
    comparison = compare(before, after)
    table = comparison.table[comparison.table["score"] == "margin_adversarial"]
    assert set(table["images"]) == {14}
    assert np.abs(table["difference"]).max() < 1e-3  # each image's random start is its content's


def test_a_planted_change_is_found_and_reported(before: Run) -> None:
    planted = before.folder.parent / "planted"
    shutil.copytree(before.folder, planted)
    records = pd.read_parquet(planted / RECORDS)
    weaker = (records["attack"] == "pgd") & (records["region"] == "cam")
    records.loc[weaker, "success_8bit"] = True
    store_records(planted, records)
    comparison = compare(before, open_run(planted))
    moved = comparison.table[comparison.table["difference"] != 0].dropna()
    assert list(zip(moved["score"], moved["attack"], moved["region"], strict=True)) == [
        ("robust_accuracy", "pgd", "cam")
    ]
    records.loc[weaker, "margin_adversarial"] -= 3.0
    store_records(planted, records)
    comparison = compare(before, open_run(planted))
    (margin,) = rows_of(comparison, "margin_adversarial", "pgd", "cam")
    assert margin["difference"] == pytest.approx(-3)
    assert np.isnan(
        margin["low"]
    )  # 14 images have no interval of a mean, so that nothing is said to have moved
    assert "margin_adversarial" not in set(comparison.moved["score"])


def test_a_change_of_every_image_has_an_interval(before: Run) -> None:
    """Where all images change alike a bootstrap knows no spread; of proportions the interval is known."""
    sides = []
    for fell in (True, False):
        folder = before.folder.parent / f"fell{fell}"
        shutil.copytree(before.folder, folder)
        records = pd.read_parquet(folder / RECORDS)
        records["success_8bit"] = fell
        store_records(folder, records)
        sides.append(open_run(folder))
    comparison = compare(*sides)
    for row in rows_of(comparison, "robust_accuracy"):
        assert (row["difference"], row["high"]) == (1, 1)
        assert 0.6 < row["low"] < 1
        assert row["p"] == 2 * 0.5**14
    assert "Robust accuracy has moved" in comparison.sentence()


def rows_of(comparison: Comparison, score: str, attack: str = "", region: str = "") -> list[dict[str, Any]]:
    table = comparison.table[comparison.table["score"] == score]
    rows = [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]
    return [row for row in rows if row["attack"].startswith(attack) and row["region"].startswith(region)]


def test_labels_that_changed_are_counted(before: Run) -> None:
    """Three of the same images carry another label in the second run."""
    relabeled = before.folder.parent / "relabeled"
    shutil.copytree(before.folder, relabeled)
    records = pd.read_parquet(relabeled / RECORDS)
    records.loc[records["index"] < 3, "label"] = 3  # owl, which no folder is called
    store_records(relabeled, records)
    assert "labels differ on 3 of these images" in compare(before, open_run(relabeled)).remarks
    assert not [remark for remark in compare(before, before).remarks if "labels differ" in remark]


def test_what_only_one_run_has_is_named_and_left_out(before: Run, pictures: Path) -> None:
    plan = small_plan(
        pictures, attacks=(AttackPlan("pgd", settings=(("steps", 3),)), AttackPlan("fgsm")), regions=("none", "border"),
        analyses=(), maps=False, seed=1,
    )  # fmt: skip
    comparison = compare(before, audit(plan, pictures.parent / "after"))
    assert set(comparison.table["attack"]) == {"", "pgd"}
    assert set(comparison.table["region"]) == {"", "none"}
    text = " ".join(comparison.only)
    for word in (
        "attack few_pixel only in",
        "region cam only in",
        "attack fgsm only in",
        "region border only in",
    ):
        assert word in text
    assert "seed differs: 0 before, 1 after" in comparison.remarks


def test_runs_without_a_common_image_are_refused(before: Run, networks: Path) -> None:
    rng = np.random.default_rng(7)
    other = draw_pictures(networks / "others", 3)
    for path in other.rglob("*.png"):
        from PIL import Image

        Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(path)
    after = audit(small_plan(other, maps=False, analyses=()), networks / "after")
    with pytest.raises(ValueError, match=r"have no image in common: no content is in both$"):
        compare(before, after)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        open_run(networks)


def test_runs_of_different_attacks_compare_clean_accuracy(before: Run, pictures: Path) -> None:
    after = audit(
        small_plan(pictures, attacks=(AttackPlan("fgsm"),), analyses=(), maps=False),
        pictures.parent / "after",
    )
    comparison = compare(before, after)
    assert list(comparison.table["score"]) == ["clean_accuracy"]
    assert (
        comparison.sentence()
        == "The runs have no attack and region in common: robust accuracy cannot be compared."
    )
    scores: Any = comparison.as_mapping()["scores"]
    assert scores[0]["difference"] == 0


def test_attacks_of_one_name_are_told_apart_by_budget_and_settings(before: Run, pictures: Path) -> None:
    attack = replace(before.plan.attacks[0], budget="linf:2/255", settings=(("restarts", 2),))
    plan = small_plan(pictures, attacks=(attack,), analyses=(), maps=False)
    after = audit(plan, pictures.parent / "weaker")
    only = compare(before, after).only
    own = before.plan.attacks[0]
    assert own.settings == (("steps", 3),)
    assert f"attack pgd at {own.budget} with steps=3 and the default restarts only in {before.name}" in only
    assert f"attack pgd at linf:2/255 with restarts=2 and the default steps only in {after.name}" in only


def test_a_default_that_is_written_out_is_the_same_setting(before: Run, pictures: Path) -> None:
    attack = replace(before.plan.attacks[0], label="", settings=(("restarts", 1), ("steps", 3)))
    plan = small_plan(pictures, attacks=(attack,), analyses=(), maps=False)
    comparison = compare(before, audit(plan, pictures.parent / "written out"))
    assert not any("attack pgd" in text for text in comparison.only)
    assert set(comparison.table["attack"]) == {"", "pgd"}


def test_attacks_written_alike_are_matched_first_and_each_one_once() -> None:
    plain = AttackPlan("pgd", "linf:4/255", label="plain")
    written = AttackPlan("pgd", "linf:4/255", (("restarts", 1),), label="written out")
    fgsm = AttackPlan("fgsm", "linf:4/255", label="fgsm")

    def matched(first: tuple[AttackPlan, ...], second: tuple[AttackPlan, ...]) -> list[tuple[str, str]]:
        plans = (replace(small_plan("pictures"), attacks=attacks) for attacks in (first, second))
        return [(one.label, other.label) for one, other in matched_attacks(*plans)]

    assert matched((plain, written), (written, plain)) == [("plain", "plain"), ("written out", "written out")]
    assert matched((written, plain), (plain, fgsm)) == [("plain", "plain")]
    assert matched((fgsm, written), (plain,)) == [("written out", "plain")]


def test_a_run_without_records_is_refused(before: Run, pictures: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    out = pictures.parent / "begun"
    with pytest.raises(KeyboardInterrupt):
        audit(small_plan(pictures, maps=False), out, watch=stop)
    assert not (out / "records.parquet").exists()
    assert not list(out.glob("shards/*.parquet"))
    for pair in ((before, open_run(out)), (open_run(out), before)):
        with pytest.raises(ValueError, match=r"begun has no finished shard yet; continue it with"):
            compare(*pair)
