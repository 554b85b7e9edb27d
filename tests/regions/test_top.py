"""The highest sites: exact areas, and ties broken by position."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.regions.strategies import LAW, scores
from weakspot import regions


@LAW
@given(scores(), st.floats(0, 1))
def test_top_takes_exactly_the_first_sites_of_a_stable_sort(drawn: Tensor, fraction: float) -> None:
    found = regions.top(drawn, fraction)
    assert found.dtype == torch.bool
    assert found.shape == drawn.shape
    for region, values in zip(found.flatten(1), drawn.flatten(1), strict=True):
        order = np.argsort(-values.numpy(), kind="stable")
        expected = np.zeros(values.numel(), bool)
        expected[order[: round(fraction * values.numel())]] = True
        np.testing.assert_array_equal(region.numpy(), expected)


@LAW
@given(scores(), st.floats(0, 1), st.floats(0, 1))
def test_a_smaller_share_lies_inside_a_larger_one(drawn: Tensor, one: float, other: float) -> None:
    small, large = (regions.top(drawn, fraction) for fraction in sorted((one, other)))
    assert not bool((small & ~large).any())


@pytest.mark.parametrize("fraction", [-0.01, 1.01, float("nan")])
def test_top_refuses_fractions_outside_their_range(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction must"):
        regions.top(torch.rand(1, 1, 3, 3), fraction)


@pytest.mark.parametrize("bad", [torch.rand(3, 3), torch.rand(1, 3, 3), torch.rand(2, 3, 3, 3)])
def test_top_refuses_scores_of_another_shape(bad: Tensor) -> None:
    with pytest.raises(ValueError, match=r"scores must have shape \(N, 1, H, W\), got"):
        regions.top(bad, 0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_top_refuses_scores_that_are_not_finite(bad: float) -> None:
    values = torch.rand(2, 1, 3, 3)
    values[1, 0, 2, 1] = bad
    with pytest.raises(ValueError, match="scores must be finite, got NaN or infinity"):
        regions.top(values, 0.5)
