"""Sums over sites against loops over every shift."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weakspot.statistics import products_over_shifts, queen_lag, ranks, standardized

LAW = settings(deadline=None, derandomize=True)  # the same cases in every run


@st.composite
def maps(draw: st.DrawFn, *, least: int = 1) -> Tensor:
    """Maps (N, H, W), of which some have many ties."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(least, 5)), draw(st.integers(least, 6)))
    values = draw(st.sampled_from([2, 5, 10_000]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return torch.randint(-values, values, shape, generator=generator) / 3


@LAW
@given(maps(), st.integers(0, 2**32))
def test_products_at_a_shift_pair_each_site_with_the_other_map_rolled_by_it(fixed: Tensor, seed: int) -> None:
    shifted = torch.randn(fixed.shape, generator=torch.Generator().manual_seed(seed))
    found = products_over_shifts(fixed, shifted)
    for image, (first, second) in enumerate(zip(fixed.numpy(), shifted.numpy(), strict=True)):
        for down, across in np.ndindex(*first.shape):
            expected = (first.astype(float) * np.roll(second, (down, across), (0, 1))).sum()
            assert float(found[image, down, across]) == pytest.approx(expected, rel=1e-6, abs=1e-4)


def test_products_take_masks_and_do_not_take_the_opposite_shift() -> None:
    fixed, shifted = torch.zeros(1, 4, 5, dtype=torch.bool), torch.zeros(1, 4, 5, dtype=torch.bool)
    fixed[0, 1, 3], shifted[0, 0, 1] = True, True
    found = products_over_shifts(fixed, shifted).round()
    assert found.nonzero().tolist() == [[0, 1, 2]]  # down by one and right by two brings one onto the other


@LAW
@given(maps(least=2))
def test_standardized_maps_have_mean_zero_and_deviation_one(values: Tensor) -> None:
    for original, found in zip(values, standardized(values), strict=True):
        if float(original.double().std(unbiased=False)) > 0:
            expected = (original.double().numpy() - original.double().numpy().mean()) / (
                original.double().numpy().std()
            )
            np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)
        else:
            assert bool(found.isnan().all())


@pytest.mark.parametrize("constant", [0.0, 0.1, -1e-20, 1e10])
def test_a_constant_map_cannot_be_standardized_and_spoils_no_neighbor(constant: float) -> None:
    values = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(0))
    values[0] = constant
    found = standardized(values)
    assert bool(found[0].isnan().all())
    assert torch.equal(found[1:], standardized(values[1:]))


@LAW
@given(maps())
def test_ranks_count_smaller_sites_and_average_ties(values: Tensor) -> None:
    for original, found in zip(values.flatten(1), ranks(values).flatten(1), strict=True):
        for value, rank in zip(original, found, strict=True):
            expected = int((original < value).sum()) + (int((original == value).sum()) + 1) / 2
            assert float(rank) == expected


@LAW
@given(maps())
def test_queen_lag_is_the_mean_of_the_neighbors_there_are(values: Tensor) -> None:
    found = queen_lag(values)
    height, width = values.shape[1:]
    for image, y, x in np.ndindex(*values.shape):
        as_wrapped_classifier = [
            float(values[image, j, i])
            for j in range(max(0, y - 1), min(height, y + 2))
            for i in range(max(0, x - 1), min(width, x + 2))
            if (j, i) != (y, x)
        ]
        expected = sum(as_wrapped_classifier) / len(as_wrapped_classifier) if as_wrapped_classifier else 0.0
        assert float(found[image, y, x]) == pytest.approx(expected, abs=1e-4)
