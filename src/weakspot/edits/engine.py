"""The engine of many small edits: what an edit does not reach is taken from the unedited image.

Preparing: a network recorded once, tried against itself, and kept for the next time.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from weakspot._checks import quiet
from weakspot._state import HOOKS, hooks
from weakspot.classifier import Classifier
from weakspot.edits.activations import in_place, merged
from weakspot.edits.kernels import State
from weakspot.edits.recording import CannotRecordError, Recording, Step, record
from weakspot.edits.rules import apply, layout_after, needs_clean
from weakspot.edits.windows import Layout, Map, Windows, as_seen, as_sites, paste, whole
from weakspot.fusion import fused
from weakspot.models.specs import settings

ROOM = 0.6  # windows that take more of a map are computed as whole maps
# Bytes of a tensor of whole maps: glibc takes those from 32 MiB on anew from the system each time.
LARGEST = 28 * 2**20
FEWEST = 4  # edits that whole maps are computed for at once, however large they are


class Engine:
    """Logits of images under small edits, by a recording of the network.

    Attributes:
        logits: (N, K) of the unedited images.
    """

    def __init__(self, recording: Recording, images: Tensor, *, full_batch: int) -> None:
        """Run the recording once on the images (N, C, H, W) and keep the maps that edits may need."""
        self.recording, self.full_batch = recording, full_batch
        self._steps = steps = in_place(recording.steps)
        readers: dict[int, list[Step]] = {}
        for step in steps:
            for slot in step.inputs:
                readers.setdefault(slot, []).append(step)
        last = {slot: number for number, step in enumerate(steps) for slot in step.inputs}
        last[recording.logits] = len(steps)
        self._read = frozenset(last)
        self._done_with = [{slot for slot in step.inputs if last[slot] == k} for k, step in enumerate(steps)]
        self._cleans: dict[int, Map] = {}
        self._sizes: dict[int, tuple[int, int]] = {}
        seen_as: dict[int, Layout | None] = {}
        values: dict[int, Any] = {}
        room = {0: images.nbytes}  # bytes, by slot
        self._take(0, images, "maps", seen_as, values, readers)
        with torch.no_grad():
            for number, step in enumerate(steps):
                result = step.run(values, len(images), recording.count)
                for slot, value in zip(step.outputs, result if step.several else [result], strict=True):
                    if isinstance(value, Tensor) and slot in self._read:
                        room[slot] = value.nbytes
                        layout = layout_after(step, seen_as, value)
                        if layout == "rows":
                            self._sizes[slot] = self._sizes[step.inputs[0]]
                        self._take(slot, value, layout, seen_as, values, readers)
                self._drop(values, number)
        self.logits: Tensor = values[recording.logits].flatten(1)
        most = [max(room.get(slot, 0) for slot in (*step.inputs, *step.outputs)) for step in steps]
        self._room = [most // len(images) for most in accumulate(reversed(most), max)][::-1]

    def _whole_at_once(self, number: int) -> int:
        """For how many edits whole maps are computed at once from a step on."""
        if self.logits.device.type != "cpu":
            return self.full_batch
        return min(self.full_batch, max(FEWEST, LARGEST // max(1, self._room[number])))

    def _take(
        self,
        slot: int,
        value: Tensor,
        layout: Layout | None,
        layouts: dict[int, Layout | None],
        values: dict[int, Any],
        readers: dict[int, list[Step]],
    ) -> None:
        values[slot], layouts[slot] = value, layout
        if layout is None:
            return
        if layout != "rows":
            height, width = value.shape[2:] if layout == "maps" else value.shape[1:3]
            self._sizes[slot] = (int(height), int(width))
        if any(needs_clean(step, layout) for step in readers.get(slot, ())):
            self._cleans[slot] = Map(as_sites(value, layout, self._sizes[slot]), layout)

    def _drop(self, values: dict[int, Any], number: int) -> None:
        for slot in self._done_with[number]:
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
            if windows and within and self._read.isdisjoint(step.outputs[1:]):
                result = apply(state, step, values)
                if step.several:
                    result = (result, *[None] * (len(step.outputs) - 1)) if result is not None else None
            if result is None:
                at_once = self._whole_at_once(number)
                if within and count > at_once:
                    return torch.cat(
                        [
                            self._go_on(number, _selected(values, rows), owners[rows], windows=windows)
                            for rows in _slices(count, at_once)
                        ]
                    )
                for slot in set(within):
                    clean = self._cleans[slot]
                    values[slot] = as_seen(whole(values[slot], clean, owners), clean.layout)
                result = step.run(values, count, self.recording.count)
            parts = zip(step.outputs, result if step.several else [result], strict=True)
            values.update({slot: part for slot, part in parts if slot in self._read and part is not None})
            self._drop(values, number)
        found = values[self.recording.logits]
        if isinstance(found, Windows):
            raise CannotRecordError("its logits have sites")
        logits: Tensor = found.flatten(1)
        return logits


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


TOLERANCE = 1e-4  # of the range of the logits


@dataclass(frozen=True)
class Prepared:
    """A classifier's recording for images of one shape.

    Attributes:
        recording: its steps, or None where edits go through the network itself.
        reason: why there is none, else empty.
    """

    recording: Recording | None
    reason: str = ""


_known: weakref.WeakKeyDictionary[nn.Module, tuple[object, Tensor, Recording]] = weakref.WeakKeyDictionary()


def prepare(classifier: Classifier, image: Tensor) -> Prepared:
    """Record the classifier, and try the recording on a few edits against the network itself.

    A recording is kept as long as the network lives, and used again where its structure, its weights, and what it says
    of this image are as they were.

    Args:
        classifier: in eval mode.
        image: (1, C, H, W) in [0, 1].
    """
    if _watched(classifier):
        return Prepared(None, "hooks on it would not see the edits")
    if any(isinstance(module, torch.jit.ScriptModule) for module in classifier.modules()):
        return Prepared(None, "TorchScript runs past the recorder")
    recording = None
    try:
        with quiet(), fused(classifier, image), torch.no_grad():
            structure, sums = _signature(classifier, image), _sums(classifier)
            known = _known.get(classifier.network)
            kept = known is not None and known[0] == structure and torch.equal(known[1], sums)
            if known is not None and kept and _same_logits(known[2], classifier, image):
                return Prepared(known[2])
            recording = merged(record(classifier, image))
            engine = Engine(recording, image, full_batch=recording.count + 1)
            off = max(
                _off(classifier, engine, image, *_trial(image, fraction, recording.count + 1))
                for fraction in (None, 16)
            )
    except CannotRecordError as reason:
        return Prepared(None, str(reason))
    except Exception as error:  # noqa: BLE001 - whatever a strange module raises, its edits go through itself
        where = (
            "it cannot be recorded" if recording is None else "its recording fits one number of images only"
        )
        return Prepared(None, f"{where} ({type(error).__name__}: {str(error).partition(chr(10))[0]})")
    if off > TOLERANCE:
        return Prepared(None, f"its recording is off by {off:.1e} of the range of its logits")
    _known[classifier.network] = (structure, sums, recording)
    return Prepared(recording)


def _signature(classifier: Classifier, image: Tensor) -> object:
    """What decides a recording besides weights, as far as it can be seen from outside."""
    shape = tuple(image.shape[1:]), image.dtype, image.device
    return type(classifier), repr(settings(classifier.network)), shape, classifier.fixed_batch


def _sums(classifier: Classifier) -> Tensor:
    """A number for each parameter and buffer that changes with any of its values."""
    sums = []
    for tensor in (*classifier.parameters(), *classifier.buffers()):
        flat = tensor.detach().flatten().to(torch.float32)
        sums.append(torch.dot(flat, _weights(len(flat), flat.device)).double().cpu())
    return torch.stack(sums) if sums else torch.zeros(0)


@lru_cache(maxsize=4)
def _ramp(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2**16, generator=generator).to(device)


def _weights(count: int, device: torch.device) -> Tensor:
    """Arbitrary weights, the same every time."""
    ramp = _ramp(device)
    return ramp[:count] if count <= len(ramp) else ramp.repeat(-(-count // len(ramp)))[:count]


def _same_logits(recording: Recording, classifier: Classifier, image: Tensor) -> bool:
    found, expected = Engine(recording, image, full_batch=1).logits, classifier(image)
    span = (expected.amax() - expected.amin()).clamp(min=1e-12)
    return found.shape == expected.shape and bool(((found - expected).abs() <= TOLERANCE * span).all())


def _watched(classifier: Classifier) -> bool:
    forward = [name for name in HOOKS if "forward" in name]
    return any(bool(getattr(nn.modules.module, f"_global{name}", None)) for name in forward) or any(
        bool(hooks(module, name)) for module in classifier.modules() for name in forward
    )


def _off(
    classifier: Classifier, engine: Engine, image: Tensor, tops: Tensor, lefts: Tensor, patches: Tensor
) -> float:
    """How far the engine's logits are from the network's, over their range."""
    owners = torch.zeros_like(tops)
    found = engine.edited(owners, tops, lefts, patches)
    expected = classifier(edited_images(image, owners, tops, lefts, patches))
    if found.shape != expected.shape:
        return math.inf
    span = (expected.amax() - expected.amin()).clamp(min=1e-12)
    return float(((found - expected).abs().amax() / span).nan_to_num(torch.inf))


def _trial(image: Tensor, fraction: int | None, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Edits from one corner to the other: of a pixel, or of a share of the image's sides."""
    channels, height, width = image.shape[1:]
    tall, wide = (1, 1) if fraction is None else (max(1, height // fraction), max(1, width // fraction))
    places = torch.linspace(0, 1, count, device=image.device)
    tops, lefts = (places * (height - tall)).long(), (places.roll(1) * (width - wide)).long()
    ramp = torch.linspace(0, 1, count * channels * tall * wide, device=image.device)
    patches = (ramp * 7919).frac().view(count, channels, tall, wide).to(image.dtype)
    patches[0], patches[-1] = 0, 1
    return tops, lefts, patches


def edited_images(images: Tensor, owners: Tensor, tops: Tensor, lefts: Tensor, patches: Tensor) -> Tensor:
    """(M, C, H, W): images[owners] with patches (M, C, h, w) at (tops, lefts)."""
    sites = images[owners].permute(0, 2, 3, 1).contiguous()
    return as_seen(paste(sites, tops, lefts, patches.permute(0, 2, 3, 1)), "maps").contiguous()
