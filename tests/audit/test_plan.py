"""Plans: a resolved plan survives a round trip; invalid values are refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.audit.fixtures import networks, pictures, small_plan
from weakspot.audit import AttackPlan, Plan, read_plan

__all__ = ["networks", "pictures"]  # fixtures


def test_a_resolved_plan_survives_json(pictures: Path) -> None:
    plan = small_plan(pictures, labels="folders", limit=3, seed=7, analyses=()).resolved()
    assert Plan.from_mapping(json.loads(json.dumps(plan.as_mapping()))) == plan
    assert plan.resolved() == plan
    of_numpy = small_plan(pictures, labels="folders", limit=np.int64(3), seed=np.uint8(7), analyses=())
    assert json.dumps(of_numpy.resolved().as_mapping()) == json.dumps(plan.as_mapping())


def test_the_cross_product_has_no_repetitions(pictures: Path) -> None:
    plan = Plan.from_mapping(
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


def test_controls_are_cells_but_no_reported_regions(pictures: Path) -> None:
    regions = ("none", "cam", "cam & ~border:2", "border:2")
    plan = small_plan(pictures, regions=regions, controls=True, control_images=2).resolved()
    assert plan.regions == (
        *regions, "matched:cam", "matched:(cam & ~border:2)", "matched:border:2", "other:cam#1", "other:cam#2",
        "other:(cam & ~border:2)#1", "other:(cam & ~border:2)#2",
    )  # fmt: skip
    assert plan.resolved() == plan
    assert plan.reported_regions == plan.regions[:7]
    donated = [plan.specs[text] for text in plan.regions[-3:]]
    assert [(str(spec.control_of), spec.donor) for spec in donated] == [
        ("cam", 2), ("cam & ~border:2", 1), ("cam & ~border:2", 2),
    ]  # fmt: skip


def test_a_plan_prints_as_a_few_lines(pictures: Path) -> None:
    plan = small_plan(pictures, regions=("none", "cam"), controls=True, control_images=2).resolved()
    assert repr(plan).splitlines() == [
        f"Plan(model audited_networks:build, images from {pictures})",
        "  attacks: pgd, few_pixel",
        "  regions: none, cam and 3 controls",
        "  analyses: overlap",
    ]


def test_several_budgets_give_several_attacks_with_their_own_labels(pictures: Path) -> None:
    plan = Plan.from_mapping(
        {"images": str(pictures), "attacks": "pgd,few_pixel", "budget": "linf:2/255,linf:8/255"}
    ).resolved()
    assert [attack.label for attack in plan.attacks] == ["pgd linf:2/255", "pgd linf:8/255", "few_pixel"]
    assert [attack.budget for attack in plan.attacks] == ["linf:2/255", "linf:8/255", None]


def test_a_toml_file_equals_its_mapping(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(
        'images = ["pictures"]\nregions = ["none", "cam"]\nanalyses = "none"\nseed = 3\n'
        '[model]\nspec = "audited_networks:build"\nsize = [24, 24]\n'
        '[[attacks]]\nname = "pgd"\nbudget = "l2:1"\nsettings = {steps = 5}\n'
    )
    plan = Plan.from_mapping(read_plan(tmp_path / "plan.toml")).resolved()
    assert plan.attacks == (AttackPlan("pgd", "l2:1", (("steps", 5),), "pgd"),)
    assert (plan.model.size, plan.analyses, plan.seed, plan.sources) == ((24, 24), (), 3, (str(pictures),))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"images": []}, "images must name at least one file.* got none"),
        ({"atacks": "pgd"}, "key of plan must be one of .* got 'atacks' .did you mean 'attacks'"),
        ({"attacks": "pgdd"}, "got 'pgdd' .did you mean 'pgd'"),
        ({"attacks": ""}, "attacks must name at least one"),
        ({"attacks": 3}, "attacks must be a list of names or tables, got 3"),
        (
            {"attacks": [{"name": "pgd", "settings": {"stepps": 3}}]},
            "setting of attack pgd must be .* got 'stepps' .did you mean 'steps'",
        ),
        ({"attacks": [{"name": "pgd", "settings": 3}]}, r"attacks\[0\].settings must be a table, got 3"),
        ({"attacks": [{"budget": "l2:1"}]}, r"attacks\[0\] must have the key name, got budget"),
        (
            {"attacks": "few_pixel", "budget": "linf:4/255"},
            "budget must be left out, got 'linf:4/255': few_pixel takes none",
        ),
        (
            {"attacks": [{"name": "few_pixel", "budget": "linf:4/255"}]},
            "budget of attack few_pixel must be left out, got linf:4/255",
        ),
        ({"budget": "linf:x"}, "linf:x"),
        ({"analyses": "overlpa"}, "did you mean 'overlap'"),
        ({"labels": "nowhere.csv"}, "labels must be .* CSV file with .*, got '.*nowhere.csv'"),
        ({"limit": 0}, "limit must be an integer of at least 1, got 0"),
        ({"shard": "many"}, "shard must be .* got 'many'"),
        ({"control_images": 0}, "control_images must be .* got 0"),
        ({"controls": "yes"}, "controls must be true or false, got 'yes'"),
        ({"controls": True}, "regions must name one to control"),
        ({"regions": "other:cam#1"}, "regions must name a region of the image itself"),
        (
            {"attacks": "pgd,weak_spots", "regions": "none,cam"},
            "regions must be none for attack weak_spots, which takes no region, got none, cam",
        ),
        ({"fraction": 2}, "fraction must be between 0 and 1, got 2"),
        ({"seed": 1.5}, "seed must be .* got 1.5"),
        ({"model": {"sepc": "x"}}, "key of model must be .* got 'sepc' .did you mean 'spec'"),
        ({"model": 3}, "model must be a table of .* got 3"),
        ({"regions": [1]}, r"regions\[0\] must be a text, got 1"),
    ],
)
def test_invalid_values_are_refused_by_name(pictures: Path, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Plan.from_mapping({"images": str(pictures), **change}).resolved()


WRONG: dict[str, list[str]] = {
    "images": ["3", "true", "[3]", "{a = 1}", "2020-01-01"],
    "out": ["3", "[]", "false", "{}"],
    "model": ["3", "true", "['a']", "[[1]]"],
    "model.spec": ["3", "[]", "{}"],
    "model.weights": ["3", "['a']"],
    "model.mean": ["3", "true", "['a']", "[true]", "{a = 1}"],
    "model.std": ["0.5", "[[0.5]]"],
    "model.size": ["224", "[224]", "[224, 224, 3]", "['a', 'b']", "[2.5, 3]"],
    "model.classes": ["3", "[1, 2]", "{}"],
    "model.device": ["3", "['cpu']", "false"],
    "attacks": ["3", "true", "[3]", "[['pgd']]", "{name = 'pgd'}", "1.5"],
    "attacks[0].name": ["3", "[]", "{}"],
    "attacks[0].budget": ["3", "['linf:1/255']", "true", "0.1"],
    "attacks[0].settings": ["3", "'steps=3'", "['steps']", "{steps = [3]}", "{steps = {a = 1}}"],
    "attacks[0].label": ["3", "[]"],
    "budget": ["3", "0.1", "[0.1]", "{}", "true"],
    "regions": ["3", "[3]", "{}", "[['cam']]"],
    "controls": ["1", "'yes'", "[]", "0.5"],
    "control_images": ["'5'", "2.5", "true", "[5]"],
    "analyses": ["3", "[3]", "{}", "true"],
    "labels": ["3", "['auto']", "{}", "true"],
    "fraction": ["'0.3'", "[0.3]", "true", "{}"],
    "seed": ["'0'", "1.5", "true", "[0]"],
    "limit": ["'10'", "2.5", "true", "[1]"],
    "maps": ["1", "'no'", "[]"],
    "shard": ["'4'", "2.5", "true"],
    "group": ["'4'", "2.5", "[4]"],
    "stated_budgets": ["3", "[3]"],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG.items() for value in values]
)
def test_a_wrong_type_is_one_sentence_with_file_and_key(tmp_path: Path, key: str, value: str) -> None:
    path = tmp_path / "plan.toml"
    if key.startswith("attacks[0]."):
        inner = key.partition(".")[2]
        name = "" if inner == "name" else "name = 'pgd'\n"
        path.write_text(f"images = ['a']\n[[attacks]]\n{name}{inner} = {value}\n")
    elif key.startswith("model."):
        path.write_text(f"images = ['a']\n[model]\n{key.partition('.')[2]} = {value}\n")
    else:
        path.write_text(f"{key} = {value}\n")
    with pytest.raises(ValueError, match=rf"plan\.toml: {re.escape(key)}[^ ]* must (be|have) ") as raised:
        read_plan(path)
    assert "\n" not in str(raised.value)


def test_two_attacks_with_one_label_are_refused(pictures: Path) -> None:
    attacks = [{"name": "pgd", "label": "a"}, {"name": "fgsm", "label": "a"}]
    with pytest.raises(ValueError, match="labels of attacks must differ, got two of 'a'"):
        Plan.from_mapping({"images": str(pictures), "attacks": attacks}).resolved()


def test_an_invalid_toml_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text("images = [")
    with pytest.raises(ValueError, match=r"plan\.toml is not valid TOML"):
        read_plan(tmp_path / "plan.toml")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.toml does not exist"):
        read_plan(tmp_path / "nowhere.toml")
