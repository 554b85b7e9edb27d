"""How far rounding in float32 may move the margins, followed backward from them.

Forward, the rounding of a layer becomes an interval, and each later layer takes it by its absolute weights, as if all
errors conspired. Backward, the weights of the layers between are multiplied first, and their signs cancel.

Let y be the result of a step, e a bound of its own rounding, and J an interval that contains the derivatives of the
margin with respect to y, of the network in real numbers from there on, at all values that the network may compute or
that lie between computed and exact ones. Replace the computed steps by exact ones, one after the other from the last to
the first: by the mean value theorem for piecewise linear functions, each replacement moves the margin by at most
sup|J| e, so

    |margin as run - margin in real numbers| <= sum over the steps of sup|J| e.

J is multiplied backward through the steps as center and radius (Zhang et al., "RecurJac", arXiv 1810.11783): an
activation has slope 0 or 1, or anything between if its input may lie on either side of a corner. All values between
computed and exact ones lie in the forms of the network as run, so these decide which.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from weakspot.edits.steps import Step
from weakspot.proofs.affine_forms import Form
from weakspot.proofs.affine_steps import BoundStep, ClampStep, LinearStep, MaxStep
from weakspot.proofs.rounding_errors import TINY, own

Interval = tuple[Tensor, Tensor]
"""Centers and radii of derivatives, each (M, number of margins, ...)."""


def moved_by_rounding(
    steps: Sequence[BoundStep],
    forms: Mapping[int, Form],
    rounding: Callable[[BoundStep], Tensor | float],
    margins: tuple[int, Tensor],
    recorded: int,
) -> Tensor:
    """(M, number of margins) how far rounding may move each margin.

    Args:
        steps: of the network.
        forms: by slot, on whole maps; they contain what the network may compute.
        rounding: how far a step's own rounding may move its result, (M, ...) or one number; 0 if it rounds nothing.
        margins: a slot (M, ...), and the derivatives of each box's margins with respect to it,
            (M, number of margins, ...).
        recorded: images in the recording of the network.
    """
    slot, derivatives = margins
    count = len(forms[slot])
    # J by slot, as far back as steps have been passed; a slot leaves with the step that makes it.
    intervals: dict[int, Interval] = {slot: (derivatives, torch.zeros_like(derivatives))}
    moved = derivatives.new_zeros(count, derivatives.shape[1])
    for step in reversed(steps):
        inputs, result = step.value.inputs, step.value.outputs[0]
        # No margin depends on this result.
        if result not in intervals:
            continue
        # All steps that read the result have been passed, so that its derivatives are complete.
        center, radius = intervals.pop(result)
        error = rounding(step)
        if isinstance(error, Tensor) or error:
            error = torch.as_tensor(error, dtype=torch.float64)
            # (M, 1, ...), for all margins of a box.
            error = error[:, None] if error.ndim else error
            moved = moved + ((center.abs() + radius) * error).flatten(2).sum(2)
        if isinstance(step, LinearStep):
            input_intervals = _before_linear(step, (center, radius), forms, recorded)
        elif isinstance(step, ClampStep):
            input_intervals = [_before_clamp(step, (center, radius), forms[inputs[0]])]
        else:
            input_intervals = [_before_maximum(step, (center, radius), forms[inputs[0]])]
        for before, interval in zip(inputs, input_intervals, strict=True):
            # Of a value that several steps read, the derivatives add up.
            other = intervals.get(before)
            intervals[before] = interval if other is None else _sum(interval, other)
    # The sum above is itself rounded in float64.
    terms = sum(form.center[0].numel() for form in forms.values())
    moved = moved * (1 + own(terms)) + TINY
    # NaN, as of zero times infinity, says nothing: rounding may do anything.
    return moved.nan_to_num(torch.inf, torch.inf)


def _sum(one: Interval, other: Interval) -> Interval:
    center = one[0] + other[0]
    return center, (one[1] + other[1] + own(2) * center.abs()) * (1 + own(2))


def _before_linear(
    step: LinearStep, after: Interval, forms: Mapping[int, Form], recorded: int
) -> list[Interval]:
    """Derivatives with respect to each input of a linear step."""
    center, radius = after
    slots = step.linear.inputs
    shapes = [forms[slot].center.shape[1:] for slot in slots]

    def transposed(what: Step, values: Tensor) -> list[Tensor]:
        # The transpose of a linear step is its vector-Jacobian product, wherever that is taken: here, at zero.
        rows = values.flatten(0, 1)
        with torch.enable_grad():
            zeros = [rows.new_zeros(len(rows), *shape).requires_grad_() for shape in shapes]
            result = what.run(dict(zip(slots, zeros, strict=True)), len(rows), recorded)
            result = result[0] if what.several else result
            made = torch.autograd.grad(result, zeros, rows.reshape(result.shape), materialize_grads=True)
        return [part.unflatten(0, values.shape[:2]) for part in made]

    # Each derivative sums up at most as many products as the step has results, or twice as many where the step reads a
    # value twice; `own` allows for eight more.
    loss = own(center[0, 0].numel())
    centers = transposed(step.linear, center)
    # Radii go by absolute weights, together with what rounding in float64 may do to the centers.
    radii = transposed(step.absolute, radius + loss * (center.abs() + radius))
    return [(one, other * (1 + loss) + TINY) for one, other in zip(centers, radii, strict=True)]


def _before_clamp(step: ClampStep, after: Interval, form: Form) -> Interval:
    center, radius = after
    lower, upper = (end[:, None] for end in form.ends)
    inside = (lower >= step.low) & (upper <= step.high)
    outside = (upper <= step.low) | (lower >= step.high)
    between = ~(inside | outside)
    # A slope between 0 and 1, times c with a radius of r, is within |c| / 2 + r of c / 2.
    half = torch.where(inside, 1.0, torch.where(between, 0.5, 0.0))
    return center * half, torch.where(between, center.abs() / 2, 0.0) + torch.where(outside, 0.0, radius)


def _before_maximum(step: MaxStep, after: Interval, form: Form) -> Interval:
    """Derivatives of candidates: 0 to 1 times that of the maximum; all of it if only one can be the largest."""
    # Axis 2 is that of the channels: each candidate of a maximum gets the maximum's derivative.
    center, radius = (part.repeat_interleave(step.count, 2) for part in after)
    lower, upper = (end.unflatten(1, (-1, step.count)) for end in form.ends)
    # A candidate may be the largest unless another one is larger for certain.
    may = upper >= lower.amax(2, keepdim=True)
    certain = may & (may.sum(2, keepdim=True) == 1)
    may, certain = (part.flatten(1, 2)[:, None] for part in (may, certain))
    half = torch.where(certain, 1.0, torch.where(may, 0.5, 0.0))
    between = may & ~certain
    return center * half, torch.where(between, center.abs() / 2, 0.0) + torch.where(may, radius, 0.0)
