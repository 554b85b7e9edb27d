"""Few-pixel attacks: differential evolution, and a search in the order that the gradient suggests."""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weakspot._checks import check_choice, check_count
from weakspot._progress import Progress, ProgressOption, part
from weakspot.attacks.context import AttackOptions, Problem, attack_context
from weakspot.attacks.differential_evolution import evolve
from weakspot.attacks.pixel_edits import evaluate_painted, paint, with_windows
from weakspot.pairs import AttackResult

ECONOMY = 12  # evolution's forward passes per one of this search's
ROUND = 100  # candidates of each image tried at once, in the order of the gradient
CENTERS = 8  # best sites whose neighbors are tried next
FINER, COLORS = 4, 125  # best sites that are finally tried in about so many colors between the corners


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
            problem.select(active),
            adversarial[active],
            limit,
            part(progress, pixel, pixel + 1, count),
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
        generations: at most; "guided" spends at most population x generations / 12 forward passes.
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
