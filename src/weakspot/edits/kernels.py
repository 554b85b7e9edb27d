"""Functions that slide a kernel over a map: which of their results a window reaches, and which sites those read.

Along one axis, result r reads the sites r * stride - padding + k * dilation for k from 0 to kernel - 1, so its extent
is dilation * (kernel - 1) + 1 sites. A window of sites start to start + length - 1 reaches the results from
ceil((start + padding - extent + 1) / stride) to floor((start + length - 1 + padding) / stride).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from weakspot.edits.steps import Step, Values, pair
from weakspot.edits.windows import Map, Windows, as_seen, gathered, paste

SIZES = 8  # different sizes of windows, at most, on any map


@dataclass(frozen=True)
class State:
    """What rules need to know besides the windows.

    Attributes:
        owners: (M,) the number of the unedited image of each edit.
        cleans: maps of the unedited images, by slot.
        sizes: heights and widths of maps, by slot.
        room: the fraction of a map from which on whole maps cost less than windows.
    """

    owners: Tensor
    cleans: dict[int, Map]
    sizes: dict[int, tuple[int, int]]
    room: float


def convolution(state: State, step: Step, values: Values) -> Windows | None:
    """Any convolution that is not transposed."""
    windows: Windows = values[step.inputs[0]]
    if not step.is_convolution or windows.order != "maps":
        return None
    _, weight, bias, stride, padding, dilation, transposed, *rest = step.arguments

    def convolve(maps: Tensor) -> Tensor:
        # Without padding, because `_slide` hands over maps that contain their border.
        result: Tensor = step.call(maps, weight, bias, stride, (0, 0), dilation, transposed, *rest)
        return result

    if step.is_pointwise:
        return windows.changed(convolve(windows.seen()))
    kernel = _Kernel(weight.shape[2:], pair(stride), pair(padding), pair(dilation))
    return _slide(state, step, values, convolve, kernel)


def max_pool(state: State, step: Step, values: Values) -> Windows | None:
    """Max pooling over two axes; the border is minus infinity."""
    _, kernel, stride, padding, dilation, _ = (*step.arguments, *[None] * 6)[:6]
    kernel = pair(kernel)
    stride, dilation = pair(stride) if stride else kernel, pair(dilation or 1)

    def pool(maps: Tensor) -> Tensor:
        return F.max_pool2d(maps, kernel, stride, 0, dilation)

    geometry = _Kernel(kernel, stride, pair(padding or 0), dilation, border=-torch.inf)
    return _slide(state, step, values, pool, geometry)


def average_pool(state: State, step: Step, values: Values) -> Windows | None:
    """Average pooling, unless kernels that overlap the border are divided by another number."""
    defaults = (None, None, None, 0, False, True, None)
    given = (*step.arguments, *defaults[len(step.arguments) :])
    _, kernel, stride, padding, ceil, counts_border, divisor = given
    kernel, padding = pair(kernel), pair(padding)
    stride = pair(stride) if stride else kernel
    # Their divisor depends on where in the map the kernel lies.
    if ceil or (any(padding) and not counts_border and divisor is None):
        return None

    def pool(maps: Tensor) -> Tensor:
        return F.avg_pool2d(maps, kernel, stride, 0, divisor_override=divisor)

    return _slide(state, step, values, pool, _Kernel(kernel, stride, padding))


def slices(state: State, step: Step, values: Values) -> Windows | None:
    """A slice of the images, which must be all; of the channels; or every n-th row or column."""
    windows: Windows = values[step.inputs[0]]
    if windows.order != "maps":
        return None
    defaults: tuple[Any, ...] = (None, 0, None, None, 1)
    _, place, start, end, every = (*step.arguments, *defaults[len(step.arguments) :])
    start, end, place = start or 0, 2**62 if end is None else end, place % 4
    if place == 0:
        # A slice to the end is recorded with the largest integer of 64 bits as its end.
        return windows if start == 0 and end > 2**31 and every == 1 else None
    if place == 1:
        return replace(windows, values=windows.values[..., slice(start, end, every)].contiguous())
    size = state.sizes[step.inputs[0]][place - 2]
    # Only over the whole side is result r the site r * every, as for a kernel of one site.
    if start != 0 or end < size:
        return None
    stride = (every, 1) if place == 2 else (1, every)

    def part(maps: Tensor) -> Tensor:
        return maps[:, :, :: stride[0], :: stride[1]]

    return _slide(state, step, values, part, _Kernel((1, 1), stride))


@dataclass(frozen=True)
class _Kernel:
    """How a kernel slides; each pair is down and along.

    Attributes:
        size: height and width.
        stride: of the results.
        padding: sites of border at the top and at the left.
        dilation: distance between the kernel's sites.
        border: the value of the border.
    """

    size: Sequence[int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    border: float = 0.0

    def reach(self, axis: int, starts: Tensor, length: int, results: int) -> _Reach:
        """What windows (M,) of this length reach along an axis (0 down, 1 along) with so many results."""
        stride, padding = self.stride[axis], self.padding[axis]
        # A dilated kernel of k sites spans d (k - 1) + 1.
        extent = self.dilation[axis] * (self.size[axis] - 1) + 1
        # Result r reads `extent` sites from r * stride - padding on. The first to meet the window is the least r with
        # r * stride > start + padding - extent, the last the greatest with r * stride < start + padding + length.
        # ceil(a / stride) as floor((a + stride - 1) / stride).
        first, last = starts + (padding - extent + stride), starts + (padding + length - 1)
        if stride > 1:
            first, last = (torch.div(ends, stride, rounding_mode="floor") for ends in (first, last))
        first, last = first.clamp(min=0), last.clamp(max=results - 1)
        # Fewer at the borders. Rounded up, so that few sizes occur: torch sets up its kernels for each.
        multiple = max(1, results // SIZES)
        reached = max(1, -(-int((last - first).amax() + 1) // multiple) * multiple)
        # (length + extent - 2) // stride + 1: no window of this length reaches more, wherever it begins.
        count = min(reached, (length + extent - 2) // stride + 1, results)
        # Moved back inside the map rather than cut, so that all windows have one size: more results are then computed
        # than were reached, from unedited sites, and come out unedited.
        first = first.clamp(max=results - count)
        # A stride longer than the kernel skips sites, on which the window may begin or end.
        before, behind = max(0, stride - extent), stride - 1
        # Result r reads from site r * stride - padding, which is r * stride + before in the map with its border of
        # padding + before sites. The stretch begins `before` sites earlier.
        cut = first * stride
        return _Reach(
            first,
            count,
            cut,
            length=before + (count - 1) * stride + extent + behind,
            inside=starts + padding + before - cut,
            before=before,
            top=padding + before,
            end=(results - 1) * stride + extent + behind + before,
        )


@dataclass(frozen=True)
class _Reach:
    """Along one axis: the results that a window reaches, and the stretch of the map that they read.

    Attributes:
        first: (M,) the first of these results.
        count: how many there are, the same for all windows.
        cut: (M,) where the stretch begins, counted with the border.
        length: of the stretch.
        inside: (M,) where the window lies in it.
        before: sites at its beginning that no result reads.
        top: width of the border before the map.
        end: sites that the last stretch needs in all, with both borders.
    """

    first: Tensor
    count: int
    cut: Tensor
    length: int
    inside: Tensor
    before: int
    top: int
    end: int

    def border(self, size: int) -> tuple[int, int]:
        """Widths before and behind a map of this size."""
        return self.top, max(0, self.end - self.top - size)


def _slide(
    state: State, step: Step, values: Values, function: Callable[[Tensor], Tensor], kernel: _Kernel
) -> Windows | None:
    """Cut out what the reached results read, and apply the function only to that.

    Args:
        state: see `rules.apply`.
        step: the step, whose input is windows.
        values: by slot.
        function: of maps (M, C, H, W) that contain their border.
        kernel: that the function slides.
    """
    windows: Windows = values[step.inputs[0]]
    if windows.order != "maps":
        return None
    clean, (rows, columns) = state.cleans[step.inputs[0]], state.sizes[step.outputs[0]]
    down = kernel.reach(0, windows.tops, windows.size[0], rows)
    along = kernel.reach(1, windows.lefts, windows.size[1], columns)
    # Every kernel makes windows grow; near the whole map, cutting and pasting costs more than it saves.
    if down.count * along.count > state.room * rows * columns:
        return None
    # Left, right, top, bottom, as `Map.with_border` takes them.
    widths = (*along.border(clean.size[1]), *down.border(clean.size[0]))
    bordered = clean.with_border(widths, kernel.border)
    # The unedited surroundings first, then the edit on top: so the kernel reads what it would read in the whole map.
    cut = gathered(bordered, state.owners, down.cut, along.cut, (down.length, along.length))
    paste(cut, down.inside, along.inside, windows.values)
    # Without the sites in front that no result reads, the function begins with the first result.
    seen = as_seen(cut[:, down.before :, along.before :], "maps")
    result = function(seen)[:, :, : down.count, : along.count]
    return Windows(result.permute(0, 2, 3, 1).contiguous(), down.first, along.first)
