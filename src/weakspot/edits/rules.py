"""How each tensor function acts on windows: which window of its result an edit reaches, and how to compute it.

A rule returns None where it does not apply; the step is then done on whole maps, which is always right and never fast.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from weakspot.edits.kernels import State, average_pool, convolution, max_pool, slices
from weakspot.edits.steps import SITEWISE, Slot, Step, Values, filled
from weakspot.edits.windows import AxisOrder, Windows, joined

PAIRWISE = {
    "add", "sub", "rsub", "mul", "div", "maximum", "minimum", "gt", "lt", "ge", "le", "eq", "ne", "where",
}  # fmt: skip
NORMS = {
    "native_batch_norm", "_native_batch_norm_legit_no_training", "_batch_norm_no_update", "cudnn_batch_norm",
}  # fmt: skip
Rule = Callable[[State, Step, Values], Windows | None]


def apply(state: State, step: Step, values: Values) -> Windows | None:
    """The windows of a step's result, or None if it needs whole maps."""
    rule = RULES.get(step.name)
    return None if rule is None else rule(state, step, values)


def _sitewise(state: State, step: Step, values: Values) -> Windows | None:
    """Functions of each site's own channels, of one map or of several, with constants without sites."""
    windows = [values[slot] for slot in step.inputs]
    if not all(isinstance(one, Windows) for one in windows):
        return None
    # An input that is no windows is a whole map already; maps of other sizes would be broadcast over sites.
    order = windows[0].order
    sizes = {state.sizes[slot] for slot in step.inputs}
    if any(one.order != order for one in windows) or len(sizes) > 1:
        return None
    if not all(_has_no_sites(leaf, order) for leaf in (*step.arguments, *step.keywords.values())):
        return None
    # One map: its windows as they are. Several: windows of common places, since values are combined site by site.
    common: list[Windows] | None = windows
    if len(windows) > 1:
        common = joined(windows, [state.cleans[slot] for slot in step.inputs], state.owners, state.room)
    if common is None:
        return None
    seen = {slot: one.seen() for slot, one in zip(step.inputs, common, strict=True)}
    result = step.call(*filled(step.arguments, seen), **filled(step.keywords, seen))
    return common[0].changed(result[0] if step.several else result)


def _has_no_sites(leaf: object, order: str) -> bool:
    """Whether an argument is not a tensor, or is the same at every site."""
    if not isinstance(leaf, Tensor) or leaf.numel() == 1:
        return True
    if order == "maps":
        return leaf.shape[-2:] == (1, 1) and (leaf.ndim < 4 or leaf.shape[0] == 1)
    return all(size == 1 for size in leaf.shape[:-1])


def _batch_norm(state: State, step: Step, values: Values) -> Windows | None:
    """Batch normalization in eval mode: a scale and a shift per channel."""
    del state
    windows: Windows = values[step.inputs[0]]
    if not _is_fixed_norm(step, windows.order):
        return None
    result = step.call(*filled(step.arguments, {step.inputs[0]: windows.seen()}), **step.keywords)
    return windows.changed(result[0])


def _is_fixed_norm(step: Step, order: AxisOrder) -> bool:
    """Whether a batch normalization is of maps, with constants; by statistics of the batch it cannot be recorded."""
    return len(step.inputs) == 1 and order == "maps"


def _layer_norm(state: State, step: Step, values: Values) -> Windows | None:
    """Layer normalization over channels, which must be the last axis."""
    del state
    windows: Windows = values[step.inputs[0]]
    if len(step.inputs) != 1 or windows.order == "maps" or len(step.arguments[1]) != 1:
        return None
    result = step.call(*filled(step.arguments, {step.inputs[0]: windows.seen()}), **step.keywords)
    return windows.changed(result[0])


def _linear(state: State, step: Step, values: Values) -> Windows | None:
    """Rows times a constant matrix: addmm(bias, rows, matrix) or mm(rows, matrix)."""
    del state
    # The windows must be the rows and not the matrix: rows are sites, which do not mix.
    place = 1 if step.name == "addmm" else 0
    windows: Windows = values[step.inputs[0]]
    if len(step.inputs) != 1 or step.arguments[place] != Slot(step.inputs[0]) or windows.order != "rows":
        return None
    result = step.call(*filled(step.arguments, {step.inputs[0]: windows.seen()}), **step.keywords)
    return windows.changed(result)


def _permute(state: State, step: Step, values: Values) -> Windows | None:
    """Between channels first and channels last."""
    del state
    windows: Windows = values[step.inputs[0]]
    turn = (windows.order, tuple(step.arguments[1]))
    # The values stay where they are: only the order in which the network sees them changes.
    if turn == ("maps", (0, 2, 3, 1)):
        return replace(windows, order="sites")
    return replace(windows, order="maps") if turn == ("sites", (0, 3, 1, 2)) else None


def _view(state: State, step: Step, values: Values) -> Windows | None:
    """Between (N, H, W, C) and (N * H * W, C)."""
    windows: Windows = values[step.inputs[0]]
    height, width = state.sizes[step.inputs[0]]
    channels = windows.values.shape[3]
    shape = tuple(step.arguments[1])
    if windows.order == "sites" and len(shape) == 2 and shape[1] == channels:
        return replace(windows, order="rows")
    if windows.order == "rows" and len(shape) == 4 and shape[1:] == (height, width, channels):
        return replace(windows, order="sites")
    return None


def _joined_channels(state: State, step: Step, values: Values) -> Windows | None:
    """Concatenation along channels."""
    parts, place = step.arguments[0], step.arguments[1] if len(step.arguments) > 1 else 0
    windows = [values[slot] for slot in step.inputs]
    if (
        place != 1
        or len(parts) != len(windows)
        or len({state.sizes[slot] for slot in step.inputs}) > 1
        or not all(isinstance(one, Windows) and one.order == "maps" for one in windows)
    ):
        return None
    common = joined(windows, [state.cleans[slot] for slot in step.inputs], state.owners, state.room)
    return None if common is None else replace(common[0], values=torch.cat([one.values for one in common], 3))


def _pad(state: State, step: Step, values: Values) -> Windows | None:
    """Constant padding. If sites are padded, the window only lies elsewhere in the larger map."""
    del state
    windows: Windows = values[step.inputs[0]]
    # The last axis first: left, right, top, bottom, channels before, channels behind.
    widths = [*step.arguments[1], 0, 0, 0, 0, 0, 0]
    if windows.order != "maps" or min(widths) < 0 or any(widths[6:]):
        return None
    # Sites behind the map move nothing, and the new border is the same in the unedited map, which holds it.
    left, _, top, _, front, back = widths[:6]
    value = step.arguments[2] if len(step.arguments) > 2 else 0
    padded = F.pad(windows.values, (front, back), value=value) if front or back else windows.values
    return Windows(padded, windows.tops + top, windows.lefts + left)


def _over_channels(state: State, step: Step, values: Values) -> Windows | None:
    """Means and sums over channels, site by site.

    Those over all sites need whole maps. The unedited sum plus the window's difference would be faster, but where the
    edit removes what the sum consisted of, only rounding errors would be left.
    """
    del state
    windows: Windows = values[step.inputs[0]]
    over = step.arguments[1] if len(step.arguments) > 1 else None
    if windows.order != "maps" or not isinstance(over, list | tuple) or [place % 4 for place in over] != [1]:
        return None
    # Without `keepdim` the result has no axis of channels and is no map.
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


def needs_clean(step: Step, order: AxisOrder) -> bool:
    """Whether a rule for this step may read the unedited map around a window."""
    if step.name in NORMS:
        return not _is_fixed_norm(step, order)
    if step.name in SITEWISE and len(step.inputs) == 1:
        # They read no neighbors, but a constant that has sites makes them take whole maps.
        return not all(_has_no_sites(leaf, order) for leaf in step.arguments)
    return order != "maps" or not step.is_pointwise


def order_after(step: Step, orders: dict[int, AxisOrder | None], value: Tensor) -> AxisOrder | None:
    """How the network sees a step's result, or None if that has no sites."""
    before = orders[step.inputs[0]] if step.inputs else None
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
