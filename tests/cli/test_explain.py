"""`weakspot explain` on images, pairs and regions, with bad input among the good."""

from __future__ import annotations

import html
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tests.cli.conftest import NAMES, TINY, Run, save
from tests.cli.test_map import PLANTED
from weakspot import Analysis, Classifier, Pairs, sample_images
from weakspot._checks import NotFiniteError
from weakspot.audit.store.run import FILES
from weakspot.cli.app import Failure
from weakspot.cli.explain import _check_pair
from weakspot.explanations import explanation
from weakspot.explanations.analysis import find_analyses
from weakspot.statistics.number_format import p_value

explain_command = sys.modules["weakspot.cli.explain"]  # the package has the function under this name
QUICK = (*TINY, "--steps", 3, "--analyses", "overlap")


@pytest.mark.slow
def test_a_folder_is_explained_and_all_files_are_written(run: Run, photographs: Path, tmp_path: Path) -> None:
    options = (*TINY, "--steps", 3, "--budget", "linf:16/255", "--seed", 3)
    ended = run("explain", photographs, *options, "--out", "run")
    assert ended.code == 0, ended.err
    assert f"Report: {tmp_path / 'run' / 'report.html'}" in ended.out
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(FILES)
    scores = pd.read_csv(tmp_path / "run/scores.csv")
    assert scores["image"].tolist() == NAMES
    pairs = Pairs.load(tmp_path / "run/pairs.safetensors")
    assert float(pairs.perturbation.abs().max()) == pytest.approx(16 / 255, abs=1e-6)
    with np.load(tmp_path / "run/maps.npz", allow_pickle=False) as maps:
        assert maps["partition"].shape == (4, 1, 64, 64)
        assert maps["vulnerability"][0].sum() == pytest.approx(scores["margin_drop"][0], rel=0.02)
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["seed"] == "3"
    assert record["schema"] == 1
    assert record["attack"] == "pgd, steps=3, 16/255 L-infinity, whole image"
    assert record["labels"] == "the model's predictions on the clean images"
    assert record["command"].startswith("weakspot explain")
    # The saved pairs, explained again, give the same scores.
    again = run("explain", "--pair", "run/pairs.safetensors", *TINY, "--seed", 3, "--out", "again")
    assert again.code == 0, again.err
    saved = pd.read_csv(tmp_path / "again/scores.csv")
    pd.testing.assert_frame_equal(saved.drop(columns="image"), scores.drop(columns="image"))


def test_commands_to_run_next_repeat_options_however_they_were_typed(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    ended = run(
        "explain",
        photographs / "chelsea.png",
        *QUICK,
        "-qblinf:2/255",
        "--budget=linf:8/255",
        "--device",
        "auto",
    )
    assert ended.code == 0, ended.err
    made = json.loads((tmp_path / "weakspot-out/run.json").read_text())
    assert made["options"] == "--budget linf:8/255 --model tiny_networks:build --mean 0 --std 1 --size 64x64"
    page = re.sub("<[^>]*>", "", (tmp_path / "weakspot-out/report.html").read_text())
    assert f"--controls {made['options']} --out" in html.unescape(page)


def test_the_same_seed_writes_the_same_scores_and_pairs(run: Run, photographs: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        assert run("explain", photographs, *QUICK, "--out", out).code == 0
    for name in ("scores.csv", "pairs.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.png", None, "missing.png: no such file or folder"),
        ("empty.png", b"", "empty.png: the file is empty (0 bytes)"),
        ("notes.txt", b"some notes", "notes.txt: not an image in a known format"),
    ],
)
def test_an_image_that_cannot_be_read_ends_with_code_4(
    run: Run, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    ended = run("explain", name, *QUICK)
    assert (ended.code, message in ended.err) == (4, True), ended.err
    assert not (tmp_path / "weakspot-out").exists()


def test_a_named_file_that_is_missing_does_not_stop_the_others_but_shows_in_the_code(
    run: Run, photographs: Path
) -> None:
    ended = run("explain", photographs / "coffee.png", "missing.png", *QUICK, "--json")
    assert ended.code == 4
    assert [row["image"] for row in json.loads(ended.out)["scores"]] == ["coffee.png"]
    assert ended.err.count("missing.png") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "linf:four"], "linf:4/255"),
        (["--budget", "linf:8"], "8/255"),
        (["--region", "nowhere"], "got 'nowhere'"),
        (["--region", "~none"], "region must hold at least one pixel, got '~none'"),
        (["--analyses", "overlop"], "did you mean 'overlap'?"),
        (["--target", "nothing"], "--target must be a number from 0 to 3, got 'nothing'"),
        (["--out", "tiny_networks.py"], "--out must be a folder, got the file tiny_networks.py"),
        (["--region", "cam", "--fraction", "3"], "fraction must be between 0 and 1, got 3.0 (did you mean 0.3?)"),
    ],
)  # fmt: skip
def test_a_wrong_option_gets_one_sentence_and_code_2(
    run: Run, photographs: Path, arguments: list[str], message: str
) -> None:
    ended = run("explain", photographs / "coffee.png", *TINY, *arguments)
    assert (ended.code, message in ended.err) == (2, True), ended.err
    assert len(ended.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        (["one.png"], {"pair": True, "samples": False}, "--pair needs two images, CLEAN ADVERSARIAL"),
        (["p.safetensors"], {"pair": False, "samples": False}, r"is not an image \(add --pair"),
        ([], {"pair": True, "samples": True}, "--samples has no effect with --pair"),
    ],
)
def test_paths_must_fit_the_option_pair(sources: list[str], options: dict[str, bool], message: str) -> None:
    with pytest.raises(Failure, match=message):
        _check_pair([Path(source) for source in sources], **options)


def test_a_mask_confines_the_attack_to_its_white_part(run: Run, photographs: Path, tmp_path: Path) -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[:16, 32:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    ended = run("explain", photographs, *QUICK, "--region", "mask.png", "--out", "run")
    assert ended.code == 0, ended.err
    changed = (Pairs.load(tmp_path / "run/pairs.safetensors").perturbation != 0).any(1)
    assert not changed[:, mask == 0].any()
    assert changed[:, mask == 255].float().mean() > 0.9
    assert ended.out.count("by changing") == 4
    assert "effect where it looks" not in ended.out  # the mask decides it


def test_four_photographs_have_no_p_value(run: Run, photographs: Path, tmp_path: Path) -> None:
    ended = run("explain", photographs, *TINY, "--analyses", "overlap,promotion", "--out", "run")
    assert ended.code == 0, ended.err
    assert (
        ended.out.count("(no p value: that takes 19 other images whose importance maps show evidence)") == 4
    )
    assert ended.out.count("--reference FOLDER") == 1
    page = (tmp_path / "run/report.html").read_text()
    for text in (ended.out, page.split("<main>")[1].split("<script")[0]):
        assert not re.search(r"\b[pq] ?[=<]|&lt; \.|where the network looks:", text)
    assert '">other images</a></th>' not in page


def test_a_folder_of_references_gives_p_values(run: Run, photographs: Path, tmp_path: Path) -> None:
    images = sample_images((64, 64))[0]
    flipped = torch.cat([images, images.flip(3)])
    turned = [image.rot90(turn, (1, 2)) for image in flipped for turn in (1, 2, 3)]
    for number, image in enumerate(turned):
        save(image, tmp_path / f"others/{number}.png")
    (tmp_path / "others/notes.txt").write_text("not an image")
    options = ("--analyses", "overlap,promotion", "--reference", "others", "--out", "run")
    ended = run("explain", photographs, *TINY, *options)
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
    assert record["reference"] == "24 images in others"
    assert '">other images</a></th>' in (tmp_path / "run/report.html").read_text()


def test_references_that_do_not_exist_are_named(run: Run, photographs: Path) -> None:
    for name, what in (("nowhere", "a path that does not exist"), ("tiny_networks.py", "a file")):
        ended = run("explain", photographs / "coffee.png", *QUICK, "--reference", name)
        assert ended.code == 4
        assert f"--reference must be a folder of images, got {name}, {what}" in ended.err
    ended = run("explain", photographs, *TINY, "--reference", photographs, "--analyses", "cam")
    assert ended.code == 2
    assert "analyses must include one that compares images" in ended.err


def test_a_pair_of_images_is_taken_as_it_is(run: Run, photographs: Path, tmp_path: Path) -> None:
    clean = sample_images((64, 64))[0][0]
    adversarial = clean.clone()
    adversarial[:, 10:20, 10:20] = 1 - adversarial[:, 10:20, 10:20]
    save(adversarial, tmp_path / "adversarial.png")
    arguments = ("explain", "--pair", photographs / "chelsea.png", "adversarial.png", "--analyses", "ssim")
    ended = run(*arguments, *TINY, "--out", "run")
    assert ended.code == 0, ended.err
    changed = (Pairs.load(tmp_path / "run/pairs.safetensors").perturbation != 0).any(1)[0]
    assert bool(changed[10:20, 10:20].all())
    assert int(changed.sum()) == 100


def test_a_pair_must_have_one_size_and_is_resized_with_a_note(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    save(sample_images((32, 64))[0][0], tmp_path / "small.png")
    ended = run("explain", "--pair", photographs / "chelsea.png", "small.png", *TINY)
    assert ended.code == 4
    assert "the images of a pair must have one size, got 64 x 64 and 32 x 64" in ended.err
    pair = ("--pair", photographs / "chelsea.png", photographs / "coffee.png")
    ended = run("explain", *pair, "--model", "tiny_networks:build", "--size", "48x48", "--analyses", "ssim")
    assert ended.code == 0
    assert "resized from 64 x 64 to 48 x 48" in ended.err


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--region", "cam"], "--region has"),
        (["--fraction", "0.3"], "--fraction has"),
        (["--budget", "linf:8/255"], "--budget has"),
        (["--labels", "folders"], "--labels has"),
        (["--steps", "20"], "--steps has"),
        (["--target", "2"], "--target has"),
        (["--steps", "5", "--budget", "l2:1"], "--budget and --steps have"),
        (["--steps", "5", "--region", "cam", "--budget", "l2:1"], "--region, --budget and --steps have"),
    ],
)
def test_an_attack_option_beside_a_pair_is_refused_by_name_even_with_the_default_value(
    run: Run, photographs: Path, arguments: list[str], options: str
) -> None:
    pair = sorted(photographs.iterdir())[:2]
    ended = run("explain", "--pair", *pair, *TINY, *arguments, "--out", "run")
    assert ended.code == 2
    assert f"weakspot: {options} no effect with --pair" in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert not Path("run").exists()


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
    ended = run("explain", photographs, *options, "--budget", "linf:0.5", "--steps", 30, "--json")
    assert ended.code == 0, ended.err
    rows = json.loads(ended.out)["scores"]
    assert all(row["success"] and row["adversarial_class"] == "digit 3" for row in rows)


def test_labels_come_from_a_table_for_attacks_too(run: Run, photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,label\n" + "".join(f"{name},3\n" for name in NAMES))
    options = (*TINY, "--labels", "labels.csv")
    ended = run("explain", photographs, *options, "--analyses", "ssim", "--out", "run")
    assert ended.code == 0, ended.err
    assert Pairs.load(tmp_path / "run/pairs.safetensors").labels.tolist() == [3] * 4
    assert json.loads((tmp_path / "run/run.json").read_text())["labels"] == "labels.csv"
    ended = run("attack", photographs, *options, "--target", 3, "--out", "made")
    assert (ended.code, ended.err.count("already labeled as class 3; skipped")) == (2, 4)


def test_quiet_prints_nothing_and_only_chosen_analyses_run(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    options = ("--budget", "l2:1.5", "--quiet", "--analyses", "ssim", "--out", "run")
    ended = run("explain", photographs, *TINY, *options)
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    scores = pd.read_csv(tmp_path / "run/scores.csv")
    assert {"ssim_windowed", "ssim_windowed_min"} <= set(scores)
    assert "jaccard" not in set(scores)
    assert (scores["l2"] <= 1.5 + 1e-4).all()


def test_what_a_model_prints_does_not_end_up_in_the_json(run: Run, photographs: Path) -> None:
    image = photographs / "coffee.png"
    ended = run("explain", image, *QUICK, "--model", "tiny_networks:Loud", "--json")
    assert ended.code == 0, ended.err
    assert len(json.loads(ended.out)["scores"]) == 1
    assert "hello from forward" in ended.err


def test_images_that_are_classified_as_the_target_are_named_and_left_out(run: Run, photographs: Path) -> None:
    rows = json.loads(run("explain", photographs, *QUICK, "--json").out)["scores"]
    target = rows[0]["label"]
    alike = [row["image"] for row in rows if row["label"] == target]
    ended = run("explain", photographs, *QUICK, "--target", target, "--json")
    if len(alike) == len(rows):
        assert ended.code == 2
        assert f"already classified or labeled as the target, {target}" in ended.err
    else:
        left = [row["image"] for row in json.loads(ended.out)["scores"]]
        assert left == [row["image"] for row in rows if row["image"] not in alike]
    assert all(f"{name}: already classified as {target}" in ended.err for name in alike)


def test_a_failure_stays_a_failure_when_it_is_saved_and_explained_again(run: Run, photographs: Path) -> None:
    options = (*QUICK, "--budget", "linf:0.0001", "--out", "run", "--json")
    first = json.loads(run("explain", photographs, *options).out)["scores"]
    pair = ("--pair", "run/pairs.safetensors", *TINY, "--analyses", "overlap")
    again = json.loads(run("explain", *pair, "--json").out)["scores"]
    assert not any(row["success"] for row in first)
    assert [row["verdict"] for row in again] == [row["verdict"] for row in first]
    assert all(row["verdict"].startswith("The attack found no adversarial example") for row in again)


THIRD = """
import torch
from torch import nn


class Third(nn.Module):
    # Brighter images are of class 1, long before they are of class 2.
    def forward(self, images):
        mean = images.mean((1, 2, 3))
        return torch.stack([10 * (0.51 - mean), 10 * (mean - 0.51), 40 * (mean - 0.9)], 1)


def build():
    return Third().eval()
"""


def test_a_targeted_attack_that_ends_in_a_third_class_is_no_failure_to_fool(run: Run, tmp_path: Path) -> None:
    (tmp_path / "third_network.py").write_text(THIRD)
    save(torch.full((3, 16, 16), 0.5), tmp_path / "gray.png")
    model = ("--model", "third_network:build", "--size", "16x16", "--mean", "0", "--std", "1")
    ended = run("explain", "gray.png", *model, "--target", 2, "--budget", "linf:60/255", "--out", "run")
    assert ended.code == 0, ended.err
    assert ended.out.startswith("0 of 1 image changed to the target as 8-bit files (0 before rounding)")
    assert "class 1 99% (not the target)" in ended.out
    assert "found no adversarial example for its target class 2" in ended.out
    assert ".  " not in ended.out  # what a later analysis adds stands in one piece
    page = (tmp_path / "run/report.html").read_text()
    assert "found no adversarial example for 1 image" not in page


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


CONSTANT = """

class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([3.0, 1.0]))

    def forward(self, images):
        return self.logits.expand(len(images), 2) + 0 * images.mean((1, 2, 3))[:, None]
"""


@pytest.mark.slow
def test_one_pixel_pairs_get_a_table_by_radius(run: Run, tmp_path: Path) -> None:
    (tmp_path / "striped_networks.py").write_text(BRITTLE)
    clean = torch.rand(24, 3, 30, 30, generator=torch.Generator().manual_seed(0)) * 0.5
    adversarial = clean.clone()
    adversarial[:, 0, 12, 15] = 1.0
    adversarial[20:, 0, 12, 15] = 0.6  # too little: these attacks fail
    zeros = torch.zeros(24, dtype=torch.long)
    Pairs(clean, adversarial, zeros, 1 - zeros).save(tmp_path / "pairs.safetensors")
    options = ("--pair", "pairs.safetensors", "--model", "striped_networks:build", "--size", "30x30")
    ended = run("explain", *options, "--analyses", "locality", "--out", "moved")
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
    plain = run("explain", *options, "--analyses", "ssim", "--out", "plain", "-q")
    assert plain.code == 0
    assert not (tmp_path / "plain/locality.csv").exists()
    assert "The same pixel at other sites" not in (tmp_path / "plain/report.html").read_text()


def test_pairs_of_one_image_are_called_pairs(run: Run, tmp_path: Path) -> None:
    (tmp_path / "striped_networks.py").write_text(BRITTLE)
    clean = torch.rand(1, 3, 30, 30, generator=torch.Generator().manual_seed(0)).repeat(24, 1, 1, 1) * 0.5
    adversarial = clean.clone()
    for number in range(24):
        adversarial[number, 0, number, 15] = 1.0
    zeros = torch.zeros(24, dtype=torch.long)
    Pairs(clean, adversarial, zeros, 1 - zeros).save(tmp_path / "pairs.safetensors")
    options = ("--pair", "pairs.safetensors", "--model", "striped_networks:build", "--size", "30x30")
    ended = run("explain", *options, "--analyses", "locality", "--out", "moved")
    assert ended.code == 0, ended.err
    assert ended.out.startswith("24 pairs of 1 image: the attack succeeds in 24 pairs.")
    assert "24 of 24 pairs fooled as 8-bit files" in ended.out
    assert "and 19 more pairs (show them" in ended.out
    assert "a successful attack (1 image) still fools" in ended.out
    assert "With fewer than 20 images, no claim is made." in ended.out
    page = (tmp_path / "moved/report.html").read_text()
    assert "All 24 pairs are fooled" in page
    assert "1 image is an example, not a rate" in page
    assert "24 images" not in ended.out + page


def test_a_zero_gradient_is_said_once(run: Run, photographs: Path, tmp_path: Path) -> None:
    flat = BRITTLE.replace("Brittle().eval()", "Constant().eval()") + CONSTANT
    (tmp_path / "flat_networks.py").write_text(flat)
    ended = run("explain", photographs, "--model", "flat_networks:build", "--size", "30x30", "--out", "run")
    assert ended.code == 0, ended.err
    assert ended.err.count("is zero everywhere") == 1
    assert "for 4 of 4 images" in ended.err


class Interrupting:
    """An analysis that raises an error, or notes what standard output holds when it runs."""

    def __init__(
        self, capture: pytest.CaptureFixture[str] | None = None, error: BaseException | None = None
    ) -> None:
        self.capture, self.seen, self.error = capture, "", error or KeyboardInterrupt()

    def __call__(self, model: Classifier, pairs: Pairs, *, seed: int) -> Analysis:
        if self.capture is None:
            raise self.error
        self.seen = self.capture.readouterr().out
        return Analysis(pd.DataFrame({"nothing": np.zeros(len(pairs))}), {})


@pytest.fixture
def last_analysis(monkeypatch: pytest.MonkeyPatch) -> Callable[[Interrupting], None]:
    """Make one analysis the last of two, after `overlap`."""

    def install(function: Interrupting) -> None:
        real = find_analyses(["overlap"])
        for module in (explanation, explain_command):
            monkeypatch.setattr(module, "find_analyses", lambda names: {"late": function, **real})
        monkeypatch.setattr(explain_command, "usual_analyses", lambda: ["late", "overlap"])

    return install


def test_the_first_verdict_is_on_screen_before_deeper_analyses(
    run: Run,
    photographs: Path,
    capsys: pytest.CaptureFixture[str],
    last_analysis: Callable[[Interrupting], None],
) -> None:
    late = Interrupting(capsys)
    last_analysis(late)
    ended = run("explain", photographs / "coffee.png", *TINY, "--steps", 3)
    assert ended.code == 0, ended.err
    assert re.search(r"\ncoffee\.png\n\w", late.seen)
    assert "Further analyses follow: late (Ctrl-C keeps those that have finished)" in late.seen
    # What was printed is not printed again, and each analysis has its cost.
    assert "fooled as 8-bit files" not in ended.out
    assert re.search(r"Analyses: overlap [\d.]+ s, late [\d.]+ s, in [\d.]+ s", ended.out)
    # Neither with --quiet nor with --json is anything printed before the end.
    for option in ("--quiet", "--json"):
        run("explain", photographs / "coffee.png", *TINY, "--steps", 3, option)
        assert late.seen == ""


def test_several_images_are_summed_up_before_their_classes_and_verdicts(run: Run, photographs: Path) -> None:
    ended = run("explain", photographs, *TINY, "--steps", 3, "--analyses", "overlap,cam", "--out", "run")
    assert ended.code == 0, ended.err
    assert ended.out.startswith("The attack succeeds on ")
    before, following, verdicts = ended.out.partition("Further analyses follow: cam")
    assert following
    assert "fooled as 8-bit files" in before
    assert "is still classified as" not in before
    assert verdicts.count("is still classified as") == 4
    assert ended.out.count("The attack succeeds on") == 1


def test_the_smallest_squares_come_first(run: Run, photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "planted_square.py").write_text(PLANTED)
    model = ("--model", "planted_square:patch", "--size", "64x64", "--budget", "linf:1", "--steps", 3)
    ended = run("explain", photographs, *model, "--analyses", "overlap,weak_spots,cam", "--out", "run")
    assert ended.code == 0, ended.err
    assert ended.out.startswith("A square of ")
    assert "Further analyses follow: cam (" in ended.out


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (NotFiniteError("NaN for image 0 of 9"), 2, "NaN for image 0 of 9"),
    ],
)
def test_an_interrupt_or_nan_keeps_the_analyses_that_had_finished(
    run: Run,
    photographs: Path,
    tmp_path: Path,
    last_analysis: Callable[[Interrupting], None],
    error: BaseException,
    code: int,
    reason: str,
) -> None:
    last_analysis(Interrupting(error=error))
    ended = run("explain", photographs / "coffee.png", *TINY, "--steps", 3, "--out", "kept")
    assert ended.code == code
    assert f"weakspot: {reason}; " in ended.err
    assert ended.err.strip().endswith("report.html holds the analyses that had finished, without late")
    record = json.loads((tmp_path / "kept/run.json").read_text())
    assert record["analyses left out"] == "late"
    assert "effect_in_roi" in pd.read_csv(tmp_path / "kept/scores.csv")


def test_a_crash_loses_no_analysis_that_had_finished_long_ago(
    run: Run,
    photographs: Path,
    tmp_path: Path,
    last_analysis: Callable[[Interrupting], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("weakspot._progress.SAVE_EVERY", 0.0)
    monkeypatch.setattr("weakspot._progress.SAVE_AT_MOST", 1.0)
    last_analysis(Interrupting(error=RuntimeError("out of memory")))
    ended = run("explain", photographs / "coffee.png", *TINY, "--steps", 3, "--out", "kept")
    assert ended.code == 1
    assert json.loads((tmp_path / "kept/run.json").read_text())["analyses left out"] == "late"
    assert "effect_in_roi" in pd.read_csv(tmp_path / "kept/scores.csv")
    assert (tmp_path / "kept/report.html").is_file()


def test_quick_runs_and_names_what_it_leaves_out(run: Run, photographs: Path, tmp_path: Path) -> None:
    ended = run("explain", photographs / "coffee.png", *TINY, "--steps", 3, "--quick", "--out", "made")
    assert ended.code == 0, ended.err
    assert (
        "Left out by --quick: weak_spots, promotion, restoration, locality, propagation, units" in ended.out
    )
    assert "Further analyses follow: cam, ssim" in ended.out
    record = json.loads((tmp_path / "made/run.json").read_text())
    assert set(record["seconds_of_analyses"]) == {"cam", "ssim", "overlap"}
    refused = run("explain", photographs, *TINY, "--quick", "--analyses", "cam")
    assert (refused.code, "--analyses has no effect with --quick" in refused.err) == (2, True)


def test_an_unknown_analysis_is_refused_before_the_attack(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    ended = run("explain", photographs, *TINY, "--analyses", "cma")
    assert (ended.code, "did you mean 'cam'" in ended.err) == (2, True), ended.err
    assert not (tmp_path / "weakspot-out").exists()
