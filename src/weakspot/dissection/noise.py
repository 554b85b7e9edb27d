"""Noise of the size of a perturbation: its values at random places with random signs, a control for units."""

from __future__ import annotations

import torch
from torch import Tensor

from weakspot.attacks import draws
from weakspot.pairs import Pairs

PLACEMENTS = 16  # tries for each draw, of which the one that keeps most of the size is taken
STREAM = 1_000_000  # apart from the random streams of attacks
ROUNDING = 1e-6


def equal_noise(pairs: Pairs, number: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The clean images under noise that has the perturbation's L0, L1, L2 and L-infinity size.

    Whole pixels of the perturbation move to random places and every value takes a random sign; where it would leave
    [0, 1], it takes the other one. Only values above .5 can fail to fit with either sign: they are cut, and of up to 16
    placements the one that keeps the most is taken. If a perturbation is itself such noise, it and all draws are
    exchangeable.

    Args:
        pairs: N pairs.
        number: of the draw.
        seed: of the draws.

    Returns:
        (N, C, H, W) the noisy images, and (N,) the fraction of the perturbation's L2 norm that was kept, 1 where
        nothing was cut.
    """
    clean, change = pairs.clean, pairs.perturbation.abs()
    channels, height, width = clean.shape[1:]
    # Of both images: two attacks on one image get noise of their own.
    keys = draws.keys(torch.cat([clean, pairs.adversarial], 1), seed)
    size = change.flatten(1).norm(dim=1)
    noisy, kept = clean.clone(), torch.full_like(size, -1.0)
    for attempt in range(PLACEMENTS):
        rows = (kept < 1 - ROUNDING).nonzero()[:, 0]
        if not len(rows):
            break
        stream = STREAM + number * 2 * PLACEMENTS + 2 * attempt
        order = draws.uniform(keys[rows], stream, height * width).argsort(dim=1, stable=True)
        flipped = draws.uniform(keys[rows], stream + 1, channels, height, width) < 0.5
        moved = change[rows].flatten(2).gather(2, order[:, None].expand(-1, channels, -1))
        moved = moved.view_as(clean[rows])
        signed = torch.where(flipped, -moved, moved)
        before = clean[rows]
        # The other sign only where this one does not fit and the other one does.
        room = (before + signed - 0.5).abs() <= 0.5 + ROUNDING
        other = (before - signed - 0.5).abs() <= 0.5 + ROUNDING
        tried = (before + torch.where(~room & other, -signed, signed)).clamp(0, 1)
        share = (tried - before).flatten(1).norm(dim=1) / size[rows].where(size[rows] > 0, 1)
        share = share.where(size[rows] > 0, 1)
        better = share > kept[rows]
        noisy[rows[better]], kept[rows[better]] = tried[better], share[better]
    return noisy, kept.clamp(max=1)
