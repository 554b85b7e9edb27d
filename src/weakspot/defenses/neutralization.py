"""Fills: what stands where a region is blocked out.

Neutralizing: a classifier that blocks out, in each image it is given, what looks vulnerable and matters little.

After Chattopadhyay et al. 2020 (arXiv 2011.10794), who say that this can be a defense after the fact; how the region
is found, and every parameter, is ours. Judge it by attacks on the defended model itself: attacks on the bare one,
replayed, say nothing of an attacker who knows.

The oracle: a neutralization that looks at the clean image, which no defender has.
"""

from __future__ import annotations

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

RANK = 8  # of the truncated SVD
RADIUS = 3  # pixels of surroundings that inpainting looks at


def neutralize(images: Tensor, region: Tensor, *, fill: str = "mean") -> Tensor:
    """Block out a region (after Chattopadhyay et al. 2020, arXiv 2011.10794).

    Gradients pass through the fills "mean", "zero" and "blur" as they are; "inpaint" and "svd" hand on the gradient
    as if they left the image as it is (BPDA, Athalye et al. 2018, arXiv 1802.00420).

    Args:
        images: (N, C, H, W) in [0, 1].
        region: bool (N, 1, H, W), or (1, 1, H, W) for every image.
        fill: "mean" of the image's sites outside the region, channel by channel (of all, where it is the whole image);
            "zero", black; "blur", 3 x 3 means; "inpaint" from the surroundings (Telea 2004,
            doi 10.1080/10867651.2004.10487596); "svd", each channel's best approximation of rank 8.

    Returns:
        (N, C, H, W), outside the region the images' own bits.

    Raises:
        ValueError: when an argument does not fit, naming it.

    >>> region = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    >>> region[..., 0, 0] = True
    >>> neutralize(torch.tensor([[[[1.0, 0.5], [0.5, 0.5]]]]), region)[0, 0, 0, 0].item()
    0.5
    """
    check_batch(images)
    check_region(region, images)
    check_fill(fill)
    where = region.to(images.device).expand(len(images), -1, -1, -1)
    return torch.where(where, FILLS[fill](images, where), images)


def check_fill(fill: str) -> None:
    """Raises ValueError unless `fill` is the name of a fill."""
    check_choice("fill", fill, FILLS)


def _mean(images: Tensor, region: Tensor) -> Tensor:
    whole = region.flatten(1).all(1).view(-1, 1, 1, 1)
    kept = (~region | whole).to(images.dtype)
    return ((images * kept).sum((2, 3), keepdim=True) / kept.sum((2, 3), keepdim=True)).expand_as(images)


def _zero(images: Tensor, region: Tensor) -> Tensor:
    del region
    return torch.zeros_like(images)


def _blur(images: Tensor, region: Tensor) -> Tensor:
    del region
    return F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)


def _inpaint(images: Tensor, region: Tensor) -> Tensor:
    import cv2

    levels = (images.detach().clamp(0, 1) * 255).round().byte().cpu().numpy()
    masks = region[:, 0].cpu().numpy().astype(np.uint8)
    filled = np.stack(
        [
            np.stack([cv2.inpaint(channel, mask, RADIUS, cv2.INPAINT_TELEA) for channel in image])
            for image, mask in zip(levels, masks, strict=True)
        ]
    )
    return _as_if_unchanged(images, torch.from_numpy(filled).to(images) / 255)


def _svd(images: Tensor, region: Tensor) -> Tensor:
    del region
    left, sizes, right = torch.linalg.svd(images.detach().float(), full_matrices=False)
    rank = min(RANK, sizes.shape[-1])
    low = (left[..., :rank] * sizes[..., None, :rank]) @ right[..., :rank, :]
    return _as_if_unchanged(images, low.clamp(0, 1).to(images))


def _as_if_unchanged(images: Tensor, filled: Tensor) -> Tensor:
    """The filled images, their gradient that of the images."""
    return images + (filled - images).detach()


FILLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "zero": _zero,
    "blur": _blur,
    "inpaint": _inpaint,
    "svd": _svd,
}


def neutralizing(
    model: nn.Module, *, fraction: float = 0.2, fill: str = "mean", randomness: float = 0.0, seed: int = 0
) -> Classifier:
    """The model defended: in every image it is given, a region is blocked out before it is classified.

    The region is found in that very image, which may be an attacked one: the top share of the gradient of the lead of
    the class predicted there (vulnerable), less the top share of that class's activation (important). Attacks on the
    result go through the fill with the region held fixed (BPDA, Athalye et al. 2018, arXiv 1802.00420), so that they
    see gradients; `fill` may have none of its own (`neutralize`).

    With randomness, sites are ranked by their gradient and, in part, by a smooth random map. That is drawn by the seed
    and the image's 8-bit content: the same image meets the same region whenever it is given, whatever its batch, and
    global generators are not drawn from. An attacker without the seed averages over draws of his own (`expectation`);
    one who has it, or may ask often enough, faces a defense without randomness.

    Args:
        model: any classifier; its weights are shared, not copied.
        fraction: share of the image that counts as vulnerable, and as important.
        fill: as for `neutralize`.
        randomness: weight of the random map against the gradient's ranks, from 0 (none) to 1 (the share `fraction` is
            blocked out at random places, where it is not important).
        seed: of the random maps.

    Raises:
        ValueError: when an argument does not fit, naming it.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    >>> neutralizing(model.eval(), fraction=0.1)(torch.rand(2, 3, 16, 16)).shape
    torch.Size([2, 2])
    """
    check_fraction(fraction)
    check_fill(fill)
    if not is_number(randomness) or not 0 <= randomness <= 1:
        raise ValueError(f"randomness is {randomness!r}; accepted is a number from 0 (none) to 1")
    check_seed(seed)
    classifier = as_classifier(model)
    how = f"{fill}, {randomness:.0%} random" if randomness else fill
    return as_wrapped_classifier(
        _Neutralizing(classifier, fraction, fill, randomness, seed),
        classifier,
        f"{classifier.name} behind neutralization ({how})",
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
    """Bool (N, 1, H, W): what `neutralizing` blocks out of these images, seen by nobody but them.

    Args:
        classifier: in eval mode.
        images: (N, C, H, W) in [0, 1].
        fraction: share of the image that counts as vulnerable, and as important.
        randomness: weight of the random map, 0 to 1.
        seed: of the random maps.
        draw: which of each image's random maps.
    """
    with torch.inference_mode(mode=False), torch.enable_grad():
        point = images.detach().clone().requires_grad_()
        logits = classifier(point)
        best = logits.topk(2, dim=1)
        (gradient,) = torch.autograd.grad(
            (best.values[:, 0] - best.values[:, 1]).sum(), point, allow_unused=True, materialize_grads=True
        )
        important = class_activations(classifier, point.detach(), best.indices[:, :1])
    sigma = max(0.5, min(images.shape[2:]) / 64)
    radius = max(1, round(4 * sigma))
    vulnerable = gaussian(gradient.norm(dim=1, keepdim=True).double(), sigma, radius)
    if randomness:
        keys = _random.keys(images.detach(), seed)
        noise = _random.normal(keys, draw, 1, *images.shape[2:]).to(vulnerable)
        vulnerable = (1 - randomness) * _ranks(vulnerable) + randomness * _ranks(
            gaussian(noise, sigma, radius)
        )
    return top(vulnerable.float(), fraction) & ~top(important.float(), fraction)


def _ranks(maps: Tensor) -> Tensor:
    """Maps (N, 1, H, W) as ranks of their sites, from 0, so that maps of any scale can be weighed together."""
    order = maps.flatten(1).argsort(dim=1, stable=True)
    return order.argsort(dim=1).view_as(maps).to(maps)


class _Neutralizing(DrawnByImage):
    """Takes images in [0, 1]; normalization lives in the classifier that it defends."""

    def __init__(
        self, defended: Classifier, fraction: float, fill: str, randomness: float, seed: int
    ) -> None:
        super().__init__()
        self.defended, self.fraction, self.fill = defended, fraction, fill
        self.randomness, self.seed = randomness, seed

    def forward(self, images: Tensor) -> Tensor:
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

    No defender can do this: he is given the attacked image only. It is what neutralization would be worth if attacks
    did not also move the region, and belongs in a table only under the name of an oracle.

    Args:
        model: the bare classifier.
        images: (N, C, H, W) in [0, 1], as attacked.
        clean: (N, C, H, W) in [0, 1], what they were made of.
        fraction: as for `neutralizing`.
        fill: as for `neutralize`.

    Returns:
        (N, C, H, W), for the bare model to classify.

    Raises:
        ValueError: when an argument does not fit, naming it.
    """
    check_fraction(fraction)
    check_fill(fill)
    with evaluating(model) as classifier, torch.no_grad():
        images = check_images(images, classifier)
        clean = check_images(clean, classifier, name="clean")
        if clean.shape != images.shape:
            raise ValueError(
                f"clean has shape {tuple(clean.shape)} and images {tuple(images.shape)}; accepted are two batches of "
                "one shape"
            )
        return neutralize(images, vulnerable_region(classifier, clean, fraction=fraction), fill=fill)
