"""The gradient of a network's first, strided convolution with respect to the image, as one dense convolution.

For images with one or three channels the libraries take several times as long for this gradient as for the convolution
itself. Each phase (i mod stride, j mod stride) of the gradient is a small convolution of the output's gradient. All
phases are computed as one convolution with stride ** 2 times as many channels and then interleaved: the sub-pixel
convolution of Shi et al. 2016 (arXiv 1609.05158, section 2.1) as the adjoint of a strided one. Localized training of a
small network costs 1.11 times its bare passes with it and 1.26 times without (docs/decisions.md).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

MOST_CHANNELS = 4  # of images; with more, or with smaller kernels, the libraries are as fast
SMALLEST_KERNEL = 4


class Adjoint(NamedTuple):
    """The adjoint of a strided convolution, as kernels of a dense one.

    Attributes:
        weight: (C * stride ** 2, out channels, K, K), one kernel per channel and phase.
        first: offset of the first output site that image site 0 contributes to, at most 0.
        last: offset of the last one, at least 0.
    """

    weight: Tensor
    first: int
    last: int


def adjoint_of(weight: Tensor, stride: int, padding: int) -> Adjoint:
    """The adjoint of the convolution with the weight (out channels, C, k, k)."""
    out, channels, size, _ = weight.shape
    # Image site stride * q + phase contributes through kernel tap t to output site q + (phase + padding - t) / stride,
    # if that is an integer.
    taps = [
        (phase, tap, (phase + padding - tap) // stride)
        for phase in range(stride)
        for tap in range(size)
        if (phase + padding - tap) % stride == 0
    ]
    first, last = min(0, *(site for *_, site in taps)), max(0, *(site for *_, site in taps))
    phase, tap, site = (torch.tensor(values, device=weight.device) for values in zip(*taps, strict=True))
    side = last - first + 1
    kernels = weight.new_zeros(stride, stride, side, side, out, channels)
    rows, columns = phase[:, None], phase[None]
    kernels[rows, columns, site[:, None] - first, site[None] - first] = weight.detach().permute(2, 3, 0, 1)[
        tap[:, None], tap[None]
    ]
    # pixel_shuffle expects the channels in the order (C, row phase, column phase).
    kernels = kernels.permute(5, 0, 1, 4, 2, 3).reshape(channels * stride**2, out, side, side)
    return Adjoint(kernels.contiguous(memory_format=torch.channels_last), first, last)


def input_gradient(gradient: Tensor, adjoint: Adjoint, stride: int, size: tuple[int, int]) -> Tensor:
    """The gradient (N, C, *size) by a convolution's input, from that by its output (N, out channels, h, w)."""
    (height, width), (h, w) = size, gradient.shape[2:]
    # Padding so that all ceil(height / stride) x ceil(width / stride) groups of sites are computed.
    below = -(-height // stride) - 1 + adjoint.last - (h - 1)
    right = -(-width // stride) - 1 + adjoint.last - (w - 1)
    margin = -adjoint.first
    if below == right == margin:
        phases = F.conv2d(gradient, adjoint.weight, padding=margin)
    else:
        phases = F.conv2d(F.pad(gradient, (margin, right, margin, below)), adjoint.weight)
    return F.pixel_shuffle(phases, stride)[..., :height, :width]


@contextmanager
def fast_input_gradient(network: nn.Module) -> Iterator[None]:
    """Inside, the network's first convolution computes its gradient by the image fast, and none by its own weights.

    For an adversary, which needs the gradient by the images only. Networks without such a convolution, and devices
    other than the CPU, are left as they are.
    """
    stem = _suitable_stem(network)
    if stem is None:
        yield
        return
    adjoint = adjoint_of(stem.weight, stem.stride[0], int(stem.padding[0]))
    original = stem.forward

    def forward(images: Tensor) -> Tensor:
        if images.ndim != 4 or not images.requires_grad or torch.is_autocast_enabled("cpu"):
            return original(images)
        output: Tensor = _Stem.apply(images, stem, adjoint)  # type: ignore[no-untyped-call]
        return output

    stem.forward = forward  # type: ignore[assignment]
    try:
        yield
    finally:
        del stem.forward


class _Context(FunctionCtx):
    adjoint: Adjoint
    stride: int
    size: tuple[int, int]


class _Stem(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, images: Tensor, stem: nn.Conv2d, adjoint: Adjoint) -> Tensor:
        ctx.adjoint, ctx.stride, ctx.size = adjoint, stem.stride[0], (images.shape[2], images.shape[3])
        bias = None if stem.bias is None else stem.bias.detach()
        return F.conv2d(images, stem.weight.detach(), bias, stem.stride, stem.padding)

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor, None, None]:
        return input_gradient(gradient, ctx.adjoint, ctx.stride, ctx.size), None, None


def _suitable_stem(network: nn.Module) -> nn.Conv2d | None:
    """The first convolution of the network, if the dense convolution is the faster one."""
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if (
        first is None
        or type(first).forward is not nn.Conv2d.forward
        or "forward" in vars(first)
        or not isinstance(first._parameters.get("weight"), nn.Parameter)  # not computed by a parametrization
        or first.weight.dtype != torch.float32
        or first.weight.device.type != "cpu"
    ):
        return None
    square = all(len(set(sides)) == 1 for sides in (first.kernel_size, first.stride, first.padding))
    plain = first.groups == 1 and set(first.dilation) == {1} and first.padding_mode == "zeros"
    if not (square and plain) or isinstance(first.padding, str):
        return None
    faster = (
        first.in_channels <= MOST_CHANNELS and first.stride[0] > 1 and first.kernel_size[0] >= SMALLEST_KERNEL
    )
    return first if faster else None
