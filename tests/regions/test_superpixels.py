"""Superpixels are numbered without gaps, connected and of similar color."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.regions.strategies import LAW, generators_untouched, pictures
from weakspot import ImageWarning, regions, sample_images


@LAW
@given(pictures(), st.sampled_from([1, 2, 5, 100]))
def test_superpixels_are_numbered_from_zero_without_gaps_and_each_is_in_one_piece(
    images: Tensor, count: int
) -> None:
    from skimage.measure import label

    before = images.clone()
    with generators_untouched():
        labels = regions.superpixels(images, count=count)
    assert torch.equal(images, before)
    assert labels.dtype == torch.int64
    assert labels.shape == (len(images), 1, *images.shape[2:])
    for one in labels:
        assert one.unique().tolist() == list(range(int(one.max()) + 1))
        for number in range(int(one.max()) + 1):
            assert label((one[0] == number).numpy(), connectivity=1).max() == 1
    if count == 1:
        assert not bool(labels.any())


@LAW
@given(pictures())
def test_superpixels_of_an_image_do_not_depend_on_its_batch(images: Tensor) -> None:
    labels = regions.superpixels(images, count=6)
    assert torch.equal(labels, torch.cat([regions.superpixels(one, count=6) for one in images.split(1)]))
    assert torch.equal(labels.flip(0), regions.superpixels(images.flip(0), count=6))
    assert torch.equal(labels, regions.superpixels(images, count=6))


@LAW
@given(pictures(channels=1))
def test_gray_is_cut_as_the_same_gray_in_three_channels(images: Tensor) -> None:
    color = images.expand(-1, 3, -1, -1)
    assert torch.equal(regions.superpixels(images, count=9), regions.superpixels(color, count=9))


@pytest.mark.parametrize("size", [(40, 60), (61, 35), (24, 24)])
@pytest.mark.parametrize("count", [12, 50])
def test_no_superpixel_crosses_a_planted_edge_and_there_are_about_as_many_as_asked(
    size: tuple[int, int], count: int
) -> None:
    images = torch.zeros(1, 3, *size)
    images[:, 0, : size[0] // 3] = 0.9
    images[:, 2, :, size[1] // 2 + 3 :] = 0.8
    labels = regions.superpixels(images, count=count)[0, 0]
    for number in range(int(labels.max()) + 1):
        assert len(images[0, :, labels == number].unique(dim=1)[0]) == 1
    assert count / 2 <= int(labels.max()) + 1 <= 2 * count


def test_photographs_fall_into_one_piece_or_into_many() -> None:
    images, _ = sample_images((96, 128))
    assert not bool(regions.superpixels(images, count=1).any())
    assert int(regions.superpixels(images).amax((1, 2, 3)).min()) > 30


def test_more_superpixels_than_pixels_are_as_many_as_pixels() -> None:
    images = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    assert int(regions.superpixels(images, count=1000).max()) + 1 == 35


@pytest.mark.parametrize("count", [0, -3, 2.5])
def test_a_count_that_is_none_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=r"count must be an integer of at least 1, got"):
        regions.superpixels(torch.rand(1, 3, 8, 8), count=count)


def test_images_of_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="images must have 1 or 3 channels, got 4"):
        regions.superpixels(torch.rand(1, 4, 8, 8))


def test_normalized_images_are_noticed() -> None:
    with pytest.warns(ImageWarning, match="are clipped to"):
        regions.superpixels(torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
