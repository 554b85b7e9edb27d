"""Structural similarity of two images, and the Gaussian smoothing and luma that it uses."""

import torch
from torch import Tensor

from weakspot._checks import check_batch


def gaussian(maps: Tensor, sigma: float, radius: int) -> Tensor:
    """Smooth maps (N, M, H, W) with a separable Gaussian.

    Borders are mirrored, the edge pixel included ("symmetric" padding), so that the sum over a map stays the same.

    Args:
        maps: (N, M, H, W).
        sigma: in pixels.
        radius: in pixels, at which the Gaussian is cut off.
    """
    # A Gaussian of two axes is the product of two of one axis: 2 (2r + 1) taps instead of (2r + 1)^2.
    offsets = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()  # a constant map stays as it is
    for side in (3, 2):
        size = maps.shape[side]
        mirrored = maps.index_select(side, _mirrored(size, radius, maps.device))
        # One tap at a time: a convolution would first copy every window to memory.
        smooth = torch.zeros_like(maps)
        for tap, weight in enumerate(kernel.tolist()):
            smooth += weight * mirrored.narrow(side, tap, size)
        maps = smooth
    return maps


def _mirrored(size: int, radius: int, device: torch.device) -> Tensor:
    # Indices repeat with period 2 * size: 0, 1, ..., size - 1, size - 1, ..., 1, 0.
    places = torch.arange(-radius, size + radius, device=device) % (2 * size)
    return torch.minimum(places, 2 * size - 1 - places)


SIGMA, RADIUS = 1.5, 5  # 11 x 11 Gaussian
C1, C2 = 0.01**2, 0.03**2  # (K L)^2 of Wang et al., for values in [0, 1]; they keep flat patches from 0 / 0
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def ssim_map(clean: Tensor, adversarial: Tensor) -> Tensor:
    """Structural similarity around each pixel (Wang et al. 2004, doi 10.1109/TIP.2003.819861, equation 13).

    Equal to scikit-image's `structural_similarity` with gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False and data_range=1. Images with three channels are compared by luma (BT.601), with any
    other number of channels by their mean over channels.

    Args:
        clean: (N, C, H, W) in [0, 1].
        adversarial: (N, C, H, W) in [0, 1].

    Returns:
        (N, 1, H, W), at most 1; 1 where the images are equal.

    Raises:
        ValueError: if the shapes differ, or these are not batches of images.
    """
    check_batch(clean, name="clean")
    check_batch(adversarial, name="adversarial")
    if clean.shape != adversarial.shape:
        raise ValueError(
            f"adversarial must have the shape of clean, {tuple(clean.shape)}, got {tuple(adversarial.shape)}"
        )
    # float64, because local variances are small differences of large squares (MPS has no float64).
    precision = torch.float32 if clean.device.type == "mps" else torch.float64
    first, second = luma(clean.detach().to(precision)), luma(adversarial.detach().to(precision))
    # Local E[x], E[y], E[x^2], E[y^2] and E[xy], all in one pass.
    moments = gaussian(torch.cat([first, second, first**2, second**2, first * second], 1), SIGMA, RADIUS)
    mean_1, mean_2, square_1, square_2, product = moments.split(1, 1)
    # var x = E[x^2] - E[x]^2 and cov = E[xy] - E[x] E[y]: of the population, so without a factor n / (n - 1).
    variance_1, variance_2 = square_1 - mean_1**2, square_2 - mean_2**2
    covariance = product - mean_1 * mean_2
    # Equation 13 as the product of luminance and of contrast and structure together (exponents 1, C3 = C2 / 2).
    luminance = (2 * mean_1 * mean_2 + C1) / (mean_1**2 + mean_2**2 + C1)
    structure = (2 * covariance + C2) / (variance_1 + variance_2 + C2)
    similarity: Tensor = luminance * structure
    return similarity.float()


def luma(images: Tensor) -> Tensor:
    """Brightness (N, 1, H, W) of images (N, C, H, W)."""
    if images.shape[1] == 3:
        return torch.einsum("nchw,c->nhw", images, images.new_tensor(LUMA))[:, None]
    return images.mean(1, keepdim=True)
