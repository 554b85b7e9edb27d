"""Stem: the gradient by the image of a network's first, strided convolution, as one dense convolution.

With one or three channels of images the libraries' own takes several times what the convolution itself takes. But every
phase (i mod stride, j mod stride) of that gradient is a small convolution of the output's gradient; all of them are one
convolution to stride ** 2 times as many channels, which are then woven into the image: the sub-pixel convolution of
Shi et al. 2016 (arXiv 1609.05158) as the adjoint of a strided one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEW = 4  # channels of images: with more, and with kernels of less than 4 sites, the libraries' own is as fast
LEAST_KERNEL = 4


class Phases(NamedTuple):
    """A strided convolution's adjoint.

    Attributes:
        weight: (C * stride ** 2, out channels, K, K), a kernel for every channel and phase.
        first: the first output site that image site 0 is reached from, at most 0.
        last: the last one.
    """

    weight: Tensor
    first: int
    last: int


def phases(weight: Tensor, stride: int, padding: int) -> Phases:
    """The adjoint of a convolution by weight (out channels, C, k, k): one kernel for each phase of its input."""
    out, channels, size, _ = weight.shape
    # Image site stride * q + r meets tap t at output site q + (r + padding - t) / stride, where that is whole.
    taps = [
        (phase, tap, (phase + padding - tap) // stride)
        for phase in range(stride)
        for tap in range(size)
        if (phase + padding - tap) % stride == 0
    ]
    first, last = min(0, *(site for *_, site in taps)), max(0, *(site for *_, site in taps))
    phase, tap, site = (torch.tensor(values, device=weight.device) for values in zip(*taps, strict=True))
    side = last - first + 1
    made = weight.new_zeros(stride, stride, side, side, out, channels)
    rows, columns = phase[:, None], phase[None]
    made[rows, columns, site[:, None] - first, site[None] - first] = weight.detach().permute(2, 3, 0, 1)[
        tap[:, None], tap[None]
    ]
    kernels = made.permute(5, 0, 1, 4, 2, 3).reshape(channels * stride**2, out, side, side)
    return Phases(kernels.contiguous(memory_format=torch.channels_last), first, last)


def gradient_by_image(gradient: Tensor, adjoint: Phases, stride: int, size: tuple[int, int]) -> Tensor:
    """From the gradient (N, out channels, h, w) by a convolution's output that by its input (N, C, *size)."""
    (height, width), (h, w) = size, gradient.shape[2:]
    below = -(-height // stride) - 1 + adjoint.last - (h - 1)
    right = -(-width // stride) - 1 + adjoint.last - (w - 1)
    margin = -adjoint.first
    if below == right == margin:
        woven = F.conv2d(gradient, adjoint.weight, padding=margin)
    else:
        woven = F.conv2d(F.pad(gradient, (margin, right, margin, below)), adjoint.weight)
    return F.pixel_shuffle(woven, stride)[..., :height, :width]


@contextmanager
def quick_stem(network: nn.Module) -> Iterator[None]:
    """Inside, the network's stem takes the quick way back to the image, and none to its own weights.

    That is for an adversary, who asks for the gradient by images alone while the weights stay. Networks without such a
    stem, and devices other than a CPU, stay as they are.
    """
    stem = _stem(network)
    if stem is None:
        yield
        return
    adjoint = phases(stem.weight, stem.stride[0], int(stem.padding[0]))
    own = stem.forward

    def forward(images: Tensor) -> Tensor:
        if images.ndim != 4 or not images.requires_grad or torch.is_autocast_enabled("cpu"):
            return own(images)
        found: Tensor = _Stem.apply(images, stem, adjoint)  # type: ignore[no-untyped-call]
        return found

    stem.forward = forward  # type: ignore[assignment]
    try:
        yield
    finally:
        del stem.forward


class _Stem(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, stem: nn.Conv2d, adjoint: Phases) -> Tensor:
        ctx.adjoint, ctx.stride, ctx.size = adjoint, stem.stride[0], tuple(images.shape[2:])
        bias = None if stem.bias is None else stem.bias.detach()
        return F.conv2d(images, stem.weight.detach(), bias, stem.stride, stem.padding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient_by_image(gradient, ctx.adjoint, ctx.stride, ctx.size), None, None


def _stem(network: nn.Module) -> nn.Conv2d | None:
    """The first convolution, where the quick way is the quicker."""
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if (
        first is None
        or type(first).forward is not nn.Conv2d.forward
        or "forward" in vars(first)
        or not isinstance(first._parameters.get("weight"), nn.Parameter)  # not computed by a parametrisation
        or first.weight.dtype != torch.float32
        or first.weight.device.type != "cpu"
    ):
        return None
    square = all(len(set(sides)) == 1 for sides in (first.kernel_size, first.stride, first.padding))
    plain = first.groups == 1 and set(first.dilation) == {1} and first.padding_mode == "zeros"
    if not (square and plain) or isinstance(first.padding, str):
        return None
    worth = first.in_channels <= FEW and first.stride[0] > 1 and first.kernel_size[0] >= LEAST_KERNEL
    return first if worth else None
