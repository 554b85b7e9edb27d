"""The adversary inside a training: a perturbation of every attacked image, in few operations besides the passes.

Stem: the gradient by the image of a network's first, strided convolution, as one dense convolution.

With one or three channels of images the libraries' own takes several times what the convolution itself takes. But every
phase (i mod stride, j mod stride) of that gradient is a small convolution of the output's gradient; all of them are one
convolution to stride ** 2 times as many channels, which are then woven into the image: the sub-pixel convolution of
Shi et al. 2016 (arXiv 1609.05158) as the adjoint of a strided one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weakspot.budgets import Budget, Linf, prepare
from weakspot.training.config import Recipe, Settings

Network = Callable[[Tensor], Tensor]
FAST_STEP = 1.25  # of the budget (Wong et al. 2020, arXiv 2001.03994)
HALF_FACTOR = 1024.0
NEAR = 1e-3  # deviation of TRADES' start: at the image itself its gradient is zero


def perturbed(
    network: Network,
    images: Tensor,
    labels: Tensor,
    region: Tensor | None,
    noise: Tensor,
    recipe: Recipe,
    settings: Settings,
) -> Tensor:
    """The images as the adversary leaves them, (n, C, H, W).

    Args:
        network: images to logits, in eval mode: the adversary moves no running statistics and drops nothing out.
        images: (n, C, H, W) in [0, 1].
        labels: (n,).
        region: bool (n, 1, H, W) that may change; everything where None.
        noise: (n, C, H, W) uniform in (-1, 1): where the random start lies.
        recipe: what is sought.
        settings: its numbers.
    """
    budget = settings.budget
    if recipe.search == "noise":
        return images + _start(budget, images, region, noise)
    steps, size = settings.steps, settings.step_size / max(_limit(budget), 1e-12)
    if recipe.search == "step":
        steps, size = 1, FAST_STEP
    if recipe.trades:
        with torch.no_grad():
            wanted = F.log_softmax(network(images), 1)
        noise = noise * min(1.0, NEAR / max(_limit(budget), 1e-12))

    # Steps go by the gradient's direction alone, so any factor will do that keeps it out of half precision's zero.
    factor = HALF_FACTOR if settings.precision == "16-mixed" else 1.0

    def loss(point: Tensor) -> Tensor:
        logits = network(point)
        if recipe.trades:
            return factor * F.kl_div(F.log_softmax(logits, 1), wanted, reduction="sum", log_target=True)
        return factor * F.cross_entropy(logits, labels, reduction="sum")

    if type(budget) is Linf:
        return _descend_cube(loss, images, region, noise, steps, size * budget.eps, budget.eps)
    point = images + _start(budget, images, region, noise)
    for _ in range(steps):
        gradient = _gradient(loss, point)
        gradient = gradient if region is None else gradient * region
        step = budget.steepest_step(gradient, point - images, images)
        point = images + _project(budget, point - images + size * step, images, region)
    return point


def _descend_cube(
    loss: Callable[[Tensor], Tensor],
    images: Tensor,
    region: Tensor | None,
    noise: Tensor,
    steps: int,
    step: float,
    eps: float,
) -> Tensor:
    """Steps of the sign inside the cube. Budget, range and region are one pair of bounds, met in one operation."""
    room = eps if region is None else eps * region
    low, high = (images - room).clamp_(min=0), (images + room).clamp_(max=1)
    point = (images + room * noise).clamp_(0, 1)
    for _ in range(steps):
        gradient = _gradient(loss, point)
        point = point.add(gradient.sign_(), alpha=step).clamp_(low, high)
    return point


def _gradient(loss: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    with torch.enable_grad():
        tracked = point.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(tracked), tracked)
    return gradient


def _start(budget: Budget, images: Tensor, region: Tensor | None, noise: Tensor) -> Tensor:
    """For a cube uniform inside it; for others along a random admissible direction, as far as a number says."""
    if type(budget) is Linf:
        room = budget.eps if region is None else budget.eps * region
        return (images + room * noise).clamp_(0, 1) - images
    inside = noise if region is None else noise * region
    extreme = budget.steepest_step(inside, torch.zeros_like(images), images)
    return _project(budget, extreme * noise[:, :1, :1, :1].abs(), images, region)


def _project(budget: Budget, perturbation: Tensor, images: Tensor, region: Tensor | None) -> Tensor:
    return prepare(budget, images).project(perturbation, region)


def _limit(budget: Budget) -> float:
    """The size of a budget in its own unit."""
    return float(getattr(budget, "eps", 1.0))


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
        or not isinstance(first._parameters.get("weight"), nn.Parameter)  # not computed by a parametrization
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
