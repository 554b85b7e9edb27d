"""The dense form of the gradient of a strided convolution is the adjoint that autograd computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from weakspot.training.input_gradient import adjoint_of, fast_input_gradient, input_gradient


@settings(max_examples=80, deadline=None)
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
    result = input_gradient(back, adjoint_of(weight, stride, padding), stride, size)
    torch.testing.assert_close(result, expected)


def stems() -> list[nn.Module]:
    return [nn.Conv2d(3, 6, 4, 2, 1), nn.Conv2d(1, 6, 7, 2, 3, bias=False), nn.Conv2d(3, 6, 8, 8)]


def gradients(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    point = images.clone().requires_grad_()
    logits = network(point)
    return logits, torch.autograd.grad((logits**2).sum(), point)[0]


@pytest.mark.parametrize("stem", stems(), ids=repr)
def test_networks_give_the_same_logits_and_gradients_and_are_restored(stem: Any) -> None:
    network = nn.Sequential(stem, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3))
    images = torch.rand(4, stem.in_channels, 16, 23)
    logits, expected = gradients(network, images)
    with fast_input_gradient(network):
        assert "forward" in vars(stem)
        result = gradients(network, images)
    assert torch.equal(result[0], logits)
    torch.testing.assert_close(result[1], expected)
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
def test_unsuitable_networks_stay_as_they_are(stem: nn.Module) -> None:
    with fast_input_gradient(nn.Sequential(stem)):
        assert "forward" not in vars(stem)


def test_an_error_inside_restores_the_network() -> None:
    stem = nn.Conv2d(3, 6, 4, 2)
    with pytest.raises(ValueError, match="inside"), fast_input_gradient(stem):
        raise ValueError("inside")
    assert "forward" not in vars(stem)
