"""The session: images that are read, folders that are written, classifiers that fit, options that are parsed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from tests.cli.conftest import NAMES, Run, save
from weakspot import sample_images
from weakspot._progress import Display
from weakspot.cli.app import Failure, app
from weakspot.cli.attack import parse_batch_size
from weakspot.cli.options import (
    ModelOptions,
    OutputOptions,
    parse_names,
    parse_number,
    parse_numbers,
    parse_settings,
    parse_size,
    read_class_names,
)
from weakspot.cli.session import Session, check_existing, check_output, check_sources, load_classifier

MODEL = ModelOptions("tiny_networks:build", size="64x64")


@pytest.fixture
def session(run: Run, tmp_path: Path) -> Session:
    context = typer.Context(typer.main.get_command(app))
    classifier = load_classifier(MODEL)
    return Session(context, OutputOptions(), MODEL, tmp_path / "out", Display(), classifier, sys.stdout)


@pytest.mark.parametrize(
    "arguments",
    [
        ("map", "--budget", "linf:0.5"),
        ("attack", "--steps", 2),
        ("explain", "--analyses", "ssim"),
        ("certify", "--colors", "0.01"),
        ("defend", "--defense", "neutralize", "--steps", 2, "--queries", 10),
    ],
    ids=lambda arguments: arguments[0],
)
def test_an_image_without_finite_logits_is_named_and_skipped(
    run: Run, photographs: Path, arguments: tuple[object, ...]
) -> None:
    Image.fromarray(np.full((64, 64, 3), 250, np.uint8)).save(photographs / "bright.png")
    command, *options = arguments
    dark = ("--model", "tiny_networks:dark", "--size", "64x64", "--mean", "0", "--std", "1")
    ended = run(command, photographs, *dark, *options, "--json", "--out", "made")
    assert ended.code == 0, ended.err
    assert ended.err.count("bright.png: Dark returned NaN or infinity; skipped") == 1
    document = json.loads(ended.out)
    assert document["skipped"] == ["bright.png: Dark returned NaN or infinity; skipped"]
    assert "bright.png" not in json.dumps({**document, "skipped": []})
    alone = run(command, photographs / "bright.png", *dark, *options, "--out", "alone")
    assert alone.code == 2
    assert alone.err.count("Dark returned NaN or infinity for every image") == 1


@pytest.mark.parametrize(
    "arguments",
    [("map",), ("attack", "--steps", 2), ("explain", "--analyses", "ssim"), ("explain", "--quick")],
    ids=lambda arguments: " ".join(map(str, arguments)),
)
def test_an_image_whose_changed_version_has_no_finite_logits_is_named_and_skipped(
    run: Run, photographs: Path, arguments: tuple[str, ...]
) -> None:
    brittle = ("--model", "tiny_networks:brittle", "--size", "64x64", "--mean", "0", "--std", "1")
    command, *options = arguments
    options += ["--json", "--budget", "linf:0.2"]
    without = json.loads(run(command, photographs, *brittle, *options, "--out", "without").out)
    Image.fromarray(np.full((64, 64, 3), 250, np.uint8)).save(photographs / "bright.png")
    ended = run(command, photographs, *brittle, *options, "--out", "made")
    assert ended.code == 0, ended.err
    remark = "bright.png: Brittle returned NaN or infinity for a changed version; skipped"
    assert ended.err.count(remark) == 1
    document = json.loads(ended.out)
    assert document["skipped"] == [remark]
    assert document["scores"] == without["scores"]
    alone = run(command, photographs / "bright.png", *brittle, *options, "--out", "alone")
    assert alone.code == 2
    assert (
        alone.err.count("Brittle returned NaN or infinity for a changed version of each image that was left")
        == 1
    )


def test_a_reference_image_without_finite_logits_is_named_and_skipped(run: Run, photographs: Path) -> None:
    Image.fromarray(np.full((64, 64, 3), 250, np.uint8)).save(photographs / "bright.png")
    dark = ("--model", "tiny_networks:dark", "--size", "64x64", "--mean", "0", "--std", "1")
    options = ("--reference", photographs, "--analyses", "overlap", "--out", "made")
    ended = run("explain", photographs / NAMES[0], *dark, *options)
    assert ended.code == 0, ended.err
    assert ended.err.count("bright.png: Dark returned NaN or infinity; skipped") == 1


def test_folders_stand_for_the_same_classes_if_an_image_of_the_first_is_skipped(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    for name, folder in zip(NAMES, "abcd", strict=True):
        (tmp_path / "sorted" / folder).mkdir(parents=True)
        (photographs / name).rename(tmp_path / "sorted" / folder / name)
    Image.fromarray(np.full((64, 64, 3), 250, np.uint8)).save(tmp_path / "sorted/a" / NAMES[0])
    dark = ("--model", "tiny_networks:dark", "--size", "64x64", "--mean", "0", "--std", "1")
    ended = run("map", "sorted", *dark, "--labels", "folders", "--json", "--out", "made")
    assert ended.code == 0, ended.err
    labels = [row["label"] for row in json.loads(ended.out)["scores"]]
    assert labels == ["class 1", "class 2", "class 3"]


def test_bad_files_among_good_ones_are_named_once_each(
    session: Session, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = photographs / "coffee.png"
    (photographs / "rocket.png").unlink()
    (photographs / "notes.txt").write_text("not an image")
    (photographs / "empty.png").touch()
    (photographs / "cut.png").write_bytes(good.read_bytes()[:2000])
    (photographs / "half.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(20))
    (photographs / "broken.gif").write_bytes(b"GIF89a")
    Image.fromarray(np.zeros((8, 8), np.float32), mode="F").save(photographs / "float.tiff")
    images = session.read_images([photographs, Path("missing.png")])
    assert images.names == NAMES[:3]
    assert session.unread  # missing.png
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    bad = ["notes.txt", "empty.png", "cut.png", "half.jpg", "broken.gif", "float.tiff"]
    assert len(lines) == len(session.skipped) == len(bad)
    for name in bad:
        assert sum(name in line for line in lines) == 1


def test_names_are_unique_and_printable(session: Session, photographs: Path) -> None:
    other = Path("other")
    other.mkdir()
    (other / "coffee.png").write_bytes((photographs / "coffee.png").read_bytes())
    images = session.read_images([photographs / "coffee.png", other / "coffee.png", other / "coffee.png"])
    assert images.names == ["photos/coffee.png", "other/coffee.png", "other/coffee.png"]
    assert images.subset([1]).names == ["other/coffee.png"]
    assert repr(images) == "Images((3, 3, 64, 64): photos/coffee.png, other/coffee.png, other/coffee.png)"


def test_sample_images_have_the_channels_of_the_classifier(run: Run, session: Session) -> None:
    session.classifier = load_classifier(ModelOptions("tiny_networks:gray", size="28x28"))
    assert session.read_images([], samples=True).pixels.shape == (4, 1, 28, 28)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: parse_number("--eps", "four"), "--eps must be a number such as 0.03 or 8/255, got 'four'"),
        # A number whose digits would fill the memory.
        (lambda: parse_number("--eps", "1e99999999"), "--eps must be a number such as 0.03"),
        (lambda: parse_number("--eps", "1/0"), "--eps must be a number"),
        (
            lambda: parse_numbers("--mean", "a,b"),
            "--mean must be numbers separated by commas, one per channel, got 'a,b'",
        ),
        (
            lambda: parse_size("big"),
            "--size must be HEIGHTxWIDTH in pixels such as 224x224, got 'big'",
        ),
        (lambda: parse_size("0x3"), "--size must be HEIGHTxWIDTH"),
        (lambda: parse_batch_size("0"), "--batch-size must be auto or an integer of at least 1, got '0'"),
        (lambda: parse_settings(["steps"]), "--set must be NAME=VALUE, got 'steps'"),
        (lambda: read_class_names(Path("nowhere.txt")), "--classes: nowhere.txt does not exist"),
        (lambda: read_class_names(Path("/")), "--classes: / is a folder"),
        (lambda: read_class_names(Path(__file__).with_name("x.json")), "x.json does not exist"),
        (lambda: check_sources([]), "no images were named (give files, folders, or --samples)"),
        (lambda: check_sources([Path("x")], samples=True), "--samples takes no images (leave out one of"),
    ],
)
def test_a_wrong_value_is_one_sentence(check: Callable[[], object], message: str) -> None:
    with pytest.raises(Failure) as caught:
        check()
    assert message in str(caught.value)


def test_values_are_parsed(tmp_path: Path) -> None:
    assert parse_number("--eps", "8 / 255") == 8 / 255
    assert parse_numbers("--mean", ".5, 1/4") == [0.5, 0.25]
    assert parse_size("32x16") == (32, 16)
    assert parse_size("32") == (32, 32)
    assert (parse_batch_size("auto"), parse_batch_size("7")) == (None, 7)
    assert parse_names("pgd, ,fgsm") == ["pgd", "fgsm"]
    given = ["steps=3", "loss=dlr", "early=true", "layer=0", "steps=4"]
    values = {"steps": 4, "loss": "dlr", "early": True, "layer": "0"}
    assert parse_settings(given, texts=["layer"]) == values
    numbers = parse_settings(["a=.5", "b=-.5", "c=+.5", "d=+5", "e=+-5", "f=+true", "g=-2e-3", "h=."])
    assert numbers == {
        "a": 0.5,
        "b": -0.5,
        "c": 0.5,
        "d": 5,
        "g": -0.002,
        "e": "+-5",
        "f": "+true",
        "h": ".",
    }
    for name, text in (
        ("names.txt", "cat\ndog"),
        ("list.json", '["cat", "dog"]'),
        ("map.json", '{"1": "dog", "0": "cat"}'),
    ):
        for mark in ("", "\ufeff"):  # the byte-order mark that some editors write
            (tmp_path / name).write_text(mark + text)
            assert read_class_names(tmp_path / name) == ["cat", "dog"]


def test_sources_that_do_not_exist_end_the_command_only_if_none_exists(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_existing([tmp_path, "nowhere"])
    assert capsys.readouterr().err == "weakspot: nowhere: no such file or folder\n"
    with pytest.raises(typer.Exit) as ended:
        check_existing(["nowhere"])
    assert ended.value.exit_code == 4


@pytest.mark.parametrize(
    ("source", "out", "refused"),
    [
        ("made/clean", "made", True),
        ("made/adversarial/a.png", "made", True),
        ("made", "made", True),
        (".", "made", True),
        ("made/clean", "made/clean", True),
        ("made/clean", "other", False),
        (".", "other", False),  # nothing was written there yet
    ],
)
def test_images_that_are_read_are_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, out: str, refused: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    for part in ("clean", "adversarial"):
        save(sample_images((8, 8))[0][0], tmp_path / "made" / part / "a.png")
    folders = ("clean", "adversarial")
    if refused:
        with pytest.raises(Failure, match=r"holds images that are read \(give another folder\)"):
            check_output(Path(out), [Path(source)], folders=folders, files=["overview.png"])
    else:
        check_output(Path(out), [Path(source)], folders=folders, files=["overview.png"])


def test_an_output_folder_must_be_writable_and_free(session: Session, tmp_path: Path) -> None:
    session.make_folder()
    assert (tmp_path / "out").is_dir()
    session.out = Path("/proc/nowhere")
    with pytest.raises(Failure, match=r"--out /proc/nowhere cannot be created"):
        session.make_folder()
    (tmp_path / "clean").touch()
    with pytest.raises(Failure, match="already holds a file named clean"):
        check_output(tmp_path, [], folders=["clean"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ModelOptions("tiny_networks:gray", size="64x64"),
            r"does not take images of 1 x 64 x 64 .*give --size",
        ),
        (
            ModelOptions("tiny_networks:Asserting"),
            r"does not take images of 3 x 224 x 224 .*: AssertionError \(give --size",
        ),
        (
            ModelOptions("tiny_networks:build", classes=Path("tiny_networks.py")),
            "--classes must hold 4 names",
        ),
        (ModelOptions("tiny_networks:biuld"), "did you mean 'build'"),
        (ModelOptions("tiny_networks:build", device="toaster"), "device"),
    ],
)
def test_a_classifier_that_does_not_fit_is_one_sentence(
    session: Session, options: ModelOptions, message: str
) -> None:
    with pytest.raises((Failure, ValueError), match=message):
        load_classifier(options)


AS_THEY_ARE = "gets pixels in [0, 1] as they are"
ONE_STEP = ("--limit", 1, "--steps", 1)
STATISTICS = ("--mean", ".485,.456,.406", "--std", ".229,.224,.225")


@pytest.mark.parametrize(
    "command",
    [
        ("attack", *ONE_STEP),
        ("audit", *ONE_STEP, "--analyses", "none", "--no-report", "--out", "made"),
        ("explain", "--steps", 1, "--analyses", "none"),
        ("map", "--limit", 1),
    ],
    ids=lambda command: command[0],
)
def test_a_network_whose_preprocessing_is_not_known_is_named_once(
    run: Run, photographs: Path, command: tuple[object, ...]
) -> None:
    name, *options = command
    ended = run(name, photographs, "--model", "tiny_networks:build", "--size", "64x64", *options)
    assert ended.code == 0, ended.err
    assert ended.err.count(f"note: tiny_networks:build {AS_THEY_ARE} (give ") == 1
    assert "unless it normalizes them itself or was trained on such pixels" in ended.err
    assert AS_THEY_ARE not in ended.out


@pytest.mark.parametrize(
    "model",
    [
        ("tiny_networks:build", *STATISTICS),
        ("tiny_networks:build", "--mean", "0", "--std", "1"),  # the user says that this is right
        ("tiny_networks:build", "--quiet"),
        ("tiny_networks:normalized",),
    ],
    ids=lambda arguments: " ".join(map(str, arguments)),
)
def test_preprocessing_that_is_given_is_not_doubted(
    run: Run, photographs: Path, model: tuple[str, ...]
) -> None:
    for command in (
        ("attack", *ONE_STEP),
        ("audit", *ONE_STEP, "--analyses", "none", "--no-report", "--out", "made"),
    ):
        ended = run(command[0], photographs, "--size", "64x64", *command[1:], "--model", *model)
        assert (ended.code, ended.err) == (0, "")


def test_networks_that_come_with_weakspot_need_no_preprocessing(run: Run, tmp_path: Path) -> None:
    """mnist_standard takes pixels in [0, 1], as it was trained."""
    digits = tmp_path / "digits"
    digits.mkdir()
    Image.new("L", (28, 28), 40).save(digits / "one.png")
    ended = run("attack", digits, "--model", "mnist_standard", *ONE_STEP)
    assert (ended.code, ended.err) == (0, "")


def test_an_audit_that_resumes_does_not_repeat_the_note(run: Run, photographs: Path) -> None:
    plain = (*ONE_STEP, "--analyses", "none", "--no-report", "--size", "64x64")
    Path("plan.toml").write_text(
        f'images = ["{photographs.as_posix()}"]\nout = "planned"\n'
        '[model]\nspec = "tiny_networks:build"\nmean = [0.5]\nstd = [0.25]\n'
    )
    assert AS_THEY_ARE not in run("audit", "plan.toml", *plain).err
    made = run("audit", photographs, "--model", "tiny_networks:build", *plain, "--out", "made")
    assert AS_THEY_ARE in made.err
    assert AS_THEY_ARE not in run("audit", "--resume", "made", "--no-report").err
