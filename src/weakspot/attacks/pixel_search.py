"""Few-pixel attacks: all images and all candidates of a generation in one batch.

Few-pixel search in the order that the gradient suggests, then around the best sites found.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weakspot._checks import check_choice, check_count
from weakspot.attacks.context import AttackOptions, Problem, Progress, attack_context, part_of
from weakspot.attacks.differential_evolution import evolve
from weakspot.attacks.pixel_edits import evaluate_painted, paint, with_windows
from weakspot.pairs import AttackResult

ECONOMY = 12  # evolution's forward passes per one of this search's
ROUND = 100  # candidates of each image tried at once, in the order of the gradient
CENTERS = 8  # best sites whose neighbors are tried next
FINER, COLORS = 4, 125  # best sites that are at last tried in about so many colors between the corners


def follow_gradient(
    problem: Problem, *, count: int, population: int, generations: int, progress: Progress | None
) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) of the lowest margin found, pixel after pixel, and those margins; see `few_pixel`."""
    adversarial, lowest = problem.clean.clone(), torch.full_like(problem.clean[:, 0, 0, 0], torch.inf)
    limit = max(ROUND, population * generations // ECONOMY // count)
    for pixel in range(count):
        here = (lowest >= 0).nonzero()[:, 0]
        if not len(here):
            break
        found, margins = _next_pixel(
            problem.select(here), adversarial[here], limit, part_of(progress, pixel, count)
        )
        better = margins < lowest[here]
        adversarial[here[better]], lowest[here[better]] = found[better], margins[better]
    return adversarial, lowest


def _next_pixel(
    problem: Problem, images: Tensor, limit: int, progress: Progress | None
) -> tuple[Tensor, Tensor]:
    """The images with the one pixel more that lowers their margin most, and those margins (N,).

    What corners leave of each image's `limit` forward passes, a sixth at least, goes to colors between them.
    """
    found, lowest, site_margins, spent = _corners(problem, images, limit - limit // 6, progress)
    rest = (lowest >= 0).nonzero()[:, 0]
    if len(rest):
        finer, margins = _between_corners(
            problem.select(rest), images[rest], site_margins[rest], limit - spent[rest]
        )
        better = margins < lowest[rest]
        found[rest[better]], lowest[rest[better]] = finer[better], margins[better].to(lowest)
    return found, lowest


def _corners(
    problem: Problem, images: Tensor, limit: int, progress: Progress | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best images with one pixel in a corner of the color cube, their margins, those of sites, and passes spent.

    Of each image's `limit` forward passes half go to candidates in the order of the gradient, the others to the
    neighbors of the best sites so far: sites near a weak one are weak too (Vargas and Su 2019). Where there are fewer
    candidates than that, all are tried.
    """
    number, channels, height, width = images.shape
    corners = torch.tensor(list(itertools.product([0.0, 1.0], repeat=channels)), device=images.device)
    order, allowed = in_gradient_order(problem, images, corners)
    found, lowest = images.clone(), torch.full_like(images[:, 0, 0, 0], torch.inf)
    here, part, base = torch.arange(number, device=images.device), problem, images
    seen = ~allowed
    site_margins = torch.full((number, height * width), torch.inf, device=images.device)
    used = torch.zeros_like(site_margins, dtype=torch.bool)
    candidates_of = allowed.sum(1)
    by_gradient = torch.where(candidates_of <= limit, candidates_of, limit // 2)
    spent = torch.zeros_like(by_gradient)
    total, best_sites = spent.clone(), site_margins.clone()
    for start in itertools.count(0, ROUND):
        ranked = start < by_gradient
        chosen = torch.zeros_like(seen).scatter_(1, order[:, start : start + ROUND], value=True)
        chosen &= ranked[:, None]
        if not bool(ranked.all()):
            best = site_margins.masked_fill(used, torch.inf).topk(min(CENTERS, height * width), largest=False)
            centers = torch.zeros_like(used).scatter_(1, best.indices, best.values.isfinite())
            centers &= ~ranked[:, None]
            used |= centers
            near = F.max_pool2d(centers.view(-1, 1, height, width).float(), 3, 1, 1) > 0
            chosen |= near.view(len(here), -1, 1).expand(-1, -1, len(corners)).flatten(1)
        chosen &= ~seen
        chosen &= chosen.cumsum(1) <= (limit - spent)[:, None]
        spent = spent + chosen.sum(1)
        owners, candidates = chosen.nonzero().unbind(1)
        if len(owners):
            sites, colors = candidates // len(corners), corners[candidates % len(corners)]
            margins = evaluate_painted(part, base, owners, sites[:, None], colors[:, None]).margins
            seen |= chosen
            places = owners * height * width + sites
            site_margins.view(-1).scatter_reduce_(0, places, margins.to(site_margins), "amin")
            table = torch.full(seen.shape, torch.inf, device=images.device)
            table[owners, candidates] = margins.to(table)
            values, best_candidates = table.min(1)
            better = values < lowest[here]
            painted = paint(
                base,
                (best_candidates // len(corners))[:, None],
                corners[best_candidates % len(corners)][:, None],
            )
            found[here[better]], lowest[here[better]] = painted[better], values[better].to(lowest)
        # An image that has gone through its ranks and found no new neighbors is done.
        left = (lowest[here] >= 0) & (spent < limit) & (ranked | chosen.any(1))
        total[here], best_sites[here] = spent, site_margins
        if not bool(left.all()):
            here, part, base = here[left], part.select(left), base[left]
            order, seen, site_margins, used = order[left], seen[left], site_margins[left], used[left]
            by_gradient, spent = by_gradient[left], spent[left]
        if progress is not None:
            progress(float(spent.max()) / limit if len(here) else 1.0)
        if not len(here):
            break
    return found, lowest, best_sites, total


def _between_corners(
    problem: Problem, images: Tensor, site_margins: Tensor, left_over: Tensor
) -> tuple[Tensor, Tensor]:
    """The images with the best color of an even grid at their best sites, and those margins (N,).

    Args:
        problem: what to fool.
        images: (N, C, H, W), to which a pixel is added.
        site_margins: (N, H * W) lowest margin found at each site, infinite where none was tried.
        left_over: (N,) forward passes that may be spent.
    """
    count, channels = images.shape[:2]
    levels = (torch.linspace(0, 1, max(2, round(COLORS ** (1 / channels)))) * 255).round() / 255
    colors = torch.tensor(list(itertools.product(levels.tolist(), repeat=channels)), device=images.device)
    best = site_margins.topk(min(FINER, site_margins.shape[1]), largest=False)
    ranks = torch.arange(best.values.shape[1], device=images.device)
    tried = best.values.isfinite() & (ranks < (left_over // len(colors))[:, None])
    table = torch.full((count, len(ranks), len(colors)), torch.inf, device=images.device)
    owners, places = tried.nonzero().unbind(1)
    if len(owners):
        sites = best.indices[owners, places].repeat_interleave(len(colors))
        every = colors.repeat(len(owners), 1)
        who = owners.repeat_interleave(len(colors))
        found = evaluate_painted(problem, images, who, sites[:, None], every[:, None]).margins
        table[owners, places] = found.view(-1, len(colors)).to(table)
    margins, chosen = table.flatten(1).min(1)
    sites = best.indices.gather(1, (chosen // len(colors))[:, None])
    return paint(images, sites, colors[chosen % len(colors)][:, None]), margins


def in_gradient_order(problem: Problem, images: Tensor, corners: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates, site * corners + corner, by the margin's first-order change, and which are in the region."""
    falling = problem.loss_and_gradient(images).direction.flatten(2)
    flat = images.flatten(2)
    gain = torch.einsum("ncs,kc->nsk", falling, corners) - (falling * flat).sum(1)[:, :, None]
    inside = problem.region.flatten(1)[:, :, None].expand_as(gain)
    gain = gain.masked_fill(~inside, -torch.inf).flatten(1)
    return gain.argsort(dim=1, descending=True, stable=True), inside.flatten(1)


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
    progress: Progress | None = None,
) -> AttackResult:
    """Change `count` pixels to any color (Su et al. 2019, arXiv 1710.08864; Vargas and Su 2019, arXiv 1902.02947).

    "evolution" is differential evolution as published: candidates (row, column, color), a child a + 0.5 (b - c)
    of three others without crossover replaces only its own parent, the fitness is the label's probability (targeted:
    the target's), colors are 8-bit. A candidate that the population already holds is not sent through the model
    again. "guided" tries the corners of the color cube at the sites where the gradient promises most, then around
    the best sites found, then colors between the corners; pixels are added one after the other.
    Images leave as soon as they fool. On images of 96 x 96 pixels and more, a single pixel's candidates go through
    `LocalEdits` where that saves a quarter of the multiplications.

    Args:
        model: as for `pgd`, like the other arguments that are not named here.
        images: likewise.
        labels: likewise.
        count: pixels that may change.
        region: bool (N, 1, H, W) of the sites that may change.
        targets: (N,) classes to reach.
        population: candidates of each image.
        generations: at most; "guided" spends population x generations / 12 forward passes, at most.
        method: "evolution" or "guided".
        seed: of the evolution; nothing in "guided" is random.
        batch_size: images at once.
        progress: called with the share done.

    Raises:
        ValueError: when an argument does not fit, naming it.

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
        model, images, labels, AttackOptions(None, region, targets, seed, batch_size)
    ) as problem:
        sites = problem.region.flatten(1).sum(1)
        if count > images.shape[2] * images.shape[3]:
            raise ValueError(
                f"count is {count}; accepted is at most the {images[0, 0].numel()} pixels of an image"
            )
        adversarial = problem.clean.clone()
        with problem.fused_model():
            lowest = problem.evaluate(adversarial)
            rows = ((sites > 0) & (lowest >= 0)).nonzero()[:, 0]
            if len(rows):
                chosen = problem.select(rows)
                found, margins = METHODS[method](
                    with_windows(chosen) if count == 1 or method == "guided" else chosen,
                    count=count,
                    population=population,
                    generations=generations,
                    progress=progress,
                )
                better = margins < lowest[rows]
                adversarial[rows[better]] = found[better]
        return problem.result(adversarial)
