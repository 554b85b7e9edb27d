"""The cost of training, and its effect. Run: python -m benchmarks.training [SECTION ...]

Sections: cost (a localized epoch compared with plain training passes), mnist and cifar10 (the robustness matrix:
networks trained by four recipes against every test, as `weakspot train --evaluate matrix` makes it). Real data comes
from the folder that WEAKSPOT_DATA names. The matrices are stored in the folder that WEAKSPOT_MATRIX names, by default
./matrix-NAME; the same command resumes them.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks import real, sections
from weakspot import zoo
from weakspot.budgets import Linf
from weakspot.datasets import LabeledImages, from_tensors, read_labeled
from weakspot.training import TrainConfig, robustness_matrix, train

ROUNDS = 11
RECIPES = ("standard", "localized", "random_mask", "full")


def cost() -> None:
    """Seconds of a localized epoch, without evaluation, and of 1 + steps x fraction plain training passes."""
    if not real.available():
        return
    print(
        "\n| network | images | steps | plain pass, ms per image | epoch | of 1 + steps x fraction plain passes "
        "| range |\n|---|---|---|---|---|---|---|"
    )
    digits = read_labeled(real.FOLDER / "mnist").subset(torch.arange(1280))
    # More updates for the faster network, so that the fixed cost of an epoch is small.
    many, few = cifar("train", 2560), cifar("train", 256)
    for name, data, steps in (("two_conv", digits, 40), ("two_conv", many, 10), ("resnet20", few, 10)):
        _compare_epoch(name, data, steps)


def _compare_epoch(name: str, data: LabeledImages, steps: int) -> None:
    from tempfile import TemporaryDirectory

    config = TrainConfig(
        recipe="localized", epochs=1, held_out=0, steps=steps, step_size=0.01, budget=Linf(0.1)
    )
    batch = config.batch_size
    passes = round(1 + steps * config.attacked_fraction)
    model = zoo.build(name, classes=10, channels=data.shape[0], size=data.shape[1:])
    epochs, plain = [], []
    with TemporaryDirectory() as cache:
        for number in range(ROUNDS + 1):
            rows: list[dict[str, float]] = []
            # The backgrounds are found in the first round, which is not counted, and stored.
            train(model, data, config, cache=Path(cache), on_epoch=rows.append)
            seconds = _plain_passes(name, data, batch, passes)
            if number:
                epochs.append(rows[0]["seconds"])
                plain.append(seconds)
    ratios = [epoch / floor for epoch, floor in zip(epochs, plain, strict=True)]
    print(
        f"| {name}, {data.shape[0]} x {data.shape[1]} x {data.shape[2]} | {len(data)} | {steps} | "
        f"{1e3 * statistics.median(plain) / passes / len(data):.3f} | {statistics.median(epochs):.2f} s | "
        f"{statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |",
        flush=True,
    )


def _plain_passes(name: str, data: LabeledImages, batch: int, passes: int) -> float:
    """Seconds of forward pass, backward pass and update of every batch, `passes` times, on images in memory."""
    model = zoo.build(name, classes=10, channels=data.shape[0], size=data.shape[1:]).train()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as torch documents it
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    images = data.images(torch.arange(len(data))).contiguous(memory_format=torch.channels_last)
    begun = time.perf_counter()
    for _ in range(passes):
        for rows in torch.arange(len(data)).split(batch):
            loss = F.cross_entropy(model(images[rows[0] : rows[-1] + 1]), data.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return time.perf_counter() - begun


def mnist() -> None:
    """Two convolutions, 6 epochs, all 60,000 and 10,000 digits."""
    if real.available():
        folder = real.FOLDER / "mnist"
        _matrix(
            "mnist",
            "two_conv",
            read_labeled(folder),
            read_labeled(folder, split="test"),
            TrainConfig(epochs=6),
        )


def cifar10() -> None:
    """Two convolutions, 8 epochs at a learning rate of .02, 30,000 training images, the first 1000 test images."""
    if real.available():
        # At 0.1 the network, which has no normalization, ends up predicting one class under full attacks.
        config = TrainConfig(epochs=8, learning_rate=0.02)
        _matrix("cifar10", "two_conv", cifar("train"), cifar("test", 1000), config)


def cifar(split: str, count: int | None = None) -> LabeledImages:
    """The folder's CIFAR-10 images."""
    images, labels = real.networks().cifar10(split, count) if count else real.networks().cifar10(split)
    return from_tensors((images * 255).round().byte(), labels, name=f"cifar10 {split}")


def _matrix(title: str, network: str, data: LabeledImages, test: LabeledImages, config: TrainConfig) -> None:
    begun = time.perf_counter()
    out = Path(os.environ.get("WEAKSPOT_MATRIX", f"matrix-{title}"))
    matrix = robustness_matrix(
        lambda seed: zoo.build(network, classes=10, channels=data.shape[0], size=data.shape[1:], seed=seed),
        data, test, config, out=out, recipes=RECIPES, strongest=300,
        on_epoch=lambda name, row: print(name, {key: round(value, 4) for key, value in row.items()}, flush=True),
    )  # fmt: skip
    print(
        f"\n{title}, {network}, {config}, {len(data)} training images: {time.perf_counter() - begun:.0f} s\n"
    )
    print(sections.table(matrix.accuracy))
    against = matrix.differences[matrix.differences["against"] == "standard"]
    print("\n" + sections.table(against))


SECTIONS = {"cost": cost, "mnist": mnist, "cifar10": cifar10}

if __name__ == "__main__":
    sections.run(SECTIONS)
