"""The identity of a network: a fingerprint of its weights, the settings of its modules, its logits for four images.

Weights do not determine a network: another activation, normalization or temperature does not change the state dict. So
the logits of four fixed images are compared too, within a tolerance and not hashed, because kernels round differently.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from weakspot._state import seeded
from weakspot.classifier import Classifier, evaluating

COUNT = 4
# Tolerances as fractions of the range of the logits; measurements are in docs/decisions.md.
ON_CPU = 1e-4  # other processors, threads, batches or library versions; and the same pass twice
ON_OTHERS = 1e-2  # GPUs multiply in TF32
LOW_PRECISION = 1e-1  # weights of 16 bits
OF_LARGEST = 1e-6  # of the largest logit, for logits that are large and close together
CHANGED = "The model changed its own weights or buffers during the audit, so results depend on the order of the images."
DRIFTED = (
    "The model's logits for fixed probe images changed during the audit although its weights did not, so results "
    "depend on the order of the images."
)
RANDOM = (
    "The model is not deterministic: two passes of the same probe image gave different logits, so another audit can "
    "give other results."
)
PLAIN_TYPES = (bool, int, float, complex, str, bytes, type(None))


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of names, shapes and bytes of the state dict, 16 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        # A buffer of one element may have any stride, which `contiguous` leaves and a view as bytes refuses.
        plain = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        digest.update(f"{name} {tuple(plain.shape)} {plain.dtype}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def settings(network: nn.Module) -> list[tuple[str, str, list[tuple[str, object]]]]:
    """For every module its name, its class, and its attributes that are numbers, texts, or lists of them."""
    result = []
    for name, module in network.named_modules():
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        plain = [(key, value) for key, value in vars(module).items() if key != "training" and _plain(value)]
        result.append((name, kind, plain))
    return result


def _plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(_plain(key) and _plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_plain(item) for item in value)
    return isinstance(value, PLAIN_TYPES)


@dataclass(frozen=True, eq=False)
class Probe:
    """Logits of a network for the probe images.

    Attributes:
        logits: float64 (4, K), NaN for an image on which the network raised.
        device: type of the device.
        low_precision: whether any of its parameters has fewer than 32 bits.
        repeats: whether a second pass gave the same logits.
    """

    logits: NDArray[np.float64]
    device: str
    low_precision: bool
    repeats: bool

    def __repr__(self) -> str:
        sides = " x ".join(map(str, self.logits.shape))
        return f"Probe(logits {sides}, device {self.device}, repeats {self.repeats})"

    def as_mapping(self) -> dict[str, str | int]:
        """Plain values for `read_probe`; logits as base64 of little-endian float32."""
        return {
            "logits": base64.b64encode(self.logits.astype("<f4").tobytes()).decode(),
            "classes": self.logits.shape[1],
            "device": self.device,
            "low_precision": self.low_precision,
            "repeats": self.repeats,
        }

    def agrees(self, other: Probe) -> bool:
        """Whether both may be of one network. Logits that do not repeat are not compared."""
        if not (self.repeats and other.repeats):
            return self.repeats == other.repeats
        tolerance = ON_CPU if self.device == other.device == "cpu" else ON_OTHERS
        if self.low_precision or other.low_precision:
            tolerance = LOW_PRECISION
        return alike(self.logits, other.logits, tolerance)


def read_probe(mapping: Mapping[str, Any]) -> Probe:
    """The probe that `as_mapping` wrote."""
    logits = np.frombuffer(base64.b64decode(mapping["logits"]), "<f4").astype(np.float64)
    return Probe(
        logits.reshape(COUNT, mapping["classes"]),
        mapping["device"],
        mapping["low_precision"],
        mapping["repeats"],
    )


def probe(classifier: Classifier) -> Probe:
    """Pass the probe images through the network, one by one, twice."""
    kinds = [tensor.dtype for tensor in classifier.parameters() if tensor.is_floating_point()]
    first, second = _logits(classifier, passes=2)
    return Probe(
        first,
        classifier.mean.device.type,
        any(torch.finfo(kind).bits < 32 for kind in kinds),
        alike(first, second, ON_CPU),
    )


def fixed_images(classifier: Classifier) -> Tensor:
    """Four images (4, C, H, W) for a classifier, computed in integers to be the same on every machine."""
    height, width = classifier.input_size
    c, y, x = np.ogrid[: classifier.channels, :height, :width]
    place = ((c * height + y) * width + x).astype(np.uint64)
    # Knuth's multiplicative hash of the pixel's number, of which the upper bits look random.
    noise = (((place + 1) * 2654435761) % 2**32 >> 16) % 256
    # Triangle waves in two directions, then blocks of which there are about six a side.
    slopes = [np.abs((x * a + y * b + c * 85) % 510 - 255) for a, b in ((9, 4), (-23, 37))]
    shapes = (y * 6 // height + x * 6 // width + c) % 4 * 60 + 30
    levels = np.stack([noise, *(np.broadcast_to(one, place.shape) for one in (*slopes, shapes))])
    return torch.from_numpy(levels.astype(np.float32) / 255).to(classifier.mean.device)


def alike(one: NDArray[np.float64], other: NDArray[np.float64], tolerance: float) -> bool:
    """Whether logits (n, K) agree within a fraction of their range; NaN and infinity must be at the same places."""
    if one.shape != other.shape:
        return False
    finite = np.isfinite(one)
    if not np.array_equal(one[~finite], other[~finite], equal_nan=True):
        return False
    rows = np.where(finite, one, np.nan)[finite.any(1)]
    if not len(rows):
        return True
    spread = float((np.nanmax(rows, 1) - np.nanmin(rows, 1)).max())
    bound = tolerance * spread + OF_LARGEST * float(np.abs(one[finite]).max())
    return bool((np.abs(one[finite] - other[finite]) <= bound).all())


def _logits(classifier: Classifier, passes: int) -> list[NDArray[np.float64]]:
    """Logits (4, K) of every pass; the first starts from fixed seeds, so that a random network repeats them."""
    images = fixed_images(classifier)
    with evaluating(classifier), seeded(0, images.device), torch.no_grad():
        logits = [[_logits_of_one(classifier, image[None]) for image in images] for _ in range(passes)]
    classes = max((len(row) for rows in logits for row in rows), default=0)
    # An image on which the network raised has no logits, and becomes a row of NaN.
    empty = np.full(classes, np.nan)
    return [np.stack([row if len(row) == classes else empty for row in rows]) for rows in logits]


def _logits_of_one(classifier: Classifier, image: Tensor) -> NDArray[np.float64]:
    try:
        logits: NDArray[np.float64] = classifier(image)[0].double().cpu().numpy()
    except Exception:  # noqa: BLE001 - the audit reports for each image what the network raises
        return np.empty(0)
    return logits


class Watch:
    """Detects changes of a network that should not change during an audit.

    Args:
        classifier: in its state at the start.
    """

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.weights = fingerprint(classifier)
        self.probe = probe(classifier)

    def remarks(self) -> list[str]:
        """Sentences on what changed since the start; none if nothing did."""
        remarks = [] if self.probe.repeats else [RANDOM]
        if fingerprint(self.classifier) != self.weights:
            return [*remarks, CHANGED]
        if self.probe.repeats and not alike(self.probe.logits, _logits(self.classifier, passes=1)[0], ON_CPU):
            remarks.append(DRIFTED)
        return remarks
