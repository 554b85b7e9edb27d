"""What the tests of budgets draw: perturbations of every scale, images with black and white pixels, regions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from weakspot.budgets import L1, L2, SSIM, Budget, Linf

LAW = settings(deadline=None, derandomize=True, max_examples=60)  # the same cases in every run

EPSILONS = st.sampled_from([0.0, 1e-4, 4 / 255, 0.3, 1.0])
LENGTHS = st.sampled_from([0.0, 1e-4, 0.1, 1.0, 3.0, 50.0])
LOSSES = st.sampled_from([0.0, 1e-4, 0.01, 0.3, 0.9])
MODES = ("global", "local")
similarities = st.builds(SSIM, LOSSES, patch=st.sampled_from([2, 3, 8]), mode=st.sampled_from(MODES))
budgets = EPSILONS.map(Linf) | LENGTHS.map(L2) | LENGTHS.map(L1) | similarities

# Square; not; sides a patch of 8 does not divide, one of them by a single pixel; sides smaller than it.
SIZES = [(1, 1), (8, 8), (8, 5), (9, 9), (3, 11), (6, 10), (17, 4)]


class Case(NamedTuple):
    """A perturbation that is wanted, images, and where they may change."""

    wanted: Tensor
    images: Tensor
    region: Tensor | None


@st.composite
def cases(draw: st.DrawFn) -> Case:
    size, channels = draw(st.sampled_from(SIZES)), draw(st.sampled_from([1, 3]))
    shape = (draw(st.integers(1, 3)), channels, *size)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    contrast = draw(st.sampled_from([0.0, 0.5, 1.0, 3.0]))
    level = draw(st.sampled_from([0.0, 0.5, 1.0]))  # with no contrast: black, gray and white images
    images = (level + contrast * (torch.rand(shape, generator=generator) - 0.5)).clamp(0, 1)
    scale = draw(st.sampled_from([0.0, 1e-6, 1e-2, 0.3, 2.0, 1e3]))
    spread = draw(st.sampled_from([0.0, 4.0]))  # of magnitudes: entries differ by orders where it is not zero
    powers = spread * (torch.rand(shape, generator=generator) - 0.5)
    wanted = scale * torch.randn(shape, generator=generator) * 10**powers
    kind = draw(st.sampled_from(["everywhere", "scattered", "empty"]))
    if kind == "everywhere":
        return Case(wanted, images, None)
    fraction = 0.4 if kind == "scattered" else 0.0
    return Case(wanted, images, torch.rand(len(images), 1, *size, generator=generator) < fraction)


def limit(budget: Budget) -> float:
    return float(getattr(budget, "eps"))  # noqa: B009 - Budget does not promise a limit's name


def pictures(channels: int, size: tuple[int, int]) -> Tensor:
    """Noise, low contrast, mostly black and white, constant gray, black, white; (6, C, H, W)."""
    noise = torch.rand(3, channels, *size, generator=torch.Generator().manual_seed(0))
    noise[1] = 0.6 + 0.05 * noise[1]
    noise[2] = (0.5 + 6 * (noise[2] - 0.5)).clamp(0, 1)
    flat = torch.tensor([0.37, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, channels, *size)
    return torch.cat([noise, flat])


def drawn(images: Tensor, scale: float, seed: int = 1) -> Tensor:
    """Normal noise of the images' shape."""
    return scale * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
