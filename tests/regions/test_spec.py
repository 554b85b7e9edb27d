"""Regions as text equal the functions of those names, and controls know what they control."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.networks import Made, untouched
from tests.regions.test_files import paint
from weakspot import regions
from weakspot.regions import read_region
from weakspot.regions.spec import REGIONS, RegionSpec


def predicted(model: torch.nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        classes: Tensor = model(images).argmax(1)
    return classes


@pytest.fixture
def painted(tmp_path: Path) -> Path:
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[3:9, 4:15] = True
    return paint(tmp_path / "a mask.png", mask)


@pytest.mark.filterwarnings("ignore::weakspot._checks.ImageWarning")
def test_every_term_and_join_means_the_function_and_operator_of_its_name(
    pooling: Made, painted: Path
) -> None:
    model, images = pooling
    labels = predicted(model, images)
    targets = (labels + 1) % 4
    cam = regions.cam(model, images, labels, fraction=0.2)
    frame, background = (
        regions.border(images, width=3),
        regions.background(images, model=model, classes=labels),
    )
    support = regions.support(model, images, labels, targets, fraction=0.2)
    white = regions.from_file(painted, images).expand(3, -1, -1, -1)
    meanings = {
        "none": torch.ones_like(cam),
        "cam": cam,
        "border:3": frame,
        "border": regions.border(images, width=8),
        "background": background,
        "support": support,
        str(painted): white,
        "~cam": ~cam,
        "~~cam": cam,
        "cam & border:3": cam & frame,
        "cam&~border:3|background": (cam & ~frame) | background,
        "background | cam & border:3": background | (cam & frame),
        "matched:cam": regions.matched(cam, seed=5, images=images),
        "~matched:cam": ~regions.matched(cam, seed=5, images=images),
        f"~{painted} & cam": ~white & cam,
    }
    with untouched(model, images, labels, targets):
        for text, expected in meanings.items():
            found = read_region(text, model, images, labels, targets=targets, fraction=0.2, seed=5)
            assert torch.equal(found, expected), text


def test_a_name_comes_before_a_file_of_that_name(
    pooling: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = pooling
    labels = predicted(model, images)
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[3:9, 4:15] = True
    paint(tmp_path / "m.png", mask).rename(tmp_path / "cam")
    (tmp_path / "mask").write_bytes((tmp_path / "cam").read_bytes())
    monkeypatch.chdir(tmp_path)
    cam = regions.cam(model, images, labels, fraction=0.3)
    white = mask.expand(3, 1, -1, -1)
    for text, expected in {"cam": cam, "~cam": ~cam, "./cam": white, "mask": white, "~mask": ~white}.items():
        assert torch.equal(read_region(text, model, images, labels), expected), text


def test_many_complements_and_long_texts_are_parsed(pooling: Made) -> None:
    model, images = pooling
    labels = predicted(model, images)
    frame = regions.border(images, width=3)
    assert torch.equal(read_region("~" * 2001 + "border:3", model, images, labels), ~frame)
    assert torch.equal(read_region(" & ".join(["border:3"] * 100), model, images, labels), frame)
    for text in ("border:²", "border:" + "9" * 300, "x" * 300):
        with pytest.raises(ValueError, match=r"^region (is|must)"):
            read_region(text, model, images, labels)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("camm", "region must .* got 'camm' .did you mean 'cam'"),
        ("", "region must be one of none, cam.* got ''"),
        ("cam &", "region must be one of none, cam.* got 'cam &'"),
        ("cam:0.2", r"region must be cam, got 'cam:0.2' \(the fraction sets its area\)"),
        ("~none:3", r"region must be none, got '~none:3' \(nothing follows it\)"),
        (
            "somewhere",
            "region must be one of .* got 'somewhere' .or superpixels:COUNT, border:WIDTH, a mask picture",
        ),
        ("border:wide", "region must be border:WIDTH with a width in pixels, got 'border:wide'"),
        ("support", "region must not be support without a class to reach"),
    ],
)
def test_other_text_is_refused_in_one_sentence(pooling: Made, text: str, sentence: str) -> None:
    model, images = pooling
    with pytest.raises(ValueError, match=sentence) as caught:
        read_region(text, model, images, predicted(model, images))
    assert "\n" not in str(caught.value)


def test_a_mask_that_is_not_there_is_named(pooling: Made) -> None:
    model, images = pooling
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        read_region("cam & gone.png", model, images, predicted(model, images))


@pytest.mark.parametrize(
    "text",
    [
        *REGIONS, "border:3", "~cam", "~~ support", "cam & border:3", "border:3|~support",
        "matched:cam", "~matched:cam", "matched:(border:3 & cam)", "matched:border:3", "PAINTED", "~PAINTED & border",
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::weakspot._checks.ImageWarning")
def test_a_region_depends_on_the_fraction_exactly_if_it_says_so(
    pooling: Made, tmp_path: Path, text: str
) -> None:
    model, images = pooling
    labels = predicted(model, images)
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[3:9, 4:15] = True
    message = text.replace("PAINTED", str(paint(tmp_path / "cam & support.png", mask)))
    message = message if text == "PAINTED" else message.replace("cam & support.png", "mask.png")
    paint(tmp_path / "mask.png", mask)
    few, many = (
        read_region(message, model, images, labels, targets=(labels + 1) % 4, fraction=fraction, seed=5)
        for fraction in (0.1, 0.7)
    )
    assert RegionSpec.parse(message).depends_on_fraction == (not few.equal(many))


@pytest.mark.filterwarnings("ignore::weakspot._checks.ImageWarning")
@pytest.mark.parametrize("name", REGIONS)
def test_a_region_depends_on_the_image_exactly_if_its_table_says_so(pooling: Made, name: str) -> None:
    model, images = pooling
    labels = predicted(model, images)
    masks = read_region(name, model, images, labels, targets=(labels + 1) % 4)
    assert REGIONS[name].depends_on_image == any(not mask.equal(masks[0]) for mask in masks)


@pytest.mark.parametrize(
    ("text", "base", "donor"),
    [
        ("cam", None, None),
        ("matched:cam", "cam", None),
        ("matched:~cam", "~cam", None),
        ("matched:(cam & border:3)", "cam & border:3", None),
        ("matched:(cam) & (border:3)", None, None),  # neither
        ("matched:((cam) & (border:3))", "(cam) & (border:3)", None),
        ("matched:cam & border:3", None, None),  # part of a control is no control
        ("other:cam#1", "cam", 1),
        ("other:(~cam)#12", "~cam", 12),
        ("other:cam#0", None, None),
    ],
)
def test_a_spec_knows_the_region_that_it_controls(text: str, base: str | None, donor: int | None) -> None:
    spec = RegionSpec.parse(text)
    assert (str(spec), spec.donor) == (text, donor)
    assert spec.is_control == (base is not None)
    assert str(spec.control_of) == str(base)


@pytest.mark.parametrize("text", ["cam", "~cam", "cam & border:3", "border|background", "matched:cam"])
def test_a_control_is_parsed_back_from_its_text(text: str) -> None:
    region = RegionSpec.parse(text)
    for control in (region.shifted(), region.of_other_image(3)):
        assert RegionSpec.parse(str(control)) == control
        assert control.depends_on_image == region.depends_on_image
