"""The command line on real and on odd input: sentences, files, exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from typer.core import TyperGroup

import weakspot
from weakspot import Pairs, cli, sample_images
from weakspot.audit.store.run import FILES
from weakspot.cli.app import Failure
from weakspot.statistics.number_format import p_value


@dataclass
class Ended:
    code: int
    out: str
    err: str


Run = Callable[..., Ended]

TINY = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()


class Loud(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = build()

    def forward(self, images):
        print("hello from forward")
        return self.inner(images)


def gray():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 10)).eval()
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs `weakspot ARGUMENTS` in a folder of its own, which holds tiny networks in tiny_networks.py."""
    (tmp_path / "tiny_networks.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    # No line of progress, however slow the machine is.
    monkeypatch.setattr(sys.modules["weakspot.cli.app"], "LINE_EVERY", 3600.0)

    def call(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["weakspot", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    yield call
    sys.modules.pop("tiny_networks", None)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    images, names = sample_images((64, 64))
    for image, name in zip(images, names, strict=True):
        save(image, folder / f"{name}.png")
    return folder


def save(image: torch.Tensor, path: Path) -> None:
    Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(path)


TINY_MODEL = ("--model", "tiny_networks:build", "--size", "64x64")
TINY_OPTIONS = (*TINY_MODEL, "--steps", 3)


def test_a_folder_is_explained_and_everything_promised_is_written(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    ended = run("explain", photographs, *TINY_OPTIONS, "--eps", "16/255", "--out", "run", "--seed", 3)
    assert ended.code == 0, ended.err
    assert f"Report: {tmp_path / 'run' / 'report.html'}" in ended.out
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(FILES)
    scores = pd.read_csv(tmp_path / "run/scores.csv")
    assert scores["image"].tolist() == ["chelsea.png", "coffee.png", "motorcycle.png", "rocket.png"]
    pairs = Pairs.load(tmp_path / "run/pairs.safetensors")
    assert float(pairs.perturbation.abs().max()) == pytest.approx(16 / 255, abs=1e-6)
    with np.load(tmp_path / "run/maps.npz", allow_pickle=False) as maps:
        assert maps["partition"].shape == (4, 1, 64, 64)
        assert maps["vulnerability"][0].sum() == pytest.approx(scores["margin_drop"][0], rel=0.02)
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["seed"] == "3"
    assert record["schema"] == 1
    assert record["attack"] == "PGD, 16/255 L-infinity, 3 steps, whole image"
    assert record["command"].startswith("weakspot explain")


def test_the_same_seed_writes_the_same_scores_and_pairs(run: Run, photographs: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        assert run("explain", photographs, *TINY_OPTIONS, "--out", out).code == 0
    for name in ("scores.csv", "pairs.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_bad_files_among_good_ones_are_named_once_each_and_the_good_ones_explained(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    good = photographs / "coffee.png"
    (photographs / "rocket.png").unlink()
    (photographs / "notes.txt").write_text("not a picture")
    (photographs / "empty.png").touch()
    (photographs / "cut.png").write_bytes(good.read_bytes()[:2000])
    (photographs / "text.jpg").write_text("hello")
    (photographs / "half.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(20))
    (photographs / "broken.gif").write_bytes(b"GIF89a")
    Image.fromarray(np.zeros((8, 8), np.float32), mode="F").save(photographs / "float.tiff")
    ended = run("explain", photographs, *TINY_OPTIONS, "--json")
    assert ended.code == 0
    printed = json.loads(ended.out)
    assert [row["image"] for row in printed["scores"]] == ["chelsea.png", "coffee.png", "motorcycle.png"]
    lines = [line for line in ended.err.splitlines() if line]
    bad = ["notes.txt", "empty.png", "cut.png", "text.jpg", "half.jpg", "broken.gif", "float.tiff"]
    assert len(lines) == len(printed["skipped"]) == len(bad)
    for name in bad:
        assert sum(name in line for line in lines) == 1
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("missing.png", None, "missing.png: there is no such file or folder"),
        ("empty.png", b"", "empty.png: the file is empty (0 bytes)"),
        ("notes.txt", b"some notes", "notes.txt: not an image in a known format"),
    ],
)
def test_a_picture_that_cannot_be_read_ends_with_code_4(
    run: Run, tmp_path: Path, name: str, content: bytes | None, wanted: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    ended = run("explain", name, *TINY_OPTIONS)
    assert ended.code == 4
    assert wanted in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "weakspot-out").exists()


def test_a_named_file_that_is_missing_does_not_stop_the_others_but_shows_in_the_code(
    run: Run, photographs: Path
) -> None:
    ended = run("explain", photographs / "coffee.png", "missing.png", *TINY_OPTIONS, "--json")
    assert ended.code == 4
    assert [row["image"] for row in json.loads(ended.out)["scores"]] == ["coffee.png"]
    assert ended.err.count("missing.png") == 1


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["explain"], "no pictures were named"),
        (["explain", "--samples", "x.png"], "--samples takes no pictures besides"),
        (["explain", "--pair", "one.png"], "--pair takes CLEAN ADVERSARIAL"),
        (
            ["explain", "--samples", "--eps", "four"],
            "eps is 'four'; accepted is a number such as 0.03 or 8/255",
        ),
        (["explain", "--samples", "--eps", "8"], "write 8/255, not 8"),
        (["explain", "--samples", "--norm", "l7"], "norm is 'l7'; accepted are linf and l2"),
        (["explain", "--samples", "--region", "nowhere"], "region must be one of none, cam"),
        (["explain", "--samples", "--size", "big"], "size is 'big'; accepted is HEIGHTxWIDTH"),
        (["explain", "--samples", "--mean", "a,b"], "mean is 'a,b'"),
        (["explain", "--samples", "--analyses", "overlop"], "did you mean 'overlap'?"),
        (["explain", "--samples", "--target", "nothing"], "got 'nothing'"),
        (["explain", "--samples", "--model", "tiny_networks:biuld"], "did you mean 'build'?"),
        (["explain", "--samples", "--device", "toaster"], "device is 'toaster'"),
        (["explain", "--samples", "--out", "tiny_networks.py"], "which is a file; accepted is a folder"),
    ],
)
def test_a_wrong_option_gets_one_sentence_and_code_2(run: Run, arguments: list[str], wanted: str) -> None:
    defaults = [] if "--model" in arguments else ["--model", "tiny_networks:build"]
    ended = run(*arguments, *defaults)
    assert ended.code == 2
    assert wanted in ended.err
    assert len(ended.err.strip().splitlines()) == 1


def test_a_mask_confines_the_attack_to_its_white_part(run: Run, photographs: Path, tmp_path: Path) -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[:16, 32:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    ended = run("explain", photographs, *TINY_OPTIONS, "--region", "mask.png", "--out", "run")
    assert ended.code == 0, ended.err
    changed = (Pairs.load(tmp_path / "run/pairs.safetensors").perturbation != 0).any(1)
    assert not changed[:, mask == 0].any()
    assert changed[:, mask == 255].float().mean() > 0.9
    assert ended.out.count("by changing") == 4
    assert "effect where it looks" not in ended.out  # it follows from the mask


def test_four_photographs_speak_no_p_value(run: Run, photographs: Path, tmp_path: Path) -> None:
    ended = run("explain", photographs, *TINY_OPTIONS, "--analyses", "overlap,promotion", "--out", "run")
    assert ended.code == 0, ended.err
    assert ended.out.count("a p value needs at least 19 other images of the same source") == 4
    page = (tmp_path / "run/report.html").read_text()
    for text in (ended.out, page.split("<main>")[1].split("<script")[0]):
        assert not re.search(r"\b[pq] ?[=<]|&lt; \.|where the network looks:", text)
    assert '<th scope="col">other images</th>' not in page


def test_a_folder_of_references_gives_p_values(run: Run, photographs: Path, tmp_path: Path) -> None:
    others = tmp_path / "others"
    others.mkdir()
    images = sample_images((64, 64))[0]
    turned = [
        image.rot90(turn, (1, 2)) for image in torch.cat([images, images.flip(3)]) for turn in (1, 2, 3)
    ]
    for number, image in enumerate(turned):
        save(image, others / f"{number}.png")
    (others / "notes.txt").write_text("not a picture")
    options = ("--analyses", "overlap,promotion", "--reference", "others", "--out", "run")
    ended = run("explain", photographs, *TINY_OPTIONS, *options)
    assert ended.code == 0, ended.err
    assert "notes.txt" in ended.err
    assert ended.out.count("q = ") + ended.out.count("q < ") == 4
    assert "in other images" in ended.out
    scores = pd.read_csv(tmp_path / "run/scores.csv")
    assert scores[["relation", "relation_p", "spearman_p", "interpretability_label_p"]].notna().all(axis=None)
    shown = [line for line in ended.out.splitlines() if " → " in line and ".png" in line]
    for line, largest in zip(shown, scores["relation_p"], strict=True):  # the table has the sentence's p
        p = p_value(float(largest))
        assert line.rstrip().endswith(p.removeprefix("p = ").removeprefix("p "))
        assert f"{p}, q" in ended.out
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["reference"] == "24 pictures in others"
    assert '<th scope="col">other images</th>' in (tmp_path / "run/report.html").read_text()


def test_references_that_are_not_there_are_named(run: Run, photographs: Path) -> None:
    for name, what in (("nowhere", "not there"), ("tiny_networks.py", "a file")):
        ended = run("explain", photographs, *TINY_OPTIONS, "--reference", name)
        assert ended.code == 4
        assert f"reference must be a folder of pictures, got {name}, which is {what}" in ended.err
    ended = run("explain", photographs, *TINY_OPTIONS, "--reference", photographs, "--analyses", "cam")
    assert ended.code == 2
    assert "analyses must name one that compares images" in ended.err


def test_a_black_mask_is_refused(run: Run, photographs: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "mask.png")
    ended = run("explain", photographs, *TINY_OPTIONS, "--region", "mask.png")
    assert ended.code == 2
    assert "mask.png has no white pixel" in ended.err


def test_a_mask_that_is_no_picture_is_refused_and_one_of_another_shape_is_noted(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    (tmp_path / "mask.png").write_text("white")
    ended = run("explain", photographs, *TINY_OPTIONS, "--region", "mask.png")
    assert ended.code == 4
    assert "region: mask.png: not an image in a known format" in ended.err
    Image.fromarray(np.full((64, 96), 255, np.uint8)).save(tmp_path / "mask.png")
    ended = run("explain", photographs, *TINY_OPTIONS, "--region", "mask.png")
    assert ended.code == 0
    assert "note: mask.png: the mask is 64 x 96 and the images are 64 x 64" in ended.err


def test_the_cam_region_changes_its_share_of_the_image(run: Run, photographs: Path, tmp_path: Path) -> None:
    ended = run("explain", photographs, *TINY_OPTIONS, "--region", "cam", "--fraction", 0.25, "--out", "run")
    assert ended.code == 0, ended.err
    changed = (Pairs.load(tmp_path / "run/pairs.safetensors").perturbation != 0).any(1).float().mean((1, 2))
    assert bool((changed <= 0.25).all())
    assert bool((changed > 0.2).all())


def test_a_pair_of_pictures_is_taken_as_it_is(run: Run, photographs: Path, tmp_path: Path) -> None:
    clean = sample_images((64, 64))[0][0]
    adversarial = clean.clone()
    adversarial[:, 10:20, 10:20] = 1 - adversarial[:, 10:20, 10:20]
    save(adversarial, tmp_path / "adversarial.png")
    ended = run(
        "explain", "--pair", photographs / "chelsea.png", "adversarial.png", *TINY_MODEL, "--out", "run"
    )
    assert ended.code == 0, ended.err
    changed = (Pairs.load(tmp_path / "run/pairs.safetensors").perturbation != 0).any(1)[0]
    assert bool(changed[10:20, 10:20].all())
    assert int(changed.sum()) == 100


def test_saved_pairs_are_explained_again_with_the_same_scores(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    assert run("explain", photographs, *TINY_OPTIONS, "--out", "first").code == 0
    assert run("explain", "--pair", "first/pairs.safetensors", *TINY_MODEL, "--out", "second").code == 0
    first, second = (
        pd.read_csv(tmp_path / out / "scores.csv").drop(columns="image") for out in ("first", "second")
    )
    pd.testing.assert_frame_equal(first, second)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--region", "cam"], "--region does"),
        (["--fraction", "0.3"], "--fraction does"),
        (["--norm", "l2"], "--norm does"),
        (["--eps", "8/255"], "--eps does"),
        (["--steps", "20"], "--steps does"),
        (["--target", "2"], "--target does"),
        (["--steps", "5", "--eps", "8/255"], "--eps and --steps do"),
        (["--steps", "5", "--norm", "l2", "--eps", "1"], "--norm, --eps and --steps do"),
    ],
)
def test_an_attack_option_beside_a_pair_is_refused_by_name_even_where_it_says_the_default(
    run: Run, photographs: Path, arguments: list[str], named: str
) -> None:
    ended = run(
        "explain", "--pair", *sorted(photographs.iterdir())[:2], *TINY_MODEL, *arguments, "--out", "run"
    )
    assert ended.code == 2
    assert f"weakspot: {named} nothing with --pair" in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("region", "used"),
    [
        (None, False),
        ("none", False),
        ("border:4", False),
        ("cam.png", False),
        ("cam", True),
        ("~matched:cam", True),
        ("matched:(border & ~ cam)", True),
        ("border|cam", True),
    ],
)
def test_a_share_to_keep_is_refused_exactly_where_no_region_is_a_fraction(
    run: Run, photographs: Path, region: str | None, used: bool
) -> None:
    Image.fromarray(np.full((64, 64), 255, np.uint8)).save("cam.png")
    where = [] if region is None else ["--region", region]
    for command in ("explain", "attack"):
        steps = ("--steps", 1) if command == "explain" else ("--set", "steps=1")
        few = photographs / "coffee.png"
        ended = run(command, few, *TINY_MODEL, *steps, *where, "--fraction", 0.5, "--out", "run", "--quiet")
        assert ended.code == (0 if used else 2), ended.err
        assert used or (
            ended.err
            == "weakspot: --fraction does nothing without cam or support in --region; add one of them, "
            "or leave it out\n"
        )


def test_pairs_of_different_sizes_are_refused_and_other_sizes_than_the_models_noted(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    save(sample_images((32, 64))[0][0], tmp_path / "small.png")
    ended = run("explain", "--pair", photographs / "chelsea.png", "small.png", *TINY_MODEL)
    assert ended.code == 4
    assert "differ in size (64 x 64 and 32 x 64" in ended.err
    options = ("--model", "tiny_networks:build", "--size", "48x48")
    ended = run("explain", "--pair", photographs / "chelsea.png", photographs / "coffee.png", *options)
    assert ended.code == 0
    assert "brought from 64 x 64 to 48 x 48" in ended.err


def test_a_gray_network_with_class_names_and_a_target(run: Run, photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\n".join(f"digit {number}" for number in range(10)))
    options = (
        "--model",
        "tiny_networks:gray",
        "--size",
        "28x28",
        "--classes",
        "names.txt",
        "--target",
        "Digit 3",
    )
    ended = run("explain", photographs, *options, "--eps", "0.5", "--steps", 30, "--json")
    assert ended.code == 0, ended.err
    rows = json.loads(ended.out)["scores"]
    assert all(row["success"] and row["adversarial_class"] == "digit 3" for row in rows)


def test_an_l2_budget_is_kept(run: Run, photographs: Path) -> None:
    ended = run("explain", photographs, *TINY_OPTIONS, "--norm", "l2", "--eps", "1.5", "--json")
    assert ended.code == 0, ended.err
    assert all(row["l2"] <= 1.5 + 1e-4 for row in json.loads(ended.out)["scores"])


def test_quiet_prints_nothing_and_chosen_analyses_are_the_only_ones(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    ended = run("explain", photographs, *TINY_OPTIONS, "--quiet", "--analyses", "ssim", "--out", "run")
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    columns = set(pd.read_csv(tmp_path / "run/scores.csv"))
    assert {"ssim_windowed", "ssim_windowed_min"} <= set(columns)
    assert "jaccard" not in columns


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("command", "where"),
    [
        (("explain", *TINY_OPTIONS), "weakspot.attacks.pgd"),
        (("explain", *TINY_OPTIONS, "--debug"), "weakspot.cli.explain.load_classifier"),
        (("attack", *TINY_MODEL), "weakspot.cli.attack._run"),
        (("defend", *TINY_OPTIONS), "weakspot.defenses.evaluate_defense"),
        (("dissect", "--demo", *TINY_MODEL), "weakspot.cli.dissect._last_layers"),
    ],
)
def test_an_interrupt_before_anything_is_written_says_so_whatever_lies_there(
    run: Run, photographs: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], where: str
) -> None:
    Path("run").mkdir()
    for name in ("run.json", "scores.csv", "notes.txt"):
        Path("run", name).write_text("of an earlier run")
    if command[0] == "dissect":
        assert run(*command, "--out", "run", "--quiet").code == 0
    monkeypatch.setattr(where, interrupt)
    ended = run(*command, *([] if "--demo" in command else [photographs]), "--out", "run")
    assert (ended.code, ended.out) == (130, "")
    assert ended.err == "weakspot: interrupted; nothing was written\n"


@pytest.mark.parametrize(
    ("command", "where", "kept"),
    [
        (("explain", *TINY_OPTIONS), "weakspot.audit.store.run._save_maps", "report.html, pairs.safetensors"),
        (
            ("explain", *TINY_OPTIONS),
            "weakspot.cli.explain.print_table",
            "report.html, scores.csv, pairs.safetensors, maps.npz, run.json",
        ),
        (
            ("attack", *TINY_MODEL, "--set", "steps=1"),
            "weakspot.report.figures.overview",
            "clean/ (4 files), adversarial/ (4 files)",
        ),
        (
            ("defend", *TINY_OPTIONS, "--queries", 4),
            "weakspot.report.figures.accuracy_figure",
            "defense.json",
        ),
    ],
)
def test_an_interrupt_names_the_files_that_were_written_by_then_and_no_others(
    run: Run,
    photographs: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    where: str,
    kept: str,
) -> None:
    Path("run").mkdir()
    Path("run/defense.csv").write_text("of an earlier run")
    Path("run/notes.txt").write_text("of somebody else")
    monkeypatch.setattr(where, interrupt)
    ended = run(*command, photographs, "--out", "run")
    assert ended.code == 130
    assert ended.err == f"weakspot: interrupted; written to run by then: {kept}\n"
    again = run(*command, photographs, "--out", "run")
    assert again.err == ended.err  # written anew is written too


def test_a_command_that_watches_no_folder_says_that_it_was_interrupted(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weakspot.cli.inspect.print_rows", interrupt)
    ended = run("models")
    assert (ended.code, ended.err) == (130, "weakspot: interrupted\n")


def test_an_interrupt_before_any_command_has_begun_is_told_too(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TyperGroup, "make_context", interrupt)
    ended = run("explain", "--samples")
    assert (ended.code, ended.err) == (130, "weakspot: interrupted; nothing was written\n")


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_an_attack_is_one_sentence(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny_networks.py").write_text(TINY)
    command = [
        sys.executable,
        "-m",
        "weakspot",
        "explain",
        str(photographs),
        *TINY_MODEL,
        "--steps",
        "100000",
    ]
    child = subprocess.Popen(
        [*command, "--out", "run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(weakspot.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "run").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (130, "")
    assert err == "weakspot: interrupted; nothing was written\n"


def test_debug_shows_the_traceback(run: Run) -> None:
    with pytest.raises(Failure, match="no pictures were named"):
        run("explain", "--debug")


def test_models_lists_the_embedded_network_and_says_what_is_missing(run: Run) -> None:
    rows = {row["model"]: row["usable"] for row in json.loads(run("models", "--json").out)}
    assert rows["efficientnet_lite0"] == "yes"
    assert {"hf:DIRECTORY", "timm:NAME", "torchvision:NAME", "model.pt2", "package.module:factory"} < set(
        rows
    )


def test_doctor_finds_this_installation_well(run: Run) -> None:
    ended = run("doctor", "--json")
    assert ended.code == 0, ended.out + ended.err
    found = {row["check"]: row["found"] for row in json.loads(ended.out)}
    assert found["verdict"] == "all is well"
    assert found["analyses"].startswith("cam, ssim, overlap")


@pytest.mark.parametrize("command", [[], ["explain"], ["models"], ["doctor"]])
def test_help_has_an_example(run: Run, command: list[str]) -> None:
    ended = run(*command, "--help")
    assert ended.code == 0
    assert "Usage: weakspot" in ended.out
    if command:
        assert f"weakspot {command[0]}" in ended.out.split("Usage: weakspot", 1)[1].split("\n", 1)[1]


def test_what_a_model_prints_does_not_end_up_in_the_json(run: Run, photographs: Path) -> None:
    ended = run(
        "explain", photographs / "coffee.png", *TINY_OPTIONS, "--model", "tiny_networks:Loud", "--json"
    )
    assert ended.code == 0, ended.err
    assert len(json.loads(ended.out)["scores"]) == 1
    assert "hello from forward" in ended.err


def test_absolute_and_relative_paths_mix_and_equal_names_stay_apart(run: Run, photographs: Path) -> None:
    other = photographs.parent / "other"
    other.mkdir()
    (other / "coffee.png").write_bytes((photographs / "coffee.png").read_bytes())
    ended = run("explain", photographs / "coffee.png", "other/coffee.png", *TINY_OPTIONS, "--json")
    assert ended.code == 0, ended.err
    assert [row["image"] for row in json.loads(ended.out)["scores"]] == [
        "photos/coffee.png",
        "other/coffee.png",
    ]


def test_a_mask_on_a_transparent_ground_is_white_only_where_it_was_painted(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    mask = np.zeros((64, 64, 4), np.uint8)
    mask[10:20, 5:30] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    assert run("explain", photographs, *TINY_OPTIONS, "--region", "mask.png", "--out", "run").code == 0
    changed = (Pairs.load(tmp_path / "run/pairs.safetensors").perturbation != 0).any(1)
    assert not changed[:, mask[..., 3] == 0].any()


def test_a_picture_already_read_as_the_target_is_named_and_left_out(run: Run, photographs: Path) -> None:
    said = json.loads(run("explain", photographs, *TINY_OPTIONS, "--json").out)["scores"]
    target = said[0]["label"]
    alike = [row["image"] for row in said if row["label"] == target]
    ended = run("explain", photographs, *TINY_OPTIONS, "--target", target, "--json")
    if len(alike) == len(said):
        assert ended.code == 2
        assert f"already read as {target}" in ended.err
    else:
        assert [row["image"] for row in json.loads(ended.out)["scores"]] == [
            row["image"] for row in said if row["image"] not in alike
        ]
    assert all(f"{name}: already read as {target}" in ended.err for name in alike)


def test_a_failure_stays_a_failure_when_it_is_saved_and_explained_again(run: Run, photographs: Path) -> None:
    options = (*TINY_OPTIONS, "--eps", "0.0001")
    first = json.loads(run("explain", photographs, *options, "--out", "run", "--json").out)["scores"]
    again = json.loads(run("explain", "--pair", "run/pairs.safetensors", *TINY_MODEL, "--json").out)["scores"]
    assert not any(row["success"] for row in first)
    assert [row["verdict"] for row in again] == [row["verdict"] for row in first]
    assert all(row["verdict"].startswith("The attack failed") for row in again)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--model", "tiny_networks:gray"], "does not take images of 1 x 64 x 64"),
        (["--classes", "tiny_networks.py"], "names; "),
        (["--out", "/proc/nowhere"], "cannot be made"),
        (["--region", "cam", "--fraction", "0"], "leaves no pixel to change"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(
    run: Run, photographs: Path, arguments: list[str], wanted: str
) -> None:
    ended = run("explain", photographs, *TINY_OPTIONS, *arguments)
    assert ended.code == 2
    assert wanted in ended.err
    assert len(ended.err.strip().splitlines()) == 1


BRITTLE = """
import torch
from torch import nn


class Brittle(nn.Module):
    # A bright value in the middle third is enough.
    def forward(self, images):
        lead = 20 * (images[..., 10:20].amax((1, 2, 3)) - 0.8)
        return torch.stack([-lead, lead], 1)


def build():
    return Brittle().eval()
"""


def test_one_pixel_pairs_get_a_table_by_radius(run: Run, tmp_path: Path) -> None:
    (tmp_path / "striped_networks.py").write_text(BRITTLE)
    clean = torch.rand(24, 3, 30, 30, generator=torch.Generator().manual_seed(0)) * 0.5
    adversarial = clean.clone()
    adversarial[:, 0, 12, 15] = 1.0
    adversarial[20:, 0, 12, 15] = 0.6  # too little: these attacks fail
    zeros = torch.zeros(24, dtype=torch.long)
    Pairs(clean, adversarial, zeros, 1 - zeros).save(tmp_path / "pairs.safetensors")
    options = (
        "--model",
        "striped_networks:build",
        "--size",
        "30x30",
        "--analyses",
        "locality",
        "--out",
        "moved",
    )
    ended = run("explain", "--pair", "pairs.safetensors", *options)
    assert ended.code == 0, ended.err
    table = pd.read_csv(tmp_path / "moved/locality.csv").set_index("radius")
    # Column 15: within four pixels every site is in the middle third, elsewhere a third of them is.
    assert table["rate"][["1", "2", "3", "4"]].tolist() == [1] * 4
    assert table["rate"]["random site"] == pytest.approx(299 / 899)
    assert table["images"].tolist() == [20] * len(table)
    assert table["failed_images"].tolist() == [4] * len(table)
    assert (table["failed_rate"] == 0).all()
    assert table["low"]["1"] == pytest.approx(0.8316, abs=1e-3)
    assert "Neighboring sites share the weakness" in ended.out
    page = (tmp_path / "moved/report.html").read_text()
    assert "Neighboring sites share the weakness" in page
    assert "The same pixel at other sites, all images" in page
    plain = run(
        "explain", "--pair", "pairs.safetensors", *options[:4], "--analyses", "ssim", "--out", "plain", "-q"
    )
    assert plain.code == 0
    assert not (tmp_path / "plain/locality.csv").exists()
    assert "The same pixel at other sites" not in (tmp_path / "plain/report.html").read_text()
