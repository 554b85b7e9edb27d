"""`weakspot certify`: its sentences, files, checks, and the options that do not fit together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.cli.conftest import NAMES, TINY, Run
from weakspot import Pairs
from weakspot.proofs import pixel_proofs

GRAY = ("--model", "tiny_networks:gray", "--mean", "0", "--size", "28x28")
PLANTED = """
import torch
from torch import nn


class Pixel(nn.Module):
    # Class 1 once the pixel in row 3, column 5 is brighter than 250/255 in a gray image, whatever else it shows.
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))
        self.unused = nn.Conv2d(1, 1, 1)  # says that images are gray

    def forward(self, images):
        value = images[:, 0, 3, 5] - 250.5 / 255 + 0 * self.bias
        return torch.stack([-value, value], 1)


def pixel():
    torch.manual_seed(0)
    return Pixel().eval()
"""
NAN_MASKED = """
import torch
from torch import nn


class Masked(nn.Module):
    # NaN for dark images whose upper left corner is hidden.
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(3, 2, 1)

    def forward(self, images):
        corner = images[:, :, :2, :2].flatten(2)
        hidden = (corner == corner[:, :, :1]).all(2).all(1)
        bad = hidden & (images.mean((1, 2, 3)) < 0.285)
        return self.inner(images).mean((2, 3)).masked_fill(bad[:, None], torch.nan)


def build():
    torch.manual_seed(0)
    return Masked().eval()
"""
PIXEL = ("--model", "planted_pixel:pixel", "--mean", "0", "--size", "8x8")


@pytest.fixture
def planted(tmp_path: Path) -> None:
    (tmp_path / "planted_pixel.py").write_text(PLANTED)


def test_the_planted_pixel_alone_is_refuted(
    run: Run, photographs: Path, tmp_path: Path, planted: None
) -> None:
    ended = run("certify", photographs, *PIXEL, "--colors", "8bit", "--out", "made")
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[0] == (
        "Of 256 pixels in 4 images, each alone in any 8-bit color: 252 proven (float32 as run), 4 "
        "refuted, 0 unknown; a color that changes the class was found in 4 images."
    )
    for name in NAMES:
        assert (
            f"{name}: At 63 of 64 pixels, no 8-bit color turns 'class 0' into another class (proven, float32 as run); "
            "at 1, one does."
        ) in lines
    scores = pd.read_csv(tmp_path / "made/scores.csv")
    assert scores[["proven", "refuted", "unknown"]].drop_duplicates().to_numpy().tolist() == [[63, 1, 0]]
    assert len(list((tmp_path / "made/maps").glob("*.png"))) == 4
    pairs = Pairs.load(tmp_path / "made/pairs.safetensors")
    changed = (pairs.perturbation != 0).any(1).nonzero()
    assert changed.tolist() == [[image, 3, 5] for image in range(4)]
    record = json.loads((tmp_path / "made/certificate.json").read_text())
    assert record["statement"] == "float32 as run"
    assert [image[3][5] for image in record["status"]] == [-1] * 4


def test_explain_takes_the_counterexamples(run: Run, photographs: Path, planted: None) -> None:
    assert run("certify", photographs, *PIXEL, "--colors", "8bit", "--out", "made").code == 0
    ended = run(
        "explain", "--pair", "made/pairs.safetensors", *PIXEL, "--analyses", "none", "--out", "explained"
    )
    assert ended.code == 0, ended.err
    assert "row 3, column 5" in ended.out


def test_a_certificate_is_checked_with_the_images_that_it_names(
    run: Run, photographs: Path, tmp_path: Path, planted: None
) -> None:
    assert run("certify", photographs, *PIXEL, "--colors", "8bit", "--out", "made").code == 0
    ended = run("certify", "--check", "made/certificate.json", *PIXEL)
    assert ended.code == 0, ended.err
    assert ended.out.startswith(
        "The certificate holds: 252 pixels proven (float32 as run), 4 refuted; the boxes of every proven pixel cover"
    )
    path = tmp_path / "made/certificate.json"
    record = json.loads(path.read_text())
    for values in record["boxes"].values():
        del values[0]
    path.write_text(json.dumps(record))
    ended = run("certify", "--check", path, *PIXEL)
    assert ended.code == 3
    assert ended.out.startswith("The certificate does not hold: pixel row 0, column 0 of ")
    found = json.loads(run("certify", "--check", path, *PIXEL, "--json").out)
    assert found["holds"] is False
    assert len(found["problems"]) == 1


def test_a_certificate_of_the_samples_is_checked_without_naming_them(run: Run, planted: None) -> None:
    assert run("certify", "--samples", *PIXEL, "--colors", "8bit", "--out", "made").code == 0
    ended = run("certify", "--check", "made/certificate.json", *PIXEL)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("The certificate holds: ")


def test_pairs_and_pictures_of_an_earlier_run_are_not_left_beside_a_certificate(
    run: Run, photographs: Path, tmp_path: Path, planted: None
) -> None:
    maps, foreign = tmp_path / "made/maps", ["0009 of another command.png", "0001 holiday.png"]
    maps.mkdir(parents=True)
    for name in foreign:
        (maps / name).touch()
    assert run("certify", photographs, *PIXEL, "--colors", "8bit", "--out", "made").code == 0
    assert len([*maps.iterdir()]) == 6
    assert (tmp_path / "made/pairs.safetensors").exists()
    assert run("certify", photographs / NAMES[1], *PIXEL, "--colors", "8bit", "--out", "made").code == 0
    assert {path.name for path in maps.iterdir()} == {"0001 coffee.png", *foreign}
    assert run("certify", photographs / NAMES[0], *PIXEL, "--patch", "2", "--out", "made").code == 0
    assert not (tmp_path / "made/pairs.safetensors").exists()
    assert {path.name for path in maps.iterdir()} == set(foreign)
    # No certificate of patches comes with pairs, so these are of another command.
    (tmp_path / "made/pairs.safetensors").touch()
    assert run("certify", photographs / NAMES[0], *PIXEL, "--patch", "2", "--out", "made").code == 0
    assert (tmp_path / "made/pairs.safetensors").exists()


def test_another_network_or_picture_is_one_sentence(run: Run, photographs: Path, planted: None) -> None:
    assert run("certify", photographs, *PIXEL, "--colors", "8bit", "--out", "made").code == 0
    ended = run("certify", "--check", "made/certificate.json", *PIXEL[:2], "--mean", "0.1", *PIXEL[4:])
    assert ended.code == 2
    assert "model must be the network of the certificate, Pixel with fingerprint" in ended.err
    ended = run("certify", photographs / NAMES[0], "--check", "made/certificate.json", *PIXEL)
    assert ended.code == 2
    assert (
        f"images must hold every image of the certificate, but image 2 ({photographs / 'coffee.png'}) is not"
        in ended.err
    )
    assert len(ended.err.strip().splitlines()) == 1
    ended = run("certify", "--check", "none.json", *PIXEL)
    assert ended.code == 4
    assert "none.json does not exist" in ended.err
    Path("text.json").write_text("{}")
    ended = run("certify", "--check", "text.json", *PIXEL)
    assert ended.code == 2
    assert "text.json must be a certificate that weakspot certify wrote, but" in ended.err


def test_a_misclassified_image_is_not_certified(
    run: Run, photographs: Path, tmp_path: Path, planted: None
) -> None:
    lines = [f"photos/{name},{'class 1' if name == NAMES[0] else 'class 0'}" for name in NAMES]
    (tmp_path / "labels.csv").write_text("file,label\n" + "\n".join(lines) + "\n")
    ended = run("certify", photographs, *PIXEL, "--colors", "8bit", "--labels", "labels.csv", "--out", "made")
    assert ended.code == 0, ended.err
    assert "Of 192 pixels in 3 correctly classified images" in ended.out
    assert (
        f"{NAMES[0]}: The image is classified as 'class 0', not as 'class 1', to begin with; there is nothing to prove."
        in ended.out
    )
    assert len(Pairs.load(tmp_path / "made/pairs.safetensors")) == 3
    # All of them wrong: no proof, and no pairs of an earlier run beside the certificate.
    lines = [f"photos/{name},class 1" for name in NAMES]
    (tmp_path / "labels.csv").write_text("file,label\n" + "\n".join(lines) + "\n")
    ended = run("certify", photographs, *PIXEL, "--colors", "8bit", "--labels", "labels.csv", "--out", "made")
    assert ended.out.startswith("No image is classified as its label; there is nothing to prove.")
    assert "proven" not in ended.out
    assert not (tmp_path / "made/pairs.safetensors").exists()


def test_only_the_region_is_asked_about(run: Run, photographs: Path, tmp_path: Path, planted: None) -> None:
    ended = run("certify", photographs / NAMES[0], *PIXEL, "--colors", "8bit", "--region", "border:1")
    assert ended.code == 0, ended.err
    assert "At all 28 pixels of the region, no 8-bit color turns 'class 0' into another class" in ended.out
    assert not (tmp_path / "weakspot-certify/pairs.safetensors").exists()


def test_a_limit_draws_images_and_the_trial_says_what_it_is(
    run: Run, photographs: Path, tmp_path: Path, planted: None
) -> None:
    ended = run("certify", photographs, *PIXEL, "--colors", "8bit", "--limit", 2, "--out", "made")
    assert ended.code == 0, ended.err
    assert "Of 128 pixels in 2 images" in ended.out
    assert len(json.loads((tmp_path / "made/certificate.json").read_text())["names"]) == 2
    ended = run("certify", photographs, *PIXEL, "--colors", "8bit", "--quick", "--region", "border:1")
    assert "--quick: at most 16 images, which shows that it works, not how well." in ended.out


def test_time_that_is_up_leaves_pixels_unknown(run: Run, photographs: Path, planted: None) -> None:
    ended = run("certify", photographs / NAMES[0], *PIXEL, "--colors", "8bit", "--time", "1e-9")
    assert ended.code == 0, ended.err
    assert "No pixel is proven (float32 as run); 64 are unknown, because the time was up." in ended.out


def test_patches_are_certified_behind_the_masks_and_checked(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    ended = run("certify", photographs, *TINY, "--patch", "2%", "--out", "made")
    assert ended.code == 0, ended.err
    record = json.loads((tmp_path / "made/certificate.json").read_text())
    certified = sum(record["certified"])
    assert ended.out.startswith(
        f"Behind double masking, the label of {certified} of 4 images withstands every patch of up to 10 x 10 pixels "
        "(2.44% of the image), anywhere;"
    )
    assert "not the network alone" in ended.out.splitlines()[0]
    scores = pd.read_csv(tmp_path / "made/scores.csv")
    assert scores["certified"].sum() == certified
    assert list(scores["sentence"].str.startswith("Not certified")) == [
        not one for one in scores["certified"]
    ]
    ended = run("certify", "--check", "made/certificate.json", *TINY)
    assert ended.code == 0, ended.err
    assert f"{certified} of 4 images certified for 10 x 10 pixels" in ended.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--patch", "x"), "--patch must be a number such as 0.03 or 8/255, got 'x'"),
        (("--patch", "²"), "--patch must be a number such as 0.03 or 8/255, got '²'"),
        (("--patch", "0"), "patch must be a side in pixels"),
        (("--patch", "65"), "patch must be at most 64 pixels a side"),
        (("--patch", "5", "--colors", "8bit"), "--colors has no effect with --patch"),
        (("--patch", "5", "--region", "cam"), "--region has no effect with --patch"),
        (("--check", "a.json", "--patch", "5"), "--patch and --out have no effect with --check"),
        (("--check", "a.json", "--colors", "8bit"), "--out and --colors have no effect with --check"),
        (("--quick", "--limit", "2"), "--limit has no effect with --quick"),
        (("--colors", "blue"), 'colors must be "full", "8bit", a radius such as 8/255'),
        (("--colors", "8"), "did you mean 8/255?"),
        (("--time", "0"), "seconds must be a number above 0, got 0"),
        (("--fraction", "0.2"), "--fraction has no effect without"),
        (("--region", "border:0"), "width must be an integer of at least 1, got 0"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_one_sentence(
    run: Run, photographs: Path, options: tuple[str, ...], message: str
) -> None:
    ended = run("certify", photographs, *TINY, *options, "--out", "made")
    assert ended.code == 2
    assert message in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert not Path("made/certificate.json").exists()


def test_images_of_many_pixels_are_announced(
    run: Run, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("weakspot.cli.certify.certify_pixels", interrupt)
    options = (
        "--model",
        "tiny_networks:build",
        "--size",
        "80x80",
        "--region",
        "border:30",
        "--colors",
        "1/255",
    )
    ended = run("certify", photographs / NAMES[0], *options, "--time", "0.01")
    assert "take long" not in ended.err
    ended = run("certify", photographs / NAMES[0], *options)
    assert "6,000 pixels an image take long (--region asks about fewer, --time sets a limit)" in ended.err


def test_names_of_a_strangers_certificate_are_checked(
    run: Run, photographs: Path, tmp_path: Path, planted: None
) -> None:
    assert run("certify", photographs, *PIXEL, "--colors", "8bit", "--out", "made").code == 0
    path = tmp_path / "made/certificate.json"
    record = json.loads(path.read_text())
    assert "another image" not in run("certify", "--check", path, *PIXEL).err
    path.write_text(json.dumps({**record, "names": record["names"][::-1]}))
    ended = run("certify", "--check", path, *PIXEL)
    assert ended.err.count("holds another image than the one that is certified under this name") == 4
    for name in ("", str(photographs)):
        path.write_text(json.dumps({**record, "names": [name] * 4}))
        ended = run("certify", "--check", path, *PIXEL)
        assert ended.code == 2
        assert f"names must be image files, got {name!r}" in ended.err


def test_an_interrupt_keeps_what_is_known_and_no_file_of_an_earlier_run(
    run: Run, photographs: Path, tmp_path: Path, planted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("certify", photographs, *PIXEL, "--colors", "8bit", "--out", "made")
    assert run(*options).code == 0
    whole = json.loads((tmp_path / "made/certificate.json").read_text())
    certify = pixel_proofs._Prover.certify

    def interrupted(prover: Any, image: int, report: Any) -> None:
        if image == 2:
            raise KeyboardInterrupt
        certify(prover, image, report)

    monkeypatch.setattr(pixel_proofs._Prover, "certify", interrupted)
    monkeypatch.setattr("weakspot._progress.SAVE_EVERY", 0.0)
    monkeypatch.setattr("weakspot._progress.SAVE_AT_MOST", 1.0)
    ended = run(*options)
    assert (ended.code, ended.err) == (
        130,
        "weakspot: interrupted; written to made so far: certificate.json\n",
    )
    assert [path.name for path in (tmp_path / "made").rglob("*") if path.is_file()] == ["certificate.json"]
    kept = json.loads((tmp_path / "made/certificate.json").read_text())
    assert kept["status"][:2] == whole["status"][:2]
    assert kept["names"] == whole["names"]
    assert not any(map(any, kept["status"][3]))
    assert run("certify", "--check", "made/certificate.json", *PIXEL).code == 0


def test_an_image_that_gives_nan_under_a_mask_is_skipped(run: Run, photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "nan_masks.py").write_text(NAN_MASKED)
    model = ("--model", "nan_masks:build", "--mean", "0", "--size", "16x16")
    ended = run("certify", photographs, *model, "--patch", "2", "--out", "made")
    assert ended.code == 0, ended.err
    assert "rocket.png: Masked returned NaN or infinity for a changed version; skipped" in ended.err
    record = json.loads((tmp_path / "made/certificate.json").read_text())
    assert [Path(name).name for name in record["names"]] == [name for name in NAMES if name != "rocket.png"]
    assert run("certify", "--check", "made/certificate.json", *model).code == 0
