"""Regions: exact areas, ties by position, and controls that are what they say."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from weakspot import regions
from weakspot.attribution import class_activation

LAW = settings(deadline=None, derandomize=True)  # the same cases in every run

KINDS = ("shift", "random", "border")


@st.composite
def scores(draw: st.DrawFn) -> Tensor:
    """Scores (N, 1, H, W), of which some have many ties."""
    count, height, width = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 7))
    values = draw(st.sampled_from([1, 2, 5, 10_000]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return torch.randint(-values, values, (count, 1, height, width), generator=generator).float() / 7


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """Masks (N, 1, H, W) of every area, from nothing to everything."""
    drawn = draw(scores())
    return drawn > draw(st.sampled_from([-1e9, -0.2, 0.0, 0.1, 1e9]))


def distance_to_border(height: int, width: int) -> Tensor:
    rows = [[min(y, height - 1 - y, x, width - 1 - x) for x in range(width)] for y in range(height)]
    return torch.tensor(rows)


@LAW
@given(scores(), st.floats(0, 1))
def test_top_takes_exactly_the_first_sites_of_a_stable_sort(drawn: Tensor, keep: float) -> None:
    found = regions.top(drawn, keep)
    assert found.dtype == torch.bool
    assert found.shape == drawn.shape
    for region, values in zip(found.flatten(1), drawn.flatten(1), strict=True):
        order = np.argsort(-values.numpy(), kind="stable")
        expected = np.zeros(values.numel(), bool)
        expected[order[: round(keep * values.numel())]] = True
        np.testing.assert_array_equal(region.numpy(), expected)


@LAW
@given(scores(), st.floats(0, 1), st.floats(0, 1))
def test_a_smaller_share_lies_inside_a_larger_one(drawn: Tensor, one: float, other: float) -> None:
    small, large = (regions.top(drawn, keep) for keep in sorted((one, other)))
    assert not bool((small & ~large).any())


@pytest.mark.parametrize("keep", [-0.01, 1.01, float("nan")])
def test_top_and_cam_refuse_what_is_no_share(pooling: tuple[nn.Module, Tensor], keep: float) -> None:
    model, images = pooling
    with pytest.raises(ValueError, match="keep is"):
        regions.top(torch.rand(1, 1, 3, 3), keep)
    with pytest.raises(ValueError, match="keep is"):
        regions.cam(model, images, torch.zeros(3, dtype=torch.long), keep=keep)


@pytest.mark.parametrize("bad", [torch.rand(3, 3), torch.rand(1, 3, 3), torch.rand(2, 3, 3, 3)])
def test_top_refuses_scores_of_another_shape(bad: Tensor) -> None:
    with pytest.raises(ValueError, match=r"scores has shape .*accepted is \(N, 1, H, W\)"):
        regions.top(bad, 0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_top_refuses_scores_that_are_not_finite(bad: float) -> None:
    values = torch.rand(2, 1, 3, 3)
    values[1, 0, 2, 1] = bad
    with pytest.raises(ValueError, match="scores holds NaN or infinity"):
        regions.top(values, 0.5)


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
def test_matched_refuses_what_is_no_region(bad: Tensor) -> None:
    with pytest.raises(ValueError, match=r"region is .*accepted is bool \(N, 1, H, W\)"):
        regions.matched(bad)


def test_matched_suggests_the_kind_that_was_meant() -> None:
    with pytest.raises(ValueError, match=r"kind is 'shfit'; did you mean shift\?"):
        regions.matched(torch.ones(1, 1, 3, 3, dtype=torch.bool), kind="shfit")


@pytest.mark.parametrize("layer", [None, "stem", "branch"])
def test_cam_is_the_top_of_the_registered_class_activation(
    pooling: tuple[nn.Module, Tensor], layer: str | None
) -> None:
    model, images = pooling
    classes = torch.tensor([0, 3, 1])
    maps = class_activation(model, images, classes, layer=layer, registration="effective")
    for keep in (0.0, 0.1, 0.3, 1.0):
        region = regions.cam(model, images, classes, keep=keep, layer=layer)
        assert region.flatten(1).sum(1).tolist() == [round(keep * 400)] * 3
        assert torch.equal(region, regions.top(maps, keep))
