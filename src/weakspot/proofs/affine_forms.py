"""Affine forms: values that depend on the color of a pixel, as c + G e + [-r, r] with e in [-1, 1]^k.

The first generators are the channels of the pixel. With one more generator for each unstable activation the forms are
zonotopes (Singh et al. 2018, "Fast and Effective Robustness Certification", DeepZ). Linear steps do not multiply the
zeros of generators outside a window, or beside the one value that a generator moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from weakspot.edits.steps import pair
from weakspot.proofs.affine_steps import LinearStep
from weakspot.proofs.rounding_errors import TINY

# The spacing of float64 at 1: one rounding is off by at most half of it, relative to the result.
ULP = 2.0**-52


@dataclass(frozen=True)
class Fresh:
    """Generators of a form that move one value each.

    Attributes:
        step: the number of the step that made them.
        half: (M, ...) how far each value moves.
        places: (M, k) numbers of the values that move, of the form as it was made, flattened.
        amounts: (M, k) how far these move; 0 where fewer than k values move.
    """

    step: int
    half: Tensor
    places: Tensor
    amounts: Tensor


@dataclass(frozen=True)
class Form:
    """Values of M boxes of colors, each an affine function of its generators with an interval around it.

    Attributes:
        center: (M, ...) float64.
        generators: (M, k, ...).
        radius: (M, ...) at least 0.
        blocks: the number of the step that made each group of generators, and how many they are; step -1 for the
            channels of the pixel.
        tops: (M,) row of each window's first site if the form covers a window of a map, with axes (M, h, w, C); None if
            it covers the whole of it, as the network sees it.
        lefts: (M,) column of that site, or None.
        fresh: generators besides those of `generators`.
    """

    center: Tensor
    generators: Tensor
    radius: Tensor
    blocks: tuple[tuple[int, int], ...]
    tops: Tensor | None = None
    lefts: Tensor | None = None
    fresh: Fresh | None = None

    def __len__(self) -> int:
        return len(self.center)

    @cached_property
    def spread(self) -> Tensor:
        """(M, ...) how far generators may move a value, rounded up."""
        count = self.generators.shape[1]
        total = self.generators.abs().sum(1)
        if self.fresh is not None:
            total = total + self.fresh.half
        # At most count + 1 roundings, each by half of ULP; no term is negative, so nothing cancels.
        return total * (1 + (count + 3) * ULP)

    @cached_property
    def deviation(self) -> Tensor:
        """(M, ...) how far a value may be from its center, rounded up."""
        return (self.spread + self.radius) * (1 + 4 * ULP) + TINY

    @property
    def magnitude(self) -> Tensor:
        """(M, ...) largest absolute value, rounded up."""
        return (self.center.abs() + self.deviation) * (1 + 2 * ULP)

    @property
    def nonzero(self) -> Tensor:
        """(M, ...) bool, whether a value may be other than zero, in float32 too."""
        return (self.center != 0) | (self.spread > 0) | (self.radius > 0)

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds (M, ...), rounded outward."""
        reach = self.deviation + 2 * ULP * self.center.abs()
        return (self.center - reach) - ULP * reach, (self.center + reach) + ULP * reach

    def with_values(self, center: Tensor, generators: Tensor, radius: Tensor) -> Form:
        return replace(self, center=center, generators=generators, radius=radius)


def point(values: Tensor) -> Form:
    """Values (M, ...) that depend on nothing and are exact."""
    return Form(values, values.new_zeros(len(values), 0, *values.shape[1:]), torch.zeros_like(values), ())


def aligned(forms: Sequence[Form]) -> list[Form]:
    """The same forms over one list of generators: those that a form lacks are zero."""
    # By the steps that made them, so that all forms list their generators in one order.
    blocks = tuple(sorted({block for form in forms for block in form.blocks}))
    if all(form.blocks == blocks for form in forms):
        return list(forms)
    result = []
    for form in forms:
        starts, start = {}, 0
        for block in form.blocks:
            starts[block] = start
            start += block[1]
        shape = form.center.shape
        parts = [
            form.generators[:, starts[block] : starts[block] + block[1]]
            if block in starts
            else form.generators.new_zeros(shape[0], block[1], *shape[1:])
            for block in blocks
        ]
        result.append(replace(form, generators=torch.cat(parts, 1), blocks=blocks))
    return result


def clamped(form: Form, low: float, high: float, step: int | None) -> Form:
    """min(max(x, low), high): ReLU, ReLU6, hardtanh and clamp; exact for float32 as well.

    Between its ends l and u a value is replaced by slope * x + [h_min, h_max]. The slope is that of the chord, which
    for ReLU gives the parallelogram of least area; any slope is sound, because h = f(x) - slope * x is piecewise
    linear and is evaluated at its ends and corners.

    Args:
        form: x.
        low: may be minus infinity.
        high: may be infinity.
        step: the number of this step, to give each unstable value a generator of its own; None to widen the radius.
    """
    lower, upper = form.ends
    inside = (lower >= low) & (upper <= high)
    # TINY keeps a value that does not move from dividing zero by zero.
    span = (upper - lower).clamp(min=TINY)
    slope = ((upper.clamp(low, high) - lower.clamp(low, high)) / span).clamp(0, 1)
    # Exactly 1 where the value passes unchanged, which the quotient of two differences may miss.
    slope = torch.where(inside, 1.0, slope)
    # The rest h is largest and least at an end, or where the clamp bends between the ends.
    corners = [lower, upper]
    corners += [
        torch.minimum(torch.maximum(lower, torch.full_like(lower, end)), upper)
        for end in (low, high)
        if abs(end) < float("inf")
    ]
    rests = torch.stack([corner.clamp(low, high) - slope * corner for corner in corners])
    most, least = rests.amax(0), rests.amin(0)
    # Wholly beyond a limit: the value becomes the limit, exactly, with neither slope nor radius.
    constant = (upper <= low) | (lower >= high)
    # Six roundings of numbers no larger than the ends or the limits.
    error = 8 * ULP * torch.maximum(lower.abs(), upper.abs()) + TINY
    shift = torch.where(inside, 0.0, (most + least) / 2)
    half = torch.where(inside | constant, 0.0, (most - least) / 2 + error)
    center = torch.where(inside, form.center, slope * form.center + shift)
    center = torch.where(constant, center.clamp(low, high), center)
    slope = torch.where(constant, 0.0, slope)
    generators = form.generators * slope[:, None]
    radius = torch.where(inside, form.radius, slope * form.radius + torch.where(constant, 0.0, error))
    changed = form.with_values(center, generators, radius)
    half = half * (1 + 4 * ULP)
    if step is None:
        return replace(changed, radius=radius + half)
    # As infinity, NaN is counted below; as NaN, it would get no generator, and the bound would not hold.
    flat = half.flatten(1).nan_to_num(torch.inf, torch.inf)
    many = int((flat > 0).sum(1).max()) if len(form) else 0
    if not many:
        return changed
    # As many as the box with the most unstable values; others are filled up with amounts of zero.
    amounts, places = flat.topk(many, 1)
    return replace(changed, fresh=Fresh(step, half, places, amounts))


def written_out(form: Form) -> Form:
    """The form with its fresh generators among the others."""
    fresh = form.fresh
    if fresh is None:
        return form
    many = fresh.places.shape[1]
    # Generator j of a box moves a single value, that with the number places[:, j].
    added = form.center.new_zeros(len(form), many, form.center[0].numel())
    added.scatter_(2, fresh.places[:, :, None], fresh.amounts[:, :, None])
    generators = torch.cat([form.generators, added.view(len(form), many, *form.center.shape[1:])], 1)
    return replace(form, generators=generators, blocks=(*form.blocks, (fresh.step, many)), fresh=None)


def largest(candidates: Form, count: int, axis: int) -> Form:
    """The largest of each `count` neighbors along an axis of the values, as max pooling takes it; exact for float32.

    The candidate j with the largest center stands for the maximum, which is x_j + [0, d] with d the largest amount by
    which any other candidate may exceed it.

    Args:
        candidates: with an axis of length channels * count, the candidates of one channel one after the other.
        count: of candidates.
        axis: of `center`.
    """
    # The neighbors get an axis of their own: axis + 1 of the values, axis + 2 of the generators.
    center = candidates.center.unflatten(axis, (-1, count))
    radius = candidates.radius.unflatten(axis, (-1, count))
    generators = candidates.generators.unflatten(axis + 1, (-1, count))
    best = center.argmax(axis + 1, keepdim=True)
    own = [
        center.gather(axis + 1, best),
        radius.gather(axis + 1, best),
        generators.gather(axis + 2, best[:, None].expand(-1, generators.shape[1], *[-1] * (center.ndim - 1))),
    ]
    # The most by which x_i may exceed x_j: generators that both share cancel, radii do not.
    ahead = center - own[0] + (generators - own[2]).abs().sum(1) + radius + own[1]
    scale = center.abs() + own[0].abs() + generators.abs().sum(1) + own[2].abs().sum(1) + radius + own[1]
    # Upward by more than the rounding of the sums above.
    ahead = ahead + (generators.shape[1] + 8) * ULP * scale
    # The best is not ahead of itself, though its radius counted twice above.
    ahead = ahead.scatter(axis + 1, best, 0.0).clamp(min=0).amax(axis + 1)
    center, radius, generators = (
        part.squeeze(place) for part, place in zip(own, (axis + 1, axis + 1, axis + 2), strict=True)
    )
    # [0, d] is d / 2 with a radius of d / 2.
    half = ahead / 2 * (1 + 2 * ULP)
    shift = torch.where(half > 0, half, 0.0)
    error = torch.where(half > 0, 4 * ULP * (center.abs() + half), 0.0)
    return candidates.with_values(center + shift, generators, radius + half + error)


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
