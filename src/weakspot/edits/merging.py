"""Merging: steps that one call does together, which spares passes over memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from weakspot.edits.bounds import bounds
from weakspot.edits.recording import Recording, Step
from weakspot.edits.rules import SITEWISE
from weakspot.edits.sliding import is_convolution, pair

FRESH = {"convolution", "addmm", "add", "native_batch_norm", "_native_batch_norm_legit_no_training"}
FUSED = (
    getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
    if torch.backends.mkldnn.is_available()
    else None
)
"""oneDNN's convolution with an activation at its end, or None where this torch has none."""


@dataclass(frozen=True)
class Activation:
    """What a convolution does to its result before it is written.

    Attributes:
        name: by which oneDNN knows it.
        numbers: that oneDNN wants with it.
        call: the same in place, for tensors that oneDNN does not take.
        keeps_nan: whether oneDNN makes NaN of NaN.
    """

    name: str
    numbers: tuple[float, ...]
    call: Callable[[Tensor], Tensor]
    keeps_nan: bool


@dataclass(frozen=True)
class Convolution:
    """A convolution of two axes that pads each side by its own width, and may end with an activation.

    Called like aten's convolution, but `padding` may be (top, left, bottom, right).

    Attributes:
        activation: at its end, or None.
        grown: the weight with zeros at its edges that make even padding do, or None to pad the maps.
    """

    activation: Activation | None = None
    grown: Tensor | None = None

    def __call__(
        self,
        maps: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        output_padding: Sequence[int],
        groups: int,
    ) -> Tensor:
        if len(padding) == 4:
            top, left, bottom, right = padding
            padding = (max(top, bottom), max(left, right))
            if self.grown is not None:
                weight = self.grown
            else:
                maps, padding = F.pad(maps, (left, right, top, bottom)), (0, 0)
        activation = self.activation
        if (
            activation is not None
            and FUSED is not None
            and maps.device.type == "cpu"
            and maps.dtype == weight.dtype == torch.float32
        ):
            shared = (pair(padding), pair(stride), pair(dilation), groups)
            fused: Tensor = FUSED(
                maps, weight, bias, *shared, activation.name, list(activation.numbers), "none"
            )
            return fused
        found = torch.convolution(
            maps, weight, bias, stride, padding, dilation, transposed, output_padding, groups
        )
        return found if activation is None else activation.call(found)


def merged(recording: Recording) -> Recording:
    """The same with padding and activations done by the convolutions that they belong to."""
    return replace(recording, steps=_activated(_padded(recording.steps), recording.logits))


def without_growth(recording: Recording) -> Recording:
    """The same with uneven padding done by padding: no multiplications by zeros."""
    steps = [
        replace(step, call=replace(step.call, grown=None)) if isinstance(step.call, Convolution) else step
        for step in recording.steps
    ]
    return replace(recording, steps=steps)


def _padded(steps: Sequence[Step]) -> list[Step]:
    """Zero padding that a convolution alone reads is done by it."""
    alone = _read_once(steps)
    paddings = {step.outputs[0]: step for step in steps if step.outputs[0] in alone and _is_padding(step)}
    taken = {step.inputs[0] for step in steps if is_convolution(step)} & paddings.keys()
    return [
        _padding_taken_over(step, paddings[step.inputs[0]])
        if is_convolution(step) and step.inputs[0] in taken
        else step
        for step in steps
        if step.outputs[0] not in taken
    ]


def _is_padding(step: Step) -> bool:
    """Whether it puts zeros around the sites of maps."""
    if step.name != "constant_pad_nd" or len(step.inputs) != 1:
        return False
    widths, value = step.arguments[1], (*step.arguments, 0)[2]
    return len(widths) == 4 and value == 0 and min(widths) >= 0


def _padding_taken_over(step: Step, before: Step) -> Step:
    _, weight, bias, stride, padding, dilation, *rest = step.arguments
    widths, (down, along) = before.arguments[1], pair(padding)
    left, right, top, bottom = widths[0] + along, widths[1] + along, widths[2] + down, widths[3] + down
    together, call = [top, left], step.call
    if (top, left) != (bottom, right):
        together += [bottom, right]
        cheap = weight.shape[1] == 1 and pair(dilation) == (1, 1)
        ends = [max(0, width) for width in (right - left, left - right, bottom - top, top - bottom)]
        call = Convolution(grown=F.pad(weight, ends) if cheap else None)
    arguments = (before.arguments[0], weight, bias, stride, together, dilation, *rest)
    return replace(step, call=call, arguments=arguments, inputs=before.inputs)


def _activated(steps: Sequence[Step], logits: int) -> list[Step]:
    """An activation that alone reads what a convolution makes is done by it.

    oneDNN's ReLU and clamp make 0 of NaN, which would hide that an edit breaks the network: they are left as they are
    where NaN cannot be ruled out.
    """
    alone = _read_once(steps) - {logits}
    largest = bounds(steps)
    made = {step.outputs[0] for step in steps if is_convolution(step)} & alone
    ends = {
        step.inputs[0]: step
        for step in steps
        if (activation := _activation(step))
        and step.inputs[0] in made
        and (activation.keeps_nan or math.isfinite(largest[step.inputs[0]]))
    }
    own = {step.outputs[0] for step in ends.values()}
    return [
        _activation_taken_over(step, ends[step.outputs[0]]) if step.outputs[0] in ends else step
        for step in steps
        if step.outputs[0] not in own
    ]


def _activation_taken_over(step: Step, end: Step) -> Step:
    call = step.call if isinstance(step.call, Convolution) else Convolution()
    return replace(step, call=replace(call, activation=_activation(end)), outputs=end.outputs)


def _read_once(steps: Sequence[Step]) -> set[int]:
    """Slots that a single step reads, in one place."""
    readers = Counter(slot for step in steps for slot in step.inputs)
    return {slot for slot, count in readers.items() if count == 1}


def _activation(step: Step) -> Activation | None:
    """The activation that a step is, or None for what oneDNN does not know."""
    numbers = step.arguments[1:]
    if (
        len(step.inputs) != 1
        or step.keywords
        or any(not isinstance(number, int | float) for number in numbers)
    ):
        return None
    if step.name == "relu":
        return Activation("relu", (), torch.relu_, keeps_nan=False)
    if step.name in {"hardtanh", "clamp"} and len(numbers) == 2 and numbers[0] <= numbers[1]:
        low, high = numbers
        return Activation("hardtanh", (low, high), lambda maps: maps.clamp_(low, high), keeps_nan=False)
    if step.name == "silu":
        return Activation("swish", (), lambda maps: F.silu(maps, inplace=True), keeps_nan=True)
    if step.name == "hardswish":
        return Activation("hardswish", (), lambda maps: F.hardswish(maps, inplace=True), keeps_nan=True)
    return None


def in_place(steps: Sequence[Step]) -> list[Step]:
    """The steps; activation functions of what nothing else reads write into it, which spares memory and time."""
    made = {slot: step.name for step in steps for slot in step.outputs}
    alone = _read_once(steps)

    def thrifty(step: Step) -> Step:
        twin = getattr(getattr(torch.ops.aten, f"{step.name}_", None), "default", None)
        if getattr(step.call, "_overloadname", "") != "default" or step.name not in SITEWISE or twin is None:
            return step
        # A constant with sites would need the map that is written over.
        constants = any(isinstance(leaf, Tensor) for leaf in step.arguments)
        fresh = len(step.inputs) == 1 and step.inputs[0] in alone and made.get(step.inputs[0]) in FRESH
        return replace(step, call=twin) if fresh and not constants else step

    return [thrifty(step) for step in steps]
