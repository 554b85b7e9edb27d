"""Bounds: how large a network's values can become, to know where none of them can be NaN.

Interval arithmetic on absolute values: coarse, but what it calls finite is finite for every image in [0, 1].

Merging: steps that one call does together, which spares passes over memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from weakspot.edits.kernels import is_convolution, pair
from weakspot.edits.recording import Recording, Slot, Step
from weakspot.edits.rules import SITEWISE

LARGEST = 1e37  # a tenth of the largest float32, for sums that round up
NO_LARGER = {
    "relu", "silu", "hardswish", "gelu", "abs", "neg", "clone", "detach", "alias", "contiguous", "lift_fresh",
    "max_pool2d_with_indices", "slice", "view", "_unsafe_view", "reshape", "permute", "transpose", "expand", "mean",
    "cat", "maximum", "minimum", "unsqueeze", "squeeze",
}  # fmt: skip
AT_MOST_ONE = {"sigmoid", "hardsigmoid", "tanh"}


def bounds(steps: Sequence[Step]) -> dict[int, float]:
    """The largest absolute value in each slot, for images in [0, 1]; infinite where it is unknown or may be NaN."""
    found = {0: 1.0}
    for step in steps:
        before = [found.get(slot, math.inf) for slot in step.inputs]
        largest = _after(step, found) if all(map(math.isfinite, before)) else math.inf
        if not largest <= LARGEST:  # NaN too
            largest = math.inf
        found.update(dict.fromkeys(step.outputs, largest))
    return found


def _after(step: Step, known: Mapping[int, float]) -> float:
    """The bound of what a step returns, for finite inputs."""
    largest = max((known[slot] for slot in step.inputs), default=math.inf)
    if step.name in NO_LARGER:
        return max([largest, *(_size(leaf) for leaf in step.arguments if isinstance(leaf, Tensor))])
    if step.name in AT_MOST_ONE:
        return 1.0
    rule = RULES.get(step.name)
    return math.inf if rule is None or not step.arguments else rule(step, known)


def _size(value: Any) -> float:
    """Largest absolute value of a constant; infinite where it has none."""
    if isinstance(value, Tensor):
        value = float(value.abs().amax()) if value.numel() else 0.0
    known = isinstance(value, int | float) and not math.isnan(value)
    return abs(float(value)) if known else math.inf


def _of(value: Any, known: Mapping[int, float]) -> float:
    return known[value.number] if isinstance(value, Slot) else _size(value)


def _convolution(step: Step, known: Mapping[int, float]) -> float:
    if not is_convolution(step):
        return math.inf
    maps, weight, bias, *_ = step.arguments
    sums = weight.abs().sum((1, 2, 3))
    return known[maps.number] * float(sums.amax()) + (0.0 if bias is None else _of(bias, known))


def _sum(step: Step, known: Mapping[int, float]) -> float:
    """With a factor, alpha, on one of the two."""
    one, other, *_ = step.arguments
    return (_of(one, known) + _of(other, known)) * max(1.0, _size(step.keywords.get("alpha", 1)))


def _product(step: Step, known: Mapping[int, float]) -> float:
    one, other, *_ = step.arguments
    return _of(one, known) * _of(other, known)


def _quotient(step: Step, known: Mapping[int, float]) -> float:
    one, other, *_ = step.arguments
    if isinstance(other, Slot) or len(step.arguments) > 2 or step.keywords:
        return math.inf
    smallest = float(other.abs().amin()) if isinstance(other, Tensor) else abs(float(other))
    return _of(one, known) / smallest if smallest else math.inf


def _batch_norm(step: Step, known: Mapping[int, float]) -> float:
    """In eval mode."""
    maps, weight, bias, mean, variance, *rest = step.arguments
    if mean is None or variance is None or (step.name == "native_batch_norm" and rest[0] is not False):
        return math.inf
    scale = (variance.double() + float(rest[-1])).rsqrt() * (1.0 if weight is None else weight)
    shift = 0.0 if bias is None else bias.abs()
    return float(((known[maps.number] + mean.abs()) * scale.abs() + shift).amax())


def _clamped(step: Step, known: Mapping[int, float]) -> float:
    """Between two numbers; of one that is missing the input may be as large as it was."""
    maps, *limits = step.arguments
    sizes = [_size(limit) for limit in limits if limit is not None]
    return max(sizes) if len(sizes) == 2 else max([_of(maps, known), 1.0, *sizes])


def _padded_bound(step: Step, known: Mapping[int, float]) -> float:
    return max(_of(step.arguments[0], known), _size((*step.arguments, 0)[2]))


def _average(step: Step, known: Mapping[int, float]) -> float:
    divisor = step.arguments[6] if len(step.arguments) > 6 else None
    return _of(step.arguments[0], known) if divisor is None else math.inf


RULES: dict[str, Callable[[Step, Mapping[int, float]], float]] = {
    "convolution": _convolution,
    "add": _sum,
    "sub": _sum,
    "rsub": _sum,
    "mul": _product,
    "div": _quotient,
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "_batch_norm_no_update": _batch_norm,
    "clamp": _clamped,
    "hardtanh": _clamped,
    "constant_pad_nd": _padded_bound,
    "avg_pool2d": _average,
}


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
