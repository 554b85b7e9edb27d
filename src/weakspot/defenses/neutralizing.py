"""Neutralizing: a classifier that blocks out, in each image it is given, what looks vulnerable and matters little.

After Chattopadhyay et al. 2020 (arXiv 2011.10794), who say that this can be a defence after the fact; how the region
is found, and every parameter, is ours. Judge it by attacks on the defended model itself: attacks on the bare one,
replayed, say nothing of an attacker who knows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weakspot.attacks import draws
from weakspot.attribution.cam import class_activations
from weakspot.checks import check_seed, check_share, is_number
from weakspot.classifier import Classifier, as_classifier
from weakspot.defenses.fills import check_fill, neutralize
from weakspot.defenses.randomness import DrawnByImage
from weakspot.defenses.wrapping import around
from weakspot.regions import top
from weakspot.smoothing import gaussian


def neutralizing(
    model: nn.Module, *, keep: float = 0.2, fill: str = "mean", randomness: float = 0.0, seed: int = 0
) -> Classifier:
    """The model defended: in every image it is given, a region is blocked out before it is classified.

    The region is found in that very image, which may be an attacked one: the top share of the gradient of the lead of
    the class predicted there (vulnerable), less the top share of that class's activation (important). Attacks on the
    result go through the fill with the region held fixed (BPDA, Athalye et al. 2018, arXiv 1802.00420), so that they
    see gradients; `fill` may have none of its own (`neutralize`).

    With randomness, sites are ranked by their gradient and, in part, by a smooth random map. That is drawn by the seed
    and the image's 8-bit content: the same image meets the same region whenever it is given, whatever its batch, and
    global generators are not drawn from. An attacker without the seed averages over draws of his own (`expectation`);
    one who has it, or may ask often enough, faces a defence without randomness.

    Args:
        model: any classifier; its weights are shared, not copied.
        keep: share of the image that counts as vulnerable, and as important.
        fill: as for `neutralize`.
        randomness: weight of the random map against the gradient's ranks, from 0 (none) to 1 (the share `keep` is
            blocked out at random places, where it is not important).
        seed: of the random maps.

    Raises:
        ValueError: when an argument does not fit, naming it.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    >>> neutralizing(model.eval(), keep=0.1)(torch.rand(2, 3, 16, 16)).shape
    torch.Size([2, 2])
    """
    check_share(keep)
    check_fill(fill)
    if not is_number(randomness) or not 0 <= randomness <= 1:
        raise ValueError(f"randomness is {randomness!r}; accepted is a number from 0 (none) to 1")
    check_seed(seed)
    classifier = as_classifier(model)
    how = f"{fill}, {randomness:.0%} random" if randomness else fill
    return around(
        _Neutralizing(classifier, keep, fill, randomness, seed),
        classifier,
        f"{classifier.name} behind neutralization ({how})",
    )


def vulnerable_region(
    classifier: Classifier,
    images: Tensor,
    *,
    keep: float,
    randomness: float = 0.0,
    seed: int = 0,
    draw: int = 0,
) -> Tensor:
    """Bool (N, 1, H, W): what `neutralizing` blocks out of these images, seen by nobody but them.

    Args:
        classifier: in eval mode.
        images: (N, C, H, W) in [0, 1].
        keep: share of the image that counts as vulnerable, and as important.
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
        keys = draws.keys(images.detach(), seed)
        noise = draws.normal(keys, draw, 1, *images.shape[2:]).to(vulnerable)
        vulnerable = (1 - randomness) * _ranks(vulnerable) + randomness * _ranks(
            gaussian(noise, sigma, radius)
        )
    return top(vulnerable.float(), keep) & ~top(important.float(), keep)


def _ranks(maps: Tensor) -> Tensor:
    """Maps (N, 1, H, W) as ranks of their sites, from 0, so that maps of any scale can be weighed together."""
    order = maps.flatten(1).argsort(dim=1, stable=True)
    return order.argsort(dim=1).view_as(maps).to(maps)


class _Neutralizing(DrawnByImage):
    """Takes images in [0, 1]; normalisation lives in the classifier that it defends."""

    def __init__(self, defended: Classifier, keep: float, fill: str, randomness: float, seed: int) -> None:
        super().__init__()
        self.defended, self.keep, self.fill = defended, keep, fill
        self.randomness, self.seed = randomness, seed

    def forward(self, images: Tensor) -> Tensor:
        region = vulnerable_region(
            self.defended, images, keep=self.keep, randomness=self.randomness, seed=self.seed, draw=self.draw
        )
        logits: Tensor = self.defended(neutralize(images, region, fill=self.fill))
        return logits
