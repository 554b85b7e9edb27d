"""What linear steps make of generators without multiplying zeros: those of windows, and those of single values."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from weakspot.edits.steps import pair
from weakspot.proofs.affine_forms import Form
from weakspot.proofs.linear_steps import LinearStep


def takes_fresh(step: LinearStep) -> bool:
    """Whether `with_fresh` covers a step: matrix products, and convolutions without groups and dilation."""
    if step.linear.name == "mm":
        return True
    return (
        step.linear.is_convolution and step.linear.arguments[8] == 1 and set(step.linear.arguments[5]) == {1}
    )


def window_product(step: LinearStep, form: Form, size: tuple[int, int]) -> Tensor:
    """(M, k, out) generators of a matrix times a map of this size, which are zero outside the windows of a form."""
    matrix, numbers, values = step.linear.arguments[1], _numbers(form, size), form.generators.flatten(2)
    result = values.new_empty(*values.shape[:2], matrix.shape[1])
    # Pixels that share a window share the matrix's rows, whose copies would cost more than the products.
    starts = numbers[:, 0]
    counts = starts.unique(return_counts=True)[1]
    # Windows of one size that begin at the same number hold the same numbers: one group for each place.
    for part in starts.argsort().split(counts.tolist()):
        result[part] = values[part] @ matrix[numbers[part[0]]]
    return result


def with_fresh(step: LinearStep, form: Form, result: Form, size: tuple[int, int]) -> Form:
    """The result of a step with what becomes of the fresh generators of its input.

    Args:
        step: that `takes_fresh`.
        form: its input.
        result: what becomes of the rest of that.
        size: height and width of the map that `form` is, or is a window of; any for a matrix product of a whole map.
    """
    fresh = form.fresh
    if fresh is None:
        return result
    # Places are counted within the form, numbers within the whole map.
    numbers = _numbers(form, size).gather(1, fresh.places)
    if step.linear.name == "mm":
        made = step.linear.arguments[1].index_select(0, numbers.flatten()).view(*numbers.shape, -1)
    else:
        made = _convolved(step, result, numbers, size)
    # Up to here, as if every value grew by 1.
    made *= fresh.amounts.view(*numbers.shape, *[1] * (made.ndim - 2))
    blocks = (*result.blocks, (fresh.step, numbers.shape[1]))
    return replace(result, generators=torch.cat([result.generators, made], 1), blocks=blocks)


def _convolved(step: LinearStep, result: Form, numbers: Tensor, size: tuple[int, int]) -> Tensor:
    """(M, k, ...) what the values with these numbers (M, k) add to each result of a convolution if they grow by 1."""
    _, weight, _, stride, padding, *_ = step.linear.arguments
    sites = size[0] * size[1]
    # Numbers run over (C, H, W), the last axis fastest.
    channels, rows, columns = numbers // sites, numbers % sites // size[1], numbers % size[1]
    windows = result.tops is not None
    reached = result.center.shape[1:3] if windows else result.center.shape[2:]
    inside = []
    for axis, (places, first) in enumerate(((rows, result.tops), (columns, result.lefts))):
        # Result r reads site r * stride - padding + k with weight k; weight `extent` is a zero.
        extent, results = weight.shape[2 + axis], torch.arange(reached[axis])
        results = results if first is None else first[:, None] + results
        reads = (
            places[:, :, None] + pair(padding)[axis] - pair(stride)[axis] * results.view(-1, 1, reached[axis])
        )
        inside.append(torch.where((reads >= 0) & (reads < extent), reads, extent))
    # A row of the padded kernel is all output channels of one place and input channel, found by one flat number.
    padded = F.pad(weight, (0, 1, 0, 1)).permute(2, 3, 1, 0)
    # (M, k, h, w): the place of the kernel with which each result reads each value.
    chosen = inside[0][..., :, None] * padded.shape[1] + inside[1][..., None, :]
    chosen = chosen * padded.shape[2] + channels[..., None, None]
    made = padded.reshape(-1, len(weight)).index_select(0, chosen.flatten()).view(*chosen.shape, len(weight))
    return made if windows else made.permute(0, 1, 4, 2, 3)


def _numbers(form: Form, size: tuple[int, int]) -> Tensor:
    """(M, n) numbers of the values of a form, in its order, among all values of the flattened (C, H, W) map."""
    if form.tops is None or form.lefts is None:
        return torch.arange(form.center[0].numel()).expand(len(form), -1)
    down, along, channels = (torch.arange(length) for length in form.center.shape[1:])
    rows = (form.tops[:, None] + down)[:, :, None, None]
    columns = (form.lefts[:, None] + along)[:, None, :, None]
    return ((channels * size[0] + rows) * size[1] + columns).flatten(1)
