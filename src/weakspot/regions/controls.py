"""Controls: regions of equal area that are somewhere else."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from weakspot._checks import check_choice, check_seed
from weakspot.regions.masks import top

CONTROLS = ("shift", "random", "border")


def matched(region: Tensor, *, kind: str = "shift", seed: int = 0, images: Tensor | None = None) -> Tensor:
    """Return a control region of exactly equal area.

    Args:
        region: bool (N, 1, H, W).
        kind: "shift" moves the region as a whole, wrapping around, by a random amount that is not zero; "random"
            scatters its sites; "border" takes the sites nearest to the image's border.
        seed: of "shift", of "random", and of the order among equally near sites of "border". Each image draws by `seed`
            and its own region, whatever else is in the batch.
        images: (N, C, H, W), by which each image draws as well, so that equal regions are not moved equally.

    Returns:
        Bool (N, 1, H, W).

    Raises:
        ValueError: if the region is not such a mask or the kind is unknown.
    """
    if region.dtype != torch.bool or region.ndim != 4 or region.shape[1] != 1:
        raise ValueError(f"region must be bool (N, 1, H, W), got {tuple(region.shape)} {region.dtype}")
    check_seed(seed)
    check_choice("kind", kind, CONTROLS)
    if images is not None and len(images) != len(region):
        raise ValueError(f"images must be as many as regions ({len(region)}), got {len(images)}")
    contents = [b""] * len(region) if images is None else [image.cpu().numpy().tobytes() for image in images]
    return torch.cat(
        [_control(mask, kind, seed, own) for mask, own in zip(region.split(1), contents, strict=True)]
    )


def _control(mask: Tensor, kind: str, seed: int, image: bytes) -> Tensor:
    content = mask.cpu().numpy().tobytes() + image
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
        # Random numbers below one only order the sites at the same distance.
        scores = scores - inward
    return top(scores.to(mask.device), int(mask.sum()) / (height * width))
