"""Frames have the requested width."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.regions.strategies import LAW, distance_to_border, pictures
from weakspot import regions


@LAW
@given(pictures(), st.integers(1, 6))
def test_the_border_holds_exactly_the_sites_nearer_than_its_width(images: Tensor, width: int) -> None:
    before = images.clone()
    region = regions.border(images, width=width)
    count, _, height, across = images.shape
    assert region.dtype == torch.bool
    assert torch.equal(region, (distance_to_border(height, across) < width).expand(count, 1, -1, -1))
    inner = max(height - 2 * width, 0) * max(across - 2 * width, 0)
    assert region.flatten(1).sum(1).tolist() == [height * across - inner] * count
    assert not bool((region & ~regions.border(images, width=width + 1)).any())
    assert torch.equal(images, before)


@pytest.mark.parametrize("width", [0, -1, 1.5])
def test_a_frame_of_no_width_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=r"width must be an integer of at least 1, got"):
        regions.border(torch.rand(1, 3, 8, 8), width=width)


def test_images_without_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images must .* got \(3, 8, 8\)"):
        regions.border(torch.rand(3, 8, 8), width=1)
