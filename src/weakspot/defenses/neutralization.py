"""Neutralization: regions of an image that look vulnerable and matter little are blocked out before classification.

After Chattopadhyay et al. 2020 (arXiv 2011.10794), who propose it as a defense after training. How the region is found
and every parameter are ours. Evaluate it by attacks on the defended model (`evaluate_defense`): attacks that were made
for the undefended model say nothing about an attacker who knows the defense.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weakspot import _random
from weakspot._checks import check_batch, check_choice, check_fraction, check_region, check_seed, is_number
from weakspot.attribution.cam import class_activations
from weakspot.classifier import Classifier, as_classifier, as_wrapped_classifier, check_images, evaluating
from weakspot.defenses.randomized import DrawnByImage
from weakspot.regions import top
from weakspot.similarity import gaussian
from weakspot.statistics.number_format import percent

RANK = 8  # of the truncated SVD
RADIUS = 3  # pixels of surroundings that inpainting uses


def neutralize(images: Tensor, region: Tensor, *, fill: str = "mean") -> Tensor:
    """Block out a region (after Chattopadhyay et al. 2020, arXiv 2011.10794).

    The fills "mean", "zero" and "blur" have their true gradients. "inpaint" and "svd" pass the gradient on as if they
    did not change the image (BPDA, Athalye et al. 2018, arXiv 1802.00420).

    Args:
        images: (N, C, H, W) in [0, 1].
        region: bool (N, 1, H, W), or (1, 1, H, W) for every image.
        fill: "mean", the mean of each channel outside the region (of the whole image, if the region is all of it);
            "zero", black; "blur", 3 x 3 means; "inpaint" from the surroundings (Telea 2004,
            doi 10.1080/10867651.2004.10487596); "svd", the best approximation of each channel with rank 8.

    Returns:
        (N, C, H, W), unchanged outside the region, bit for bit.

    Raises:
        ValueError: if an argument does not fit.

    >>> region = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    >>> region[..., 0, 0] = True
    >>> neutralize(torch.tensor([[[[1.0, 0.5], [0.5, 0.5]]]]), region)[0, 0, 0, 0].item()
    0.5
    """
    check_batch(images)
    check_region(region, images)
    check_choice("fill", fill, FILLS)
    where = region.to(images.device).expand(len(images), -1, -1, -1)
    return torch.where(where, FILLS[fill](images, where), images)


def _mean(images: Tensor, region: Tensor) -> Tensor:
    # A region that covers the whole image has no outside; then the mean is over all sites.
    whole = region.flatten(1).all(1).view(-1, 1, 1, 1)
    # Sums over many pixels would leave the range of half precision.
    outside = (~region | whole).to(torch.promote_types(images.dtype, torch.float32))
    mean = (images * outside).sum((2, 3), keepdim=True) / outside.sum((2, 3), keepdim=True)
    return mean.to(images.dtype).expand_as(images)


def _inpaint(images: Tensor, region: Tensor) -> Tensor:
    import cv2

    # OpenCV inpaints single channels of 8 bits.
    levels = (images.detach().clamp(0, 1) * 255).round().byte().cpu().numpy()
    masks = region[:, 0].cpu().numpy().astype(np.uint8)
    filled = np.stack(
        [
            np.stack([cv2.inpaint(channel, mask, RADIUS, cv2.INPAINT_TELEA) for channel in image])
            for image, mask in zip(levels, masks, strict=True)
        ]
    )
    return _straight_through(images, torch.from_numpy(filled).to(images) / 255)


def _svd(images: Tensor, region: Tensor) -> Tensor:
    del region
    # The closest matrix of this rank (Eckart and Young 1936), for each channel.
    left, sizes, right = torch.linalg.svd(images.detach().float(), full_matrices=False)
    rank = min(RANK, sizes.shape[-1])
    low = (left[..., :rank] * sizes[..., None, :rank]) @ right[..., :rank, :]
    return _straight_through(images, low.clamp(0, 1).to(images))


def _straight_through(images: Tensor, filled: Tensor) -> Tensor:
    """The filled images, with the gradient of the images."""
    return images + (filled - images).detach()


FILLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "zero": lambda images, _: torch.zeros_like(images),
    "blur": lambda images, _: F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1),
    "inpaint": _inpaint,
    "svd": _svd,
}


def neutralizing(
    model: nn.Module, *, fraction: float = 0.2, fill: str = "mean", randomness: float = 0.0, seed: int = 0
) -> Classifier:
    """The model behind a defense that blocks out a region of every image before it is classified.

    The region is found in the given image, which may be an attacked one. It is the top `fraction` of the gradient of
    the predicted class's lead (vulnerable) without the top `fraction` of the class activation (important). Attacks on
    the result see gradients through the fill with the region held fixed (BPDA, Athalye et al. 2018, arXiv 1802.00420).

    With randomness, sites are ranked by their gradient and in part by a smooth random map. The map is derived from the
    seed and the 8-bit content of the image: the same image always gets the same region, and the global generators are
    not used. An attacker without the seed averages over draws of their own (`expectation`). For an attacker who has it,
    or may query often enough, the defense is not random.

    Args:
        model: any classifier. Its weights are shared, not copied.
        fraction: of the image that counts as vulnerable, and as important.
        fill: see `neutralize`.
        randomness: weight of the random map against the ranks of the gradient, from 0 (none) to 1 (the region is random
            outside the important one).
        seed: of the random maps.

    Raises:
        ValueError: if an argument does not fit.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    >>> neutralizing(model.eval(), fraction=0.1)(torch.rand(2, 3, 16, 16)).shape
    torch.Size([2, 2])
    """
    check_fraction(fraction)
    check_choice("fill", fill, FILLS)
    if not is_number(randomness) or not 0 <= randomness <= 1:
        raise ValueError(f"randomness must be between 0 and 1, got {randomness!r}")
    check_seed(seed)
    classifier = as_classifier(model)
    description = f"{fill}, {percent(randomness)} random" if randomness else fill
    return as_wrapped_classifier(
        _Neutralizing(classifier, fraction, fill, randomness, seed),
        classifier,
        f"{classifier.name} behind neutralization ({description})",
    )


def vulnerable_region(
    classifier: Classifier,
    images: Tensor,
    *,
    fraction: float,
    randomness: float = 0.0,
    seed: int = 0,
    draw: int = 0,
) -> Tensor:
    """The region that `neutralizing` blocks out, bool (N, 1, H, W), from these images only.

    Args:
        classifier: in eval mode.
        images: (N, C, H, W) in [0, 1].
        fraction: of the image that counts as vulnerable, and as important.
        randomness: weight of the random map, 0 to 1.
        seed: of the random maps.
        draw: number of the random map of each image.
    """
    with torch.inference_mode(mode=False), torch.enable_grad():  # also if the caller disabled gradients
        point = images.detach().clone().requires_grad_()
        logits = classifier(point)
        best = logits.topk(2, dim=1)
        lead = best.values[:, 0] - best.values[:, 1]
        (gradient,) = torch.autograd.grad(lead.sum(), point, allow_unused=True, materialize_grads=True)
        important = class_activations(classifier, point.detach(), best.indices[:, :1])
    # Gradients change from site to site; smoothing makes regions of them.
    sigma = max(0.5, min(images.shape[2:]) / 64)
    radius = max(1, round(4 * sigma))
    vulnerable = gaussian(gradient.norm(dim=1, keepdim=True).double(), sigma, radius)
    if randomness:
        keys = _random.keys(images.detach(), seed)
        # Both maps as ranks: a weighted sum of gradients and noise would depend on the gradients' scale.
        noise = _random.normal(keys, draw, 1, *images.shape[2:]).to(vulnerable)
        scattered = _ranks(gaussian(noise, sigma, radius))
        vulnerable = (1 - randomness) * _ranks(vulnerable) + randomness * scattered
    return top(vulnerable.float(), fraction) & ~top(important.float(), fraction)


def _ranks(maps: Tensor) -> Tensor:
    """The ranks, from 0, of the sites of maps (N, 1, H, W), so that maps of different scales can be averaged."""
    # The inverse of a sorting permutation is the rank of each site.
    order = maps.flatten(1).argsort(dim=1, stable=True)
    return order.argsort(dim=1).view_as(maps).to(maps)


class _Neutralizing(DrawnByImage):
    """Takes images in [0, 1]; the defended classifier normalizes them."""

    def __init__(
        self, defended: Classifier, fraction: float, fill: str, randomness: float, seed: int
    ) -> None:
        super().__init__()
        self.defended, self.fraction, self.fill = defended, fraction, fill
        self.randomness, self.seed = randomness, seed

    def forward(self, images: Tensor) -> Tensor:
        check_batch(images)
        region = vulnerable_region(
            self.defended,
            images,
            fraction=self.fraction,
            randomness=self.randomness,
            seed=self.seed,
            draw=self.draw,
        )
        logits: Tensor = self.defended(neutralize(images, region, fill=self.fill))
        return logits


def oracle_neutralized(
    model: nn.Module, images: Tensor, clean: Tensor, *, fraction: float = 0.2, fill: str = "mean"
) -> Tensor:
    """Attacked images with the region blocked out that `neutralizing` finds in their *clean* images.

    No defender can do this, because a defender has the attacked image only. The result bounds what neutralization would
    achieve if attacks did not also move the region; tables must call it an oracle.

    Args:
        model: the undefended classifier.
        images: (N, C, H, W) in [0, 1], attacked.
        clean: (N, C, H, W) in [0, 1], the same images without attack.
        fraction: see `neutralizing`.
        fill: see `neutralize`.

    Returns:
        (N, C, H, W), for the undefended model to classify.

    Raises:
        ValueError: if an argument does not fit.
    """
    check_fraction(fraction)
    check_choice("fill", fill, FILLS)
    with evaluating(model) as classifier, torch.no_grad():
        images = check_images(images, classifier)
        clean = check_images(clean, classifier, name="clean")
        if clean.shape != images.shape:
            raise ValueError(
                f"clean must have the shape of images, {tuple(images.shape)}, got {tuple(clean.shape)}"
            )
        return neutralize(images, vulnerable_region(classifier, clean, fraction=fraction), fill=fill)
