"""The engine of many small edits: whatever an edit does not reach is taken from the unedited image."""

import math
import weakref
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from weakspot._checks import quiet
from weakspot._memory import remembered
from weakspot._random import float32_noise
from weakspot._state import HOOKS, hooks
from weakspot.classifier import Classifier
from weakspot.edits.kernels import State
from weakspot.edits.recording import record
from weakspot.edits.rules import apply, needs_clean, order_after
from weakspot.edits.steps import (
    CannotRecordError,
    Recording,
    Step,
    Values,
    by_onednn,
    in_place,
    with_padding_in_convolutions,
)
from weakspot.edits.windows import AxisOrder, Map, Windows, as_seen, as_sites, paste, whole
from weakspot.fusion import fused
from weakspot.models.identity import settings

ROOM = 0.6  # windows that take a larger fraction of a map are computed as whole maps
# Bytes of a tensor of whole maps: glibc allocates those from 32 MiB on anew from the system each time.
LARGEST = 28 * 2**20
FEWEST = 4  # edits whose whole maps are computed at once, however large they are
TOLERANCE = 1e-4  # of the range of the logits


class Engine:
    """Logits of images under small edits, by a recording of the network.

    Attributes:
        logits: (N, K) of the unedited images.
    """

    def __init__(self, recording: Recording, images: Tensor, *, full_batch: int) -> None:
        """Run the recording once on the images (N, C, H, W) and store the maps that edits may need."""
        self.recording, self.full_batch = recording, full_batch
        self._steps = steps = in_place(by_onednn(recording.steps))
        readers: dict[int, list[Step]] = {}
        for step in steps:
            for slot in step.inputs:
                readers.setdefault(slot, []).append(step)
        self._readers = readers
        # The step that reads each slot last; the logits stay to the end.
        last = {slot: number for number, step in enumerate(steps) for slot in step.inputs}
        last[recording.logits] = len(steps)
        self._read = frozenset(last)
        # Values are dropped after the step that reads them last.
        self._done_with = [{slot for slot in step.inputs if last[slot] == k} for k, step in enumerate(steps)]
        self._cleans: dict[int, Map] = {}
        self._sizes: dict[int, tuple[int, int]] = {}
        orders: dict[int, AxisOrder | None] = {}
        values: Values = {0: images}
        bytes_of = {0: images.nbytes}
        self._store(0, images, orders, "maps")
        with torch.no_grad():
            for number, step in enumerate(steps):
                result = step.run(values, len(images), recording.count)
                for slot, value in zip(step.outputs, result if step.several else [result], strict=True):
                    if isinstance(value, Tensor) and slot in self._read:
                        bytes_of[slot] = value.nbytes
                        order = order_after(step, orders, value)
                        if order == "rows":  # rows have lost their height and width
                            self._sizes[slot] = self._sizes[step.inputs[0]]
                        values[slot] = value
                        self._store(slot, value, orders, order)
                self._drop(values, number)
        self.logits: Tensor = values[recording.logits].flatten(1)
        most = [max(bytes_of.get(slot, 0) for slot in (*step.inputs, *step.outputs)) for step in steps]
        # Per image, the largest tensor from each step on.
        self._bytes = [largest // len(images) for largest in accumulate(reversed(most), max)][::-1]

    def _store(
        self, slot: int, value: Tensor, orders: dict[int, AxisOrder | None], order: AxisOrder | None
    ) -> None:
        """Note how the network sees a value, and store it if edits may need it."""
        orders[slot] = order
        if order is None:
            return
        if order != "rows":
            height, width = value.shape[2:] if order == "maps" else value.shape[1:3]
            self._sizes[slot] = (int(height), int(width))
        if any(needs_clean(step, order) for step in self._readers.get(slot, ())):
            self._cleans[slot] = Map(as_sites(value, order, self._sizes[slot]), order)

    def _whole_at_once(self, number: int) -> int:
        """For how many edits whole maps are computed at once from a step on."""
        if self.logits.device.type != "cpu":
            return self.full_batch
        return min(self.full_batch, max(FEWEST, LARGEST // max(1, self._bytes[number])))

    def _drop(self, values: Values, number: int) -> None:
        for slot in self._done_with[number]:
            values.pop(slot, None)

    def edited(self, owners: Tensor, tops: Tensor, lefts: Tensor, patches: Tensor) -> Tensor:
        """(M, K) logits with patches (M, C, h, w) at (tops, lefts) of the images numbered `owners`, each (M,).

        If the patches require gradients, the logits have them too; `has_gradients` says whether they are right.
        """
        sites = patches.permute(0, 2, 3, 1).contiguous()
        return self._run(0, {0: Windows(sites, tops, lefts)}, owners, windows=True)

    def replayed(self, images: Tensor) -> Tensor:
        """(M, K) logits of whole images, by the recording."""
        with torch.no_grad():
            owners = torch.zeros(len(images), dtype=torch.long, device=images.device)
            return self._run(0, {0: images}, owners, windows=False)

    def _run(self, start: int, values: Values, owners: Tensor, *, windows: bool) -> Tensor:
        """Run from a step on. Whole maps take more memory than windows: fewer edits go through those at once."""
        steps, count = self._steps, len(owners)
        state = State(owners, self._cleans, self._sizes, ROOM)
        for number in range(start, len(steps)):
            step = steps[number]
            within = [slot for slot in step.inputs if isinstance(values[slot], Windows)]
            result: Any = None
            if windows and within and self._read.isdisjoint(step.outputs[1:]):
                result = apply(state, step, values)
                # Only the first output of a tuple is followed; the others are not read.
                if step.several and result is not None:
                    result = (result, *[None] * (len(step.outputs) - 1))
            if result is None:
                at_once = self._whole_at_once(number)
                if within and count > at_once:
                    # The rest of the steps, from this one on, for a part of the edits at a time.
                    size = evenly(count, at_once)
                    slices = [slice(start, start + size) for start in range(0, count, size)]
                    parts = [
                        self._run(number, _selected(values, rows), owners[rows], windows=windows)
                        for rows in slices
                    ]
                    return torch.cat(parts)
                # From here on whole maps: the windows are pasted into the unedited ones.
                for slot in set(within):
                    clean = self._cleans[slot]
                    values[slot] = as_seen(whole(values[slot], clean, owners), clean.order)
                result = step.run(values, count, self.recording.count)
            outputs = zip(step.outputs, result if step.several else [result], strict=True)
            values.update({slot: one for slot, one in outputs if slot in self._read and one is not None})
            self._drop(values, number)
        logits = values[self.recording.logits]
        if isinstance(logits, Windows):
            raise CannotRecordError("its logits have sites")
        flat: Tensor = logits.flatten(1)
        return flat


def _selected(values: Values, rows: slice) -> Values:
    return {
        slot: value.select(rows) if isinstance(value, Windows) else value[rows]
        for slot, value in values.items()
    }


def evenly(count: int, size: int) -> int:
    """The size of equal parts of at most `size`: a small last part costs almost as much as a full one."""
    return -(-count // -(-count // size))


@dataclass(frozen=True)
class Prepared:
    """A classifier's recording for images of one shape.

    Attributes:
        recording: its steps, or None if edits go through the network itself.
        reason: why there is no recording, else empty.
    """

    recording: Recording | None
    reason: str = ""

    def __repr__(self) -> str:
        if self.recording is None:
            return f"Prepared(no recording: {self.reason})"
        return f"Prepared({len(self.recording.steps)} steps)"


# Recordings outlive the call here, unlike in `remembered`, and are tested before each use.
_known: weakref.WeakKeyDictionary[nn.Module, tuple[object, Tensor, Recording]] = weakref.WeakKeyDictionary()


def prepare(classifier: Classifier, image: Tensor) -> Prepared:
    """Record the classifier, and try the recording on a few edits against the network itself.

    A recording is remembered as long as the network lives, and used again if the network's structure, its weights and
    its logits of this image are the same.

    Args:
        classifier: in eval mode.
        image: (1, C, H, W) in [0, 1].
    """
    return remembered(classifier, ("prepared", image.shape, image.dtype), lambda: _prepare(classifier, image))


def _prepare(classifier: Classifier, image: Tensor) -> Prepared:
    if _has_hooks(classifier):
        return Prepared(None, "hooks on it would not see the edits")
    if any(isinstance(module, torch.jit.ScriptModule) for module in classifier.modules()):
        return Prepared(None, "TorchScript runs past the recorder")
    recording = None
    try:
        with quiet(), fused(classifier, image), torch.no_grad():
            structure, sums = _signature(classifier, image), _sums(classifier)
            known = _known.get(classifier.network)
            if known is not None and known[0] == structure and torch.equal(known[1], sums):
                earlier = known[2]
                if _error(Engine(earlier, image, full_batch=1).logits, classifier(image)) <= TOLERANCE:
                    return Prepared(earlier)
            recording = with_padding_in_convolutions(record(classifier, image))
            error = _error_of_trials(classifier, recording, image)
    except CannotRecordError as reason:
        return Prepared(None, str(reason))
    except Exception as problem:  # noqa: BLE001 - whatever an unusual module raises, edits then go through itself
        phase = (
            "it cannot be recorded" if recording is None else "its recording fits one number of images only"
        )
        return Prepared(None, f"{phase} ({type(problem).__name__})")
    if error > TOLERANCE:
        return Prepared(None, f"its recording is off by {error:.1e} of the range of its logits")
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
        # Weighted, so that values that swap places are noticed.
        sums.append(torch.dot(flat, _weights(len(flat), flat.device)).double().cpu())
    return torch.stack(sums) if sums else torch.zeros(0)


@lru_cache(maxsize=4)
def _noise(device: torch.device) -> Tensor:
    return float32_noise(torch.Generator().manual_seed(0), 2**16).to(device)


def _weights(count: int, device: torch.device) -> Tensor:
    """(count,) arbitrary weights, the same every time."""
    noise = _noise(device)
    return noise[:count] if count <= len(noise) else noise.repeat(-(-count // len(noise)))[:count]


def _has_hooks(classifier: Classifier) -> bool:
    forward = [name for name in HOOKS if "forward" in name]
    return any(bool(getattr(nn.modules.module, f"_global{name}", None)) for name in forward) or any(
        bool(hooks(module, name)) for module in classifier.modules() for name in forward
    )


def _error(logits: Tensor, expected: Tensor) -> float:
    """How far logits are off, as a fraction of the range of the expected ones; infinite if they do not fit."""
    if logits.shape != expected.shape:
        return math.inf
    span = (expected.amax() - expected.amin()).clamp(min=1e-12)
    return float(((logits - expected).abs().amax() / span).nan_to_num(torch.inf))


def _error_of_trials(classifier: Classifier, recording: Recording, image: Tensor) -> float:
    """The error on edits of a pixel and of a sixteenth of the sides, from one corner to the other."""
    # One more than was recorded, so that a step in which that number is fixed is noticed.
    count = recording.count + 1
    engine = Engine(recording, image, full_batch=count)
    channels, height, width = image.shape[1:]
    places = torch.linspace(0, 1, count, device=image.device)
    errors = []
    for tall, wide in ((1, 1), (max(1, height // 16), max(1, width // 16))):
        # Rolled, so that not all places lie on the diagonal.
        tops, lefts = (places * (height - tall)).long(), (places.roll(1) * (width - wide)).long()
        ramp = torch.linspace(0, 1, count * channels * tall * wide, device=image.device)
        # A fractional part of a steep ramp looks like noise, but costs no random numbers.
        patches = (ramp * 7919).frac().view(count, channels, tall, wide).to(image.dtype)
        patches[0], patches[-1] = 0, 1
        edits = torch.zeros_like(tops), tops, lefts, patches
        errors.append(_error(engine.edited(*edits), classifier(edited_images(image, *edits))))
    return max(errors)


def has_gradients(engine: Engine, classifier: Classifier, image: Tensor) -> bool:
    """Whether an engine's gradients of logits by patches are those of the network itself.

    Those of a network that defines its own backward pass, as a straight-through defense does, are not: the recording
    holds only what its forward pass computes.

    Args:
        engine: of images of this shape.
        classifier: that was recorded, in its fused form if the recording is.
        image: (1, C, H, W), image 0 of the engine.
    """
    _, _, height, width = image.shape
    tall, wide = max(1, height // 4), max(1, width // 4)
    top = torch.tensor([(height - tall) // 2], device=image.device)
    left = torch.tensor([(width - wide) // 2], device=image.device)
    gradients = []
    try:
        for forward in (
            lambda patch: engine.edited(torch.zeros_like(top), top, left, patch),
            lambda patch: classifier(edited_images(image, torch.zeros_like(top), top, left, patch)),
        ):
            here = image[:, :, int(top) : int(top) + tall, int(left) : int(left) + wide]
            patch = (0.9 * here + 0.05).detach().requires_grad_()
            with torch.enable_grad():
                logits = forward(patch)
                weights = torch.linspace(-1, 1, logits.shape[1], device=image.device)
                (gradient,) = torch.autograd.grad((logits * weights).sum(), patch)
            gradients.append(gradient)
    except RuntimeError:  # no gradient, or a step that autograd cannot follow
        return False
    ours, theirs = gradients
    # A ReLU at zero may fall to either side by rounding, so that single values may differ.
    return bool((ours - theirs).norm() <= 1e-3 * theirs.norm())


def edited_images(images: Tensor, owners: Tensor, tops: Tensor, lefts: Tensor, patches: Tensor) -> Tensor:
    """(M, C, H, W): images[owners] with patches (M, C, h, w) at (tops, lefts)."""
    sites = images[owners].permute(0, 2, 3, 1).contiguous()
    return as_seen(paste(sites, tops, lefts, patches.permute(0, 2, 3, 1)), "maps").contiguous()
