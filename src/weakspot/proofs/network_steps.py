"""A recorded network as steps on affine forms."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from weakspot._checks import quiet
from weakspot.classifier import Classifier
from weakspot.edits.recording import record
from weakspot.edits.steps import RESHAPES, CannotRecordError, Recording, Slot, Step, filled
from weakspot.proofs.affine_steps import (
    BoundStep,
    NotSupportedError,
    because,
    differences,
    matrix_of,
)
from weakspot.proofs.bound_steps import bound_steps, leading_copies


@dataclass(frozen=True, eq=False)
class BoundNetwork:
    """A recorded network as steps on affine forms.

    Attributes:
        steps: from images in slot 0 to `logits`.
        logits: a slot (N, K).
        last: the recorded step that makes them, if it is a matrix product.
        recording: that it was made of.
    """

    steps: Sequence[BoundStep]
    logits: int
    last: Step | None
    recording: Recording


def bound_network(classifier: Classifier, image: Tensor) -> BoundNetwork:
    """Record a network, not fused: folded weights would be rounded differently.

    Args:
        classifier: in eval mode.
        image: (1, C, H, W).

    Raises:
        NotSupportedError: if it cannot be recorded or has a step that affine forms do not cover.
    """
    try:
        with quiet():
            recording = record(classifier, image)
        shapes = _shapes(recording, image)
    except CannotRecordError as reason:
        raise NotSupportedError(f"the network cannot be recorded ({reason})") from None
    logits = leading_copies(recording.steps, recording.logits, shapes)
    # What follows the logits only copies them. A last matrix is merged for each image, with its label.
    makers = [number for number, step in enumerate(recording.steps) if logits in step.outputs]
    needed = _on_maps(recording.steps[: makers[0] + 1], shapes, logits) if makers else []
    # Any label will do to ask whether the last step is a matrix.
    merged = needed[-1] if needed and differences(needed[-1], 0) else None
    steps = [part for step in needed if step is not merged for part in bound_steps(step, shapes)]
    _check_made(steps, merged, logits)
    return BoundNetwork(steps, logits, merged, recording)


def _on_maps(steps: Sequence[Step], shapes: dict[int, torch.Size], logits: int) -> list[Step]:
    """The steps with products of flattened maps as products of the maps themselves, which may stay windows."""
    # Slots of flattened maps, with the slots of the maps themselves.
    maps = {
        step.outputs[0]: step.inputs[0]
        for step in steps
        if step.name in RESHAPES
        and len(shapes[step.inputs[0]]) == 4
        and shapes[step.outputs[0]] == (shapes[step.inputs[0]][0], shapes[step.inputs[0]][1:].numel())
    }

    def on_map(step: Step) -> Step:
        if not matrix_of(step) or step.inputs[0] not in maps:
            return step
        slot = maps[step.inputs[0]]
        return replace(step, arguments=filled(step.arguments, {step.inputs[0]: Slot(slot)}), inputs=(slot,))

    result = [on_map(step) for step in steps]
    # Flattened maps that nothing reads any more are left out.
    read = {logits, *(slot for step in result for slot in step.inputs)}
    return [step for step in result if step.outputs[0] in read or step.outputs[0] not in maps]


def _check_made(steps: Sequence[BoundStep], merged: Step | None, logits: int) -> None:
    """Raises NotSupportedError if a step reads a value without bounds, such as the indices of max pooling."""
    made = {0}
    for step in steps:
        if not made.issuperset(step.value.inputs):
            raise NotSupportedError(because(step.value, "on a value without bounds"))
        made.add(step.value.outputs[0])
    if not made.issuperset(merged.inputs if merged else (logits,)):
        raise NotSupportedError("logits that are a value without bounds are not supported")


def _shapes(recording: Recording, image: Tensor) -> dict[int, torch.Size]:
    """Shapes of all values, for as many images as were recorded."""
    values: dict[int, Tensor] = {0: image.detach().expand(recording.count, -1, -1, -1).clone()}
    with torch.no_grad():
        for step in recording.steps:
            result = step.run(values, recording.count, recording.count)
            values.update(zip(step.outputs, result if step.several else [result], strict=True))
    return {slot: value.shape for slot, value in values.items() if isinstance(value, Tensor)}
