"""Seeds and images decide every random number, whatever torch's default type is."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from weakspot._random import float32_noise, keys, mixed_seed, normal, uniform
from weakspot.logits import probe_images
from weakspot.regions import matched
from weakspot.training.adversary import scattered
from weakspot.training.data import Augmentation


def few_sites(size: int = 12) -> Tensor:
    region = torch.zeros(2, 1, size, size, dtype=torch.bool)
    region[:, :, 2:5, 3:9] = True
    return region


def moved_images(pixels: Tensor) -> Tensor:
    return Augmentation("crop,flip", len(pixels), (12, 12), seed=5, epoch=1).apply(
        torch.arange(len(pixels)), pixels
    )


PIXELS = torch.linspace(0, 1, 8 * 144, dtype=torch.float32).view(8, 1, 12, 12)
DRAWS = {
    "noise": lambda: float32_noise(torch.Generator().manual_seed(3), 4, 5),
    "uniform": lambda: uniform(keys(PIXELS, 1), 2, 3),
    "normal": lambda: normal(keys(PIXELS, 1), 2, 3),
    "probes": lambda: probe_images(PIXELS),
    "random control": lambda: matched(few_sites(), kind="random", seed=1),
    "control at the border": lambda: matched(few_sites(), kind="border", seed=1),
    "scattered": lambda: scattered(few_sites(), torch.tensor([1, 0]), 3, mixed_seed(1, 2)),
    "augmentation": lambda: moved_images(PIXELS),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_random_numbers_do_not_depend_on_the_default_type(draw: Callable[[], Tensor]) -> None:
    expected = draw()
    torch.set_default_dtype(torch.float64)
    try:
        found = draw()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_integers_of_numpy_are_the_same_seeds() -> None:
    assert mixed_seed(np.int64(3), np.uint8(1)) == mixed_seed(3, 1)  # type: ignore[arg-type]
