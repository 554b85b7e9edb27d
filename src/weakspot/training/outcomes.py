"""Testing: which images a trained network still reads rightly, as they are and under each attack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from weakspot._checks import check_classes, check_count
from weakspot.attacks import ensemble, pgd
from weakspot.budgets import Budget
from weakspot.classifier import evaluating, predict
from weakspot.datasets import LabeledImages
from weakspot.training.data import find_backgrounds

TESTS = {
    "clean": "the images as they are",
    "localized": "PGD in the background",
    "full": "PGD everywhere",
    "strongest": "both and the ensemble `attacks.ensemble` everywhere, on the first images",
    "swapped": "another image's background behind the object",
}


class Judged(NamedTuple):
    """Images (N, C, H, W), labels (N,) and bool masks (N, 1, H, W) of their backgrounds."""

    images: Tensor
    labels: Tensor
    backgrounds: Tensor


def judged_images(
    data: LabeledImages,
    *,
    limit: int | None = None,
    masks: Path | None = None,
    progress: Callable[[float], None] | None = None,
) -> Judged:
    """The first `limit` images of the data with their backgrounds, which `masks` keeps.

    Raises:
        ValueError: when these are fewer than two images.
    """
    if len(data) < 2 or (limit is not None and (not isinstance(limit, int) or limit < 2)):
        raise ValueError(
            f"limit is {limit} of {len(data)} test images; accepted are two and more, to swap backgrounds"
        )
    rows = torch.arange(len(data) if limit is None else min(limit, len(data)))
    part = data.subset(rows)
    found = find_backgrounds(part, cache=masks, progress=progress)
    return Judged(part.images(rows), part.labels, found.masks(rows))


def outcomes(
    model: nn.Module,
    test: Judged,
    *,
    budget: Budget,
    steps: int,
    strongest: int = 500,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Tensor]:
    """For each of `TESTS` whether each image is read rightly: bool (N,), for "strongest" (strongest,) the first.

    An attacked image counts as right only if the clean one does.

    Args:
        model: a classifier of these images.
        test: N images.
        budget: of all attacks.
        steps: of PGD.
        strongest: images for the ensemble, which costs as much as a hundred times the others.
        seed: of attacks and of the swap.
        progress: called with the share done.
    """
    check_count("steps", steps)
    check_count("strongest", strongest)
    images, labels, masks = test
    with evaluating(model) as classifier:
        device = classifier.mean.device
        images, labels, masks = images.to(device), labels.to(device), masks.to(device)
        logits = predict(classifier, images)
        check_classes(labels, len(images), logits.shape[1])
        right = logits.argmax(1) == labels
        swapped = predict(classifier, swap_backgrounds(images, masks, seed)).argmax(1) == labels

    def told(start: float, end: float) -> Callable[[float], None] | None:
        return None if progress is None else lambda done: progress(start + (end - start) * done)

    def standing(region: Tensor | None, start: float, end: float) -> Tensor:
        # What is read wrongly as it is cannot be lost to an attack.
        left = right.nonzero()[:, 0]
        result = right.clone()
        if len(left):
            made = pgd(
                model,
                images[left],
                labels[left],
                budget=budget,
                region=None if region is None else region[left],
                steps=steps,
                seed=seed,
                stop_early=True,
                progress=told(start, end),
            )
            result[left] = ~made.fooled
        return result

    localized = standing(masks, 0.0, 0.3)
    full = standing(None, 0.3, 0.6)
    few = (full & localized)[:strongest]
    left = few.nonzero()[:, 0]  # what PGD has fooled needs no stronger attack
    if len(left):
        made = ensemble(model, images[left], labels[left], budget=budget, seed=seed, progress=told(0.6, 1.0))
        few[left] = ~made.fooled
    return {
        name: found.cpu() for name, found in zip(TESTS, (right, localized, full, few, swapped), strict=True)
    }


def swap_backgrounds(images: Tensor, backgrounds: Tensor, seed: int = 0) -> Tensor:
    """Each image's object before the background of another, (N, C, H, W).

    Where the other has its object, the mean color of its background stands in for what is hidden.

    Args:
        images: (N, C, H, W), at least two.
        backgrounds: bool (N, 1, H, W).
        seed: of who gets whose.
    """
    count = len(images)
    if count < 2:
        raise ValueError(f"images has {count}; accepted are at least two, to swap backgrounds")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    other = torch.empty_like(order)
    other[order] = order.roll(1)  # a cycle: nobody keeps its own
    other = other.to(images.device)
    behind, there = images[other], backgrounds[other]
    area = there.sum((2, 3), keepdim=True).clamp(min=1)
    plain = (behind * there).sum((2, 3), keepdim=True) / area
    swapped: Tensor = torch.where(backgrounds, torch.where(there, behind, plain), images)
    return swapped
