"""`weakspot attack`: what it writes, what it prints, what it refuses."""

from __future__ import annotations

import json
import re
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tests.cli.conftest import NAMES, TINY, Run, save
from weakspot import SSIM, AttackResult, ImageWarning, Linf, attacks, load, read_images, regions
from weakspot._checks import NotFiniteError
from weakspot.attacks import registry
from weakspot.attacks.registry import ORDER, available_attacks, find_attack
from weakspot.cli import attack_choice
from weakspot.cli.app import Failure
from weakspot.cli.attack_choice import Aim, ChosenAttack, find_budget, read_settings
from weakspot.regions.spec import REGIONS


def test_pairs_images_and_scores_are_written_and_agree(run: Run, photographs: Path, tmp_path: Path) -> None:
    ended = run(
        "attack", photographs, *TINY, "--attack", "pgd", "--budget", "ssim:0.01", "--region", "background",
        "--set", "steps=4", "--set", "momentum=0.5", "--seed", 3, "--out", "made",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert f"Written to {tmp_path / 'made'}" in ended.out
    folder = tmp_path / "made"
    assert sorted(path.name for path in folder.iterdir()) == [
        "adversarial", "clean", "overview.png", "pairs.safetensors", "run.json", "scores.csv",
    ]  # fmt: skip
    result = AttackResult.load(folder / "pairs.safetensors")
    clean, names = read_images(photographs, size=(64, 64))
    assert names == NAMES
    torch.testing.assert_close(result.clean, clean)
    scores = pd.read_csv(folder / "scores.csv")
    assert scores["image"].tolist() == NAMES
    assert scores["n_forward"].tolist() == result.n_forward.tolist()
    assert scores["success"].tolist() == result.success.tolist()
    assert scores["n_backward"].tolist() == [4] * 4
    assert scores["seed"].tolist() == [3] * 4
    written, _ = read_images(folder / "adversarial")
    files, fits = attacks.stored(result.adversarial, result.clean, SSIM(0.01))
    assert torch.equal(written, files)  # within the budget, which nearest levels would overspend
    assert bool(fits.all())
    assert not torch.equal(written, (result.adversarial * 255).round() / 255)
    before, _ = read_images(folder / "clean")
    assert torch.equal(before, (clean * 255).round() / 255)
    # The same in Python.
    model = load("tiny_networks:build", input_size=(64, 64))
    with torch.no_grad():
        labels = model(clean).argmax(1)
        adversarial_class = model(written).argmax(1)
    with pytest.warns(ImageWarning, match="GrabCut found"):
        region = regions.background(clean, model=model, classes=labels)
    expected = attacks.pgd(
        model, clean, labels, budget=SSIM(0.01), region=region, steps=4, momentum=0.5, seed=3
    )
    torch.testing.assert_close(result.adversarial, expected.adversarial, atol=1e-5, rtol=0)
    spent = SSIM(0.01).distance(result.perturbation, clean)
    assert bool((spent <= 0.01).all())
    assert scores["ssim_budget_spent"].tolist() == pytest.approx(spent.tolist(), rel=1e-5)
    assert (scores["ssim_windowed_min"] <= scores["ssim_windowed"]).all()
    assert not {"ssim", "ssim_local_budget_spent"} & set(scores)
    assert scores["success_8bit"].tolist() == (adversarial_class != labels).tolist()
    record = json.loads((folder / "run.json").read_text())
    assert record["attack"] == "pgd, steps=4, momentum=0.5, 0.01 SSIM (global, patches of 8), background"
    assert record["images"] == NAMES


def test_the_overview_shows_clean_adversarial_and_difference(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    (photographs / NAMES[1]).rename(photographs / f"{'long name ' * 15}.png")  # its caption moves no picture
    assert run("attack", photographs, *TINY, "--set", "steps=2", "--out", "made").code == 0
    with Image.open(tmp_path / "made/overview.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(float)
    assert pixels.shape[1] == 900
    # Four rows of three images: no place of the sheet is blank.
    for row in range(4):
        for column in range(3):
            top, left = round((row + 0.45) * pixels.shape[0] / 4), round((column + 0.5) * 300)
            assert pixels[top - 40 : top + 40, left - 40 : left + 40].std() > 1


def test_an_interrupted_overview_leaves_no_file(
    run: Run, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(_: object, path: Path, **__: object) -> None:
        Path(path).write_bytes(b"half a picture")
        raise KeyboardInterrupt

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", cut)
    assert run("attack", photographs, *TINY, "--attack", "fgsm", "--out", "made").code == 130
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"clean", "adversarial"}


def test_saved_pairs_can_be_explained(run: Run, photographs: Path) -> None:
    assert run("attack", photographs / NAMES[0], *TINY, "--set", "steps=2", "--out", "made").code == 0
    ended = run("explain", "--pair", "made/pairs.safetensors", *TINY, "--out", "explained")
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("eps", [0.001, 0.5])
def test_the_changes_in_the_table_are_those_of_the_files(
    run: Run, photographs: Path, tmp_path: Path, eps: float
) -> None:
    ended = run("attack", photographs, *TINY, "--budget", f"linf:{eps}", "--out", "made")
    assert ended.code == 0, ended.err
    scores = pd.read_csv(tmp_path / "made/scores.csv")
    for row in scores.to_dict("records"):
        name = Path(row["png"]).name
        clean, changed = (
            np.asarray(Image.open(tmp_path / "made" / folder / name)).astype(int)
            for folder in ("clean", "adversarial")
        )
        change = np.abs(changed - clean)
        most, pixels = int(change.max()), int(change.any(-1).sum())
        assert (round(255 * row["linf_8bit"]), row["pixels_8bit"]) == (most, pixels)
        assert most <= 255 * eps
        assert re.search(rf" {most}/255 +{pixels} ", ended.out)
    assert (int(scores["pixels_8bit"].max()) == 0) == (eps == 0.001)


def test_a_misclassified_image_is_no_success_anywhere(
    run: Run, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions: list[str] = []
    monkeypatch.setattr("weakspot.report.figures.contact_sheet", lambda _, lines, __: captions.extend(lines))
    image = photographs / NAMES[0]
    made = run("attack", image, *TINY, "--budget", "linf:0", "--json", "--out", "made")
    own = json.loads(made.out)["scores"][0]
    assert (own["correct"], own["before"]) == (True, f"class {own['label']}")
    Path("labels.csv").write_text(f"file,label\n{image.name},{(own['label'] + 1) % 4}")
    made = run(
        "attack", image, *TINY, "--labels", "labels.csv", "--budget", "linf:0", "--json", "--out", "made"
    )
    row = json.loads(made.out)["scores"][0]
    assert (row["correct"], row["before"], row["after"]) == (False, own["before"], own["before"])
    assert captions[1] == f"{NAMES[0]}: {own['before']} → {own['before']} (misclassified without an attack)"


def test_json_is_the_only_output(run: Run, photographs: Path) -> None:
    ended = run(
        "attack", photographs, *TINY, "--json", "--budget", "linf:8/255", "--target", 2, "--out", "made"
    )
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    assert {row["image"] for row in document["scores"]} <= set(NAMES)
    assert {row["target"] for row in document["scores"]} == {2}
    assert all(row["linf"] <= 8 / 255 + 1e-6 for row in document["scores"])
    assert Path(document["folder"]).name == "made"


def test_a_targeted_attack_that_misses_does_not_deny_that_the_network_was_fooled(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    rows = json.loads(run("attack", photographs, *TINY, "--json", "--budget", "linf:0", "--out", "a").out)
    label = rows["scores"][0]["label"]
    target = next(number for number in range(4) if number != label)
    ended = run(
        "attack", photographs / NAMES[0], *TINY, "--target", target, "--budget", "linf:0", "--out", "made"
    )
    assert ended.code == 0, ended.err
    assert f"0 of 1 image changed to class {target} as 8-bit files (0 before rounding)" in ended.out
    assert "fooled" not in ended.out
    assert "on target" in ended.out


@pytest.mark.parametrize("attack", available_attacks())
def test_every_attack_on_the_list_runs(run: Run, photographs: Path, tmp_path: Path, attack: str) -> None:
    short = {
        "few_pixel": ["population=8", "generations=2", "count=2"],
        "strattack": ["steps=10", "group=8"],
        "carlini_wagner": ["steps=10"],
        "ead": ["steps=10"],
    }
    settings = [part for setting in short.get(attack, []) for part in ("--set", setting)]
    ended = run("attack", photographs / NAMES[0], *TINY, "--attack", attack, *settings, "--out", "made")
    assert ended.code == 0, ended.err
    result = AttackResult.load(tmp_path / "made/pairs.safetensors")
    if find_attack(attack).default_budget:
        assert bool((Linf(4 / 255).distance(result.perturbation, result.clean) <= 4 / 255 + 1e-6).all())
    if attack == "few_pixel":
        assert int(result.distances["pixels"].max()) <= 2


def test_the_list_names_attacks_budgets_and_regions(run: Run) -> None:
    ended = run("attack", "--list", "--json")
    assert ended.code == 0
    rows = json.loads(ended.out)
    named = {
        kind: [row["name"] for row in rows if row["kind"] == kind] for kind in ("attack", "budget", "region")
    }
    own, libraries = named["attack"][:-3], named["attack"][-3:]
    assert libraries == ["foolbox:CLASS", "torchattacks:CLASS", "art:CLASS"]
    assert own == [*ORDER, *sorted(set(available_attacks()) - set(ORDER))]
    assert {"linf:EPS", "ssim:EPS", "ssim-local:EPS"} <= set(named["budget"])
    assert named["region"] == [*REGIONS, "FILE"]
    assert next(row for row in rows if row["name"] == "pgd")["--set"].startswith("steps, restarts")
    assert "pgd" in run("attack", "--list").out


def test_images_with_one_name_in_two_folders_stay_apart(run: Run, photographs: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / "two" / folder).mkdir(parents=True)
        save(read_images(photographs / NAMES[0])[0][0], tmp_path / "two" / folder / "same.png")
    save(read_images(photographs / NAMES[1])[0][0], tmp_path / "two/a/same.bmp")
    ended = run("attack", tmp_path / "two", *TINY, "--attack", "fgsm", "--out", "made")
    assert ended.code == 0, ended.err
    files = pd.read_csv(tmp_path / "made/scores.csv")["png"].tolist()
    assert files == ["adversarial/a/same.png", "adversarial/a/same-2.png", "adversarial/b/same.png"]
    assert all((tmp_path / "made" / file).is_file() for file in files)


@pytest.mark.parametrize(
    ("name", "budget", "settings", "message"),
    [
        ("few_pixel", "l2:1", [], "few_pixel takes no --budget"),
        ("pgd", "ssm:0.1", [], "ssm"),
        ("pgd", "linf:8", [], "8/255"),
        ("pgd", None, ["stes=3"], "--set of pgd must be one of"),
        ("pgd", None, ["seed=3"], "--set of pgd must be one of"),
        ("nolibrary:X", None, [], "LIBRARY:CLASS"),
        ("pgdd", None, [], "did you mean 'pgd'?"),
    ],
)
def test_an_argument_that_an_attack_does_not_take_is_refused(
    name: str, budget: str | None, settings: list[str], message: str
) -> None:
    def read() -> None:
        attack = registry.find_attack(name)
        find_budget(attack, budget or "linf:4/255", given=budget is not None)
        read_settings(attack, settings)

    with pytest.raises((Failure, ValueError)) as caught:
        read()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "steps=many"], "steps"),
        (["--set", "steps=true"], "steps"),
        (["--region", "support"], "support"),
        (["--attack", "pgdd"], "did you mean 'pgd'?"),
    ],
)
def test_a_wrong_option_gets_one_sentence_and_code_2(
    run: Run, photographs: Path, arguments: list[str], message: str
) -> None:
    ended = run("attack", photographs, *TINY, *arguments)
    assert (ended.code, message in ended.err) == (2, True), ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert not Path("weakspot-attack/scores.csv").exists()


def test_unreadable_files_are_named_and_the_rest_is_attacked(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    (photographs / "broken.png").write_bytes(b"not an image")
    ended = run("attack", photographs, "missing.png", *TINY, "--attack", "fgsm", "--out", "made")
    assert ended.code == 4
    assert "missing.png: no such file or folder" in ended.err
    assert "broken.png" in json.loads((tmp_path / "made/run.json").read_text())["skipped"]
    assert len(pd.read_csv(tmp_path / "made/scores.csv")) == 4


def test_names_that_clash_or_are_too_long_get_new_names(run: Run, tmp_path: Path) -> None:
    (tmp_path / "v/x/a.png").mkdir(parents=True)
    for name in ("x/a.jpg", "x/a.png/c.jpg", "n" * 240 + ".jpg", "x/[red]é ü.png"):
        save(torch.rand(3, 20, 20), tmp_path / "v" / name)
    ended = run("attack", "v", *TINY, "--attack", "fgsm", "--out", "made")
    assert ended.code == 0, ended.err
    files = pd.read_csv(tmp_path / "made/scores.csv")["png"].tolist()
    assert len(set(files)) == 4
    assert all((tmp_path / "made" / file).is_file() for file in files)


PLUGIN = """
import torch

import weakspot
from weakspot import attacks


def simple(model, images, labels, *, budget):
    return attacks.fgsm(model, images, labels, budget=budget)


def free(model, images, labels, **options):
    options.setdefault("budget", weakspot.Linf(0.01))
    return attacks.pgd(model, images, labels, steps=2, **options)


def wrong(model, images, labels):
    return images


def _result(images, adversarial, labels, claim):
    none = labels * 0
    success = (none + claim).bool()
    return weakspot.AttackResult(images, adversarial, labels, (labels + 1) % 10, success, none, none)


def boastful(model, images, labels, *, region=None):
    return _result(images, images.clone(), labels, 1)  # says that it fooled, and nothing of files


def modest(model, images, labels):
    return _result(images, images.clone(), labels, 0)


def everywhere(model, images, labels, *, region=None):
    return _result(images, 1 - images, labels, 0)


def greedy(model, images, labels, *, budget):
    return _result(images, (images + 2 * budget.eps).clamp(0, 1), labels, 0)


def small(model, images, labels):
    return _result(images[:, :, :8], images[:, :, :8], labels, 0)
"""
PLUGGED = ("simple", "free", "wrong", "boastful", "modest", "everywhere", "greedy", "small")


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attacks of another package, one of which cannot be imported."""
    (tmp_path / "plugged.py").write_text(PLUGIN)
    entries = [EntryPoint(name, f"plugged:{name}", registry.GROUP) for name in PLUGGED] + [
        EntryPoint("broken", "no_such_package:attack", registry.GROUP)
    ]

    def installed(*, group: str, name: str | None = None) -> list[EntryPoint]:
        own = entries if group == registry.GROUP else []
        every = [*entry_points(group=group), *own]
        return [entry for entry in every if name is None or entry.name == name]

    monkeypatch.setattr(registry, "entry_points", installed)


@pytest.mark.usefixtures("plugins")
def test_attacks_of_other_packages_are_listed_and_get_what_they_take(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    image = photographs / NAMES[0]
    rows = {row["name"]: row for row in json.loads(run("attack", "--list", "--json").out)}
    assert "cannot be loaded" in rows["broken"]["what"]
    assert rows["simple"]["kind"] == "attack"
    assert run("attack", image, *TINY, "--attack", "simple", "--out", "made").code == 0
    ended = run(
        "attack", image, *TINY, "--attack", "free", "--region", "border:2", "--seed", 4, "--out", "made"
    )
    assert ended.code == 0, ended.err
    result = AttackResult.load(tmp_path / "made/pairs.safetensors")
    assert not bool(result.perturbation[..., 2:-2, 2:-2].any())
    assert result.seed is not None
    assert result.seed.tolist() == [4]
    for arguments, message in (
        (["simple", "--region", "border:2"], "simple takes no --region"),
        (["simple", "--target", "2"], "simple takes no --target"),
        (["simple", "--batch-size", "2"], "simple takes no --batch-size"),
        (["wrong"], "attack wrong must return an AttackResult, got Tensor"),
        (["broken"], "attack broken (no_such_package:attack) cannot be loaded"),
        (["free", "--set", "stpes=1"], "free failed with these arguments"),
        (
            ["everywhere", "--region", "border:2"],
            "must leave pixels outside the region as they are, got 3600 changed in image 0",
        ),
        (
            ["greedy", "--budget", "linf:8/255"],
            "must stay inside its budget of 8/255 L-infinity, got 0.0627 in",
        ),
        (["small"], "attack small must return images of shape (1, 3, 64, 64), got (1, 3, 8, 64)"),
    ):
        ended = run("attack", image, *TINY, "--out", "other", "--attack", *arguments)
        assert (ended.code, message in ended.err) == (2, True), ended.err


@pytest.mark.usefixtures("plugins", "run")
def test_the_success_of_an_attack_of_another_package_is_verified() -> None:
    model = load("tiny_networks:build", input_size=(64, 64))
    images = torch.rand(2, 3, 64, 64)
    predicted = model(images).argmax(1)
    labels = torch.stack(
        [predicted[0], (predicted[1] + 1) % 10]
    )  # the second image is taken for another class
    for name in ("boastful", "modest"):
        result = find_attack(name).run(model, images, labels, attacks.AttackOptions(), {})
        assert result.success.tolist() == [False, True]
        assert result.success_8bit is not None
        assert result.success_8bit.tolist() == [False, True]
        assert result.n_forward.tolist() == [2, 2]


@pytest.mark.parametrize(
    "setting", ["momentum=x", "momentum=null", "loss=3", "restarts=0", "stop_early=perhaps"]
)
def test_a_value_that_an_attack_cannot_use_does_not_crash(run: Run, photographs: Path, setting: str) -> None:
    image = photographs / NAMES[0]
    ended = run("attack", image, *TINY, "--set", "steps=1", "--set", setting, "--out", "made")
    assert ended.code in {0, 2}
    assert "unexpected" not in ended.err


FLAT = """
import torch
from torch import nn


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, images):
        return self.bias + 0 * images.mean((1, 2, 3))[:, None]


def build():
    return Constant().eval()
"""


@pytest.fixture
def in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images are attacked at once, and kept after each attack."""
    monkeypatch.setattr(attack_choice, "LEAST", 2)
    monkeypatch.setattr(attack_choice, "default_batch", lambda _: 0)
    monkeypatch.setattr("weakspot._progress.SAVE_EVERY", 0.0)
    monkeypatch.setattr("weakspot._progress.SAVE_AT_MOST", 1.0)


def test_parts_give_the_results_of_the_whole(
    run: Run, photographs: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    options = ("attack", photographs, *TINY, "--region", "cam", "--set", "steps=3", "--seed", 5)
    assert run(*options, "--out", "whole").code == 0
    request.getfixturevalue("in_pairs")
    ended = run(*options, "--out", "parts")
    assert ended.code == 0, ended.err
    whole, parts = (pd.read_csv(tmp_path / name / "scores.csv") for name in ("whole", "parts"))
    pd.testing.assert_frame_equal(whole, parts)
    one, other = (AttackResult.load(tmp_path / name / "pairs.safetensors") for name in ("whole", "parts"))
    assert one.names == other.names
    torch.testing.assert_close(one.adversarial, other.adversarial)
    about = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "parts")]
    assert about[0]["attack"] == about[1]["attack"]


@pytest.mark.parametrize("attack", ["pgd", "ensemble"])  # each attack of an ensemble finds the gradients zero
def test_zero_gradients_are_counted_over_all_parts(
    run: Run, photographs: Path, tmp_path: Path, in_pairs: None, attack: str
) -> None:
    (tmp_path / "flat_network.py").write_text(FLAT)
    model = ("--model", "flat_network:build", "--size", "30x30")
    ended = run("attack", photographs, *model, "--attack", attack, "--out", "made")
    assert ended.code == 0, ended.err
    assert (
        ended.err.count("is zero everywhere for 4 of 4 images") == ended.err.count("is zero everywhere") == 1
    )


def test_zero_gradients_of_images_that_are_skipped_are_not_counted(
    run: Run, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flat_network.py").write_text(FLAT)
    attack = ChosenAttack.run

    def failing(chosen: ChosenAttack, classifier: Any, aim: Aim, options: Any) -> AttackResult:
        result = attack(chosen, classifier, aim, options)
        if "coffee.png" in aim.names:
            raise NotFiniteError("NaN")
        return result

    monkeypatch.setattr(ChosenAttack, "run", failing)
    ended = run("attack", photographs, "--model", "flat_network:build", "--size", "30x30", "--out", "made")
    assert ended.code == 0, ended.err
    assert (
        ended.err.count("is zero everywhere for 3 of 3 images") == ended.err.count("is zero everywhere") == 1
    )


def test_an_interrupt_keeps_the_parts_that_are_done_and_nan_skips_only_its_image(
    run: Run, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_pairs: None
) -> None:
    attack = ChosenAttack.run

    def failing(chosen: ChosenAttack, classifier: Any, aim: Aim, options: Any) -> AttackResult:
        if "motorcycle.png" in aim.names:
            raise KeyboardInterrupt
        if "coffee.png" in aim.names:
            raise NotFiniteError("NaN")
        return attack(chosen, classifier, aim, options)

    monkeypatch.setattr(ChosenAttack, "run", failing)
    ended = run("attack", photographs, *TINY, "--attack", "fgsm", "--out", "made")
    assert ended.code == 130
    assert "coffee.png: Sequential returned NaN or infinity for a changed version; skipped" in ended.err
    assert "interrupted; written to made so far: clean/ (1 file), adversarial/ (1 file)" in ended.err
    assert pd.read_csv(tmp_path / "made/scores.csv")["image"].tolist() == ["chelsea.png"]
    assert len(AttackResult.load(tmp_path / "made/pairs.safetensors")) == 1


def test_where_no_image_can_be_changed_the_command_says_so(
    run: Run, photographs: Path, monkeypatch: pytest.MonkeyPatch, in_pairs: None
) -> None:
    def failing(*_: object) -> AttackResult:
        raise NotFiniteError("NaN")

    monkeypatch.setattr(ChosenAttack, "run", failing)
    ended = run("attack", photographs, *TINY, "--out", "made")
    assert ended.code == 2
    assert "NaN or infinity for a changed version of each image that was left" in ended.err
