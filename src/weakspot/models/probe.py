"""Probe: what a network answers to four fixed images, by which two networks of the same weights are told apart.

The weights do not say how they are used: another activation, normalization or temperature leaves the state dict as it
is. The answers are compared within a tolerance instead of hashed, because kernels round differently.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weakspot.classifier import Classifier, evaluating
from weakspot.models.specs import fingerprint

COUNT = 4
# Shares of the spread of the logits; docs/decisions.md has what was measured.
ON_CPU = 1e-4  # other processors, threads, batches, library versions; and the same pass twice
ON_OTHERS = 1e-2  # GPUs multiply in TF32
LOW_PRECISION = 1e-1  # weights of 16 bits
OF_LARGEST = 1e-6  # of the largest logit, for logits that are far from zero and close together
CHANGED = "The model changed its own weights or buffers during the audit, so results depend on the order of the images."
DRIFTED = (
    "The model's answers to fixed probe images changed during the audit although its weights did not, so results "
    "depend on the order of the images."
)
RANDOM = (
    "The model is not deterministic: two passes of the same probe image gave different logits, so another audit can "
    "give other results."
)


@dataclass(frozen=True, eq=False)
class Probe:
    """Answers of a network.

    Attributes:
        logits: float64 (4, K), NaN for an image on which the network raised.
        device: kind of device it was on.
        low_precision: whether any of its parameters has fewer than 32 bits.
        repeats: whether a second pass gave the same logits.
    """

    logits: NDArray[np.float64]
    device: str
    low_precision: bool
    repeats: bool

    def as_mapping(self) -> dict[str, Any]:
        """What `read_probe` takes: plain values, the logits as base64 of little-endian float32."""
        return {
            "logits": base64.b64encode(self.logits.astype("<f4").tobytes()).decode(),
            "classes": self.logits.shape[1],
            "device": self.device,
            "low_precision": self.low_precision,
            "repeats": self.repeats,
        }

    def agrees(self, other: Probe) -> bool:
        """Whether both could be of one network; logits that do not even agree with themselves say nothing."""
        if not (self.repeats and other.repeats):
            return self.repeats == other.repeats
        tolerance = ON_CPU if self.device == other.device == "cpu" else ON_OTHERS
        if self.low_precision or other.low_precision:
            tolerance = LOW_PRECISION
        return alike(self.logits, other.logits, tolerance)


def read_probe(mapping: Mapping[str, Any]) -> Probe:
    """The probe that `as_mapping` described."""
    logits = np.frombuffer(base64.b64decode(mapping["logits"]), "<f4").astype(np.float64)
    return Probe(
        logits.reshape(COUNT, mapping["classes"]),
        mapping["device"],
        mapping["low_precision"],
        mapping["repeats"],
    )


def probe(classifier: Classifier) -> Probe:
    """Pass the probe images through the network, twice, one by one."""
    kinds = [tensor.dtype for tensor in classifier.parameters() if tensor.is_floating_point()]
    first, second = _logits(classifier, passes=2)
    return Probe(
        first,
        classifier.mean.device.type,
        any(torch.finfo(kind).bits < 32 for kind in kinds),
        alike(first, second, ON_CPU),
    )


def probe_images(classifier: Classifier) -> Tensor:
    """Four images (4, C, H, W) for a classifier, the same on every machine: whole 255ths made by whole numbers."""
    height, width = classifier.input_size
    c, y, x = np.ogrid[: classifier.channels, :height, :width]
    place = ((c * height + y) * width + x).astype(np.uint64)
    noise = (((place + 1) * 2654435761) % 2**32 >> 16) % 256
    slopes = [np.abs((x * a + y * b + c * 85) % 510 - 255) for a, b in ((9, 4), (-23, 37))]
    shapes = (y * 6 // height + x * 6 // width + c) % 4 * 60 + 30
    levels = np.stack([noise, *(np.broadcast_to(one, place.shape) for one in (*slopes, shapes))])
    return torch.from_numpy(levels.astype(np.float32) / 255).to(classifier.mean.device)


def alike(one: NDArray[np.float64], other: NDArray[np.float64], tolerance: float) -> bool:
    """Whether logits (n, K) agree within a share of their spread; NaN and infinity only with their like."""
    if one.shape != other.shape:
        return False
    known = np.isfinite(one)
    if not np.array_equal(one[~known], other[~known], equal_nan=True):
        return False
    finite = np.where(known, one, np.nan)[known.any(1)]
    if not len(finite):
        return True
    spread = float((np.nanmax(finite, 1) - np.nanmin(finite, 1)).max())
    bound = tolerance * spread + OF_LARGEST * float(np.abs(one[known]).max())
    return bool((np.abs(one[known] - other[known]) <= bound).all())


def _logits(classifier: Classifier, passes: int) -> list[NDArray[np.float64]]:
    """Logits (4, K) of every pass; the first begins from fixed seeds, so that dropout would draw the same again."""
    images = probe_images(classifier)
    with evaluating(classifier), torch.no_grad():
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - the generator that a model may draw from; `evaluating` puts it back
        torch.manual_seed(0)
        found = [[_answer(classifier, image[None]) for image in images] for _ in range(passes)]
    classes = max((len(answer) for answers in found for answer in answers), default=0)
    empty = np.full(classes, np.nan)
    return [
        np.stack([answer if len(answer) == classes else empty for answer in answers]) for answers in found
    ]


def _answer(classifier: Classifier, image: Tensor) -> NDArray[np.float64]:
    try:
        logits: NDArray[np.float64] = classifier(image)[0].double().cpu().numpy()
    except Exception:  # noqa: BLE001 - an audit says of each image what a network raises on it
        return np.empty(0)
    return logits


class Watch:
    """Looks again and again at a network that is not supposed to change.

    Args:
        classifier: as it is at the beginning.
    """

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.weights = fingerprint(classifier)
        self.probe = probe(classifier)

    def remarks(self) -> list[str]:
        """What is to be said of the network by now: nothing of one that is as it was."""
        found = [] if self.probe.repeats else [RANDOM]
        if fingerprint(self.classifier) != self.weights:
            return [*found, CHANGED]
        if self.probe.repeats and not alike(self.probe.logits, _logits(self.classifier, passes=1)[0], ON_CPU):
            found.append(DRIFTED)
        return found
