"""Candidates of a few-pixel search: images with some pixels repainted, made and evaluated in batches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from weakspot.attacks.objectives import log_odds
from weakspot.attacks.problem import Problem


class Painted(NamedTuple):
    """What the model makes of candidates: margins (M,), below zero where they fool, and fitness (M,), to be lowered."""

    margins: Tensor
    fitness: Tensor


def paint(images: Tensor, sites: Tensor, colors: Tensor) -> Tensor:
    """Images (M, C, H, W) with the sites (M, P), numbered in reading order, repainted in colours (M, P, C)."""
    flat = images.flatten(2).clone()
    places = sites[:, None].expand(-1, images.shape[1], -1)
    return flat.scatter_(2, places, colors.transpose(1, 2).to(flat)).view_as(images)


def evaluate_painted(
    problem: Problem, images: Tensor, owners: Tensor, sites: Tensor, colors: Tensor
) -> Painted:
    """Repaint images[owners] and send them through the model; no more than a few batches exist at once."""
    margins, fitness = [], []
    for part in torch.arange(len(owners), device=images.device).split(4 * problem.batch_size):
        mine = owners[part]
        found, logits = problem.logits(paint(images[mine], sites[part], colors[part]), mine)
        targets = None if problem.targets is None else problem.targets[mine]
        margins.append(found)
        fitness.append(log_odds(logits, problem.labels[mine], targets))
    return Painted(torch.cat(margins), torch.cat(fitness))
