"""Random probes of the bounds of margins: boxes of colors of random pixels, and colors inside them.

Run: python -m benchmarks.certify_probes [--probes N] [--network NAME], with the folder that WEAKSPOT_DATA names. For
each network of `NETWORKS` and both statements: a margin of the network below its lower bound, or above its upper one,
is a violation. Under "float32 as run" the network runs in float32, under "exact arithmetic" a copy of it in float64.
N is shared by the networks, or all for NAME.

A second table: what the bounds of rounding take from margins at single colors, followed forward from layer to layer and
backward, and what rounding does take there, beside float64.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks import real
from weakspot.classifier import evaluating
from weakspot.proofs.margin_bounds import MarginBounds, _form_of
from weakspot.proofs.network_steps import bound_network

NETWORKS = (
    "mnist_cnn_a_adv",
    "mnist_conv_small_nat",
    "cifar10_conv_small_pgd",
    "cifar10_cnn_a_adv",
    "cifar10_resnet2b_adv",
    "cifar10_resnet4b_adv",
)
BOXES, COLORS = 100, 100  # of one image, and of one box
FLOAT64 = 1e-12  # by which float64 itself may round the copy


def boxes(image: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, columns, and boxes of all widths."""
    channels, height, width = image.shape[1:]
    pixels = torch.randint(height * width, (BOXES,), generator=generator)
    corners = torch.rand(2, BOXES, channels, generator=generator)
    spread = torch.rand(BOXES, 1, generator=generator) ** 3
    low = corners[0] * (1 - spread)
    high = torch.maximum(low, (low + spread * corners[1].round().clamp(min=0.5)).clamp(max=1))
    return pixels // width, pixels % width, low.double(), high.double()


def violations(
    model: nn.Module, image: Tensor, label: int, generator: torch.Generator, *, as_run: bool, deep: bool
) -> int:
    rows, columns, low, high = boxes(image, generator)
    with evaluating(model) as classifier, torch.no_grad():
        bounds = MarginBounds(bound_network(classifier, image), image, label, as_run=as_run)
        parts = [
            bounds.bounds(rows[p], columns[p], low[p], high[p], deep=deep)
            for p in torch.arange(BOXES).split(2 if deep else BOXES)
        ]
    lower, upper = torch.cat([one.lower for one in parts]), torch.cat([one.upper for one in parts])
    judge = model if as_run else copy.deepcopy(model).double()
    slack = 0.0 if as_run else FLOAT64
    others = [k for k in range(lower.shape[1] + 1) if k != label]
    wrong = 0
    for number in range(COLORS):
        at = torch.rand(low.shape, generator=generator, dtype=torch.float64)
        at = at.round() if number % 3 == 0 else at
        colors = torch.minimum(torch.maximum((low + at * (high - low)).float(), low.float()), high.float())
        edited = image.repeat(BOXES, 1, 1, 1)
        edited[torch.arange(BOXES), :, rows, columns] = colors
        with torch.no_grad():
            logits = judge(edited if as_run else edited.double()).double()
        margins = logits[:, label : label + 1] - logits[:, others]
        wrong += int(((margins < lower - slack) | (margins > upper + slack)).any(1).sum())
    return wrong


def rounding(model: nn.Module, image: Tensor, label: int, generator: torch.Generator) -> Tensor:
    """(3,) largest over random pixels, colors and classes: by bounds forward, by bounds backward, and what it is."""
    rows, columns, colors, _ = boxes(image, generator)
    colors = colors.float().double()
    with evaluating(model) as classifier, torch.no_grad():
        bounds = MarginBounds(bound_network(classifier, image), image, label, as_run=True)
        forms = bounds._propagation.run(_form_of(rows, columns, colors, colors), deep=False, keep=True)
        forward = bounds._margins(forms)
        every = torch.ones_like(forward.lower, dtype=torch.bool)
        backward = bounds._moved_by_rounding(forms, bounds._propagation.overflows, every)
        edited = image.repeat(BOXES, 1, 1, 1)
        edited[torch.arange(BOXES), :, rows, columns] = colors.float()
        lost = model(edited).double() - copy.deepcopy(model).double()(edited.double())
    others = [k for k in range(lost.shape[1]) if k != label]
    taken = (lost[:, label : label + 1] - lost[:, others]).abs()
    if bool((taken > backward + FLOAT64).any()):
        raise AssertionError("rounding takes more than its bound")
    return torch.stack([(forward.upper - forward.lower).amax() / 2, backward.amax(), taken.amax()])


def rounding_table(names: Sequence[str], images_each: int) -> None:
    print("\n| network | images | forward | backward | taken |\n|---|---|---|---|---|")
    for name in names:
        model, images, labels = real.correct(name, images_each)
        generator = torch.Generator().manual_seed(0)
        each = [
            rounding(model, images[row : row + 1], int(labels[row]), generator) for row in range(len(images))
        ]
        middle = torch.stack(each).median(0).values
        print(
            f"| {name} | {len(each)} | {' | '.join(f'{float(value):.2g}' for value in middle)} |", flush=True
        )


def main(probes: int, names: Sequence[str]) -> None:
    print("| network | statement | generators | probes | violations | CPU s |\n|---|---|---|---|---|---|")
    total = broken = 0
    for name in names:
        model, images, labels = real.first(name, 1000)
        for as_run in (True, False):
            for deep in (False, True):
                generator = torch.Generator().manual_seed(0)
                start, wrong = time.process_time(), 0
                rounds = max(1, probes // (4 * len(names) * BOXES * COLORS))
                for _ in range(rounds):
                    row = int(torch.randint(len(images), (1,), generator=generator))
                    image, label = images[row : row + 1], int(labels[row])
                    wrong += violations(model, image, label, generator, as_run=as_run, deep=deep)
                done = rounds * BOXES * COLORS
                total, broken = total + done, broken + wrong
                statement = "float32 as run" if as_run else "exact arithmetic"
                print(
                    f"| {name} | {statement} | {'per ReLU' if deep else 'shared'} | {done:,} | {wrong} | "
                    f"{time.process_time() - start:.1f} |",
                    flush=True,
                )
    print(f"\n{broken} violations in {total:,} probes")
    rounding_table(names, 20)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--probes", type=int, default=1_000_000)
    parser.add_argument("--network", choices=NETWORKS)
    given = parser.parse_args()
    main(given.probes, [given.network] if given.network else NETWORKS)
