"""One dialect: the same option means the same in every command, and labels are shown where they are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image

from tests.cli.conftest import NAMES, TINY, Run
from weakspot import AttackResult
from weakspot.audit import open_run
from weakspot.cli.app import EXTRAS, Failure, app
from weakspot.cli.options import parse_settings, read_class_names


def saved(folder: str) -> torch.Tensor:
    return AttackResult.load(Path(folder) / "pairs.safetensors").adversarial


def test_steps_and_set_steps_are_the_same_in_attack_and_explain(run: Run, photographs: Path) -> None:
    forms = {"steps": ("--steps", 2), "set": ("--set", "steps=2"), "more": ("--steps", 5)}
    results = {}
    for name, form in forms.items():
        ended = run("attack", photographs, *TINY, "--budget", "l2:1", *form, "--out", name)
        assert ended.code == 0, ended.err
        results[name] = saved(name)
    assert torch.equal(results["steps"], results["set"])
    assert not torch.equal(results["steps"], results["more"])
    for form in (forms["steps"], forms["set"]):
        ended = run(
            "explain", photographs, *TINY, "-b", "l2:1", *form, "--analyses", "none", "--out", "explained"
        )
        assert ended.code == 0, ended.err
        assert torch.equal(saved("explained"), results["steps"])
        assert json.loads(Path("explained/run.json").read_text())["attack"].startswith("pgd, steps=2, 1 L2")


def test_explain_takes_any_attack(run: Run, photographs: Path) -> None:
    choice = ("--attack", "fgsm", "--set", "loss=cross_entropy", "--region", "border:4")
    assert run("attack", photographs, *TINY, *choice, "--out", "attacked").code == 0
    ended = run("explain", photographs, *TINY, *choice, "--analyses", "none", "--out", "explained")
    assert ended.code == 0, ended.err
    assert torch.equal(saved("attacked"), saved("explained"))


@pytest.mark.parametrize("command", ["attack", "explain"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", 3, "--set", "steps=3"), "--steps and --set steps=N must not both be given"),
        (("--attack", "fgsm", "--steps", 3), "fgsm takes no --steps"),
        (("--set", "stesp=3"), "--set of pgd must be one of"),
        (("--eps", "0.1"), "unknown option --eps"),
        (("--norm", "l2"), "unknown option --norm"),
    ],
)
def test_wrong_arguments_of_an_attack_are_one_sentence(
    run: Run, photographs: Path, command: str, options: tuple[str, ...], message: str
) -> None:
    ended = run(command, photographs, *TINY, *options, "--out", "made")
    assert ended.code == 2
    assert message in ended.err
    assert len(ended.err.strip().splitlines()) == 1


def test_steps_of_an_audit_are_those_of_every_attack_that_takes_steps(run: Run, photographs: Path) -> None:
    plain = ("--analyses", "none", "--no-report", "--limit", 2)
    ended = run("audit", photographs, *TINY, *plain, "--attacks", "pgd,fgsm", "--steps", 2, "--out", "made")
    assert ended.code == 0, ended.err
    assert [dict(attack.settings) for attack in open_run("made").plan.attacks] == [{"steps": 2}, {}]
    assert open_run("made").records.query("attack == 'pgd'")["n_backward"].max() == 2
    # Given on the command line, they override those of a plan.
    Path("plan.toml").write_text(
        f'images = ["{photographs.as_posix()}"]\nout = "planned"\n'
        '[[attacks]]\nname = "pgd"\nsettings = {steps = 7, loss = "dlr"}\n'
    )
    ended = run("audit", "plan.toml", *TINY, *plain, "--steps", 2)
    assert ended.code == 0, ended.err
    assert [dict(attack.settings) for attack in open_run("planned").plan.attacks] == [
        {"steps": 2, "loss": "dlr"}
    ]
    ended = run("audit", "--resume", "made", "--steps", 3)
    assert (ended.code, "--resume takes no images and no plan options" in ended.err) == (2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", 3, "--set", "pgd.steps=3"), "--steps and --set ATTACK.steps=N must not both be given"),
        (("--steps", 3, "--quick"), "--steps has no effect with --quick"),
        (("--attacks", "fgsm", "--steps", 3), "fgsm takes no --steps"),
        (("--steps", 0), "--steps must be"),
    ],
)
def test_wrong_steps_of_an_audit_are_one_sentence(
    run: Run, photographs: Path, options: tuple[object, ...], message: str
) -> None:
    ended = run("audit", photographs, *TINY, *options, "--out", "made")
    assert ended.code == 2
    assert message in ended.err
    assert len(ended.err.strip().splitlines()) == 1


def test_wrong_labels_are_named_and_never_count_as_fooled(run: Run, photographs: Path) -> None:
    predicted = run(
        "attack", photographs, *TINY, "--steps", 1, "--budget", "linf:0", "--json", "--out", "plain"
    )
    rows = json.loads(predicted.out)["scores"]
    assert predicted.err == ""
    wrong = (rows[0]["label"] + 1) % 4
    lines = [f"{row['image']},{row['label']}" for row in rows[1:]]
    Path("labels.csv").write_text("\n".join(["file,label", f"{NAMES[0]},{wrong}", *lines]))
    for command in (("attack",), ("explain", "--analyses", "none")):
        ended = run(
            *command,
            photographs,
            *TINY,
            "--labels",
            "labels.csv",
            "--steps",
            1,
            "--budget",
            "linf:0",
            "--out",
            "made",
        )
        assert ended.code == 0, ended.err
        label, reached = f"class {wrong}", f"class {rows[0]['label']}"
        assert f"{NAMES[0]}: labeled {label}, classified as {reached} without an attack" in ended.err
        assert ended.err.count("classified as") == 1
        # No image was changed: a model that errs without an attack has not been fooled by one.
        assert "0 of 3 correctly classified images fooled as 8-bit files" in ended.out
        assert "yes" not in ended.out
        assert ended.out.count("wrong before") == 1


def test_many_wrong_labels_are_counted(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "gray"
    folder.mkdir()
    for number in range(8):
        Image.new("RGB", (64, 64), (number, number, number)).save(folder / f"{number}.png")
    predicted = run("attack", folder, *TINY, "--steps", 1, "--budget", "linf:0", "--json", "--out", "plain")
    rows = json.loads(predicted.out)["scores"]
    Path("labels.csv").write_text(
        "\n".join(["file,label", *(f"{row['image']},{(row['label'] + 1) % 4}" for row in rows)])
    )
    ended = run("attack", folder, *TINY, "--labels", "labels.csv", "--steps", 1, "--out", "made")
    assert ended.err.count("without an attack") == 6
    assert "... and 3 more images are misclassified without an attack" in ended.err
    assert ended.out.startswith("Images classified as their label without an attack: none of 8,")


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000 + "]" * 100_000, "{", '"cat"', "3", "null", '[["cat"]]', '{"a": "cat"}', "[null]"],
)
def test_class_names_that_are_no_list_are_one_sentence(tmp_path: Path, content: str) -> None:
    path = tmp_path / "names.json"
    path.write_text(content)
    with pytest.raises(Failure, match="must be a JSON list of names, or an object of class number to name"):
        read_class_names(path)


def test_class_names_are_a_list_or_an_object_of_numbers(tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    path.write_text('["cat", "dog"]')
    assert read_class_names(path) == ["cat", "dog"]
    path.write_text(json.dumps({str(number): f"class {number}" for number in (10, 2, 0)}))
    assert read_class_names(path) == ["class 0", "class 2", "class 10"]


def test_a_setting_nested_without_end_is_text() -> None:
    assert parse_settings(["x=" + "[" * 100_000]) == {"x": "[" * 100_000}


def test_the_help_shows_every_default_and_the_extra_of_each_command() -> None:
    commands: Any = typer.main.get_command(app)
    for name, one in commands.commands.items():
        for parameter in one.params:
            is_value = parameter.param_type_name == "option" and not parameter.is_flag
            if is_value and parameter.default is None:
                assert isinstance(parameter.show_default, str), f"{name} {parameter.name}"
        for extra, (_, uses) in EXTRAS.items():
            line = f"pip install 'weakspot\\[{extra}]'"
            needed = {
                part.split()[0] for part in uses.split(", ") if part == name or part.startswith(f"{name} l")
            }
            assert (line in one.help) == bool(needed), name


def test_the_extra_is_readable_in_the_help(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert "Needs an extra: pip install 'weakspot[audit]'." in run("audit", "--help").out
    assert "Needs an extra: pip install 'weakspot[train]'." in run("train", "--help").out
    assert "Needs an extra" not in run("explain", "--help").out
