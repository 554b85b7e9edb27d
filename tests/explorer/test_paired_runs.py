"""Two runs side by side: the records of both, what changed, and nothing that only one of them has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.audit.fixtures import TINY, Audited, audited, draw_pictures, networks, pictures, small_plan
from weakspot.audit import AttackPlan, ModelPlan, Run, compare
from weakspot.explorer.gallery import Gallery

__all__ = ["audited", "networks", "pictures"]  # fixtures
OTHER = ModelPlan("audited_networks:other", size=(24, 24), classes=TINY.classes)


@pytest.fixture
def before(audited: Audited, pictures: Path) -> Run:
    return audited("before", small_plan(pictures), pictures.parent / "before")


@pytest.fixture
def after(audited: Audited, pictures: Path) -> Run:
    return audited("after", small_plan(pictures, model=OTHER), pictures.parent / "after")


def whole(gallery: Gallery, name: str, **body: Any) -> Any:
    reply = gallery.answer(name, body)
    while "working" in reply:
        reply = gallery.answer(name, body)
    return reply


def test_changes_equal_the_pairs_matched_by_hand(before: Run, after: Run) -> None:
    gallery = Gallery(before, after)
    rows: Any = gallery.answer("records", {"size": 200})["records"]
    keys = ["content", "attack", "region"]
    left, right = (
        run.sql("select * from outcomes").df().set_index(keys)["robust"] for run in (before, after)
    )
    assert len(rows) == len(left) == 56
    names = {
        (True, True): "withstood in both",
        (True, False): "newly fooled",
        (False, True): "no longer fooled",
        (False, False): "fooled in both",
    }
    stored = (
        before.sql("select index, content, attack, region from records").df().set_index(["index", *keys[1:]])
    )
    for row in rows:
        content = stored["content"][row["index"], row["attack"], row["region"]]
        key = (content, row["attack"], row["region"])
        assert row["change"] == names[bool(left[key]), bool(right[key])]


def test_the_comparison_is_that_of_the_audit(before: Run, after: Run) -> None:
    reply = whole(Gallery(before, after), "compare")
    expected = compare(before, after)
    assert reply["verdict"] == expected.sentence()
    assert reply["images"] == 14
    assert [row["score"] for row in reply["moved"]] == expected.moved["score"].tolist()
    counted = sum(row["n"] for row in reply["changes"])
    assert counted == 56


def test_a_run_beside_itself_has_not_changed(before: Run) -> None:
    gallery = Gallery(before, before)
    rows: Any = gallery.answer("histogram", {"column": "change"})["values"]
    assert {row["value"] for row in rows} <= {"withstood in both", "fooled in both"}
    reply = whole(gallery, "compare")
    assert reply["moved"] == []
    assert "No change of robust accuracy beyond chance" in reply["verdict"]


def test_attacks_are_matched_by_what_they_do_and_pictures_by_their_own_run(
    audited: Audited, pictures: Path, before: Run
) -> None:
    # The second run has its attacks in another order, one of them with other settings, and another region.
    attacks = (
        AttackPlan("few_pixel", settings=(("generations", 3), ("population", 6))),
        AttackPlan("pgd", settings=(("steps", 5),)),
    )
    turned = small_plan(pictures, model=OTHER, attacks=attacks, regions=("cam", "none"))
    after = audited("turned", turned, pictures.parent / "turned")
    gallery = Gallery(before, after)
    rows: Any = gallery.answer("records", {"size": 200})["records"]
    assert {row["attack"] for row in rows} == {"few_pixel"}
    row = next(row for row in rows if row["region"] == "cam")
    shown: Any = gallery.answer("thumbnails", {"ids": [row["id"]], "picture": "adversarial_after"})
    own = Gallery(after)
    number = row["index"] * 4 + 0  # its first attack in its first region
    alone: Any = own.answer("thumbnails", {"ids": [number], "picture": "adversarial"})
    assert shown["pictures"][str(row["id"])] == alone["pictures"][str(number)]


def test_minimal_attacks_without_an_equal_budget_have_no_change(audited: Audited, pictures: Path) -> None:
    fmn = AttackPlan("fmn", settings=(("steps", 5),))
    runs = [
        audited(
            name,
            small_plan(
                pictures, attacks=(fmn,), regions=("none",), stated_budgets=budgets, analyses=(), maps=False
            ),
            pictures.parent / name,
        )
        for name, budgets in (("stated", ("linf:4/255",)), ("unstated", ()))
    ]
    rows: Any = Gallery(*runs).answer("histogram", {"column": "change"})["values"]
    assert [row["value"] for row in rows] == [None]


def test_runs_without_a_common_image_are_refused(audited: Audited, pictures: Path, before: Run) -> None:
    from PIL import Image

    others = draw_pictures(pictures.parent / "others", 4)
    for path in others.rglob("*.png"):
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    after = audited("others", small_plan(others, maps=False), pictures.parent / "second")
    with pytest.raises(ValueError, match="have no image, attack and region in common"):
        Gallery(before, after)
