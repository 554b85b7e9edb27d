"""Candidates of a few-pixel search: images with some pixels repainted, evaluated in batches."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from weakspot.attacks.context import Problem
from weakspot.attacks.losses import log_odds
from weakspot.attacks.observers import Observation
from weakspot.edits import Edits, prepare
from weakspot.edits.local import WORTH, work_saved

LARGE = 96 * 96  # pixels of an image from which on edits may go by windows; smaller images share batches


class Painted(NamedTuple):
    """Margins (M,) of candidates, below zero where they fool, and their fitness (M,), which the search lowers."""

    margins: Tensor
    fitness: Tensor


def paint(images: Tensor, sites: Tensor, colors: Tensor) -> Tensor:
    """Images (M, C, H, W) with the sites (M, P), numbered in reading order, repainted in colors (M, P, C)."""
    flat = images.flatten(2).clone()
    # (M, C, P): every channel of a site is repainted.
    places = sites[:, None].expand(-1, images.shape[1], -1)
    return flat.scatter_(2, places, colors.transpose(1, 2).to(flat)).view_as(images)


def evaluate_painted(
    problem: Problem, images: Tensor, owners: Tensor, sites: Tensor, colors: Tensor
) -> Painted:
    """Repaint images[owners] and evaluate them; only a few batches exist at once."""
    if problem.prepared is not None and sites.shape[1] == 1:
        return _by_windows(problem, images, owners, sites[:, 0], colors[:, 0])
    margins, fitness = [], []
    for part in torch.arange(len(owners), device=images.device).split(4 * problem.batch_size):
        own = owners[part]
        margin, logits = problem.logits(paint(images[own], sites[part], colors[part]), own)
        targets = None if problem.targets is None else problem.targets[own]
        margins.append(margin)
        fitness.append(log_odds(logits, problem.labels[own], targets))
    return Painted(torch.cat(margins), torch.cat(fitness))


def with_windows(problem: Problem) -> Problem:
    """The same problem, with edits of one pixel by windows if the images are large and windows save enough work.

    This is decided by counting, not by timing, so that the same seed gives the same result on every machine.
    """
    image = problem.clean[:1]
    if image.shape[2] * image.shape[3] < LARGE:
        return problem
    prepared = prepare(problem.classifier, image)
    if prepared.recording is None or work_saved(prepared.recording, image) < WORTH:
        return problem
    return replace(problem, prepared=prepared)


def _by_windows(problem: Problem, images: Tensor, owners: Tensor, sites: Tensor, colors: Tensor) -> Painted:
    """One pixel each, image by image, because the last bits of a result depend on what shares its chunk."""
    width = images.shape[3]
    margins = torch.empty(len(owners), dtype=images.dtype, device=images.device)
    fitness = torch.empty_like(margins)
    for owner in owners.unique():
        rows = (owners == owner).nonzero()[:, 0]
        edits = Edits(problem.classifier, images[owner : owner + 1], problem.prepared, windows=True)
        places, patches = sites[rows], colors[rows, :, None, None].to(images)
        logits = edits.logits(torch.zeros_like(places), places // width, places % width, patches)
        targets = None if problem.targets is None else problem.targets[owners[rows]]
        margins[rows] = problem.margins(logits, owners[rows])
        fitness[rows] = log_odds(logits, problem.labels[owners[rows]], targets).to(fitness)
        if problem.observer is not None:
            image, own, painted = images[owner : owner + 1], sites[rows, None], colors[rows, None]

            def picture(
                number: int, image: Tensor = image, own: Tensor = own, painted: Tensor = painted
            ) -> Tensor:
                return paint(image, own[number : number + 1], painted[number : number + 1])[0]

            problem.observer(Observation(problem.rows[owners[rows]], margins[rows], picture))
    return Painted(margins, fitness)
