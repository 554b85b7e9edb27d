"""The engine of many small edits: what an edit does not reach is taken from the unedited image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from weakspot.edits.recording import CannotRecordError, Recording, Slot, Step
from weakspot.edits.rules import SITEWISE, apply, layout_after, needs_clean
from weakspot.edits.sliding import State
from weakspot.edits.windows import Layout, Map, Windows, as_seen, as_sites, whole

FRESH = {"convolution", "addmm", "add", "native_batch_norm", "_native_batch_norm_legit_no_training"}
ROOM = 0.6  # windows that take more of a map are computed as whole maps


class Engine:
    """Logits of images under small edits, by a recording of the network.

    Attributes:
        logits: (N, K) of the unedited images.
    """

    def __init__(self, recording: Recording, images: Tensor, *, full_batch: int) -> None:
        """Run the recording once on the images (N, C, H, W) and keep the maps that edits may need."""
        self.recording, self.full_batch = recording, full_batch
        merged = _padding_merged(recording.steps)
        kept = {slot for step in merged for slot in step.inputs if needs_clean(step, "maps")}
        self._steps = steps = _in_place(merged, kept)
        self._last = {slot: number for number, step in enumerate(steps) for slot in step.inputs}
        self._last[recording.logits] = len(steps)
        self._cleans: dict[int, Map] = {}
        self._sizes: dict[int, tuple[int, int]] = {}
        layouts: dict[int, Layout | None] = {}
        values: dict[int, Any] = {}
        self._take(0, images, "maps", layouts, values, kept)
        with torch.no_grad():
            for number, step in enumerate(steps):
                result = step.run(values, len(images), recording.count)
                for slot, value in zip(step.outputs, result if step.several else [result], strict=True):
                    if isinstance(value, Tensor) and slot in self._last:
                        layout = layout_after(step, layouts, value)
                        if layout == "rows":
                            self._sizes[slot] = self._sizes[step.inputs[0]]
                        self._take(slot, value, layout, layouts, values, kept)
                self._drop(values, step.inputs, number)
        self.logits: Tensor = values[recording.logits].flatten(1)

    def _take(
        self,
        slot: int,
        value: Tensor,
        layout: Layout | None,
        layouts: dict[int, Layout | None],
        values: dict[int, Any],
        kept: set[int],
    ) -> None:
        values[slot], layouts[slot] = value, layout
        if layout is None:
            return
        if layout != "rows":
            height, width = value.shape[2:] if layout == "maps" else value.shape[1:3]
            self._sizes[slot] = (int(height), int(width))
        if slot in kept:
            self._cleans[slot] = Map(as_sites(value, layout, self._sizes[slot]), layout)

    def _drop(self, values: dict[int, Any], slots: tuple[int, ...], number: int) -> None:
        for slot in set(slots):
            if self._last[slot] == number:
                values.pop(slot, None)

    def edited(self, owners: Tensor, tops: Tensor, lefts: Tensor, patches: Tensor) -> Tensor:
        """(M, K) logits with patches (M, C, h, w) at (tops, lefts) of the images numbered `owners`, each (M,)."""
        sites = patches.permute(0, 2, 3, 1).contiguous()
        with torch.no_grad():
            return self._go_on(0, {0: Windows(sites, tops, lefts)}, owners, windows=True)

    def replayed(self, images: Tensor) -> Tensor:
        """(M, K) logits of whole images, by the recording."""
        with torch.no_grad():
            owners = torch.zeros(len(images), dtype=torch.long, device=images.device)
            return self._go_on(0, {0: images}, owners, windows=False)

    def _go_on(self, start: int, values: dict[int, Any], owners: Tensor, *, windows: bool) -> Tensor:
        """From a step on. Whole maps are computed for fewer edits at once than windows: they take more room."""
        steps, count = self._steps, len(owners)
        state = State(owners, self._cleans, self._sizes, ROOM)
        for number in range(start, len(steps)):
            step = steps[number]
            within = [slot for slot in step.inputs if isinstance(values[slot], Windows)]
            result: Any = None
            others_wanted = any(slot in self._last for slot in step.outputs[1:])
            if windows and within and not others_wanted:
                result = apply(state, step, values)
                if step.several:
                    result = (result, *[None] * (len(step.outputs) - 1)) if result is not None else None
            if result is None:
                if within and count > self.full_batch:
                    return torch.cat(
                        [
                            self._go_on(number, _selected(values, rows), owners[rows], windows=windows)
                            for rows in _slices(count, self.full_batch)
                        ]
                    )
                for slot in set(within):
                    clean = self._cleans[slot]
                    values[slot] = as_seen(whole(values[slot], clean, owners), clean.layout)
                result = step.run(values, count, self.recording.count)
            parts = zip(step.outputs, result if step.several else [result], strict=True)
            values.update({slot: part for slot, part in parts if slot in self._last and part is not None})
            self._drop(values, step.inputs, number)
        found = values[self.recording.logits]
        if isinstance(found, Windows):
            raise CannotRecordError("its logits have sites")
        logits: Tensor = found.flatten(1)
        return logits


def _padding_merged(steps: Sequence[Step]) -> list[Step]:
    """The steps; zero padding that a convolution alone reads, and could do itself, is done by it."""
    readers = Counter(slot for step in steps for slot in step.inputs)
    padded: dict[int, tuple[int, list[int]]] = {}
    found = []
    for step in steps:
        if step.name == "constant_pad_nd" and readers[step.outputs[0]] == 1 and len(step.inputs) == 1:
            widths, value = list(step.arguments[1]), (*step.arguments, 0)[2]
            if (
                len(widths) == 4
                and value == 0
                and widths[0] == widths[1] >= 0
                and widths[2] == widths[3] >= 0
            ):
                padded[step.outputs[0]] = (step.inputs[0], [widths[2], widths[0]])
                found.append(step)
                continue
        if step.name == "convolution" and step.inputs[0] in padded and not step.arguments[6]:
            source, widths = padded[step.inputs[0]]
            own = step.arguments[4] if len(step.arguments[4]) == 2 else step.arguments[4] * 2
            both = [width + more for width, more in zip(own, widths, strict=True)]
            arguments = (Slot(source), *step.arguments[1:4], both, *step.arguments[5:])
            found = [one for one in found if step.inputs[0] not in one.outputs]
            found.append(replace(step, arguments=arguments, inputs=(source,)))
            continue
        found.append(step)
    return found


def _in_place(steps: Sequence[Step], kept: set[int]) -> list[Step]:
    """The steps; activation functions of what nothing else reads write into it, which spares memory and time."""
    made = {slot: step.name for step in steps for slot in step.outputs}
    readers = Counter(slot for step in steps for slot in step.inputs)

    def thrifty(step: Step) -> Step:
        twin = getattr(getattr(torch.ops.aten, f"{step.name}_", None), "default", None)
        if getattr(step.call, "_overloadname", "") != "default":
            return step
        if step.name not in SITEWISE or twin is None or len(step.inputs) != 1:
            return step
        (read,) = step.inputs
        alone = readers[read] == 1 and read not in kept and made.get(read) in FRESH
        return replace(step, call=twin) if alone else step

    return [thrifty(step) for step in steps]


def _selected(values: dict[int, Any], rows: slice) -> dict[int, Any]:
    return {
        slot: value.select(rows) if isinstance(value, Windows) else value[rows]
        for slot, value in values.items()
    }


def evenly(count: int, size: int) -> int:
    """Of how many each part is best, no more than a size: a small last part costs almost as much as a full one."""
    return -(-count // -(-count // size))


def _slices(count: int, size: int) -> list[slice]:
    size = evenly(count, size)
    return [slice(start, start + size) for start in range(0, count, size)]
