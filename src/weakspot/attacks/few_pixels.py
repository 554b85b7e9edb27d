"""Few-pixel attacks: all images and all candidates of a generation in one batch."""

from __future__ import annotations

from torch import Tensor, nn

from weakspot.attacks.evolution import evolve
from weakspot.attacks.gradient import Progress, check_counts
from weakspot.attacks.guided import follow_gradient
from weakspot.attacks.painting import with_windows
from weakspot.attacks.problem import attacking
from weakspot.checks import closest
from weakspot.pairs import AttackResult

METHODS = {"evolution": evolve, "guided": follow_gradient}


def pixels(
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
    """Change `count` pixels to any colour (Su et al. 2019, arXiv 1710.08864; Vargas and Su 2019, arXiv 1902.02947).

    "evolution" is differential evolution as published: candidates (row, column, colour), a child a + 0.5 (b - c)
    of three others without crossover replaces only its own parent, the fitness is the label's probability (targeted:
    the target's), colours are 8-bit. A candidate that the population already holds is not sent through the model
    again. "guided" tries the corners of the colour cube at the sites where the gradient promises most, then around
    the best sites found, then colours between the corners; pixels are added one after the other.
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
    >>> result = pixels(model, images, model(images).argmax(1), method="guided")
    >>> bool(result.success[0]), int(result.distances["pixels"][0])
    (True, 1)
    """
    check_counts(count=count, generations=generations)
    check_counts(least=4, population=population)
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; {closest(str(method), METHODS)}")
    with attacking(model, images, labels, region, targets, batch_size, seed) as problem:
        sites = problem.region.flatten(1).sum(1)
        if count > images.shape[2] * images.shape[3]:
            raise ValueError(
                f"count is {count}; accepted is at most the {images[0, 0].numel()} pixels of an image"
            )
        adversarial = problem.clean.clone()
        with problem.searching():
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
