"""A recorded network as a list of steps, and the steps rewritten so that fewer passes over memory are made."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from weakspot.fusion import runs_by_onednn

RESHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias", "expand"}  # their second argument is a shape
SITEWISE = {
    "relu", "hardtanh", "sigmoid", "tanh", "gelu", "silu", "hardswish", "hardsigmoid", "elu", "leaky_relu", "celu",
    "selu", "softplus", "mish", "neg", "abs", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "square",
    "pow", "clamp", "clamp_min", "clamp_max", "erf", "sin", "cos", "sign", "round", "floor", "ceil", "clone", "detach",
    "alias", "_to_copy", "contiguous", "lift_fresh", "_prelu_kernel", "hardshrink", "softshrink", "threshold",
    "logical_not",
}  # fmt: skip
"""Functions of one site alone, with constants that are the same at every site."""
FRESH = {"convolution", "addmm", "add", "native_batch_norm", "_native_batch_norm_legit_no_training"}
"""Functions whose result shares no memory with anything else."""

Arguments = tuple[Any, ...]  # of a torch function
Keywords = dict[str, Any]
Values = dict[int, Any]
"""By slot: a tensor, or the windows that edits change of it."""


class CannotRecordError(Exception):
    """The network does something that cannot be repeated from its steps; the message says what."""


@dataclass(frozen=True)
class Slot:
    """Takes the place of a value that depends on the image in a step's arguments."""

    number: int


@dataclass(frozen=True)
class Step:
    """One call of a tensor function.

    Attributes:
        name: of the function without its overload, such as "convolution".
        call: the function; it changes none of its arguments, unless `in_place` replaced it.
        arguments: positional, with slots for what depends on the image; other tensors are constants.
        keywords: keyword arguments, with slots in the same way.
        inputs: the slots among the arguments, in order.
        outputs: the slots that it fills; -1 for a part that is not a tensor.
        several: whether it returns a tuple.
    """

    name: str
    call: Callable[..., Any]
    arguments: Arguments
    keywords: Keywords
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    several: bool

    def run(self, values: Values, count: int, recorded: int) -> Any:
        """Call the function for `count` images; the shapes in its arguments were recorded with `recorded`."""
        arguments, keywords = filled(self.arguments, values), filled(self.keywords, values)
        if self.name == "convolution" and 1 in arguments[0].shape[1:]:
            # On CPUs torch 2.13 gives wrong numbers, or crashes, for such maps with channels-last strides.
            arguments = (arguments[0].clone(memory_format=torch.contiguous_format), *arguments[1:])
        if self.name in RESHAPES:
            shape = list(arguments[1])
            if shape and shape[0] != -1:
                if shape[0] * count % recorded:
                    raise CannotRecordError(f"{self.name} mixes images: it makes shape {tuple(shape)}")
                shape[0] = shape[0] * count // recorded
            if self.name != "expand":
                # Values may lie in memory in another order than when they were recorded.
                return arguments[0].reshape(shape)
            arguments = (arguments[0], shape, *arguments[2:])
        elif self.name == "native_group_norm":
            # The fourth argument is the number of images.
            arguments = (*arguments[:3], arguments[3] * count // recorded, *arguments[4:])
        elif self.name in {"native_batch_norm", "cudnn_batch_norm"} and arguments[5]:
            raise CannotRecordError("its batch normalization takes its statistics from the images of a batch")
        return self.call(*arguments, **keywords)

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution of two axes, not transposed, with constant weights."""
        if self.name != "convolution" or len(self.inputs) != 1:
            return False
        maps, weight, _, _, _, _, transposed, *_ = self.arguments
        return isinstance(maps, Slot) and weight.ndim == 4 and not transposed

    @property
    def is_pointwise(self) -> bool:
        """Whether it is a convolution of each site's own channels."""
        if not self.is_convolution:
            return False
        _, weight, _, stride, padding, *_ = self.arguments
        return weight.shape[2:] == (1, 1) and set(stride) == {1} and set(padding) == {0}


@dataclass(frozen=True)
class Recording:
    """Steps from images (N, C, H, W) in slot 0 to logits (N, K).

    Attributes:
        steps: in the order they were done; each needs only slots that earlier ones filled.
        logits: the slot that ends with the logits.
        count: the number of images that were recorded.
        work_saved: by windows, by the size of the edit (see `local.work_saved`).
    """

    steps: Sequence[Step]
    logits: int
    count: int
    work_saved: dict[tuple[int, int], float] = field(default_factory=dict, init=False)


def filled(arguments: Any, values: Values) -> Any:
    """The arguments with values in place of slots."""
    kind = type(arguments)
    if kind is Slot:
        return values[arguments.number]
    if kind is tuple or kind is list:
        return kind(filled(leaf, values) for leaf in arguments)
    if kind is dict:
        return {name: filled(leaf, values) for name, leaf in arguments.items()}
    return arguments


def pair(value: Any) -> tuple[int, int]:
    """Down and along, of an argument that may be one number for both; of four numbers the first two."""
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


@dataclass(frozen=True)
class PaddedConvolution:
    """A convolution that pads each side by its own width: `padding` is (top, left, bottom, right).

    Attributes:
        grown: the weight with zeros at its edges, with which even padding gives the same result; None to pad the maps.
    """

    grown: Tensor | None

    def __call__(
        self, maps: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, *rest: Any
    ) -> Tensor:
        if len(padding) == 4:
            top, left, bottom, right = padding
            # Both sides as wide as the wider one, which the zeros of `grown` make up for.
            padding = (max(top, bottom), max(left, right))
            if self.grown is not None:
                weight = self.grown
            else:
                maps, padding = F.pad(maps, (left, right, top, bottom)), (0, 0)
        return torch.convolution(maps, weight, bias, stride, padding, *rest)


def with_padding_in_convolutions(recording: Recording) -> Recording:
    """The same, with zero padding that only a convolution reads done by that convolution."""
    steps = recording.steps
    single = _read_once(steps)
    paddings = {
        step.outputs[0]: step for step in steps if step.outputs[0] in single and _is_zero_padding(step)
    }
    taken = {step.inputs[0] for step in steps if step.is_convolution} & paddings.keys()
    merged = [
        _padding_taken_over(step, paddings[step.inputs[0]])
        if step.is_convolution and step.inputs[0] in taken
        else step
        for step in steps
        if step.outputs[0] not in taken
    ]
    return replace(recording, steps=merged)


def without_growth(recording: Recording) -> Recording:
    """The same, without multiplications by the zeros of grown weights."""
    steps = [
        replace(step, call=PaddedConvolution(None)) if isinstance(step.call, PaddedConvolution) else step
        for step in recording.steps
    ]
    return replace(recording, steps=steps)


def by_onednn(steps: Sequence[Step]) -> list[Step]:
    """The steps, where pointwise convolutions on CPUs go through oneDNN (see `fusion.runs_by_onednn`)."""
    return [replace(step, call=_pointwise) if step.is_pointwise else step for step in steps]


def _pointwise(
    maps: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, _: Any, *rest: Any
) -> Tensor:
    # The recorded dilation may be meant for more images than there are now.
    dilation = [2, 2] if runs_by_onednn(maps, weight) else [1, 1]
    return torch.convolution(maps, weight, bias, stride, padding, dilation, *rest)


def in_place(steps: Sequence[Step]) -> list[Step]:
    """The steps, where activations of what nothing else reads overwrite it, which saves memory and time."""
    made = {slot: step.name for step in steps for slot in step.outputs}
    single = _read_once(steps)

    def overwriting(step: Step) -> Step:
        twin = getattr(getattr(torch.ops.aten, f"{step.name}_", None), "default", None)
        if getattr(step.call, "_overloadname", "") != "default" or step.name not in SITEWISE or twin is None:
            return step
        # A constant with sites would need the map that is overwritten.
        constants = any(isinstance(leaf, Tensor) for leaf in step.arguments)
        fresh = len(step.inputs) == 1 and step.inputs[0] in single and made.get(step.inputs[0]) in FRESH
        return replace(step, call=twin) if fresh and not constants else step

    return [overwriting(step) for step in steps]


def _is_zero_padding(step: Step) -> bool:
    """Whether it puts zeros around the sites of maps."""
    if step.name != "constant_pad_nd" or len(step.inputs) != 1:
        return False
    widths, value = step.arguments[1], (*step.arguments, 0)[2]
    return len(widths) == 4 and value == 0 and min(widths) >= 0


def _padding_taken_over(step: Step, before: Step) -> Step:
    _, weight, bias, stride, padding, dilation, *rest = step.arguments
    widths, (down, along) = before.arguments[1], pair(padding)
    # F.pad lists the last axis first: left, right, top, bottom.
    left, right, top, bottom = widths[0] + along, widths[1] + along, widths[2] + down, widths[3] + down
    total, call = [top, left], step.call
    if (top, left) != (bottom, right):
        total += [bottom, right]
        # Depthwise: a few zeros cost less than padding.
        cheap = weight.shape[1] == 1 and pair(dilation) == (1, 1)
        # Zeros go where even padding is wider than wanted: at the kernel's start if the border after the map is wider.
        zeros = [max(0, width) for width in (right - left, left - right, bottom - top, top - bottom)]
        call = PaddedConvolution(F.pad(weight, zeros) if cheap else None)
    arguments = (before.arguments[0], weight, bias, stride, total, dilation, *rest)
    return replace(step, call=call, arguments=arguments, inputs=before.inputs)


def _read_once(steps: Sequence[Step]) -> set[int]:
    """Slots that a single step reads, in one place."""
    readers = Counter(slot for step in steps for slot in step.inputs)
    return {slot for slot, count in readers.items() if count == 1}
