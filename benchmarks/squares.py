"""The smallest square beside exhaustive searches over its places: side and CPU seconds for each image.

Run: python -m benchmarks.squares photographs|cifar [--first N] [--images N]
[--json FILE]. Every row is printed as it is done.

`photographs`: EfficientNet-Lite0 at 8/255. A step is a tenth of the side, at least one pixel. At a side one step and a
pixel below the found one, PGD runs at all places of a grid at half the side's distance, 3 steps at all of 256 places,
5 more at their best quarter and 20 more at their best sixteenth: a reduced search, since every place at every side
would take days. "within a step" says that it found nothing there.

`cifar`: ResNet-20 at 8/255. At the side one pixel below the found one, `pgd` with 20 steps from a random start, the
public attack, runs at every place. "exact" says that none of them fools.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time

import torch
from torch import Tensor, nn

from benchmarks import real
from benchmarks.records import recorded
from weakspot import Linf, attacks, load, sample_images, smallest_square
from weakspot.attacks.context import AttackOptions, attack_context
from weakspot.attacks.first_order import linearize
from weakspot.attacks.gradient import shrinking_steps
from weakspot.vulnerability.place_search import PRECISION, SquareSearch, Stage, square_masks

BUDGET = Linf(8 / 255)
WAVE = 256
REDUCED = (
    Stage(WAVE, (1.5, 1.0, 0.7), math.inf),
    Stage(WAVE // 4, (1.0, 0.7, 0.5, 0.4, 0.3), math.inf),
    Stage(WAVE // 16, shrinking_steps(20), 0.0),
)


def grid_search(model: nn.Module, image: Tensor, label: Tensor, side: int) -> int:
    """How many places were tried until one was enough, minus that number if none of them was."""
    with (
        attack_context(model, image, label, AttackOptions(BUDGET, batch_size=4)) as problem,
        problem.fused_model(),
    ):
        search = SquareSearch(problem, linearize(problem))
        ends = [image.shape[axis] - side for axis in (2, 3)]
        lines = [sorted({*range(0, end + 1, max(1, side // 2)), end}) for end in ends]
        places = torch.tensor(list(itertools.product(*lines)))
        order = search.ratios(side)[0][places[:, 0], places[:, 1]].argsort(descending=True)
        for number, wave in enumerate(places[order].split(WAVE)):
            part = search._at(side, wave)
            if search._attack(part, wave, search._first_order(part, side, wave), REDUCED):
                return number * WAVE + len(wave)
    return -len(places)


def photographs(first: int, count: int) -> None:
    model = load("efficientnet_lite0", device="cpu")
    images, names = sample_images()
    if real.available():
        images = torch.cat([images, real.networks().imagenet(200)[0][[17, 90]]])
        names = [*names, "imagenet17", "imagenet90"]
    labels = real.predictions(model, images)
    print("| photograph | side | CPU s | gradients | smaller side | places tried | within a step | CPU s |")
    print("|---|---|---|---|---|---|---|---|")
    for number in range(first, min(first + count, len(images))):
        row = slice(number, number + 1)
        start = time.process_time()
        found = smallest_square(model, images[row], labels[row], budget=BUDGET)
        seconds, side = time.process_time() - start, int(found.side)
        cells = [names[number], str(side), f"{seconds:.1f}", str(int(found.pairs.n_backward))]
        below = side - max(1, side // PRECISION) - 1
        if below >= 1:
            start = time.process_time()
            tried = grid_search(model, images[row], labels[row], below)
            took = f"{time.process_time() - start:.0f}"
            cells += [str(below), str(abs(tried)), "yes" if tried < 0 else "no", took]
        else:
            cells += [""] * 4
        print(f"| {' | '.join(cells)} |", flush=True)


def cifar(first: int, count: int) -> None:
    model, images, labels = real.correct("cifar10_resnet20", first + count)
    print("| image | side | CPU s | smaller side | places that fool | exact | CPU s |")
    print("|---|---|---|---|---|---|---|")
    for number in range(first, first + count):
        row = slice(number, number + 1)
        start = time.process_time()
        side = int(smallest_square(model, images[row], labels[row], budget=BUDGET).side)
        cells = [str(number), str(side), f"{time.process_time() - start:.1f}"]
        if side > 1:
            start = time.process_time()
            ends = (range(33 - side + 1) for _ in range(2))
            places = torch.tensor(list(itertools.product(*ends)))
            masks = square_masks(
                torch.full_like(places[:, 0], side - 1), places[:, 0], places[:, 1], (32, 32)
            )
            many = len(places)
            result = attacks.pgd(
                model,
                images[row].expand(many, -1, -1, -1),
                labels[row].expand(many),
                budget=BUDGET,
                region=masks,
                steps=20,
            )
            fooled = int(result.fooled.sum())
            took = f"{time.process_time() - start:.0f}"
            cells += [str(side - 1), f"{fooled} of {many}", "no" if fooled else "yes", took]
        else:
            cells += ["", "", "yes" if side else "", ""]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with recorded("squares", "The smallest square beside exhaustive searches over its places."):
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument("section", choices=["photographs", "cifar"])
        parser.add_argument("--first", type=int, default=0)
        parser.add_argument("--images", type=int, default=6)
        given = parser.parse_args()
        (photographs if given.section == "photographs" else cifar)(given.first, given.images)
