"""Differential evolution over pixels and colors of all images (Storn and Price 1997, doi 10.1023/A:1008202821328)."""

from __future__ import annotations

import torch
from torch import Tensor

from weakspot import _random
from weakspot.attacks.context import Problem, Progress
from weakspot.attacks.pixel_edits import evaluate_painted, paint

WEIGHT = 0.5  # of the difference of two candidates that is added to a third
MEAN, SPREAD = 128 / 255, 127 / 255  # of the first colors, as published


def evolve(
    problem: Problem, *, count: int, population: int, generations: int, progress: Progress | None
) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) of the lowest margin that differential evolution finds, and those; see `few_pixel`."""
    height, width = problem.clean.shape[2:]
    adversarial, lowest = problem.clean.clone(), torch.full_like(problem.clean[:, 0, 0, 0], torch.inf)
    here, part, nearest = (
        torch.arange(len(problem), device=adversarial.device),
        problem,
        _nearest_sites(problem),
    )
    sides = torch.tensor([height, width], device=adversarial.device)
    tried = _first_candidates(problem, population, count)
    held: _Candidates | None = None
    for generation in range(generations + 1):
        tried.sites = _sites(tried.places, nearest, width)
        tried.levels = (tried.colors * 255).round()
        _evaluate(part, tried, held)
        if held is None:
            held = tried
        else:
            held.replace_where(tried.fitness < held.fitness, tried)
        margins, best = held.margins.min(1)
        better = margins < lowest[here]
        rows = torch.arange(len(here), device=here.device)
        painted = paint(part.clean, held.sites[rows, best], held.levels[rows, best] / 255)
        adversarial[here[better]], lowest[here[better]] = painted[better], margins[better]
        left = margins >= 0
        if not bool(left.all()):
            here, part, nearest = here[left], part.select(left), nearest[left]
            held.keep(left)
        if progress is not None:
            progress(generation / generations)
        if not len(here) or generation == generations:
            break
        first, second, third = _three_others(part.keys, generation + 1, population)
        tried = _Candidates(
            places=held.mixed("places", first, second, third).clamp(min=0).minimum(sides - 1e-3),
            colors=held.mixed("colors", first, second, third).clamp(0, 1),
        )
    return adversarial, lowest


class _Candidates:
    """A population of each image; every tensor begins (N, population).

    Attributes:
        places: (.., count, 2) row and column, continuous.
        colors: (.., count, C) in [0, 1].
        sites: (.., count) the pixels meant, numbered in reading order, inside the region.
        levels: (.., count, C) the colors in 255ths.
        margins: (..) below zero where a candidate fools.
        fitness: (..) the lower the better.
    """

    sites: Tensor
    levels: Tensor
    margins: Tensor
    fitness: Tensor

    def __init__(self, places: Tensor, colors: Tensor) -> None:
        self.places, self.colors = places, colors

    def replace_where(self, better: Tensor, other: _Candidates) -> None:
        for name, mine in vars(self).items():
            mask = better.view(*better.shape, *[1] * (mine.ndim - 2))
            setattr(self, name, torch.where(mask, getattr(other, name), mine))

    def keep(self, rows: Tensor) -> None:
        for name, mine in vars(self).items():
            setattr(self, name, mine[rows])

    def mixed(self, name: str, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
        values = getattr(self, name)
        rows = torch.arange(len(values), device=values.device)[:, None]
        child: Tensor = values[rows, first] + WEIGHT * (values[rows, second] - values[rows, third])
        return child


def _first_candidates(problem: Problem, population: int, count: int) -> _Candidates:
    """Sites uniform in the region, colors normal around gray."""
    channels, _, width = problem.clean.shape[1:]
    keys = problem.keys
    allowed = problem.region.flatten(1)
    drawn = (_random.uniform(keys, 0, population * count) * allowed.sum(1, keepdim=True)).long()
    # The n-th site of the region is where as many sites were counted.
    sites = torch.searchsorted(allowed.cumsum(1), drawn + 1)
    places = torch.stack([sites // width, sites % width], 2).float() + 0.5
    colors = (MEAN + SPREAD * _random.normal(keys, 1, population, count, channels)).clamp(0, 1)
    return _Candidates(places.view(len(keys), population, count, 2), colors)


def _three_others(keys: Tensor, generation: int, population: int) -> tuple[Tensor, Tensor, Tensor]:
    """For every candidate three of the population, each (N, population), no two the same."""
    drawn = _random.uniform(keys, 1 + generation, 3, population)
    first = (drawn[:, 0] * population).long()
    second = (drawn[:, 1] * (population - 1)).long()
    second = second + (second >= first)
    third = (drawn[:, 2] * (population - 2)).long()
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    third = third + (third >= low)
    return first, second, third + (third >= high)


def _sites(places: Tensor, nearest: Tensor, width: int) -> Tensor:
    """The pixel at each place (N, P, count, 2), or where that is outside the region the one nearest to it."""
    whole = places.long()
    sites = whole[..., 0] * width + whole[..., 1]
    return nearest.gather(1, sites.flatten(1)).view_as(sites)


def _nearest_sites(problem: Problem) -> Tensor:
    """(N, H * W) for every site the nearest one of the region."""
    everywhere = problem.region.flatten(1).all(1)
    height, width = problem.clean.shape[2:]
    found = torch.arange(height * width, device=problem.clean.device).repeat(len(problem), 1)
    if bool(everywhere.all()):
        return found
    from scipy.ndimage import distance_transform_edt

    for row in (~everywhere).nonzero()[:, 0].tolist():
        outside = ~problem.region[row, 0].cpu().numpy()
        rows, columns = distance_transform_edt(outside, return_distances=False, return_indices=True)
        found[row] = torch.from_numpy(rows * width + columns).flatten().to(found)
    return found


def _evaluate(problem: Problem, tried: _Candidates, held: _Candidates | None) -> None:
    """Margins and fitness of every candidate; equal ones, or ones that are held already, are asked for once."""
    count, population = tried.sites.shape[:2]
    owners = torch.arange(count, device=tried.sites.device)[:, None].expand(-1, population)
    names = _names(tried, owners)
    known = names.new_zeros(0) if held is None else _names(held, owners).flatten()
    every, places = torch.unique(torch.cat([known, names.flatten()]), return_inverse=True)
    margins, fitness = (torch.full((len(every),), torch.nan, device=every.device) for _ in range(2))
    if held is not None:
        margins[places[: len(known)]] = held.margins.flatten()
        fitness[places[: len(known)]] = held.fitness.flatten()
    mine = places[len(known) :]
    asked = torch.full_like(every, -1)
    asked[mine.flip(0)] = torch.arange(len(mine), device=every.device).flip(0)  # one candidate of each name
    new = (fitness.isnan() & (asked >= 0)).nonzero()[:, 0]
    which = asked[new].sort()
    if len(new):
        found = evaluate_painted(
            problem,
            problem.clean,
            owners.flatten()[which.values],
            tried.sites.flatten(0, 1)[which.values],
            tried.levels.flatten(0, 1)[which.values] / 255,
        )
        margins[new[which.indices]], fitness[new[which.indices]] = (
            found.margins.float(),
            found.fitness.float(),
        )
    tried.margins = margins[mine].view(count, population)
    tried.fitness = fitness[mine].view(count, population)


def _names(candidates: _Candidates, owners: Tensor) -> Tensor:
    """(N, population) 64-bit names of image, sites and colors; equal where all are."""
    name = _random.mixed(owners)
    for pixel in range(candidates.sites.shape[2]):
        name = _random.mixed(name + candidates.sites[:, :, pixel])
        for channel in range(candidates.levels.shape[3]):
            name = _random.mixed(name + candidates.levels[:, :, pixel, channel].long())
    return name
