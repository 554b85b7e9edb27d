"""`--quick`: a trial with fewer images and steps in every command that attacks, stated in its output."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.cli.conftest import TINY, Run
from tests.dissection.test_units import planted
from weakspot import audit as audits
from weakspot.attacks import find_attack
from weakspot.cli.attack_choice import quick_steps

SAID = "--quick: at most 16 images"


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """An array of 20 images of 64 x 64."""
    values = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "many.npz", images=values, labels=np.arange(20) % 4)
    return tmp_path / "many.npz"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of 20 images."""
    from PIL import Image

    (tmp_path / "many").mkdir()
    rng = np.random.default_rng(0)
    for number in range(20):
        picture = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        picture.save(tmp_path / f"many/{number:02}.png")
    return tmp_path / "many"


def test_attack_takes_fewer_images_and_steps(run: Run, folder: Path, tmp_path: Path) -> None:
    ended = run("attack", folder, *TINY, "--quick", "--seed", 3, "--out", "made")
    assert ended.code == 0, ended.err
    assert "--quick: at most 16 images and 10 steps, which shows that it works, not how well." in ended.out
    names = pd.read_csv(tmp_path / "made/scores.csv")["image"].tolist()
    assert (len(names), names) == (16, sorted(names))
    assert "pgd, steps=10," in json.loads((tmp_path / "made/run.json").read_text())["attack"]
    # The same seed draws the same images, and so does --limit.
    assert run("attack", folder, *TINY, "-a", "fgsm", "--limit", 16, "--seed", 3, "--out", "other").code == 0
    assert pd.read_csv(tmp_path / "other/scores.csv")["image"].tolist() == names
    # An attack without steps is only limited in images.
    ended = run("attack", folder, *TINY, "-a", "fgsm", "--quick", "--out", "one")
    assert f"{SAID}, which shows" in ended.out


def test_attack_without_quick_takes_all_images_and_says_nothing_of_it(run: Run, folder: Path) -> None:
    ended = run("attack", folder, *TINY, "-a", "fgsm", "--out", "made")
    assert "of 20 images" in ended.out
    assert "--quick" not in ended.out


def test_map_takes_fewer_images(run: Run, folder: Path, tmp_path: Path) -> None:
    ended = run("map", folder, *TINY, "--size", "32x32", "--grid", 2, "--quick", "--out", "made")
    assert ended.code == 0, ended.err
    assert f"{SAID}, which shows" in ended.out
    assert len(pd.read_csv(tmp_path / "made/scores.csv")) == 16


def test_audit_takes_fewer_images_and_steps_unless_the_plan_states_less(
    run: Run, many: Path, tmp_path: Path
) -> None:
    plain = ("--analyses", "none", "--no-report")
    ended = run("audit", many, *TINY, *plain, "--attacks", "pgd,fgsm", "--quick", "--out", "made")
    assert ended.code == 0, ended.err
    assert f"{SAID} and at most 10 steps" in ended.out
    plan = audits.open_run("made").plan
    assert (plan.limit, [dict(attack.settings) for attack in plan.attacks]) == (16, [{"steps": 10}, {}])
    (tmp_path / "plan.toml").write_text(
        'images = ["many.npz"]\nlimit = 3\nout = "less"\nanalyses = "none"\n'
        '[model]\nspec = "tiny_networks:build"\nsize = [64, 64]\n'
        '[[attacks]]\nname = "pgd"\nsettings = {steps = 2}\n'
    )
    assert run("audit", "plan.toml", "--quick", "--no-report").code == 0
    plan = audits.open_run("less").plan
    assert (plan.limit, dict(plan.attacks[0].settings)) == (3, {"steps": 2})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('limit = "x"', "limit must be"),
        ("attacks = 5", "attacks must be"),
        ('[[attacks]]\nname = "pgd"\nsettings = 3', "settings must be"),
        ('[[attacks]]\nname = "pgdd"', "did you mean 'pgd'"),
    ],
)
def test_a_wrong_plan_is_refused_as_without_quick(
    run: Run, many: Path, tmp_path: Path, line: str, message: str
) -> None:
    assert many.is_file()
    (tmp_path / "plan.toml").write_text(f'images = ["many.npz"]\nout = "made"\n{line}\n')
    ended = run("audit", "plan.toml", "--quick")
    assert (ended.code, message in ended.err) == (2, True), ended.err


def test_dissect_takes_fewer_images(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weakspot.cli.dissect.QUICK_LABELED", 4)
    dataset = planted(tmp_path / "set")
    network = ("--model", "tiny_networks:build", "--size", "32x32")
    ended = run("dissect", dataset, *network, "--quick", "--images", folder, "--out", "made")
    assert ended.code == 0, ended.err
    assert (
        "--quick: at most 4 labeled images, and of --images at most 16 in 10 steps; this shows" in ended.out
    )
    about = json.loads((tmp_path / "made/run.json").read_text())
    assert about["limit"] == "4"
    assert "10 steps, on 16 images" in about["attack"]


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("attack", "--limit", 3), "--limit"),
        (("attack", "--steps", 3), "--steps"),
        (("attack", "--set", "steps=3"), "--quick and --set steps=N must not both be given"),
        (
            ("attack", "--limit", 3, "--steps", 3),
            "--limit and --steps have no effect with --quick, which sets its own",
        ),
        (("map", "--effort", "verified"), "--effort has no effect with --quick, which uses the estimate"),
        (("defend", "--queries", 3), "--queries has no effect with --quick, which sets its own"),
        (("audit", "--limit", 3, "--out", "made"), "--limit"),
        (("audit", "--set", "pgd.steps=3", "--out", "made"), "--quick and --set ATTACK.steps=N"),
    ],
)
def test_what_quick_sets_must_not_be_given_too(
    run: Run, photographs: Path, arguments: tuple[object, ...], option: str
) -> None:
    command, *others = arguments
    ended = run(command, photographs, *TINY, "--quick", *others)
    assert (ended.code, option in ended.err) == (2, True), ended.err


def test_a_trial_has_no_more_steps_than_the_attack_itself() -> None:
    assert quick_steps(find_attack("pgd")) == 10
    assert quick_steps(find_attack("fgsm")) is None
