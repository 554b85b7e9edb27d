"""Aims: --fraction only where a region depends on it, and regions from mask images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from tests.cli.conftest import Run
from weakspot import load, sample_images
from weakspot.cli.app import Failure, app, explained
from weakspot.cli.attack_choice import Aim, AimOptions, find_region
from weakspot.cli.options import refuse_fraction


@pytest.fixture
def aim(run: Run) -> tuple[torch.nn.Module, Aim]:
    classifier = load("tiny_networks:build", input_size=(64, 64))
    images = sample_images((64, 64))[0]
    predicted = classifier(images).argmax(1)
    return classifier, Aim(images, predicted, None, ["a", "b", "c", "d"], predicted)


@pytest.mark.parametrize(
    ("region", "used"),
    [
        ("none", False),
        ("border:4", False),
        ("cam.png", False),
        ("cam", True),
        ("~matched:cam", True),
        ("matched:(border & ~ cam)", True),
        ("border|cam", True),
    ],
)
def test_a_fraction_is_refused_exactly_where_no_region_depends_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, region: str, used: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((64, 64), 255, np.uint8)).save("cam.png")
    group = typer.main.get_command(app)
    for command in ("explain", "attack", "audit"):
        one = group.commands[command]  # type: ignore[attr-defined]  # a group
        context = one.make_context(command, ["--fraction", "0.5", "x.png"])
        if used:
            refuse_fraction(context, ["none", region])
        else:
            with pytest.raises(Failure, match="--fraction has no effect without cam or superpixels"):
                refuse_fraction(context, ["none", region])
        refuse_fraction(one.make_context(command, ["x.png"]), [region])


def test_the_cam_region_has_the_fraction_of_the_image(aim: tuple[torch.nn.Module, Aim]) -> None:
    region, where = find_region(AimOptions(region="cam", fraction=0.25), aim[0], aim[1], 0)  # type: ignore[arg-type]
    assert region is not None
    assert region.float().mean((1, 2, 3)).tolist() == [0.25] * 4
    assert where == "the 25% of the image with most evidence for its class"
    where = find_region(AimOptions(region="cam", fraction=0.004), aim[0], aim[1], 0)[1]  # type: ignore[arg-type]
    assert where == "the 0.4% of the image with most evidence for its class"
    assert find_region(AimOptions(), aim[0], aim[1], 0) == (None, "whole image")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("region", "fraction", "code", "message"),
    [
        ("mask.png", 0.3, 2, "mask.png must have a mark"),
        ("notes.png", 0.3, 4, "region: notes.png: not an image in a known format"),
        ("nowhere.png", 0.3, 4, "region: nowhere.png"),
        ("cam", 0, 2, "region must hold at least one pixel, got 'cam' with fraction 0"),
        ("support", 0.3, 2, "support"),
    ],
)
def test_a_region_that_cannot_be_made_is_one_sentence(
    aim: tuple[torch.nn.Module, Aim], region: str, fraction: float, code: int, message: str
) -> None:
    Image.fromarray(np.zeros((64, 64), np.uint8)).save("mask.png")
    Path("notes.png").write_text("white")
    with pytest.raises(Exception, match=message) as caught:
        find_region(AimOptions(region=region, fraction=fraction), aim[0], aim[1], 0)  # type: ignore[arg-type]
    assert explained(caught.value)[1] == code


def test_a_mask_on_a_transparent_ground_is_white_where_it_was_painted(
    aim: tuple[torch.nn.Module, Aim],
) -> None:
    mask = np.zeros((64, 64, 4), np.uint8)
    mask[10:20, 5:30] = 255
    Image.fromarray(mask).save("mask.png")
    region, where = find_region(AimOptions(region="mask.png"), aim[0], aim[1], 0)  # type: ignore[arg-type]
    assert region is not None
    assert np.array_equal(region[0, 0].numpy(), mask[..., 3] > 0)
    assert where == "the marked part of mask.png"
