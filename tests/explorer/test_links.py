"""Copies: the command and the Python code do outside what the bench did."""

from __future__ import annotations

import base64
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.explorer.benches import SIZE, Events, filled_bench, network, photographs, png, square
from weakspot.classifier import Classifier
from weakspot.datasets.labels import ClassIndex
from weakspot.explorer.bench import Bench, Origin
from weakspot.explorer.desk import Desk
from weakspot.explorer.messages import Message
from weakspot.images import read_images
from weakspot.pairs import AttackResult

FACTORY = "tests.explorer.benches:network"
ROOT = Path(__file__).parents[2]
BODY: Message = {
    "image": 0,
    "mask": png(square()),
    "attack": "pgd",
    "budget": "linf:16/255",
    "options": {"steps": 3, "restarts": 2},
    "seed": 4,
}


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    """A picture file whose name a shell would take apart."""
    path = tmp_path / "it's a $(cat) & dog.png"
    levels = (photographs(1)[0] * 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(levels).save(path)
    return path


def copied(photograph: Path, body: Message) -> tuple[Message, Message, Bench]:
    """What the bench says, the copies, and the bench, for an image from the command line."""
    bench = Bench(network(), Origin(["--model", FACTORY], f"weakspot.load({FACTORY!r})"))
    bench.add(read_images(photograph, size=SIZE)[0], ["cat"], paths=[str(photograph)])
    desk = Desk(bench)
    try:
        done = Events(desk, "attack", body).last()
        assert done["event"] == "done", done
        return done, desk.ask("command", body).result(60), bench
    finally:
        desk.close()


@pytest.mark.slow
def test_the_python_code_reproduces_both_sides(photograph: Path, tmp_path: Path) -> None:
    done, copies, _ = copied(photograph, BODY)
    script = tmp_path / "copied.py"
    script.write_text(str(copies["python"]), "utf-8")
    ran = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True, text=True, cwd=tmp_path, env=environment(), check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    for line, side in zip(ran.stdout.splitlines(), ("attack", "control"), strict=True):
        told = done[side]
        assert isinstance(told, dict)
        found = re.fullmatch(r"(\w+): fooled (\w+), (.+), margin (.+)", line)
        assert found is not None, line
        assert found[1] == {"attack": "mask", "control": "control"}[side]
        assert found[2] == str(told["success"])
        assert found[3] == told["predicted"]["name"]
        assert float(found[4]) == pytest.approx(told["margin"], abs=2e-4)


@pytest.mark.slow
def test_the_command_reproduces_both_sides_bit_for_bit(photograph: Path, tmp_path: Path) -> None:
    _, copies, bench = copied(photograph, BODY)
    (tmp_path / "weakspot").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m weakspot "$@"\n')
    (tmp_path / "weakspot").chmod(0o755)
    paths = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    ran = subprocess.run(
        ["/bin/sh", "-e"], input=str(copies["command"]),
        capture_output=True, text=True, cwd=tmp_path, env=environment() | paths, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    exhibit = bench.exhibit(0)
    for folder, pair in (("mask", exhibit.pair), ("control", exhibit.control)):
        saved = AttackResult.load(tmp_path / "weakspot-attack" / folder / "pairs.safetensors")
        assert pair is not None
        assert torch.equal(saved.adversarial, pair.adversarial)
        assert torch.equal(saved.success, pair.success)


def test_without_a_mask_the_whole_image_is_attacked(photograph: Path) -> None:
    _, copies, _ = copied(photograph, {**BODY, "mask": None})
    assert "--region" not in str(copies["command"])
    assert "base64" not in str(copies["python"])
    assert "region=region" in str(copies["python"])


def test_the_copies_hold_every_setting(photograph: Path) -> None:
    body: Message = {
        **BODY,
        "attack": "few_pixel",
        "budget": None,
        "options": {"population": 5, "generations": 2, "method": "guided"},
    }
    _, copies, _ = copied(photograph, body)
    command = str(copies["command"])
    for part in (
        "--attack few_pixel",
        "--set population=5",
        "--set method=guided",
        "--seed 4",
        f"--model {FACTORY}",
    ):
        assert part in command
    assert "--budget" not in command
    assert "population=5, generations=2, method='guided'" in str(copies["python"])


def test_a_model_from_python_has_no_command_and_code_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    desk = Desk(filled_bench())
    try:
        copies = desk.ask("command", BODY).result(60)
    finally:
        desk.close()
    assert copies["command"] is None
    assert "A model from Python has no command" in str(copies["remark"])
    # The code runs where the person's own variables are.
    printed: list[str] = []
    space = {"model": network().network, "images": photographs(), "print": printed.append}
    exec(compile(str(copies["python"]), "copied", "exec"), space)  # noqa: S102 - that is what is tested
    assert [line.partition(":")[0] for line in printed] == ["mask", "control"]


def test_an_uploaded_picture_must_be_saved_first(photograph: Path) -> None:
    bench = filled_bench()
    bench.origin = Origin(["--model", FACTORY], f"weakspot.load({FACTORY!r})")
    desk = Desk(bench)
    try:
        sent = {"name": "my cat.png", "file": base64.b64encode(photograph.read_bytes()).decode()}
        number = desk.ask("upload", sent).result(60)["image"]
        copies = desk.ask("command", {**BODY, "image": number}).result(60)
    finally:
        desk.close()
    assert "Save the picture that you dropped as my cat.png first." in str(copies["remark"])
    assert "weakspot attack 'my cat.png'" in str(copies["command"])


@pytest.mark.parametrize(
    ("names", "texts"),
    [
        (["3", "2", "1", "0"], ["3", "2", "1", "0"]),
        (
            ["ant", "it's a $(cat) & dog", "ant", "Fish, aquarium"],
            ["0", "it's a $(cat) & dog", "2", "Fish, aquarium"],
        ),
        (["2", "2", "0", "class 0"], [None, "1", "0", "class 0"]),
        (["2"], ["2", "class 1", "class 2", "class 3"]),
    ],
)
def test_the_target_of_the_copies_is_the_class_that_was_chosen(
    names: list[str], texts: list[str | None]
) -> None:
    model = Classifier.wrap(network().network, input_size=SIZE, class_names=names)
    bench = Bench(model, Origin(["--model", FACTORY], f"weakspot.load({FACTORY!r})"))
    bench.add(photographs(4), ["a", "b", "c", "d"], torch.arange(4), paths=["a", "b", "c", "d"])
    desk = Desk(bench)
    try:
        for target, text in enumerate(texts):
            copies = desk.ask("command", {"image": (target + 1) % 4, "target": target}).result(60)
            assert f"targets=torch.tensor([{target}]" in str(copies["python"])
            if text is None:
                assert copies["command"] is None
                assert "There is no command for class 0 as the target" in str(copies["remark"])
            else:
                words = shlex.split(str(copies["command"]))
                assert words[words.index("--target") + 1] == text
                assert ClassIndex(tuple(names), 4).index(text) == target
    finally:
        desk.close()


def test_a_picture_whose_name_begins_with_a_dash_is_no_option_of_the_command() -> None:
    bench = Bench(network(), Origin(["--model", FACTORY], f"weakspot.load({FACTORY!r})"))
    bench.add(photographs(), ["a", "--cat.png"], paths=["-a b.png", "--cat.png"])
    bench.add(photographs(1), ["-sent.png"], uploaded=True)
    desk = Desk(bench)
    try:
        for number, name in enumerate(["-a b.png", "--cat.png", "-sent.png"]):
            copies = desk.ask("command", {"image": number}).result(60)
            assert shlex.split(str(copies["command"]))[:3] == ["weakspot", "attack", f"./{name}"]
            assert f"read_images({name!r}," in str(copies["python"])
    finally:
        desk.close()


def test_nothing_of_the_request_reaches_the_shell_unquoted(photograph: Path) -> None:
    body: Message = {**BODY, "options": {"loss": "$(touch owned); `x` 'y'"}}
    bench = Bench(network(), Origin(["--model", FACTORY], f"weakspot.load({FACTORY!r})"))
    bench.add(read_images(photograph, size=SIZE)[0], ["cat"], paths=[str(photograph)])
    desk = Desk(bench)
    try:
        command = str(desk.ask("command", body).result(60)["command"])
    finally:
        desk.close()
    line = next(line for line in command.splitlines() if line.startswith("weakspot"))
    assert "loss=$(touch owned); `x` 'y'" in shlex.split(line)
