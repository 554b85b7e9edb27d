"""Mask pictures: the white part is the region, or what is painted on a transparent ground."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from weakspot import Classifier, ImageWarning, regions
from weakspot.cli.app import UNREADABLE, USAGE, explained
from weakspot.cli.attack_choice import Aim, AimOptions, find_region


def named(path: Path, images: Tensor) -> Tensor:
    """As --region PATH on the command line."""
    zeros = torch.zeros(len(images), dtype=torch.long)
    aims = AimOptions(region=str(path))
    region, _ = find_region(aims, Classifier.wrap(nn.Identity()), Aim(images, zeros, None, [], zeros), 0)
    assert region is not None
    return region


def paint(path: Path, mask: Tensor) -> Path:
    Image.fromarray(mask.numpy().astype(np.uint8) * 255).save(path)
    return path


@pytest.mark.parametrize("size", [(9, 14), (14, 9), (1, 1)])
def test_a_mask_of_the_images_size_comes_in_as_it_was_painted(tmp_path: Path, size: tuple[int, int]) -> None:
    painted = torch.rand(size, generator=torch.Generator().manual_seed(0)) > 0.4
    painted[0, 0] = True
    images = torch.rand(3, 3, *size)
    path = paint(tmp_path / "mask.png", painted)
    region = regions.from_file(path, images)
    assert region.dtype == torch.bool
    assert torch.equal(region, painted[None, None])
    assert torch.equal(region, regions.from_file(str(path), images))
    assert torch.equal(region.expand(3, -1, -1, -1), named(path, images))


@pytest.mark.parametrize("zoom", [0.5, 2, 3])
def test_a_mask_of_another_size_keeps_its_place(tmp_path: Path, zoom: float) -> None:
    painted = torch.zeros(round(16 * zoom), round(24 * zoom), dtype=torch.bool)
    painted[: round(8 * zoom), round(16 * zoom) :] = True
    region = regions.from_file(paint(tmp_path / "mask.png", painted), torch.rand(1, 3, 16, 24))
    expected = torch.zeros(1, 1, 16, 24, dtype=torch.bool)
    expected[..., :8, 16:] = True
    assert torch.equal(region, expected)


def test_a_mask_of_another_shape_is_cropped_at_its_center_with_a_warning(tmp_path: Path) -> None:
    painted = torch.zeros(32, 64, dtype=torch.bool)
    painted[:, :24] = True  # of which the outer 16 columns lie outside the crop
    path = paint(tmp_path / "mask.png", painted)
    with pytest.warns(ImageWarning, match=r"mask\.png: the mask is 32 x 64 and the images are 32 x 32"):
        region = regions.from_file(path, torch.rand(1, 1, 32, 32))
    assert torch.equal(region, (torch.arange(32) < 8).expand(1, 1, 32, 32))
    with (
        pytest.warns(ImageWarning, match="another shape"),
        pytest.raises(ValueError, match="a mark where the model looks"),
    ):
        regions.from_file(paint(path, painted & (torch.arange(64) < 16)), torch.rand(1, 1, 32, 32))


@pytest.mark.parametrize("size", [(300, 451), (199, 300), (150, 224)])
def test_a_shape_that_differs_by_rounding_is_no_other_shape(tmp_path: Path, size: tuple[int, int]) -> None:
    path = paint(tmp_path / "mask.png", torch.ones(size, dtype=torch.bool))
    assert bool(regions.from_file(path, torch.rand(1, 3, 200, 300)).all())


def test_only_the_first_frame_counts_with_a_warning(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (255, 0)]
    frames[0].save(tmp_path / "mask.gif", save_all=True, append_images=frames[1:])
    with pytest.warns(ImageWarning, match="holds 2 frames"):
        assert bool(regions.from_file(tmp_path / "mask.gif", torch.rand(1, 3, 8, 8)).all())


def test_files_that_are_not_masks_are_refused_with_an_exit_code(tmp_path: Path) -> None:
    images = torch.rand(1, 3, 8, 8)
    (tmp_path / "text.png").write_text("white")
    paint(tmp_path / "black.png", torch.zeros(8, 8, dtype=torch.bool))
    for name, error, sentence, code in (
        ("none.png", FileNotFoundError, "does not exist", UNREADABLE),
        ("text.png", ValueError, "text.png: not an image in a known format$", UNREADABLE),
        (".", ValueError, "must be a picture, got a folder", UNREADABLE),
        (
            "black.png",
            ValueError,
            r"must have a mark .* \(mark where the attack acts: white on black, or .*\)$",
            USAGE,
        ),
    ):
        with pytest.raises(error, match=sentence):
            regions.from_file(tmp_path / name, images)
        with pytest.raises(Exception, match=sentence) as caught:
            named(tmp_path / name, images)
        assert explained(caught.value)[1] == code


@pytest.mark.parametrize("color", [(255, 0, 0), (0, 0, 0), (255, 255, 255), (40, 90, 10)])
@pytest.mark.parametrize("kind", ["png", "webp", "gif"])
def test_any_opaque_mark_on_a_transparent_ground_is_a_mark(
    tmp_path: Path, color: tuple[int, int, int], kind: str
) -> None:
    painted = torch.rand(8, 12, generator=torch.Generator().manual_seed(1)) > 0.6
    pixels = np.zeros((8, 12, 4), np.uint8)
    pixels[painted.numpy()] = (*color, 255)
    path = tmp_path / f"mask.{kind}"
    Image.fromarray(pixels).save(path, lossless=True)
    assert torch.equal(regions.from_file(path, torch.rand(1, 3, 8, 12)), painted[None, None])


def test_an_opaque_picture_with_an_alpha_channel_is_read_by_its_lightness(tmp_path: Path) -> None:
    pixels = np.zeros((6, 6, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[:2, :, :3] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    region = regions.from_file(tmp_path / "mask.png", torch.rand(1, 3, 6, 6))
    assert torch.equal(region[0, 0], torch.arange(6)[:, None].expand(6, 6) < 2)


def test_a_picture_without_a_mark_is_refused(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (255, 255, 255, 0)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="must have a mark where the model looks"):
        regions.from_file(tmp_path / "mask.png", torch.rand(1, 3, 8, 8))
