"""Clamps and max pooling as steps on affine forms."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from weakspot.edits.steps import Arguments, Slot, Step, pair
from weakspot.proofs.linear_steps import (
    BoundStep,
    ClampStep,
    LinearStep,
    MaxStep,
    NotSupportedError,
    because,
    check_only_input,
    convolve,
)
from weakspot.proofs.rounding_errors import LARGEST

FAR = -1e300  # below every float32; stands for the minus infinity around maps that are max-pooled


def clamp_step(step: Step) -> ClampStep:
    """ReLU, ReLU6, hardtanh and clamp."""
    check_only_input(step)
    # Limits that a call leaves out are those of the function; clamp has none.
    defaults = {"relu": (0.0, None), "hardtanh": (-1.0, 1.0)}.get(step.name, (None, None))
    given = [*step.arguments[1:]]
    if step.name == "clamp_max":
        given = [None, *given]
    given += list(defaults[len(given) :])
    named = (step.keywords.get("min", given[0]), step.keywords.get("max", given[1]))
    if any(isinstance(end, Tensor) for end in named):
        raise NotSupportedError(because(step, "with tensors as limits"))
    low, high = (
        fallback if end is None else float(end)
        for end, fallback in zip(named, (-torch.inf, torch.inf), strict=True)
    )
    # Every value would become such a limit, whose rounding `limit_error` leaves out.
    if low > LARGEST or high < -LARGEST:
        raise NotSupportedError(because(step, "with limits near the range of float32"))
    # Negated, so that NaN is refused as well.
    if not low <= high:
        raise NotSupportedError(because(step, "with limits in the wrong order"))
    return ClampStep(step, low, high)


def max_pool_steps(step: Step, shapes: dict[int, torch.Size]) -> list[BoundStep]:
    """Max pooling as a convolution that lays the candidates of each maximum side by side, then their maximum."""
    check_only_input(step)
    given: Arguments = (*step.arguments, *(None, None, None, 0, 1, False)[len(step.arguments) :])
    _, kernel, stride, padding, dilation, ceil = given
    if ceil:
        raise NotSupportedError("max pooling with ceil_mode is not supported")
    high, wide = pair(kernel)
    stride = pair(stride) if stride else (high, wide)
    (down, along), dilation = pair(padding), pair(dilation)
    channels, many = shapes[step.inputs[0]][1], high * wide
    # Values between the recorded steps get numbers that no slot of the recording has.
    source, middle, candidates = step.inputs[0], -2 * step.outputs[0] - 1, -2 * step.outputs[0] - 2
    steps: list[BoundStep] = []
    if down or along:
        # As F.pad takes widths: the last axis first.
        around = [along, along, down, down]
        value = Step(
            "constant_pad_nd",
            torch.constant_pad_nd,
            (Slot(source), around, FAR),
            {},
            (source,),
            (middle,),
            False,
        )
        # Generators and radii of the padding are zero: only its value is far below.
        zero = replace(value, arguments=(Slot(source), around, 0.0))
        steps.append(LinearStep(value, zero, zero, zero, 0))
        source = middle
    # One kernel for each place of the window, which copies that place.
    # With a group for each channel, result c * many + j is place j of channel c.
    weight = torch.eye(many, dtype=torch.float64).view(many, 1, high, wide).repeat(channels, 1, 1, 1)
    arguments = (Slot(source), weight, None, list(stride), [0, 0], list(dilation), False, [0, 0], channels)
    spread = Step("convolution", convolve, arguments, {}, (source,), (candidates,), False)
    steps.append(LinearStep(spread, spread, spread, spread, 0))
    # The indices, its second output, have no bounds: `network_steps` refuses steps that read them.
    taken = replace(step, inputs=(candidates,), outputs=step.outputs[:1], several=False)
    return [*steps, MaxStep(taken, many)]
