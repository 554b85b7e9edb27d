"""Superpixels are numbered without gaps, connected and of similar color."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.regions.strategies import LAW, generators_untouched, pictures
from weakspot import ImageWarning, regions, sample_images
from weakspot.attribution import class_activation


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


def chosen_by_hand(labels: Tensor, scores: Tensor, fraction: float) -> set[int]:
    """Pieces in the order of their mean score, while they fit; the first one in any case."""
    areas = {number: int((labels == number).sum()) for number in labels.unique().tolist()}
    means = {number: float(scores[labels == number].double().mean()) for number in areas}
    chosen: set[int] = set()
    for number in sorted(areas, key=lambda each: -means[each]):
        if chosen and sum(areas[each] for each in chosen) + areas[number] > fraction * labels.numel():
            break
        chosen.add(number)
    return chosen if fraction else set()


@pytest.mark.filterwarnings("ignore:the first superpixel")
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.1, 0.3, 0.8, 1.0])
def test_the_region_is_whole_superpixels_in_the_order_of_their_evidence(
    pooling: tuple[nn.Module, Tensor], fraction: float
) -> None:
    model, images = pooling
    classes = torch.tensor([0, 3, 1])
    region = regions.important_superpixels(model, images, classes, fraction=fraction, count=12)
    labels = regions.superpixels(images, count=12)
    maps = class_activation(model, images, classes, alignment="effective")
    for own, cut, scores in zip(region, labels, maps, strict=True):
        expected = chosen_by_hand(cut, scores, fraction)
        assert {number for number in cut.unique().tolist() if bool(own[cut == number].any())} == expected
        assert {number for number in cut.unique().tolist() if bool(own[cut == number].all())} == expected
        if len(expected) > 1:
            assert float(own.float().mean()) <= fraction
    text = regions.read_region("superpixels:12", model, images, classes, fraction=fraction)
    assert torch.equal(text, region)


def test_the_superpixels_of_a_planted_object_are_chosen() -> None:
    class Corner(nn.Module):
        """Class 0 is the red of the image, pooled everywhere."""

        def __init__(self) -> None:
            super().__init__()
            self.maps = nn.Conv2d(3, 2, 1, bias=False)
            self.maps.weight.data = torch.tensor([[1.0, -1, -1], [-1, 0, 1]]).view(2, 3, 1, 1)

        def forward(self, images: Tensor) -> Tensor:
            return torch.relu(self.maps(images)).mean((2, 3))

    images = torch.zeros(1, 3, 40, 40)
    images[:, 2] = 0.3
    images[:, :, 8:20, 20:32] = torch.tensor([0.9, 0.1, 0.1]).view(1, 3, 1, 1)
    area = 144 / 1600
    region = regions.important_superpixels(
        Corner().eval(), images, torch.tensor([0]), fraction=area, count=60
    )
    assert not bool(region[images[:, :1] == 0].any())
    assert float(region.float().mean()) > area / 2


@pytest.mark.parametrize("text", ["superpixels:x", "superpixels:-3", "superpixels:1.5"])
def test_a_number_of_superpixels_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="region must be superpixels:COUNT with a number of pieces, got"):
        regions.read_region(text, nn.Identity(), torch.rand(1, 3, 8, 8), torch.tensor([0]))


def test_a_single_superpixel_larger_than_the_fraction_is_warned_of(pooling: tuple[nn.Module, Tensor]) -> None:
    model, images = pooling
    with pytest.warns(
        ImageWarning, match="the first superpixel of 3 of 3 images is larger than the fraction 0.1"
    ):
        region = regions.important_superpixels(model, images, torch.tensor([0, 1, 2]), fraction=0.1, count=1)
    assert bool(region.all())
