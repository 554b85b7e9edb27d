"""Functions that slide a kernel over a map: what of their results a window reaches, and what those look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from weakspot.edits.recording import Slot, Step
from weakspot.edits.windows import Map, Windows, as_seen, gathered, paste

STEPS = 8  # sizes of windows, at most, on any map


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


def convolution(state: State, step: Step, values: dict[int, Any]) -> Windows | None:
    """Any but transposed ones."""
    windows: Windows = values[step.inputs[0]]
    if not is_convolution(step) or windows.layout != "maps":
        return None
    _, weight, bias, stride, padding, dilation, transposed, *rest = step.arguments

    def convolve(maps: Tensor) -> Tensor:
        found: Tensor = step.call(maps, weight, bias, stride, (0, 0), dilation, transposed, *rest)
        return found

    if is_pointwise(step):
        return windows.changed(convolve(windows.seen()))
    return _sliding(
        state, step, values, convolve, weight.shape[2:], pair(stride), pair(padding), pair(dilation), 0.0
    )


def is_convolution(step: Step) -> bool:
    """Whether it is a convolution of two axes, not transposed, of maps with weights that do not depend on the image."""
    if step.name != "convolution" or len(step.inputs) != 1:
        return False
    maps, weight, _, _, _, _, transposed, *_ = step.arguments
    return isinstance(maps, Slot) and weight.ndim == 4 and not transposed


def is_pointwise(step: Step) -> bool:
    """Whether it is a convolution of each site's own channels."""
    if not is_convolution(step):
        return False
    _, weight, _, stride, padding, *_ = step.arguments
    return weight.shape[2:] == (1, 1) and set(stride) == {1} and set(padding) == {0}


def max_pool(state: State, step: Step, values: dict[int, Any]) -> Windows | None:
    """Over windows of two axes; beyond the border lies minus infinity."""
    _, kernel, stride, padding, dilation, _ = (*step.arguments, *[None] * 6)[:6]
    kernel = pair(kernel)
    stride, dilation = pair(stride) if stride else kernel, pair(dilation or 1)

    def pool(maps: Tensor) -> Tensor:
        return F.max_pool2d(maps, kernel, stride, 0, dilation)

    return _sliding(state, step, values, pool, kernel, stride, pair(padding or 0), dilation, -torch.inf)


def average_pool(state: State, step: Step, values: dict[int, Any]) -> Windows | None:
    """Not where a window that hangs over the border is divided by another number."""
    defaults = (None, None, None, 0, False, True, None)
    given = (*step.arguments, *defaults[len(step.arguments) :])
    _, kernel, stride, padding, ceil, counts_border, divisor = given
    kernel, padding = pair(kernel), pair(padding)
    stride = pair(stride) if stride else kernel
    if ceil or (any(padding) and not counts_border and divisor is None):
        return None

    def pool(maps: Tensor) -> Tensor:
        return F.avg_pool2d(maps, kernel, stride, 0, divisor_override=divisor)

    return _sliding(state, step, values, pool, kernel, stride, padding, (1, 1), 0.0)


def slices(state: State, step: Step, values: dict[int, Any]) -> Windows | None:
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
    as_wrapped_classifier = clean.with_border(border_widths, border)
    cut = gathered(as_wrapped_classifier, state.owners, down.cut, along.cut, down.length, along.length)
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


def pair(value: Any) -> tuple[int, int]:
    """Down and along, of an argument that may be one number for both; of four numbers the first two."""
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])
