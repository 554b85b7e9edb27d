"""Candidates of a few-pixel attack, images with some pixels repainted, and their search in the gradient's order."""

import itertools
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from weakspot._progress import Progress, part
from weakspot.attacks.context import Problem
from weakspot.attacks.losses import log_odds
from weakspot.attacks.observers import Observation
from weakspot.edits import Edits, prepare
from weakspot.edits.local import WORTH, work_saved

LARGE = 96 * 96  # pixels of an image from which on edits may go by windows; smaller images share batches
ECONOMY = 12  # evolution's forward passes per one of this search's
ROUND = 100  # candidates of each image tried at once, in the order of the gradient
CENTERS = 8  # best sites whose neighbors are tried next
FINER, COLORS = 4, 125  # best sites that are finally tried in about so many colors between the corners


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
    for rows in torch.arange(len(owners), device=images.device).split(4 * problem.batch_size):
        own = owners[rows]
        margin, logits = problem.logits(paint(images[own], sites[rows], colors[rows]), own)
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


def follow_gradient(
    problem: Problem, *, count: int, population: int, generations: int, progress: Progress | None
) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) of the lowest margin found, pixel after pixel, and those margins; see `few_pixel`."""
    adversarial, lowest = problem.clean.clone(), torch.full_like(problem.clean[:, 0, 0, 0], torch.inf)
    limit = max(ROUND, population * generations // ECONOMY // count)
    for pixel in range(count):
        active = (lowest >= 0).nonzero()[:, 0]
        if not len(active):
            break
        images, margins = _next_pixel(
            problem.select(active), adversarial[active], limit, part(progress, pixel, pixel + 1, count)
        )
        better = margins < lowest[active]
        adversarial[active[better]], lowest[active[better]] = images[better], margins[better]
    return adversarial, lowest


def _next_pixel(
    problem: Problem, images: Tensor, limit: int, progress: Progress | None
) -> tuple[Tensor, Tensor]:
    """The images with the one more pixel that lowers their margin most, and those margins (N,).

    Of each image's `limit` forward passes, whatever the corners leave, at least a sixth, goes to colors between them.
    """
    search = _CornerSearch(problem, images, limit - limit // 6)
    search.run(progress)
    best, lowest = search.best, search.lowest
    rest = (lowest >= 0).nonzero()[:, 0]
    if len(rest):
        finer, margins = _between_corners(
            problem.select(rest), images[rest], search.site_margins[rest], limit - search.spent[rest]
        )
        better = margins < lowest[rest]
        best[rest[better]], lowest[rest[better]] = finer[better], margins[better].to(lowest)
    return best, lowest


class _CornerSearch:
    """The best images with one pixel in a corner of the color cube.

    Of each image's `limit` forward passes half go to candidates in the order of the gradient, the others to the
    neighbors of the best sites so far, because sites near a weak one are weak too (Vargas and Su 2019). If there are
    fewer candidates than that, all are tried. A candidate's number is site * corners + corner.

    Attributes:
        best: (N, C, H, W).
        lowest: (N,) their margins.
        site_margins: (N, H * W) lowest margin found at each site, infinite where none was tried.
        spent: (N,) forward passes.
    """

    def __init__(self, problem: Problem, images: Tensor, limit: int) -> None:
        self.problem, self.images, self.limit = problem, images, limit
        self.best, self.lowest = images.clone(), torch.full_like(images[:, 0, 0, 0], torch.inf)
        self.corners = color_grid(2, images)
        self.order, allowed = in_gradient_order(problem, images, self.corners)
        # Candidates outside the region are never tried.
        self.seen = ~allowed
        sites = images.shape[2] * images.shape[3]
        self.site_margins = torch.full((len(images), sites), torch.inf, device=images.device)
        self.used = torch.zeros_like(self.site_margins, dtype=torch.bool)  # sites whose neighbors were tried
        candidates = allowed.sum(1)
        self.by_gradient = torch.where(candidates <= limit, candidates, limit // 2)
        self.spent = torch.zeros_like(self.by_gradient)

    def run(self, progress: Progress | None) -> None:
        active = torch.arange(len(self.images), device=self.images.device)
        for start in itertools.count(0, ROUND):
            chosen = self._choose(active, start)
            self.spent[active] += chosen.sum(1)
            owners, candidates = chosen.nonzero().unbind(1)
            if len(owners):
                self._try(active, owners, candidates)
            # An image that has gone through its ranks and found no new neighbors is done.
            ranked = start < self.by_gradient[active]
            unfinished = (self.lowest[active] >= 0) & (self.spent[active] < self.limit)
            active = active[unfinished & (ranked | chosen.any(1))]
            if progress is not None:
                progress(float(self.spent[active].max()) / self.limit if len(active) else 1.0)
            if not len(active):
                break

    def _choose(self, active: Tensor, start: int) -> Tensor:
        """Bool (n, candidates): those to try next on the active images (n,)."""
        height, width = self.images.shape[2:]
        ranked = start < self.by_gradient[active]
        ranks = self.order[active, start : start + ROUND]
        chosen = torch.zeros_like(self.seen[active]).scatter_(1, ranks, value=True)
        # Images that have gone through their ranks take neighbors instead.
        chosen &= ranked[:, None]
        if not bool(ranked.all()):
            margins = self.site_margins[active].masked_fill(self.used[active], torch.inf)
            best = margins.topk(min(CENTERS, height * width), largest=False)
            centers = torch.zeros_like(margins, dtype=torch.bool)
            centers.scatter_(1, best.indices, best.values.isfinite())
            centers &= ~ranked[:, None]
            self.used[active] |= centers
            # A maximum over 3 x 3 marks the neighbors, in all corners.
            near = F.max_pool2d(centers.view(-1, 1, height, width).float(), 3, 1, 1) > 0
            chosen |= near.view(len(active), -1, 1).expand(-1, -1, len(self.corners)).flatten(1)
        chosen &= ~self.seen[active]
        # Of more candidates than passes are left, those with the lowest numbers.
        chosen &= chosen.cumsum(1) <= (self.limit - self.spent[active])[:, None]
        self.seen[active] |= chosen
        return chosen

    def _try(self, active: Tensor, owners: Tensor, candidates: Tensor) -> None:
        """Evaluate candidates (M,) of the active images numbered `owners` (M,)."""
        part, base = self.problem.select(active), self.images[active]
        corners = self.corners
        sites, colors = candidates // len(corners), corners[candidates % len(corners)]
        margins = evaluate_painted(part, base, owners, sites[:, None], colors[:, None]).margins
        # The lowest margin over corners and rounds, at each site.
        places = active[owners] * self.site_margins.shape[1] + sites
        self.site_margins.view(-1).scatter_reduce_(0, places, margins.to(self.site_margins), "amin")
        table = torch.full((len(active), self.seen.shape[1]), torch.inf, device=base.device)
        table[owners, candidates] = margins.to(table)
        values, best = table.min(1)
        better = values < self.lowest[active]
        painted = paint(base, (best // len(corners))[:, None], corners[best % len(corners)][:, None])
        self.best[active[better]] = painted[better]
        self.lowest[active[better]] = values[better].to(self.lowest)


def color_grid(levels: int, images: Tensor) -> Tensor:
    """(levels^C, C) even grid of 8-bit colors, like the images; two levels are the corners of the color cube."""
    steps = ((torch.linspace(0, 1, levels) * 255).round() / 255).tolist()
    return torch.tensor(list(itertools.product(steps, repeat=images.shape[1]))).to(images)


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
    colors = color_grid(max(2, round(COLORS ** (1 / channels))), images)
    best = site_margins.topk(min(FINER, site_margins.shape[1]), largest=False)
    ranks = torch.arange(best.values.shape[1], device=images.device)
    # A site is tried in all colors of the grid or in none.
    tried = best.values.isfinite() & (ranks < (left_over // len(colors))[:, None])
    table = torch.full((count, len(ranks), len(colors)), torch.inf, device=images.device)
    owners, places = tried.nonzero().unbind(1)
    if len(owners):
        sites = best.indices[owners, places].repeat_interleave(len(colors))
        every = colors.repeat(len(owners), 1)
        each = owners.repeat_interleave(len(colors))
        margins = evaluate_painted(problem, images, each, sites[:, None], every[:, None]).margins
        table[owners, places] = margins.view(-1, len(colors)).to(table)
    lowest, chosen = table.flatten(1).min(1)
    sites = best.indices.gather(1, (chosen // len(colors))[:, None])
    return paint(images, sites, colors[chosen % len(colors)][:, None]), lowest


def in_gradient_order(problem: Problem, images: Tensor, corners: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates, site * corners + corner, by the margin's first-order change, and which are in the region."""
    falling = problem.loss_and_gradient(images).direction.flatten(2)
    flat = images.flatten(2)
    # First-order fall of the margin: direction . (corner - present color).
    gain = torch.einsum("ncs,kc->nsk", falling, corners) - (falling * flat).sum(1)[:, :, None]
    inside = problem.region.flatten(1)[:, :, None].expand_as(gain)
    gain = gain.masked_fill(~inside, -torch.inf).flatten(1)
    return gain.argsort(dim=1, descending=True, stable=True), inside.flatten(1)
