"""The cost of an explanation beside the passes that it needs.

Run: python -m benchmarks.explain [analyses] [--json FILE].
"""

from __future__ import annotations

import itertools
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.records import recorded
from benchmarks.timing import alternate, peak_gigabytes, show
from weakspot import attacks, class_activation, explain, load, overlap, sample_images
from weakspot.attribution import margin_drop
from weakspot.classifier import Classifier, default_batch, predict
from weakspot.explanations.analysis import FIRST, usual_analyses
from weakspot.statistics import products_over_shifts

STEPS = 10
ROUNDS = 3


class Counted(nn.Module):
    """A network that counts the images that pass through it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.images = network, 0

    def forward(self, images: Tensor) -> object:
        self.images += len(images)
        return self.network(images)


class Tokens(nn.Module):
    """A vision transformer of 64 x 64 pixels (Dosovitskiy et al. 2021, arXiv 2010.11929) with random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 96, 8, 8)
        self.first = nn.Parameter(torch.zeros(1, 1, 96))
        self.places = nn.Parameter(0.02 * torch.randn(1, 65, 96))
        layer = nn.TransformerEncoderLayer(96, 4, 384, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 3, nn.LayerNorm(96), enable_nested_tensor=False)
        self.head = nn.Linear(96, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.first.expand(len(images), -1, -1), patches], 1) + self.places
        logits: Tensor = self.head(self.blocks(tokens)[:, 0])
        return logits


def analyses(title: str, model: Classifier, image: Tensor) -> None:
    """Print the processor time of every analysis within one explanation of one image, the least of a few rounds.

    A network of tokens goes whole through every edit, so its counted images are all its passes. Where edits go by
    windows, they are not counted.
    """
    counted = Counted(model.network).eval()
    model = Classifier.wrap(counted, mean=model.mean.flatten().tolist(), std=model.std.flatten().tolist())
    labels = predict(model, image).argmax(1)
    pairs = attacks.pgd(model, image, labels, steps=STEPS)
    names = sorted(usual_analyses(), key=lambda name: name != FIRST)  # the order in which they run
    batch = image.expand(default_batch(image), -1, -1, -1)
    one = min(_seconds(lambda: predict(model, batch)) for _ in range(5)) / len(batch)
    times, images = [], []
    for _ in range(ROUNDS):
        marks = [(time.process_time(), counted.images)]
        explain(model, pairs, progress=lambda _: marks.append((time.process_time(), counted.images)))  # noqa: B023
        times.append([after[0] - before[0] for before, after in itertools.pairwise(marks)])
        images = [after[1] - before[1] for before, after in itertools.pairwise(marks)]
    least = [min(column) for column in zip(*times, strict=True)]
    print(f"\n{title}; one forward pass of an image takes {1000 * one:.1f} ms\n")
    print("| analysis | processor seconds | images through the network | seconds of their forward passes |")
    print("|---|---|---|---|")
    for name, seconds, count in zip(
        [*names, "all"], [*least, sum(least)], [*images, sum(images)], strict=True
    ):
        print(f"| {name} | {seconds:.2f} | {count} | {count * one:.2f} |", flush=True)


def _seconds(job: Callable[[], object]) -> float:
    begun = time.process_time()
    job()
    return time.process_time() - begun


def main() -> None:
    """Print every table; with the argument `analyses` only those of single analyses."""
    print(
        f"{datetime.now(UTC):%Y-%m-%d} · {platform.machine()}, {torch.get_num_threads()} threads · "
        f"torch {torch.__version__}"
    )
    model = load("efficientnet_lite0", device="cpu")
    images, names = sample_images()
    analyses("EfficientNet-Lite0, one photograph of 224 x 224", model, images[:1])
    torch.manual_seed(0)
    analyses("A vision transformer of 64 x 64", Classifier.wrap(Tokens().eval()), torch.rand(1, 3, 64, 64))
    if sys.argv[1:] == ["analyses"]:
        return
    labels = predict(model, images).argmax(1)
    pairs = attacks.pgd(model, images, labels, steps=STEPS)

    def passes(count: int = 1) -> None:
        for _ in range(count):
            point = images.clone().requires_grad_()
            torch.autograd.grad(model(point).sum(), point)

    show(
        f"PGD, {STEPS} steps, batch of {default_batch(images)} at 224 x 224",
        alternate(
            {
                f"floor: {STEPS} forward + backward passes": lambda: passes(STEPS),
                "attacks.pgd": lambda: attacks.pgd(model, images, labels, steps=STEPS),
            }
        ),
        f"floor: {STEPS} forward + backward passes",
    )
    show(
        "Explaining four pairs",
        alternate(
            {
                "floor: 1 forward pass": lambda: predict(model, images),
                "class_activation": lambda: class_activation(model, images, labels),
                "class_activation, effective alignment": lambda: class_activation(
                    model, images, labels, alignment="effective"
                ),
                "margin_drop (integrated gradients)": lambda: margin_drop(
                    model, pairs.clean, pairs.adversarial, pairs.labels, pairs.targets
                ),
                "overlap": lambda: overlap(model, pairs),
                "explain, all analyses": lambda: explain(model, pairs, names=names),
            },
            rounds=3,
        ),
        "floor: 1 forward pass",
    )

    first, second = torch.rand(1, 224, 224), torch.rand(1, 224, 224)

    def rolls() -> None:
        one, other = first[0].double().numpy(), second[0].double().numpy()
        draws = np.random.default_rng(0).integers(0, 224, (999, 2))
        [float((one * np.roll(other, tuple(draw), (0, 1))).sum()) for draw in draws]

    show(
        "A shift null on 224 x 224 sites",
        alternate(
            {
                "floor: 999 shifts one by one": rolls,
                "all 50,176 shifts": lambda: products_over_shifts(first, second),
            }
        ),
        "floor: 999 shifts one by one",
    )
    print(f"\nPeak memory of the whole run: {peak_gigabytes():.2f} GB")


if __name__ == "__main__":
    with recorded("explain", "The cost of an explanation beside the passes that it needs."):
        main()
