"""Steps on affine forms: what each does to centers, to generators, and to the magnitudes that bound rounding."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from weakspot.edits.steps import Arguments, Slot, Step, pair
from weakspot.proofs.rounding_errors import LARGEST

FAR = -1e300  # below every float32; stands for the minus infinity around maps that are max-pooled
PATCH_BYTES = (
    2 * 2**20
)  # of patches copied at once; with more, they leave the cache before they are multiplied


class NotSupportedError(Exception):
    """The network has a step that affine forms do not cover; the message names it."""


@dataclass(frozen=True)
class LinearStep:
    """A step that is linear in its inputs, up to a constant.

    Attributes:
        value: the step in float64.
        linear: the step without its constant.
        absolute: the step with absolute values in place of its factors, without its constant.
        rounding: as `absolute`, but applied to magnitudes to bound rounding; the same step where nothing is merged.
        terms: the number n of gamma_n; 0 if nothing is rounded.
        constant: magnitude of the constant, broadcast over the result; None if there is none.
        counting: applied to ones where values may be nonzero, and zeros elsewhere, the number of products that may be
            nonzero, broadcast over the result; None if that is not known.
    """

    value: Step
    linear: Step
    absolute: Step
    rounding: Step
    terms: int
    constant: Tensor | None = None
    counting: Step | None = None


@dataclass(frozen=True)
class ClampStep:
    """min(max(x, low), high), where `value` reads and writes."""

    value: Step
    low: float
    high: float


@dataclass(frozen=True)
class MaxStep:
    """The largest of each `count` channels, one after the other, where `value` reads and writes."""

    value: Step
    count: int


BoundStep = LinearStep | ClampStep | MaxStep


def because(step: Step, detail: str = "") -> str:
    """Why a step has no bounds."""
    return f"{step.name} is not supported{' ' + detail if detail else ''}"


def check_only_input(step: Step) -> None:
    """Raises NotSupportedError unless the step's first argument is its only input."""
    if len(step.inputs) != 1 or step.arguments[0] != Slot(step.inputs[0]):
        raise NotSupportedError(because(step, "with these arguments"))


def convolve(
    maps: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    transposed: bool, output_padding: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """torch.convolution in float64; as one product of matrices, which takes a third of the time, where it can be."""
    if groups != 1 or set(dilation) != {1}:
        return torch.convolution(
            maps.contiguous(), weight, bias, stride, padding, dilation, transposed, output_padding, groups
        )
    (down, along), (high, wide) = pair(padding), weight.shape[2:]
    # (C, H, W, N) with a border: with the maps innermost, copies move long stretches of memory, and the product is one
    # of few rows with many columns, twice as fast as its transpose. F.pad takes the last axis first.
    sites = F.pad(maps.permute(1, 2, 3, 0), (0, 0, along, along, down, down))
    # (C, rows, columns, N, high, wide): the sites that each result reads.
    patches = sites.unfold(1, high, pair(stride)[0]).unfold(2, wide, pair(stride)[1])
    shape = (len(weight), *patches.shape[1:3], -1)
    # (out, high * wide * C), in the order in which patches are flattened below.
    factors = weight.permute(0, 2, 3, 1).flatten(1)
    each = max(1, PATCH_BYTES // max(1, 8 * patches[:, :, :, 0].numel()))
    parts = [
        (factors @ part.permute(4, 5, 0, 1, 2, 3).reshape(factors.shape[1], -1)).view(shape)
        for part in patches.split(each, 3)
    ]
    values = torch.cat(parts, 3).permute(3, 0, 1, 2)
    return values if bias is None else values + bias[:, None, None]


def matrix_step(
    step: Step, matrix: Tensor, magnitudes: Tensor, bias: Tensor | None, weight: Tensor
) -> LinearStep:
    """Rows, or flattened maps, times a matrix (in, out) plus a bias (out,).

    Args:
        step: whose inputs and outputs it has.
        matrix: factors.
        magnitudes: what bounds the rounding; at least the absolute factors.
        bias: constant, or None.
        weight: (out,) magnitude of the bias.
    """

    def times(factors: Tensor, constant: Tensor | None) -> Step:
        def call(rows: Tensor, factors: Tensor) -> Tensor:
            # Maps are flattened here, because `network_steps` leaves their flattening out.
            result = rows.flatten(1) @ factors
            return result if constant is None else result + constant

        return replace(step, name="mm", call=call, arguments=(Slot(step.inputs[0]), factors), keywords={})

    return LinearStep(
        value=times(matrix, bias),
        linear=times(matrix, None),
        absolute=times(matrix.abs(), None),
        rounding=times(magnitudes, None),
        terms=len(matrix) + 2,
        constant=weight[None] if bias is not None else None,
        # One column for all results, which read the same values.
        counting=times(torch.ones_like(matrix[:, :1]), None),
    )


def matrix_of(step: Step) -> tuple[Tensor, Tensor | None] | None:
    """Matrix (in, out) and bias of a step that multiplies rows by a constant matrix; None if it is another."""
    if step.name not in {"addmm", "mm"} or len(step.inputs) != 1 or step.keywords:
        return None
    place = 1 if step.name == "addmm" else 0
    if step.arguments[place] != Slot(step.inputs[0]) or not isinstance(step.arguments[place + 1], Tensor):
        return None
    bias = step.arguments[0] if place else None
    matrix = step.arguments[place + 1].detach().cpu().double()
    if bias is None:
        return matrix, None
    return matrix, bias.detach().cpu().double().flatten().expand(matrix.shape[1])


def differences(step: Step, label: int) -> LinearStep | None:
    """A last step of logits, merged with the differences of the label's logit and each other; None if it is no matrix.

    Merged, errors that both logits share cancel. The rounding of both logits counts.
    """
    factors = matrix_of(step)
    if factors is None:
        return None
    matrix, bias = factors
    others = [column for column in range(matrix.shape[1]) if column != label]
    # (in, K - 1): a column for the margin over each other class.
    merged = matrix[:, label : label + 1] - matrix[:, others]
    sizes = matrix[:, label : label + 1].abs() + matrix[:, others].abs()
    if bias is None:
        return matrix_step(step, merged, sizes, None, torch.zeros(0))
    return matrix_step(
        step, merged, sizes, bias[label] - bias[others], bias[label].abs() + bias[others].abs()
    )


def clamp_step(step: Step) -> ClampStep:
    """ReLU, ReLU6, hardtanh and clamp."""
    check_only_input(step)
    # Limits that a call leaves out are those of the function; clamp has none.
    defaults = {"relu": (0.0, None), "hardtanh": (-1.0, 1.0)}.get(step.name, (None, None))
    given = [*step.arguments[1:]]
    if step.name == "clamp_max":
        given = [None, *given]
    given += list(defaults[len(given) :])
    named = (step.keywords.get("min", given[0]), step.keywords.get("max", given[1]))
    if any(isinstance(end, Tensor) for end in named):
        raise NotSupportedError(because(step, "with tensors as limits"))
    low, high = (
        fallback if end is None else float(end)
        for end, fallback in zip(named, (-torch.inf, torch.inf), strict=True)
    )
    # Every value would become such a limit, whose rounding `limit_error` leaves out.
    if low > LARGEST or high < -LARGEST:
        raise NotSupportedError(because(step, "with limits near the range of float32"))
    # Negated, so that NaN is refused as well.
    if not low <= high:
        raise NotSupportedError(because(step, "with limits in the wrong order"))
    return ClampStep(step, low, high)


def max_pool_steps(step: Step, shapes: dict[int, torch.Size]) -> list[BoundStep]:
    """Max pooling as a convolution that lays the candidates of each maximum side by side, then their maximum."""
    check_only_input(step)
    given: Arguments = (*step.arguments, *(None, None, None, 0, 1, False)[len(step.arguments) :])
    _, kernel, stride, padding, dilation, ceil = given
    if ceil:
        raise NotSupportedError("max pooling with ceil_mode is not supported")
    high, wide = pair(kernel)
    stride = pair(stride) if stride else (high, wide)
    (down, along), dilation = pair(padding), pair(dilation)
    channels, many = shapes[step.inputs[0]][1], high * wide
    # Values between the recorded steps get numbers that no slot of the recording has.
    source, middle, candidates = step.inputs[0], -2 * step.outputs[0] - 1, -2 * step.outputs[0] - 2
    steps: list[BoundStep] = []
    if down or along:
        # As F.pad takes widths: the last axis first.
        around = [along, along, down, down]
        far: Arguments = (Slot(source), around, FAR)
        value = Step("constant_pad_nd", torch.constant_pad_nd, far, {}, (source,), (middle,), False)
        # Generators and radii of the padding are zero: only its value is far below.
        zero = replace(value, arguments=(Slot(source), around, 0.0))
        steps.append(LinearStep(value, zero, zero, zero, 0))
        source = middle
    # One kernel for each place of the window, which copies that place.
    # With a group for each channel, result c * many + j is place j of channel c.
    weight = torch.eye(many, dtype=torch.float64).view(many, 1, high, wide).repeat(channels, 1, 1, 1)
    arguments = (Slot(source), weight, None, list(stride), [0, 0], list(dilation), False, [0, 0], channels)
    spread = Step("convolution", convolve, arguments, {}, (source,), (candidates,), False)
    steps.append(LinearStep(spread, spread, spread, spread, 0))
    # The indices, its second output, have no bounds: `network_steps` refuses steps that read them.
    taken = replace(step, inputs=(candidates,), outputs=step.outputs[:1], several=False)
    return [*steps, MaxStep(taken, many)]
