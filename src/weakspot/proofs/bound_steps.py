"""The steps of a recorded network as they act on affine forms; steps that cannot are named."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from weakspot.edits.steps import Slot, Step, pair
from weakspot.proofs.affine_steps import (
    BoundStep,
    LinearStep,
    NotSupportedError,
    because,
    check_only_input,
    clamp_step,
    convolve,
    matrix_of,
    matrix_step,
    max_pool_steps,
)
from weakspot.proofs.rounding_errors import LARGEST, SMALLEST

COPIES = {"alias", "detach", "clone", "contiguous", "lift_fresh", "_to_copy"}
MOVES = COPIES | {"view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t"}
MOVES |= {"slice", "squeeze", "unsqueeze", "select", "expand"}
NORMS = {"native_batch_norm", "_native_batch_norm_legit_no_training", "_batch_norm_no_update"}
AVERAGES = {"avg_pool2d", "_adaptive_avg_pool2d", "mean", "sum"}
CLAMPS = {"relu", "hardtanh", "clamp", "clamp_min", "clamp_max"}
# Roundings of a batch norm: four of the scale, seven of the shift, two of their use, in any order of the formula.
NORM_TERMS = 16


def _first(value: Tensor) -> Tensor:
    return value


def bound_steps(step: Step, shapes: dict[int, torch.Size]) -> list[BoundStep]:
    """What a recorded step does to affine forms, as one step or several.

    Args:
        step: of the recording; its constants may have any type and device.
        shapes: of the values in each slot.

    Raises:
        NotSupportedError: if that is not known.
    """
    step = _in_double(step)
    if any(len(shapes[slot]) < 2 for slot in step.inputs):
        raise NotSupportedError(because(step, "on values with no axis besides that of images"))
    if step.name in CLAMPS:
        return [clamp_step(step)]
    if step.name == "max_pool2d_with_indices":
        return max_pool_steps(step, shapes)
    build = BUILDERS.get(step.name)
    if build is None:
        raise NotSupportedError(because(step))
    return [build(step, shapes)]


def _in_double(step: Step) -> Step:
    """The step with constants in float64 on the CPU, and without conversions of type."""

    def plain(leaf: object) -> object:
        if isinstance(leaf, Tensor):
            return leaf.detach().cpu().double() if leaf.is_floating_point() else leaf.detach().cpu()
        return type(leaf)(map(plain, leaf)) if isinstance(leaf, list | tuple) else leaf

    if step.name == "_to_copy":
        return _converted(step)
    if "dtype" in step.keywords and step.keywords["dtype"] is not None:
        raise NotSupportedError(because(step, "with a dtype"))
    keywords = {name: plain(value) for name, value in step.keywords.items()}
    return replace(step, arguments=tuple(map(plain, step.arguments)), keywords=keywords)


def _converted(step: Step) -> Step:
    """A copy as another type; the dtype stays among the keywords where values may be rounded."""
    kind = step.keywords.get("dtype")
    if kind not in {None, torch.float32, torch.float64}:
        raise NotSupportedError(because(step, f"to {kind}"))

    # Nothing is converted in float64. Where the network rounds to float32, `_move` counts the rounding.
    def call(value: Tensor, **_: object) -> Tensor:
        return value

    keywords = {"dtype": kind} if kind == torch.float32 else {}
    return replace(step, call=call, arguments=step.arguments[:1], keywords=keywords)


def _convolution(step: Step, _: dict[int, torch.Size]) -> LinearStep:
    if not step.is_convolution or not isinstance(step.arguments[1], Tensor):
        raise NotSupportedError(
            "convolution is not supported unless it is two-dimensional, with constant weights"
        )
    maps, weight, bias, *rest = step.arguments
    step = replace(step, call=convolve)
    absolute = replace(step, arguments=(maps, weight.abs(), None, *rest))
    # One count for all results of a site, which read the same values unless channels form groups.
    ones = torch.ones_like(weight[:1] if rest[-1] == 1 else weight)
    return LinearStep(
        value=step,
        linear=replace(step, arguments=(maps, weight, None, *rest)),
        absolute=absolute,
        rounding=absolute,
        terms=weight[0].numel() + 2,
        constant=None if bias is None else bias.abs().view(1, -1, 1, 1),
        counting=replace(step, arguments=(maps, ones, None, *rest)),
    )


def _matrix(step: Step, _: dict[int, torch.Size]) -> LinearStep:
    factors = matrix_of(step)
    if factors is None:
        raise NotSupportedError(because(step, "with these arguments"))
    matrix, bias = factors
    return matrix_step(step, matrix, matrix.abs(), bias, torch.zeros(0) if bias is None else bias.abs())


def _move(step: Step, shapes: dict[int, torch.Size]) -> LinearStep:
    """Steps that only move values."""
    check_only_input(step)
    if any(isinstance(given, torch.dtype) for given in step.arguments):
        raise NotSupportedError(because(step, "as another type"))
    before, after = shapes[step.inputs[0]], shapes[step.outputs[0]]
    # How many arguments after the input are axes; axis 0, also as counted from the end, is that of images.
    over = {"slice": 1, "squeeze": 1, "unsqueeze": 1, "select": 1, "transpose": 2}.get(step.name, 0)
    axes = step.arguments[1 : 1 + over]
    # The axis of an unsqueeze is one of its result, which has one more.
    count = len(after) if step.name == "unsqueeze" else max(len(before), 1)
    images_move = any(isinstance(axis, int) and axis % count == 0 for axis in axes)
    if step.name == "slice":
        whole = (*step.arguments[2:], None, None)[:2]
        # A slice to the end is recorded with the largest integer of 64 bits as its end.
        images_move = images_move and not (whole[0] in {None, 0} and (whole[1] is None or whole[1] > 2**31))
    if step.name == "permute":
        images_move = step.arguments[1][0] != 0
    # A first axis of another length than before is not that of the images any longer.
    if images_move or step.name == "t" or before[0] != after[0]:
        raise NotSupportedError(because(step, "across images"))
    rounds = step.name == "_to_copy" and step.keywords.get("dtype") is not None
    if step.name in COPIES:
        # Derivatives pass through all of them, also where torch's function stops them.
        step = replace(step, call=_first, arguments=step.arguments[:1], keywords={})
    return LinearStep(step, step, step, step, 1 if rounds else 0)


def _constant_pad(step: Step, shapes: dict[int, torch.Size]) -> LinearStep:
    check_only_input(step)
    # Widths come in pairs, the last axis first; one more pair would pad the axis of images.
    if len(step.arguments[1]) > 2 * (len(shapes[step.inputs[0]]) - 1):
        raise NotSupportedError(because(step, "across images"))
    zero = replace(step, arguments=(*step.arguments[:2], 0.0))
    given = step.arguments[2] if len(step.arguments) > 2 else 0.0
    value = torch.tensor(float(given), dtype=torch.float64)
    _check_range(step, value)
    if float(value.float()) == float(value):
        return LinearStep(step, zero, zero, zero, 0)
    return LinearStep(step, zero, zero, zero, 1, value.abs()[None])


def _average(step: Step, shapes: dict[int, torch.Size]) -> LinearStep:
    """Averages and sums: factors are positive, so the step bounds its own magnitudes."""
    check_only_input(step)
    before = shapes[step.inputs[0]]
    if step.name in {"mean", "sum"}:
        over = step.arguments[1] if len(step.arguments) > 1 else None
        if not isinstance(over, list | tuple) or any(axis % len(before) == 0 for axis in over):
            raise NotSupportedError(because(step, "across images"))
        terms = 1
        for axis in over:
            terms *= before[axis]
    elif step.name == "avg_pool2d":
        terms = pair(step.arguments[1])[0] * pair(step.arguments[1])[1]
        divisor = step.arguments[6] if len(step.arguments) > 6 else None
        if divisor is not None and divisor <= 0:
            raise NotSupportedError(because(step, "with a negative divisor"))
    else:
        # An adaptive window holds all sites of the map at most.
        terms = before[2:].numel()
    return LinearStep(step, step, step, step, terms + 2)


def _batch_norm(step: Step, shapes: dict[int, torch.Size]) -> LinearStep:
    """x * scale + shift for each channel, in eval mode."""
    given = step.arguments
    training = step.name == "native_batch_norm" and given[5]
    if training or len(step.inputs) != 1 or given[0] != Slot(step.inputs[0]) or given[3] is None:
        raise NotSupportedError(because(step, "with statistics of the batch"))
    # The functions of NORMS differ in what lies between; eps comes last in each.
    weight, bias, mean, variance, eps = given[1], given[2], given[3], given[4], given[-1]
    # In float32 the parts of the formula may exceed its result.
    growth = (variance + eps).rsqrt().clamp(min=1) * (1.0 if weight is None else weight.abs().clamp(min=1))
    shifts = torch.maximum(mean.abs(), torch.zeros(()) if bias is None else bias.abs())
    if not bool((growth <= 2.0**26).all() & (shifts <= LARGEST / 2**26).all()):
        raise NotSupportedError(because(step, "with factors near the range of float32"))
    scale = (variance + eps).rsqrt() * (1.0 if weight is None else weight)
    shift = (0.0 if bias is None else bias) - mean * scale
    size = (0.0 if bias is None else bias.abs()) + (mean * scale).abs()
    shape = (1, -1, *[1] * (len(shapes[step.inputs[0]]) - 2))
    scale, shift, size = (part.reshape(shape) for part in (scale, shift, size))

    def call(maps: Tensor, factor: Tensor, constant: Tensor) -> Tensor:
        return maps * factor + constant

    def affine(factor: Tensor, constant: Tensor) -> Step:
        # Named as a function of each site's own channels, so that it goes by windows.
        arguments = (Slot(step.inputs[0]), factor, constant)
        return replace(
            step,
            name="add",
            call=call,
            arguments=arguments,
            keywords={},
            outputs=step.outputs[:1],
            several=False,
        )

    zero = torch.zeros_like(shift)
    absolute = affine(scale.abs(), zero)
    return LinearStep(affine(scale, shift), affine(scale, zero), absolute, absolute, NORM_TERMS, size)


def _scaled(step: Step, shapes: dict[int, torch.Size]) -> LinearStep:
    """Products with constants, and quotients by constants."""
    if step.name == "mul" and len(step.arguments) == 2 and isinstance(step.arguments[1], Slot):
        step = replace(step, arguments=step.arguments[::-1])
    check_only_input(step)
    factor = step.arguments[1]
    if len(step.arguments) > 2 or step.keywords:
        raise NotSupportedError(because(step, "with these arguments"))
    factor = factor if isinstance(factor, Tensor) else torch.tensor(float(factor), dtype=torch.float64)
    _check_constant(step, factor, shapes)
    factor = factor.double()
    # The reciprocal, by which torch may multiply instead, must be in range as well.
    if step.name == "div" and bool((factor.abs() < 1 / LARGEST).any()):
        raise NotSupportedError(because(step, "by a number near zero"))
    absolute = replace(step, arguments=(step.arguments[0], factor.abs()))
    # Roundings of the constant to float32, of its reciprocal, and of the product.
    return LinearStep(step, step, absolute, absolute, 3 if step.name == "div" else 2)


def _sum(step: Step, shapes: dict[int, torch.Size]) -> LinearStep:
    """Sums and differences of values, or of a value and a constant."""
    alpha = float(step.keywords.get("alpha", 1))
    parts = step.arguments[:2]
    if len(step.arguments) > 2 or alpha != 1:
        raise NotSupportedError(because(step, "with a factor"))
    # rsub subtracts its first argument from its second.
    signs = {"add": (1.0, 1.0), "sub": (1.0, -1.0), "rsub": (-1.0, 1.0)}[step.name]
    if all(isinstance(part, Slot) for part in parts):
        if shapes[step.inputs[0]] != shapes[step.inputs[1]]:
            raise NotSupportedError(because(step, "on values of two shapes"))
        absolute = replace(step, name="add", call=torch.add, arguments=parts, keywords={})
        return LinearStep(step, step, absolute, absolute, 1)
    place = 0 if isinstance(parts[0], Slot) else 1
    other, sign = parts[1 - place], signs[place]
    constant = other if isinstance(other, Tensor) else torch.tensor(float(other), dtype=torch.float64)
    _check_constant(step, constant, shapes)
    slot = Slot(step.inputs[0])

    def call(values: Tensor) -> Tensor:
        return values if sign > 0 else -values

    linear = replace(step, call=call, arguments=(slot,), keywords={})
    absolute = replace(step, call=_first, arguments=(slot,), keywords={})
    # The constant is rounded to float32, then the sum is.
    return LinearStep(step, linear, absolute, absolute, 2, constant.double().abs())


def _negated(step: Step, _: dict[int, torch.Size]) -> LinearStep:
    check_only_input(step)
    absolute = replace(step, call=_first)
    return LinearStep(step, step, absolute, absolute, 0)


def _joined(step: Step, shapes: dict[int, torch.Size]) -> LinearStep:
    """Concatenation along any axis but that of the images."""
    parts, axis = step.arguments[0], step.arguments[1] if len(step.arguments) > 1 else 0
    if len(parts) != len(step.inputs) or axis % len(shapes[step.inputs[0]]) == 0:
        raise NotSupportedError(because(step, "with constants or across images"))
    return LinearStep(step, step, step, step, 0)


def _check_constant(step: Step, constant: Tensor, shapes: dict[int, torch.Size]) -> None:
    """Constants must broadcast over the images and leave the shape as it is."""
    shape = shapes[step.inputs[0]]
    grows = torch.broadcast_shapes(shape, constant.shape) != shape
    if grows or (constant.ndim == len(shape) and constant.shape[0] != 1):
        raise NotSupportedError(because(step, "with a constant for each image"))
    _check_range(step, constant.double())


def _check_range(step: Step, constant: Tensor) -> None:
    """As run, constants become float32: with a relative error of at most u if they are in its normal range."""
    rounded = constant.float().double()
    lost = (rounded != constant) & (constant.abs() < SMALLEST)
    if not bool((constant.abs() <= LARGEST).all()) or bool(lost.any()):
        raise NotSupportedError(because(step, "with a constant outside the range of float32"))


BUILDERS: dict[str, Callable[[Step, dict[int, torch.Size]], LinearStep]] = {
    **dict.fromkeys(MOVES, _move),
    **dict.fromkeys(NORMS, _batch_norm),
    **dict.fromkeys(AVERAGES, _average),
    "convolution": _convolution,
    "addmm": _matrix,
    "mm": _matrix,
    "constant_pad_nd": _constant_pad,
    "mul": _scaled,
    "div": _scaled,
    "add": _sum,
    "sub": _sum,
    "rsub": _sum,
    "neg": _negated,
    "cat": _joined,
}


def _may_round(step: Step) -> bool:
    """Whether a step that only moves values may round them, or read their bits as another type."""
    if step.name == "_to_copy":
        return step.keywords.get("dtype") not in {None, torch.float64}
    return any(isinstance(given, torch.dtype) for given in step.arguments)


def leading_copies(steps: Sequence[Step], logits: int, shapes: dict[int, torch.Size]) -> int:
    """The slot of the logits before steps that only copy them."""
    # Back from the logits, over steps that keep the shape and the order of the values.
    made = {slot: step for step in steps for slot in step.outputs}
    while logits in made and made[logits].name in MOVES and shapes[made[logits].inputs[0]] == shapes[logits]:
        if made[logits].name in {"permute", "transpose", "t"} or _may_round(made[logits]):
            break
        logits = made[logits].inputs[0]
    return logits
