"""How each tensor function acts on windows: which window of its result an edit reaches, and how to compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from weakspot.edits.kernels import State, average_pool, convolution, is_pointwise, max_pool, slices
from weakspot.edits.recording import Slot, Step, filled
from weakspot.edits.windows import Layout, Windows, joined

SITEWISE = {
    "relu", "hardtanh", "sigmoid", "tanh", "gelu", "silu", "hardswish", "hardsigmoid", "elu", "leaky_relu", "celu",
    "selu", "softplus", "mish", "neg", "abs", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "square",
    "pow", "clamp", "clamp_min", "clamp_max", "erf", "sin", "cos", "sign", "round", "floor", "ceil", "clone", "detach",
    "alias", "_to_copy", "contiguous", "lift_fresh", "_prelu_kernel", "hardshrink", "softshrink", "threshold",
    "logical_not",
}  # fmt: skip
PAIRWISE = {
    "add",
    "sub",
    "rsub",
    "mul",
    "div",
    "maximum",
    "minimum",
    "gt",
    "lt",
    "ge",
    "le",
    "eq",
    "ne",
    "where",
}
NORMS = {
    "native_batch_norm",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_no_update",
    "cudnn_batch_norm",
}
Rule = Callable[[State, Step, dict[int, Any]], Windows | None]


def apply(state: State, step: Step, values: dict[int, Any]) -> Windows | None:
    """What a step makes of windows, or None where it needs whole maps."""
    rule = RULES.get(step.name)
    return None if rule is None else rule(state, step, values)


def _sitewise(state: State, step: Step, values: dict[int, Any]) -> Windows | None:
    """Functions of each site's own channels, with constants that are the same at every site."""
    windows = [values[slot] for slot in step.inputs]
    if not all(isinstance(one, Windows) for one in windows):
        return None
    layout = windows[0].layout
    sizes = {state.sizes[slot] for slot in step.inputs}
    if any(one.layout != layout for one in windows) or len(sizes) > 1:
        return None
    if not all(_spread_evenly(leaf, layout) for leaf in (*step.arguments, *step.keywords.values())):
        return None
    common = joined(windows, [state.cleans[slot] for slot in step.inputs], state.owners, state.room) if (
        len(windows) > 1
    ) else windows  # fmt: skip
    if common is None:
        return None
    seen = {slot: one.seen() for slot, one in zip(step.inputs, common, strict=True)}
    result = step.call(*filled(step.arguments, seen), **filled(step.keywords, seen))
    return common[0].changed(result[0] if step.several else result)


def _spread_evenly(leaf: Any, layout: str) -> bool:
    """Whether an argument is no tensor, or one without sites."""
    if not isinstance(leaf, Tensor) or leaf.numel() == 1:
        return True
    if layout == "maps":
        return leaf.shape[-2:] == (1, 1) and (leaf.ndim < 4 or leaf.shape[0] == 1)
    return all(size == 1 for size in leaf.shape[:-1])


def _batch_norm(state: State, step: Step, values: dict[int, Any]) -> Windows | None:
    """In eval mode: a scale and a shift per channel."""
    del state
    windows: Windows = values[step.inputs[0]]
    if (
        len(step.inputs) != 1
        or windows.layout != "maps"
        or (len(step.arguments) > 5 and step.arguments[5] is True)
    ):
        return None
    result = step.call(*filled(step.arguments, {step.inputs[0]: windows.seen()}), **step.keywords)
    return windows.changed(result[0])


def _layer_norm(state: State, step: Step, values: dict[int, Any]) -> Windows | None:
    del state
    windows: Windows = values[step.inputs[0]]
    if len(step.inputs) != 1 or windows.layout == "maps" or len(step.arguments[1]) != 1:
        return None
    result = step.call(*filled(step.arguments, {step.inputs[0]: windows.seen()}), **step.keywords)
    return windows.changed(result[0])


def _linear(state: State, step: Step, values: dict[int, Any]) -> Windows | None:
    """Rows times a constant matrix: addmm(bias, rows, matrix) or mm(rows, matrix)."""
    del state
    place = 1 if step.name == "addmm" else 0
    windows: Windows = values[step.inputs[0]]
    if len(step.inputs) != 1 or step.arguments[place] != Slot(step.inputs[0]) or windows.layout != "rows":
        return None
    result = step.call(*filled(step.arguments, {step.inputs[0]: windows.seen()}), **step.keywords)
    return windows.changed(result)


def _permute(state: State, step: Step, values: dict[int, Any]) -> Windows | None:
    del state
    windows: Windows = values[step.inputs[0]]
    turn = (windows.layout, tuple(step.arguments[1]))
    if turn == ("maps", (0, 2, 3, 1)):
        return replace(windows, layout="sites")
    return replace(windows, layout="maps") if turn == ("sites", (0, 3, 1, 2)) else None


def _view(state: State, step: Step, values: dict[int, Any]) -> Windows | None:
    """Between (N, H, W, C) and (N * H * W, C)."""
    windows: Windows = values[step.inputs[0]]
    height, width = state.sizes[step.inputs[0]]
    channels = windows.values.shape[3]
    shape = tuple(step.arguments[1])
    if windows.layout == "sites" and len(shape) == 2 and shape[1] == channels:
        return replace(windows, layout="rows")
    if windows.layout == "rows" and len(shape) == 4 and shape[1:] == (height, width, channels):
        return replace(windows, layout="sites")
    return None


def _joined_channels(state: State, step: Step, values: dict[int, Any]) -> Windows | None:
    """Concatenation along channels."""
    parts, place = step.arguments[0], step.arguments[1] if len(step.arguments) > 1 else 0
    windows = [values[slot] for slot in step.inputs]
    if (
        place != 1
        or len(parts) != len(windows)
        or len({state.sizes[slot] for slot in step.inputs}) > 1
        or not all(isinstance(one, Windows) and one.layout == "maps" for one in windows)
    ):
        return None
    common = joined(windows, [state.cleans[slot] for slot in step.inputs], state.owners, state.room)
    return None if common is None else replace(common[0], values=torch.cat([one.values for one in common], 3))


def _pad(state: State, step: Step, values: dict[int, Any]) -> Windows | None:
    """Constant padding: of channels as it is; of sites, the window only lies elsewhere in the larger map."""
    del state
    windows: Windows = values[step.inputs[0]]
    widths = [*step.arguments[1], 0, 0, 0, 0, 0, 0]
    if windows.layout != "maps" or min(widths) < 0 or any(widths[6:]):
        return None
    left, _, top, _, front, back = widths[:6]
    value = step.arguments[2] if len(step.arguments) > 2 else 0
    values_ = F.pad(windows.values, (front, back), value=value) if front or back else windows.values
    return Windows(values_, windows.tops + top, windows.lefts + left)


def _over_channels(state: State, step: Step, values: dict[int, Any]) -> Windows | None:
    """Means and sums over channels, site by site.

    Over all sites whole maps are needed: the unedited sum and what the window adds to it is no short cut, because
    where the edit takes away what the sum was made of, rounding is all that is left.
    """
    del state
    windows: Windows = values[step.inputs[0]]
    over = step.arguments[1] if len(step.arguments) > 1 else None
    if windows.layout != "maps" or not isinstance(over, list | tuple) or [place % 4 for place in over] != [1]:
        return None
    if len(step.arguments) < 3 or not step.arguments[2]:
        return None
    seen = {step.inputs[0]: windows.seen()}
    return windows.changed(step.call(*filled(step.arguments, seen), **step.keywords))


RULES: dict[str, Rule] = {
    **dict.fromkeys(SITEWISE | PAIRWISE, _sitewise),
    **dict.fromkeys(NORMS, _batch_norm),
    "native_layer_norm": _layer_norm,
    "addmm": _linear,
    "mm": _linear,
    "permute": _permute,
    "view": _view,
    "_unsafe_view": _view,
    "cat": _joined_channels,
    "constant_pad_nd": _pad,
    "mean": _over_channels,
    "sum": _over_channels,
    "convolution": convolution,
    "max_pool2d_with_indices": max_pool,
    "avg_pool2d": average_pool,
    "slice": slices,
}


def needs_clean(step: Step, layout: Layout) -> bool:
    """Whether windows may have to be seen in their maps for this step."""
    if step.name in SITEWISE | NORMS and len(step.inputs) == 1:
        return step.name in SITEWISE and not all(_spread_evenly(leaf, layout) for leaf in step.arguments)
    return layout != "maps" or not is_pointwise(step)


def layout_after(step: Step, layouts: dict[int, Layout | None], value: Tensor) -> Layout | None:
    """How the network sees what a step returned, or None for what has no sites."""
    before = layouts[step.inputs[0]] if step.inputs else None
    if before is not None and step.name == "permute":
        return {(0, 2, 3, 1): "sites", (0, 3, 1, 2): "maps"}.get(tuple(step.arguments[1]))  # type: ignore[return-value]
    if step.name in {"view", "_unsafe_view"}:
        if before == "sites" and value.ndim == 2:
            return "rows"
        if before == "rows" and value.ndim == 4:
            return "sites"
        return None
    if before in {"sites", "rows"} and value.ndim == (4 if before == "sites" else 2):
        return before
    return "maps" if value.ndim == 4 else None
