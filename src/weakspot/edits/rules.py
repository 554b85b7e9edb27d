"""How each tensor function acts on windows: which window of its result an edit reaches, and how to compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from weakspot.edits.recording import Slot, Step, filled
from weakspot.edits.windows import Layout, Map, Windows, as_seen, gathered, joined, paste

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
STEPS = 8
Rule = Callable[["State", Step, dict[int, Any]], "Windows | None"]


@dataclass(frozen=True)
class State:
    """What rules look at.

    Attributes:
        owners: (M,) which of the unedited images each edit is of.
        cleans: maps of these, by slot.
        sizes: heights and widths of maps, by slot.
        room: windows that take more than this share of a map are not worth their while.
    """

    owners: Tensor
    cleans: dict[int, Map]
    sizes: dict[int, tuple[int, int]]
    room: float


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


def _convolution(state: State, step: Step, values: dict[int, Any]) -> Windows | None:
    _, weight, bias, stride, padding, dilation, transposed, _, groups = step.arguments
    if transposed or weight.ndim != 4 or len(step.inputs) != 1:
        return None

    def convolve(maps: Tensor) -> Tensor:
        return F.conv2d(maps, weight, bias, _pair(stride), 0, _pair(dilation), groups)

    return _sliding(
        state, step, values, convolve, weight.shape[2:], _pair(stride), _pair(padding), _pair(dilation), 0.0
    )


def _max_pool(state: State, step: Step, values: dict[int, Any]) -> Windows | None:
    _, kernel, stride, padding, dilation, _ = (*step.arguments, *[None] * 6)[:6]
    kernel = _pair(kernel)
    stride, dilation = _pair(stride) if stride else kernel, _pair(dilation or 1)

    def pool(maps: Tensor) -> Tensor:
        return F.max_pool2d(maps, kernel, stride, 0, dilation)

    return _sliding(state, step, values, pool, kernel, stride, _pair(padding or 0), dilation, -torch.inf)


def _average_pool(state: State, step: Step, values: dict[int, Any]) -> Windows | None:
    defaults = (None, None, None, 0, False, True, None)
    given = (*step.arguments, *defaults[len(step.arguments) :])
    _, kernel, stride, padding, ceil, counts_border, divisor = given
    kernel, padding = _pair(kernel), _pair(padding)
    stride = _pair(stride) if stride else kernel
    if ceil or (any(padding) and not counts_border and divisor is None):
        return None

    def pool(maps: Tensor) -> Tensor:
        return F.avg_pool2d(maps, kernel, stride, 0, divisor_override=divisor)

    return _sliding(state, step, values, pool, kernel, stride, padding, (1, 1), 0.0)


def _slice(state: State, step: Step, values: dict[int, Any]) -> Windows | None:
    """Part of the images, which must be all; of the channels; or every so many-th row or column."""
    windows: Windows = values[step.inputs[0]]
    if windows.layout != "maps":
        return None
    defaults: tuple[Any, ...] = (None, 0, None, None, 1)
    _, place, start, end, every = (*step.arguments, *defaults[len(step.arguments) :])
    start, end, place = start or 0, 2**62 if end is None else end, place % 4
    if place == 0:
        return windows if start == 0 and end > 2**31 and every == 1 else None
    if place == 1:
        return replace(windows, values=windows.values[..., slice(start, end, every)].contiguous())
    size = state.sizes[step.inputs[0]][place - 2]
    if start != 0 or end < size:
        return None
    stride = (every, 1) if place == 2 else (1, every)

    def part(maps: Tensor) -> Tensor:
        return maps[:, :, :: stride[0], :: stride[1]]

    return _sliding(state, step, values, part, (1, 1), stride, (0, 0), (1, 1), 0.0)


def _sliding(
    state: State,
    step: Step,
    values: dict[int, Any],
    function: Callable[[Tensor], Tensor],
    kernel: tuple[int, ...],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    border: float,
) -> Windows | None:
    """Functions that slide a kernel over the map: cut out what the reached results look at, and do only that.

    Args:
        state: as for `apply`, like the next two.
        step: likewise.
        values: likewise.
        function: of maps (M, C, H, W) whose border is already there.
        kernel: height and width.
        stride: down and along.
        padding: sites of border at the top and at the left.
        dilation: likewise, between the kernel's sites.
        border: what the border is filled with.
    """
    windows: Windows = values[step.inputs[0]]
    if windows.layout != "maps":
        return None
    clean, (rows, columns) = state.cleans[step.inputs[0]], state.sizes[step.outputs[0]]
    down = _reach(windows.tops, windows.size[0], kernel[0], stride[0], padding[0], dilation[0], rows)
    along = _reach(windows.lefts, windows.size[1], kernel[1], stride[1], padding[1], dilation[1], columns)
    if down.count * along.count > state.room * rows * columns:
        return None
    border_widths = (*along.border(clean.size[1], columns), *down.border(clean.size[0], rows))
    around = clean.with_border(border_widths, border)
    cut = gathered(around, state.owners, down.cut, along.cut, down.length, along.length)
    paste(cut, down.inside, along.inside, windows.values)
    seen = as_seen(cut[:, down.before :, along.before :], "maps")
    found = function(seen)[:, :, : down.count, : along.count]
    return Windows(found.permute(0, 2, 3, 1).contiguous(), down.first, along.first)


@dataclass(frozen=True)
class _Reach:
    """Along one axis: results that a window reaches, and the stretch of the map that they look at.

    Attributes:
        first: (M,) of the results reached.
        count: how many there are, the same for all.
        cut: (M,) where the stretch to cut out begins, counted with the border.
        length: of the stretch.
        inside: (M,) where the window lies in it.
        before: sites at its beginning that no result looks at.
        top: width of the border before the map.
        need: function arguments that `border` needs: kernel's extent, stride, and sites wanted behind.
    """

    first: Tensor
    count: int
    cut: Tensor
    length: int
    inside: Tensor
    before: int
    top: int
    need: tuple[int, int, int]

    def border(self, size: int, results: int) -> tuple[int, int]:
        """Widths before and behind a map of this size, for so many results."""
        extent, stride, behind = self.need
        end = (results - 1) * stride + extent + behind + self.before
        return self.top, max(0, end - self.top - size)


def _reach(
    starts: Tensor, length: int, kernel: int, stride: int, padding: int, dilation: int, results: int
) -> _Reach:
    extent = dilation * (kernel - 1) + 1
    first, last = starts + (padding - extent + stride), starts + (padding + length - 1)
    if stride > 1:
        first, last = (torch.div(ends, stride, rounding_mode="floor") for ends in (first, last))
    first, last = first.clamp(min=0), last.clamp(max=results - 1)
    # Fewer at the borders. In steps, so that not every size comes up: kernels are set up for each.
    step = max(1, results // STEPS)
    reached = max(1, -(-int((last - first).amax() + 1) // step) * step)
    count = min(reached, (length + extent - 2) // stride + 1, results)
    first = first.clamp(max=results - count)
    # A stride longer than the kernel skips sites; the window may begin or end on them.
    before, behind = max(0, stride - extent), stride - 1
    cut = first * stride
    return _Reach(
        first,
        count,
        cut,
        before + (count - 1) * stride + extent + behind,
        starts + padding + before - cut,
        before,
        padding + before,
        (extent, stride, behind),
    )


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


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
    "convolution": _convolution,
    "max_pool2d_with_indices": _max_pool,
    "avg_pool2d": _average_pool,
    "slice": _slice,
}


def needs_clean(step: Step, layout: Layout) -> bool:
    """Whether windows may have to be seen in their maps for this step."""
    if step.name in SITEWISE | NORMS and len(step.inputs) == 1:
        return step.name in SITEWISE and not all(_spread_evenly(leaf, layout) for leaf in step.arguments)
    return True


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
