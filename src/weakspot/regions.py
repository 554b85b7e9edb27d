"""Regions: where. Boolean masks (N, 1, H, W), combined with `&`, `|` and `~`, and controls of equal area."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from weakspot.attribution.cam import class_activation
from weakspot.checks import check_seed, check_share, closest

CONTROLS = ("shift", "random", "border")


def cam(
    model: nn.Module, images: Tensor, classes: Tensor, *, keep: float = 0.3, layer: str | None = None
) -> Tensor:
    """Where the network gathers most evidence for a class: the top share of its class activation.

    Args:
        model: any classifier.
        images: (N, C, H, W) in [0, 1].
        classes: (N,) the class each image is explained for.
        keep: share of the image, 0 to 1.
        layer: the module whose map is used; the last that keeps one where not given.

    Returns:
        Bool (N, 1, H, W), round(keep * H * W) sites true in each.
    """
    check_share(keep)
    return top(class_activation(model, images, classes, layer=layer, registration="effective"), keep)


def top(scores: Tensor, keep: float) -> Tensor:
    """The highest `keep` share of sites; ties go to the site that comes first in reading order.

    Args:
        scores: (N, 1, H, W), finite.
        keep: share of the image, 0 to 1.

    Returns:
        Bool (N, 1, H, W), exactly round(keep * H * W) sites true in each.

    Raises:
        ValueError: when scores have another shape or are not finite, or keep is no share.

    >>> top(torch.tensor([[[[3.0, 1.0], [2.0, 3.0]]]]), 0.5)
    tensor([[[[ True, False],
              [False,  True]]]])
    """
    check_share(keep)
    if scores.ndim != 4 or scores.shape[1] != 1:
        raise ValueError(f"scores has shape {tuple(scores.shape)}; accepted is (N, 1, H, W)")
    if not bool(scores.isfinite().all()):
        raise ValueError("scores holds NaN or infinity; accepted are finite numbers")
    flat = scores.flatten(1)
    chosen = flat.argsort(dim=1, descending=True, stable=True)[:, : round(keep * flat.shape[1])]
    region = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, chosen, value=True)
    return region.view_as(scores)


def matched(region: Tensor, *, kind: str = "shift", seed: int = 0) -> Tensor:
    """A control region of exactly equal area.

    Args:
        region: bool (N, 1, H, W).
        kind: "shift" moves the region, whole and wrapping around, by a random amount that is not zero;
            "random" scatters its sites; "border" takes the sites nearest the image's border.
        seed: of "shift", "random" and of the order among equally near sites of "border". Each image draws
            by `seed` and its own region, whatever else is in the batch.

    Returns:
        Bool (N, 1, H, W).

    Raises:
        ValueError: when the region is not such a mask or the kind is unknown.
    """
    if region.dtype != torch.bool or region.ndim != 4 or region.shape[1] != 1:
        raise ValueError(f"region is {tuple(region.shape)} {region.dtype}; accepted is bool (N, 1, H, W)")
    check_seed(seed)
    if kind not in CONTROLS:
        raise ValueError(f"kind is {kind!r}; {closest(kind, CONTROLS)}")
    return torch.cat([_control(mask, kind, seed) for mask in region.split(1)])


def _control(mask: Tensor, kind: str, seed: int) -> Tensor:
    content = mask.cpu().numpy().tobytes()
    digest = hashlib.blake2b(content, digest_size=7, key=str(seed).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest))
    height, width = mask.shape[2:]
    if kind == "shift":
        if height * width == 1:
            return mask.clone()
        move = int(torch.randint(1, height * width, (), generator=generator))
        return mask.roll((move // width, move % width), (2, 3))
    scores = torch.rand(1, 1, height, width, generator=generator)
    if kind == "border":
        rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
        inward = torch.minimum(
            torch.minimum(rows, height - 1 - rows), torch.minimum(columns, width - 1 - columns)
        )
        scores = scores - inward
    return top(scores.to(mask.device), int(mask.sum()) / (height * width))
