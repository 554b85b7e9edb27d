"""What the tests of regions draw: scores, masks and images small enough for brute force."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

LAW = settings(deadline=None, derandomize=True)  # the same cases in every run


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


@st.composite
def pictures(draw: st.DrawFn, channels: int | None = None, side: int = 8, shortest: int = 1) -> Tensor:
    """Images (N, C, H, W) in [0, 1]: noise, dark with a few bright pixels, or constant."""
    size = [draw(st.integers(1, 3)), channels or draw(st.sampled_from([1, 3]))]
    size += [draw(st.integers(shortest, side)), draw(st.integers(shortest, side))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    noise = torch.rand(size, generator=generator)
    kind = draw(st.sampled_from(["noise", "sparse", "constant"]))
    if kind == "sparse":
        return noise * (torch.rand(size, generator=generator) < 0.15)
    return torch.full(size, float(noise.flatten()[0])) if kind == "constant" else noise


def distance_to_border(height: int, width: int) -> Tensor:
    """(H, W) steps from each site to the nearest outermost pixel."""
    rows = [[min(y, height - 1 - y, x, width - 1 - x) for x in range(width)] for y in range(height)]
    return torch.tensor(rows)


@contextmanager
def generators_untouched() -> Iterator[None]:
    """Asserts that nothing was drawn from the random numbers of torch, numpy and Python."""

    def states() -> list[object]:
        return [torch.random.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()]  # noqa: NPY002

    before = states()
    yield
    assert states() == before
