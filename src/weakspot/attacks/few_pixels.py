"""Few-pixel attacks, by differential evolution (Storn and Price 1997, doi 10.1023/A:1008202821328) or guided search."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weakspot import _random
from weakspot._checks import check_choice, check_count
from weakspot._progress import Progress, ProgressOption
from weakspot.attacks.context import AttackOptions, Problem, attack_context
from weakspot.attacks.pixel_search import evaluate_painted, follow_gradient, paint, with_windows
from weakspot.pairs import AttackResult

WEIGHT = 0.5  # F of Storn and Price: of the difference of two candidates that is added to a third
MEAN, SPREAD = 128 / 255, 127 / 255  # of the first colors, as published


def evolve(
    problem: Problem, *, count: int, population: int, generations: int, progress: Progress | None
) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) of the lowest margin that evolution finds, and those margins; see `few_pixel`."""
    height, width = problem.clean.shape[2:]
    adversarial, lowest = problem.clean.clone(), torch.full_like(problem.clean[:, 0, 0, 0], torch.inf)
    active = torch.arange(len(problem), device=adversarial.device)
    part, nearest = problem, _nearest_sites(problem)
    sides = torch.tensor([height, width], device=adversarial.device)
    children = _first_candidates(problem, population, count)
    parents: _Candidates | None = None
    for generation in range(generations + 1):
        children.sites = _sites(children.places, nearest, width)
        children.levels = (children.colors * 255).round()
        _evaluate(part, children, parents)
        if parents is None:
            parents = children
        else:  # a child replaces only its own parent
            parents.replace_where(children.fitness < parents.fitness, children)
        margins, best = parents.margins.min(1)
        better = margins < lowest[active]
        rows = torch.arange(len(active), device=active.device)
        painted = paint(part.clean, parents.sites[rows, best], parents.levels[rows, best] / 255)
        adversarial[active[better]], lowest[active[better]] = painted[better], margins[better]
        unfooled = margins >= 0
        if not bool(unfooled.all()):
            active, part, nearest = active[unfooled], part.select(unfooled), nearest[unfooled]
            parents.select(unfooled)
        if progress is not None:
            progress(generation / generations)
        if not len(active) or generation == generations:
            break
        three = _three_different(part.keys, generation + 1, population)
        children = _Candidates(
            # Just below the sides, so that every place is cut to a pixel of the image.
            places=parents.combined("places", *three).clamp(min=0).minimum(sides - 1e-3),
            colors=parents.combined("colors", *three).clamp(0, 1),
        )
    return adversarial, lowest


class _Candidates:
    """A population of each image; every tensor begins (N, population).

    Attributes:
        places: (.., count, 2) row and column, continuous.
        colors: (.., count, C) in [0, 1].
        sites: (.., count) the pixels, numbered in reading order, inside the region.
        levels: (.., count, C) the colors in 255ths.
        margins: (..) below zero if a candidate fools.
        fitness: (..) the lower the better.
    """

    sites: Tensor
    levels: Tensor
    margins: Tensor
    fitness: Tensor

    def __init__(self, places: Tensor, colors: Tensor) -> None:
        self.places, self.colors = places, colors

    def replace_where(self, better: Tensor, other: _Candidates) -> None:
        for name, own in vars(self).items():
            mask = better.view(*better.shape, *[1] * (own.ndim - 2))
            setattr(self, name, torch.where(mask, getattr(other, name), own))

    def select(self, rows: Tensor) -> None:
        for name, own in vars(self).items():
            setattr(self, name, own[rows])

    def combined(self, name: str, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
        """Children a + 0.5 (b - c) of the candidates with these numbers, each (N, population)."""
        values = getattr(self, name)
        rows = torch.arange(len(values), device=values.device)[:, None]
        child: Tensor = values[rows, first] + WEIGHT * (values[rows, second] - values[rows, third])
        return child


def _first_candidates(problem: Problem, population: int, count: int) -> _Candidates:
    """Sites uniform in the region, colors normal around gray."""
    channels, _, width = problem.clean.shape[1:]
    keys = problem.keys
    allowed = problem.region.flatten(1)
    numbers = (_random.uniform(keys, 0, population * count) * allowed.sum(1, keepdim=True)).long()
    # The n-th site of the region is the first with n sites of it counted so far.
    sites = torch.searchsorted(allowed.cumsum(1), numbers + 1)
    # The middle of each pixel, because places are cut to whole numbers.
    places = torch.stack([sites // width, sites % width], 2).float() + 0.5
    colors = (MEAN + SPREAD * _random.normal(keys, 1, population, count, channels)).clamp(0, 1)
    return _Candidates(places.view(len(keys), population, count, 2), colors)


def _three_different(keys: Tensor, generation: int, population: int) -> tuple[Tensor, Tensor, Tensor]:
    """For every candidate three of the population, each (N, population): no two the same, itself maybe among them."""
    # Streams 0 and 1 drew the first candidates.
    numbers = _random.uniform(keys, 1 + generation, 3, population)
    first = (numbers[:, 0] * population).long()
    # One of the others: numbers from the first one on are shifted by one.
    second = (numbers[:, 1] * (population - 1)).long()
    second = second + (second >= first)
    third = (numbers[:, 2] * (population - 2)).long()
    # One of the rest: shifted past the lower of the two, then past the higher.
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    third = third + (third >= low)
    return first, second, third + (third >= high)


def _sites(places: Tensor, nearest: Tensor, width: int) -> Tensor:
    """The pixel at each place (N, P, count, 2); if that is outside the region, the nearest one inside."""
    whole = places.long()
    sites = whole[..., 0] * width + whole[..., 1]
    return nearest.gather(1, sites.flatten(1)).view_as(sites)


def _nearest_sites(problem: Problem) -> Tensor:
    """(N, H * W) for every site the nearest one of the region."""
    # Sites inside the region are their own nearest site.
    everywhere = problem.region.flatten(1).all(1)
    height, width = problem.clean.shape[2:]
    nearest = torch.arange(height * width, device=problem.clean.device).repeat(len(problem), 1)
    if bool(everywhere.all()):
        return nearest
    from scipy.ndimage import distance_transform_edt

    for row in (~everywhere).nonzero()[:, 0].tolist():
        outside = ~problem.region[row, 0].cpu().numpy()
        rows, columns = distance_transform_edt(outside, return_distances=False, return_indices=True)
        nearest[row] = torch.from_numpy(rows * width + columns).flatten().to(nearest)
    return nearest


def _evaluate(problem: Problem, children: _Candidates, parents: _Candidates | None) -> None:
    """Margins and fitness of every child; equal candidates, parents among them, are evaluated once."""
    count, population = children.sites.shape[:2]
    owners = torch.arange(count, device=children.sites.device)[:, None].expand(-1, population)
    names = _names(children, owners)
    earlier = names.new_zeros(0) if parents is None else _names(parents, owners).flatten()
    every, places = torch.unique(torch.cat([earlier, names.flatten()]), return_inverse=True)
    # One value for each name, NaN until it is known.
    margins, fitness = (
        torch.full((len(every),), torch.nan, dtype=torch.float32, device=every.device) for _ in range(2)
    )
    if parents is not None:
        margins[places[: len(earlier)]] = parents.margins.flatten()
        fitness[places[: len(earlier)]] = parents.fitness.flatten()
    own = places[len(earlier) :]
    # For each name the first child that has it: of several writes to one place the last one counts.
    first = torch.full_like(every, -1)
    first[own.flip(0)] = torch.arange(len(own), device=every.device).flip(0)
    new = (fitness.isnan() & (first >= 0)).nonzero()[:, 0]
    if len(new):
        # In the order of children, image by image: names are hashes, and their order means nothing.
        which = first[new].sort()
        painted = evaluate_painted(
            problem,
            problem.clean,
            owners.flatten()[which.values],
            children.sites.flatten(0, 1)[which.values],
            children.levels.flatten(0, 1)[which.values] / 255,
        )
        margins[new[which.indices]] = painted.margins.float()
        fitness[new[which.indices]] = painted.fitness.float()
    children.margins = margins[own].view(count, population)
    children.fitness = fitness[own].view(count, population)


def _names(candidates: _Candidates, owners: Tensor) -> Tensor:
    """(N, population) 64-bit names of image, sites and colors; equal where all are."""
    name = _random.mixed(owners)
    for pixel in range(candidates.sites.shape[2]):
        name = _random.mixed(name + candidates.sites[:, :, pixel])
        for channel in range(candidates.levels.shape[3]):
            name = _random.mixed(name + candidates.levels[:, :, pixel, channel].long())
    return name


METHODS = {"evolution": evolve, "guided": follow_gradient}


def few_pixel(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    count: int = 1,
    region: Tensor | None = None,
    targets: Tensor | None = None,
    population: int = 400,
    generations: int = 100,
    method: str = "evolution",
    seed: int = 0,
    batch_size: int | None = None,
    progress: ProgressOption = None,
) -> AttackResult:
    """Change `count` pixels to any color (Su et al. 2019, arXiv 1710.08864; Vargas and Su 2019, arXiv 1902.02947).

    "evolution" is differential evolution as published: candidates are (row, column, color), a child a + 0.5 (b - c) of
    three different candidates, maybe its parent among them, without crossover replaces only its parent, the fitness is
    the label's probability (targeted: the target's), and colors are 8-bit. A candidate that the population already
    contains is not evaluated again. "guided" tries the corners of the color cube at the sites where the gradient
    promises most, then around the best sites so far, then colors between the corners; pixels are added one after the
    other. Images leave as soon as they fool. On images of 96 x 96 pixels and more, a single pixel's candidates go
    through `LocalEdits` if that saves a quarter of the multiplications. Shared arguments are described in
    `AttackOptions`.

    Args:
        count: pixels that may change; 1 is the one-pixel attack.
        population: candidates of each image.
        generations: at most. For each pixel, "guided" spends at most the larger of 100 and
            population x generations / 12 / count forward passes.
        method: "evolution" or "guided", in which nothing is random.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2, bias=False)).eval()
    >>> images = torch.full((1, 3, 4, 4), 0.01)
    >>> result = few_pixel(model, images, model(images).argmax(1), method="guided")
    >>> bool(result.success[0]), int(result.distances["pixels"][0])
    (True, 1)
    """
    check_count("count", count)
    check_count("generations", generations)
    check_count("population", population, least=4)
    check_choice("method", method, METHODS)
    with attack_context(
        model, images, labels, AttackOptions(None, region, targets, seed, batch_size, progress)
    ) as problem:
        sites = problem.region.flatten(1).sum(1)
        pixels = images.shape[2] * images.shape[3]
        if count > pixels:
            raise ValueError(f"count must be at most the {pixels} pixels of an image, got {count}")
        adversarial = problem.clean.clone()
        with problem.fused_model():
            lowest = problem.evaluate(adversarial)
            rows = ((sites > 0) & (lowest >= 0)).nonzero()[:, 0]
            if len(rows):
                chosen = problem.select(rows)
                best, margins = METHODS[method](
                    with_windows(chosen) if count == 1 or method == "guided" else chosen,
                    count=count,
                    population=population,
                    generations=generations,
                    progress=problem.progress,
                )
                better = margins < lowest[rows]
                adversarial[rows[better]] = best[better]
        return problem.result(adversarial)
