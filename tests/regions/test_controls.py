"""Controls have exactly equal area and the promised shape."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.regions.strategies import LAW, distance_to_border, masks
from weakspot import regions

KINDS = ("shift", "random", "border")


@pytest.mark.parametrize("kind", KINDS)
@LAW
@given(region=masks(), seed=st.integers(0, 2**40))
def test_a_control_has_exactly_the_regions_area_and_draws_alone(kind: str, region: Tensor, seed: int) -> None:
    before = region.clone()
    control = regions.matched(region, kind=kind, seed=seed)
    assert control.dtype == torch.bool
    assert torch.equal(control.flatten(1).sum(1), region.flatten(1).sum(1))
    assert torch.equal(control, regions.matched(region, kind=kind, seed=seed))
    assert torch.equal(region, before)
    alone = [regions.matched(mask, kind=kind, seed=seed) for mask in region.split(1)]
    assert torch.equal(control, torch.cat(alone))
    assert torch.equal(control.flip(0), regions.matched(region.flip(0), kind=kind, seed=seed))


@LAW
@given(masks(), st.integers(0, 2**40))
def test_shift_is_a_circular_shift_by_something(region: Tensor, seed: int) -> None:
    height, width = region.shape[2:]
    for mask, control in zip(
        region.split(1), regions.matched(region, kind="shift", seed=seed).split(1), strict=True
    ):
        moves = set(product(range(height), range(width))) - {(0, 0)}
        assert any(torch.equal(mask.roll(move, (2, 3)), control) for move in moves or {(0, 0)})


def test_shift_reaches_every_place_but_its_own() -> None:
    site = torch.zeros(1, 1, 3, 4, dtype=torch.bool)
    site[0, 0, 1, 2] = True
    reached = sum(regions.matched(site, kind="shift", seed=seed).int() for seed in range(200))
    assert isinstance(reached, Tensor)
    assert int(reached[0, 0, 1, 2]) == 0
    assert int((reached > 0).sum()) == 11


def test_random_takes_every_site_equally_often() -> None:
    region = torch.zeros(1, 1, 4, 5, dtype=torch.bool)
    region[..., :5] = torch.tensor([True, False, False, False, False])
    drawn = torch.cat([regions.matched(region, kind="random", seed=seed) for seed in range(500)])
    rates = drawn.float().mean(0)
    assert float((rates - 0.2).abs().max()) < 0.07  # four standard errors


@LAW
@given(masks(), st.integers(0, 2**40))
def test_border_leaves_out_no_site_nearer_the_border_than_one_it_takes(region: Tensor, seed: int) -> None:
    inward = distance_to_border(*region.shape[2:])
    for control in regions.matched(region, kind="border", seed=seed)[:, 0]:
        if bool(control.any()) and not bool(control.all()):
            assert int(inward[control].max()) <= int(inward[~control].min())


@pytest.mark.parametrize("kind", KINDS)
def test_controls_of_different_seeds_differ(kind: str) -> None:
    region = torch.zeros(1, 1, 9, 8, dtype=torch.bool)
    region[..., 2:5, 3:6] = True
    controls = [regions.matched(region, kind=kind, seed=seed) for seed in range(5)]
    assert any(not torch.equal(controls[0], other) for other in controls[1:])


@pytest.mark.parametrize(
    "bad",
    [
        torch.ones(1, 1, 3, 3),
        torch.ones(1, 3, 3, dtype=torch.bool),
        torch.ones(1, 3, 3, 3, dtype=torch.bool),
    ],
    ids=["float", "three dimensions", "three channels"],
)
def test_matched_refuses_tensors_that_are_not_regions(bad: Tensor) -> None:
    with pytest.raises(ValueError, match=r"region must be bool \(N, 1, H, W\), got"):
        regions.matched(bad)


def test_regions_that_are_alike_are_moved_apart_by_their_images() -> None:
    region = torch.zeros(12, 1, 9, 9, dtype=torch.bool)
    region[..., :3, :3] = True
    images = torch.rand(12, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    alike, apart = (regions.matched(region, images=known) for known in (None, images))
    assert len(alike.flatten(1).unique(dim=0)) == 1
    assert len(apart.flatten(1).unique(dim=0)) > 6
    assert torch.equal(apart[3:4], regions.matched(region[3:4], images=images[3:4]))
    with pytest.raises(ValueError, match="images must be as many as regions"):
        regions.matched(region, images=images[:3])


def test_matched_suggests_the_kind_that_was_meant() -> None:
    with pytest.raises(ValueError, match=r"kind must .* got 'shfit' \(did you mean 'shift'\?"):
        regions.matched(torch.ones(1, 1, 3, 3, dtype=torch.bool), kind="shfit")


def test_images_of_any_float_type_with_or_without_gradients_are_drawn_by() -> None:
    region, images = torch.rand(2, 1, 6, 6) > 0.5, torch.rand(2, 3, 6, 6)
    plain = regions.matched(region, images=images)
    assert torch.equal(regions.matched(region, images=images.clone().requires_grad_()), plain)
    assert torch.equal(regions.matched(region, images=images.to(memory_format=torch.channels_last)), plain)
    assert regions.matched(region, images=images.bfloat16()).shape == region.shape
    with pytest.raises(ValueError, match="region must hold at least one mask"):
        regions.matched(region[:0])
