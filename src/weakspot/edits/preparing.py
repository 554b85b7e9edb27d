"""Preparing: a network recorded once, tried against itself, and kept for the next time."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from weakspot.checks import quiet
from weakspot.classifier import Classifier
from weakspot.edits.engine import Engine
from weakspot.edits.merging import merged
from weakspot.edits.recording import CannotRecordError, Recording, record
from weakspot.edits.windows import as_seen, paste
from weakspot.fusion import fused
from weakspot.models.settings import settings
from weakspot.threads import HOOKS, hooks

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
                _off(classifier, engine, image, *_trial(image, share, recording.count + 1))
                for share in (None, 16)
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


def _trial(image: Tensor, share: int | None, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Edits from one corner to the other: of a pixel, or of a share of the image's sides."""
    channels, height, width = image.shape[1:]
    tall, wide = (1, 1) if share is None else (max(1, height // share), max(1, width // share))
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
