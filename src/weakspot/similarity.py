"""Similarity: where two images look different to the eye.

Smoothing: Gaussian means of maps, borders mirrored, so that sums over a map are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weakspot._checks import check_batch


def gaussian(maps: Tensor, sigma: float, radius: int) -> Tensor:
    """Maps (N, M, H, W) under a separable Gaussian cut at `radius` pixels; the edge pixel itself is mirrored too."""
    offsets = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    for side in (3, 2):
        size = maps.shape[side]
        mirrored = maps.index_select(side, _mirrored(size, radius, maps.device))
        # Tap by tap: a convolution would lay out every window in memory first.
        smooth = torch.zeros_like(maps)
        for tap, weight in enumerate(kernel.tolist()):
            smooth += weight * mirrored.narrow(side, tap, size)
        maps = smooth
    return maps


def _mirrored(size: int, radius: int, device: torch.device) -> Tensor:
    places = torch.arange(-radius, size + radius, device=device) % (2 * size)
    return torch.minimum(places, 2 * size - 1 - places)


SIGMA, RADIUS = 1.5, 5  # 11 x 11 Gaussian
C1, C2 = 0.01**2, 0.03**2
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def ssim_map(clean: Tensor, adversarial: Tensor) -> Tensor:
    """Structural similarity of the two images around each site (Wang et al. 2004, doi 10.1109/TIP.2003.819861).

    Equal to scikit-image's `structural_similarity` with gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False and data_range=1, on luma (BT.601) where images have three channels; of other
    channel counts but one, the mean over channels is compared.

    Args:
        clean: (N, C, H, W) in [0, 1].
        adversarial: (N, C, H, W) in [0, 1].

    Returns:
        (N, 1, H, W), 1 where nothing changed.

    Raises:
        ValueError: when the two differ in shape or are no such batches.
    """
    check_batch(clean, name="clean")
    check_batch(adversarial, name="adversarial")
    if clean.shape != adversarial.shape:
        raise ValueError(
            f"clean is {tuple(clean.shape)}, adversarial {tuple(adversarial.shape)}; accepted is one shape"
        )
    # float64: local variances are small differences of large squares.
    precision = torch.float32 if clean.device.type == "mps" else torch.float64
    first, second = luma(clean.detach().to(precision)), luma(adversarial.detach().to(precision))
    moments = gaussian(torch.cat([first, second, first**2, second**2, first * second], 1), SIGMA, RADIUS)
    mean_1, mean_2, square_1, square_2, product = moments.split(1, 1)
    variance_1, variance_2 = square_1 - mean_1**2, square_2 - mean_2**2
    covariance = product - mean_1 * mean_2
    luminance = (2 * mean_1 * mean_2 + C1) / (mean_1**2 + mean_2**2 + C1)
    structure = (2 * covariance + C2) / (variance_1 + variance_2 + C2)
    similarity: Tensor = luminance * structure
    return similarity.float()


def luma(images: Tensor) -> Tensor:
    """(N, 1, H, W) brightness of images (N, C, H, W)."""
    if images.shape[1] == 3:
        return torch.einsum("nchw,c->nhw", images, images.new_tensor(LUMA))[:, None]
    return images.mean(1, keepdim=True)
