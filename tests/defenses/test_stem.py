"""The quick way back from a strided convolution to the image is the adjoint that autograd finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from weakspot.training.adversary import gradient_by_image, phases, quick_stem


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    kernel=st.integers(1, 8),
    stride=st.integers(1, 6),
    padding=st.integers(0, 4),
    channels=st.integers(1, 3),
)
def test_it_is_the_adjoint_for_every_shape(
    size: tuple[int, int], kernel: int, stride: int, padding: int, channels: int
) -> None:
    if min(size) + 2 * padding < kernel:
        return
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, channels, *size, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, channels, kernel, kernel, generator=generator, dtype=torch.float64)
    output = torch.nn.functional.conv2d(images, weight, stride=stride, padding=padding)
    back = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    (expected,) = torch.autograd.grad(output, images, back)
    found = gradient_by_image(back, phases(weight, stride, padding), stride, size)
    torch.testing.assert_close(found, expected)


def stems() -> list[nn.Module]:
    return [
        nn.Conv2d(3, 6, 4, 2, 1),
        nn.Conv2d(1, 6, 7, 2, 3, bias=False),
        nn.Conv2d(3, 6, 8, 8),
    ]


def gradients(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    point = images.clone().requires_grad_()
    logits = network(point)
    return logits, torch.autograd.grad((logits**2).sum(), point)[0]


@pytest.mark.parametrize("stem", stems(), ids=repr)
def test_networks_give_the_same_logits_and_gradients_and_come_back(stem: Any) -> None:
    network = nn.Sequential(stem, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3))
    images = torch.rand(4, stem.in_channels, 16, 23)
    logits, expected = gradients(network, images)
    with quick_stem(network):
        assert "forward" in vars(stem)
        found = gradients(network, images)
    assert torch.equal(found[0], logits)
    torch.testing.assert_close(found[1], expected)
    assert "forward" not in vars(stem)
    assert torch.equal(gradients(network, images)[1], expected)


@pytest.mark.parametrize(
    "stem",
    [
        nn.Conv2d(3, 6, 3, 2, 1),
        nn.Conv2d(3, 6, 5),
        nn.Conv2d(3, 6, 4, 2, padding_mode="circular", padding=1),
        nn.Conv2d(3, 6, 4, 2, dilation=2),
        nn.Conv2d(3, 6, 4, 2, groups=3),
        nn.Conv2d(3, 6, (4, 5), 2),
        nn.Conv2d(3, 6, 4, (1, 2)),
        nn.Conv2d(3, 6, 4, padding="same"),
        nn.Conv2d(3, 6, 4, 2).double(),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 4, 2)),
        nn.Linear(3, 3),
    ],
    ids=repr,
)
def test_what_it_does_not_do_better_stays_as_it_is(stem: nn.Module) -> None:
    with quick_stem(nn.Sequential(stem)):
        assert "forward" not in vars(stem)


def test_an_error_inside_puts_the_stem_back() -> None:
    stem = nn.Conv2d(3, 6, 4, 2)
    with pytest.raises(ValueError, match="inside"), quick_stem(stem):
        raise ValueError("inside")
    assert "forward" not in vars(stem)
