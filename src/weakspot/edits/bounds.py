"""Bounds: how large a network's values can become, to know where none of them can be NaN.

Interval arithmetic on absolute values: coarse, but what it calls finite is finite for every image in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from weakspot.edits.recording import Slot, Step
from weakspot.edits.sliding import is_convolution

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


def _padded(step: Step, known: Mapping[int, float]) -> float:
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
    "constant_pad_nd": _padded,
    "avg_pool2d": _average,
}
