"""The cost of an explanation, compared with the passes that it needs at least. Run: python -m benchmarks.explain"""

from __future__ import annotations

import platform
from datetime import UTC, datetime

import numpy as np
import torch

from benchmarks.timing import alternate, peak_gigabytes, show
from weakspot import attacks, class_activation, explain, load, overlap, sample_images
from weakspot.attribution import margin_drop
from weakspot.classifier import default_batch, predict
from weakspot.statistics import products_over_shifts

STEPS = 10


def main() -> None:
    """Print every table."""
    print(
        f"{datetime.now(UTC):%Y-%m-%d} · {platform.machine()}, {torch.get_num_threads()} threads · "
        f"torch {torch.__version__}"
    )
    model = load("efficientnet_lite0", device="cpu")
    images, names = sample_images()
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
    main()
