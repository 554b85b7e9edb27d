"""SSIM maps against scikit-image and against the definition, written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.networks import Made
from weakspot.explanations.visible_change import analyze_ssim as analyze
from weakspot.pairs import Pairs
from weakspot.similarity import ssim_map

LUMA = np.array([0.299, 0.587, 0.114])


def drawn(channels: int, height: int, width: int, change: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(height * width)
    clean = torch.rand(2, channels, height, width, generator=generator)
    changed = clean + change * torch.randn(clean.shape, generator=generator)
    return clean, changed.clamp(0, 1)


def gray(image: Tensor) -> NDArray[np.float64]:
    pixels: NDArray[np.float64] = image.double().numpy()
    return np.tensordot(LUMA, pixels, 1) if len(pixels) == 3 else pixels.mean(0)


def by_definition(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Wang et al. 2004, site by site, with an 11 x 11 Gaussian and mirrored borders."""
    offsets = np.arange(-5, 6)
    line = np.exp(-0.5 * (offsets / 1.5) ** 2)
    window = np.outer(line, line) / line.sum() ** 2
    height, width = first.shape
    a, b = (np.pad(image, 5, mode="symmetric") for image in (first, second))
    found = np.empty((height, width))
    for y in range(height):
        for x in range(width):
            u, v = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mean_u, mean_v = (window * u).sum(), (window * v).sum()
            spread_u, spread_v = (window * (u - mean_u) ** 2).sum(), (window * (v - mean_v) ** 2).sum()
            shared = (window * (u - mean_u) * (v - mean_v)).sum()
            found[y, x] = (2 * mean_u * mean_v + 0.01**2) * (2 * shared + 0.03**2)
            found[y, x] /= (mean_u**2 + mean_v**2 + 0.01**2) * (spread_u + spread_v + 0.03**2)
    return found


@pytest.mark.parametrize("change", [0.003, 0.1, 1.0])
@pytest.mark.parametrize("size", [(11, 11), (16, 23), (40, 13)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_equals_scikit_image_on_luma(channels: int, size: tuple[int, int], change: float) -> None:
    from skimage.metrics import structural_similarity

    clean, adversarial = drawn(channels, *size, change)
    found = ssim_map(clean, adversarial)
    for index in range(2):
        _, expected = structural_similarity(
            gray(clean[index]),
            gray(adversarial[index]),
            full=True,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
        )
        np.testing.assert_allclose(found[index, 0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 5), (10, 4), (12, 2)], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_ssim_of_small_images_and_other_channels_follows_its_definition(
    channels: int, size: tuple[int, int]
) -> None:
    clean, adversarial = drawn(channels, *size, 0.2)
    found = ssim_map(clean, adversarial)
    for index in range(2):
        expected = by_definition(gray(clean[index]), gray(adversarial[index]))
        np.testing.assert_allclose(found[index, 0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("level", [None, 0.0, 0.3, 1.0])
def test_an_image_has_ssim_one_with_itself(channels: int, level: float | None) -> None:
    image, _ = drawn(channels, 17, 12, 0)
    image = image if level is None else torch.full_like(image, level)
    assert torch.equal(ssim_map(image, image.clone()), torch.ones(2, 1, 17, 12))


def test_ssim_is_symmetric_at_most_one_and_local() -> None:
    clean, _ = drawn(3, 30, 30, 0)
    adversarial = clean.clone()
    adversarial[:, :, 3, 4] = 1 - adversarial[:, :, 3, 4].round()
    found = ssim_map(clean, adversarial)
    torch.testing.assert_close(ssim_map(adversarial, clean), found)
    assert float(found.max()) <= 1
    near = torch.zeros(30, 30, dtype=torch.bool)
    near[:9, :10] = True  # five pixels around the changed one
    assert bool((found[:, 0, near] < 1).any())
    assert torch.equal(found[:, 0, ~near], torch.ones(2, 900 - 90))


@pytest.mark.parametrize(
    ("clean", "adversarial", "message"),
    [
        (torch.rand(1, 3, 5, 5), torch.rand(1, 3, 5, 6), "adversarial must have the shape of clean"),
        (torch.rand(1, 3, 5, 5), torch.rand(2, 3, 5, 5), "adversarial must have the shape of clean"),
        (torch.rand(3, 5, 5), torch.rand(3, 5, 5), r"clean must .* got \(3, 5, 5\)"),
        (torch.rand(1, 3, 5, 5), torch.zeros(1, 3, 5, 5, dtype=torch.uint8), "adversarial must .*uint8"),
        (torch.rand(1, 3, 5, 5), torch.full((1, 3, 5, 5), torch.nan), r"adversarial must .*\[0\]"),
    ],
)
def test_invalid_pairs_of_batches_are_errors(clean: Tensor, adversarial: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ssim_map(clean, adversarial)


def test_the_ssim_analysis_has_its_map_its_mean_and_its_minimum(pooling: Made) -> None:
    model, clean = pooling
    adversarial = (clean + 0.1).clamp(0, 1)
    classes = torch.tensor([0, 1, 2])
    found = analyze(model, Pairs(clean, adversarial, classes, classes))
    expected = ssim_map(clean, adversarial)
    torch.testing.assert_close(found.maps["ssim"], 1 - expected)
    for name, values in (("mean", expected.mean((1, 2, 3))), ("min", expected.amin((1, 2, 3)))):
        column = "ssim_windowed" if name == "mean" else "ssim_windowed_min"
        np.testing.assert_allclose(found.scores[column], values.numpy(), rtol=1e-5)
