"""Plans: what is said in full comes back, what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.audit.fixtures import networks, pictures, small_plan
from weakspot.audit import AttackPlan, read_mapping, read_plan
from weakspot.audit.plan.plan import other_region

__all__ = ["networks", "pictures"]  # fixtures


def test_a_resolved_plan_comes_back_from_json_as_it_was(pictures: Path) -> None:
    plan = small_plan(pictures, labels="folders", limit=3, seed=7, analyses=()).resolved()
    assert read_mapping(json.loads(json.dumps(plan.as_mapping()))) == plan
    assert plan.resolved() == plan


def test_the_cross_product_holds_nothing_twice(pictures: Path) -> None:
    plan = read_mapping(
        {
            "images": [str(pictures), str(pictures)],
            "attacks": "pgd, fgsm,pgd",
            "regions": "none,cam , none",
            "analyses": "ssim,overlap,ssim",
        }
    ).resolved()
    assert [(attack.label, region) for attack, region in plan.cells] == [
        ("pgd", "none"), ("pgd", "cam"), ("fgsm", "none"), ("fgsm", "cam"),
    ]  # fmt: skip
    assert plan.sources == (str(pictures),)
    assert plan.analyses == ("ssim", "overlap")


def test_controls_are_cells_of_their_own_and_not_reported_as_regions(pictures: Path) -> None:
    regions = ("none", "cam", "cam & ~border:2", "border:2")
    plan = small_plan(pictures, regions=regions, controls=True, control_images=2).resolved()
    assert plan.regions == (
        *regions, "matched:cam", "matched:(cam & ~border:2)", "matched:border:2", "other:cam#1", "other:cam#2",
        "other:(cam & ~border:2)#1", "other:(cam & ~border:2)#2",
    )  # fmt: skip
    assert plan.resolved() == plan
    assert plan.reported_regions == plan.regions[:7]
    assert [other_region(text) for text in plan.regions[-3:]] == [
        ("cam", 2), ("cam & ~border:2", 1), ("cam & ~border:2", 2),
    ]  # fmt: skip


def test_several_budgets_make_several_attacks_with_labels_of_their_own(pictures: Path) -> None:
    plan = read_mapping(
        {"images": str(pictures), "attacks": "pgd,few_pixel", "budget": "linf:2/255,linf:8/255"}
    ).resolved()
    assert [attack.label for attack in plan.attacks] == ["pgd linf:2/255", "pgd linf:8/255", "pixels"]
    assert [attack.budget for attack in plan.attacks] == ["linf:2/255", "linf:8/255", None]


def test_a_toml_file_says_the_same_as_a_mapping(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(
        'images = ["pictures"]\nregions = ["none", "cam"]\nanalyses = "none"\nseed = 3\n'
        '[model]\nspec = "audited_networks:build"\nsize = [24, 24]\n'
        '[[attacks]]\nname = "pgd"\nbudget = "l2:1"\nsettings = {steps = 5}\n'
    )
    plan = read_mapping(read_plan(tmp_path / "plan.toml"), tmp_path).resolved()
    assert plan.attacks == (AttackPlan("pgd", "l2:1", (("steps", 5),), "pgd"),)
    assert (plan.model.size, plan.analyses, plan.seed, plan.sources) == ((24, 24), (), 3, (str(pictures),))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"images": []}, "images names nothing"),
        ({"atacks": "pgd"}, "key of plan must .* got 'atacks' .did you mean 'attacks'"),
        ({"attacks": "pgdd"}, "attack must .* got 'pgdd' .did you mean 'pgd'"),
        ({"attacks": ""}, "attacks is empty"),
        (
            {"attacks": [{"name": "pgd", "settings": {"stepps": 3}}]},
            "setting of pgd must .*'stepps'.*did you mean 'steps'",
        ),
        ({"attacks": [{"budget": "l2:1"}]}, "lacks name"),
        ({"attacks": "pixels", "budget": "linf:4/255"}, "pixels takes none"),
        ({"attacks": [{"name": "pixels", "budget": "linf:4/255"}]}, "takes none"),
        ({"budget": "linf:x"}, "budget is 'linf:x'"),
        ({"analyses": "overlpa"}, "did you mean 'overlap'"),
        ({"labels": "nowhere.csv"}, "labels is .*nowhere.csv"),
        ({"limit": 0}, "limit must be a whole number of at least 1, got 0"),
        ({"shard": "many"}, "shard must be .* got 'many'"),
        ({"control_images": 0}, "control_images must be .* got 0"),
        ({"fraction": 2}, "fraction must .* got 2"),
        ({"seed": 1.5}, "seed must .* got 1.5"),
        ({"model": {"sepc": "x"}}, "key of model must .* got 'sepc' .did you mean 'spec'"),
        ({"model": 3}, "model is 3"),
        ({"regions": [1]}, "regions is"),
    ],
)
def test_what_does_not_fit_is_named(pictures: Path, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_mapping({"images": str(pictures), **change}).resolved()


def test_two_attacks_of_one_label_are_refused(pictures: Path) -> None:
    attacks = [{"name": "pgd", "label": "a"}, {"name": "fgsm", "label": "a"}]
    with pytest.raises(ValueError, match="two of label 'a'"):
        read_mapping({"images": str(pictures), "attacks": attacks}).resolved()


def test_no_toml_is_said_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text("images = [")
    with pytest.raises(ValueError, match=r"plan\.toml is no TOML"):
        read_plan(tmp_path / "plan.toml")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.toml"):
        read_plan(tmp_path / "nowhere.toml")
