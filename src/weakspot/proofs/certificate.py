"""PixelCertificate: for each pixel, whether some color of it changes the decision, and how that is known."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from weakspot._io.files import write_atomic
from weakspot.classifier import Classifier
from weakspot.models.identity import fingerprint
from weakspot.pairs import Pairs
from weakspot.proofs.allowed_colors import AllowedColors
from weakspot.statistics.number_format import counted, percent

FORMAT = "weakspot pixel certificate 1"
AS_RUN = "float32 as run"
EXACT = "exact arithmetic"
STATEMENTS = {
    AS_RUN: "whatever color in the box a proven pixel takes, the network as torch runs it in float32 on this machine "
    "puts the image into the class of its label",
    EXACT: "whatever color in the box a proven pixel takes, the network evaluated in real numbers, with its float32 "
    "weights, puts the image into the class of its label; rounding may change what a machine computes",
}
PROVEN, UNKNOWN, REFUTED = 1, 0, -1


@dataclass(frozen=True)
class ColorBoxes:
    """Boxes of colors with a lower bound of the margin in each; those of one proven pixel cover its allowed colors.

    Attributes:
        pixels: (B, 3) image, row and column.
        low: (B, C) lowest value of each channel, float64.
        high: (B, C) highest value of each channel, float64.
        bound: (B,) lower bound of the label's logit less that of any other class, float64.
        method: (B,) int8, a number of `METHODS`.
    """

    pixels: Tensor
    low: Tensor
    high: Tensor
    bound: Tensor
    method: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def select(self, chosen: Tensor) -> ColorBoxes:
        """Some of the boxes, by number or by a bool mask (B,)."""
        return ColorBoxes(
            self.pixels[chosen], self.low[chosen], self.high[chosen], self.bound[chosen], self.method[chosen]
        )

    @staticmethod
    def none(channels: int) -> ColorBoxes:
        """No boxes."""
        color = torch.zeros(0, channels, dtype=torch.float64)
        return ColorBoxes(
            torch.zeros(0, 3, dtype=torch.long), color, color, color.sum(1), torch.zeros(0, dtype=torch.int8)
        )

    @staticmethod
    def concatenate(parts: list[ColorBoxes]) -> ColorBoxes:
        """Boxes one after the other."""
        return ColorBoxes(
            *(
                torch.cat([getattr(part, name) for part in parts])
                for name in ("pixels", "low", "high", "bound", "method")
            )
        )


SHARED, PER_RELU, ENUMERATED = 0, 1, 2
METHODS = (
    "affine bounds with one generator per channel of the pixel",
    "affine bounds with one generator per channel of the pixel and per unstable ReLU",
    "enumeration of all 8-bit colors in the box, by forward passes in batches",
)


@dataclass(frozen=True, eq=False, repr=False)
class PixelCertificate:
    """What one changed pixel can do: proven harmless, refuted with a color, or unknown with the reason.

    Attributes:
        status: (N, H, W) int8: 1 where no allowed color of the pixel changes the decision, -1 where one does, 0 where
            neither is known, and outside the region.
        statement: "float32 as run" or "exact arithmetic", what a proof is about.
        lower_bound: (N, H, W) float64, a lower bound of the margin z_label - max other z over the allowed colors; -inf
            where none is known.
        color: (N, C, H, W) the color that refutes; the image's own elsewhere.
        predicted: (N, H, W) the class of the image with that color; -1 where not refuted.
        reason: (N, H, W) int16, a number of `reasons` where the status is unknown, else -1.
        reasons: why a pixel is unknown, in words.
        boxes: the boxes that cover the colors of the proven pixels.
        colors: which colors were allowed.
        region: bool (N, 1, H, W), the pixels that were asked about.
        images: (N, C, H, W).
        labels: (N,).
        network: name and fingerprint of the network, see `network_record`.
        names: N names of the images, or empty.
    """

    status: Tensor
    statement: str
    lower_bound: Tensor
    color: Tensor
    predicted: Tensor
    reason: Tensor
    reasons: tuple[str, ...]
    boxes: ColorBoxes
    colors: AllowedColors
    region: Tensor
    images: Tensor
    labels: Tensor
    network: Mapping[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    def __repr__(self) -> str:
        count, height, width = self.status.shape
        asked = int(self.region.sum())
        inside = self.status[self.region[:, 0]]
        fractions = ", ".join(
            f"{percent(int((inside == status).sum()) / max(1, asked))} {name}"
            for name, status in (("proven", PROVEN), ("refuted", REFUTED), ("unknown", UNKNOWN))
        )
        fractions = fractions if asked else "no pixel in the region"
        images = f"{counted(count)} of {height} x {width}"
        return f"PixelCertificate({images}, {self.colors}, {self.statement}: {fractions})"

    @property
    def proven_fraction(self) -> Tensor:
        """(N,) fraction of the region's pixels that are proven; NaN where the region is empty."""
        return self._fraction(PROVEN)

    @property
    def refuted_fraction(self) -> Tensor:
        """(N,) fraction of the region's pixels that are refuted; NaN where the region is empty."""
        return self._fraction(REFUTED)

    @property
    def unknown_fraction(self) -> Tensor:
        """(N,) fraction of the region's pixels that are neither; NaN where the region is empty."""
        return self._fraction(UNKNOWN)

    def _fraction(self, status: int) -> Tensor:
        inside = self.region[:, 0]
        return ((self.status == status) & inside).flatten(1).double().sum(1) / inside.flatten(1).sum(1)

    @property
    def counterexample_pixels(self) -> Tensor:
        """(M, 3) image, row and column of the refuted pixels, in the order of `counterexamples`."""
        return (self.status == REFUTED).nonzero()

    @property
    def counterexamples(self) -> Pairs:
        """A pair for each refuted pixel, whose adversarial image has that pixel in the color that refutes.

        Of an image that is misclassified without a change every pixel is refuted by its own color.
        """
        refuted = self.counterexample_pixels
        images, rows, columns = refuted.unbind(1)
        # Indexing by numbers copies: what is written below does not reach `self.images`.
        adversarial = self.images[images]
        adversarial[torch.arange(len(images)), :, rows, columns] = self.color[images, :, rows, columns]
        names = (f"{self.names[image]} row {row}, column {column}" for image, row, column in refuted.tolist())
        return Pairs(
            self.images[images],
            adversarial,
            self.labels[images],
            self.predicted[images, rows, columns],
            names=tuple(names) if self.names else (),
        )

    def unknown_because(self) -> dict[str, int]:
        """How many pixels of the region are unknown for each reason."""
        counts = {
            text: int(((self.reason == number) & self.region[:, 0]).sum())
            for number, text in enumerate(self.reasons)
        }
        return {text: count for text, count in counts.items() if count}

    def to_json(self, path: Path | str) -> Path:
        """Write the certificate, with the boxes that cover the colors of every proven pixel, atomically."""
        return write_record(path, self.record())

    def record(self) -> dict[str, object]:
        """What `to_json` writes; bounds that are not known are null."""
        boxes, pixels = self.boxes, self.counterexample_pixels
        refuted = pixels[:, 0], pixels[:, 1], pixels[:, 2]
        return {
            "format": FORMAT,
            "statement": self.statement,
            "meaning": STATEMENTS[self.statement],
            "network": dict(self.network),
            "colors": {
                "text": str(self.colors),
                "radius": self.colors.radius,
                "eight_bit": self.colors.eight_bit,
            },
            "versions": versions(),
            "settings": float32_settings(),
            "image_shape": list(self.images.shape[1:]),
            "images": [digest(image) for image in self.images],
            "names": list(self.names),
            "labels": self.labels.tolist(),
            "region": self.region[:, 0].int().tolist(),
            "status": self.status.tolist(),
            "lower_bound": _finite_or_null(self.lower_bound),
            "reasons": list(self.reasons),
            "reason": self.reason.tolist(),
            "methods": list(METHODS),
            "boxes": {
                "pixels": boxes.pixels.tolist(),
                "low": boxes.low.tolist(),
                "high": boxes.high.tolist(),
                "bound": _finite_or_null(boxes.bound),
                "method": boxes.method.tolist(),
            },
            "counterexamples": {
                "pixels": pixels.tolist(),
                "colors": self.color[refuted[0], :, refuted[1], refuted[2]].double().tolist(),
                "predicted": self.predicted[refuted].tolist(),
            },
        }


def versions() -> dict[str, str]:
    """Versions of what computed a certificate."""
    return {name: version(name) for name in ("weakspot", "torch")} | {
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def float32_settings() -> dict[str, str | int | bool]:
    """The settings of this process on which rounding in float32 depends."""
    return {
        "matmul_precision": torch.get_float32_matmul_precision(),
        "onednn": bool(torch.backends.mkldnn.enabled),
        "onednn_fpmath": os.environ.get("ONEDNN_DEFAULT_FPMATH_MODE", "strict"),
        "tf32_convolutions": bool(torch.backends.cudnn.allow_tf32),
        "threads": torch.get_num_threads(),
    }


def network_record(classifier: Classifier) -> dict[str, str]:
    """Name and fingerprint of a network: of its weights, its normalization and its layers as they print.

    A state dict alone would not tell networks apart that differ in a stride, or in the normalization before them.
    """
    layers = re.sub(r" at 0x[0-9a-f]+", "", str(classifier.network))  # addresses differ between processes
    parts = fingerprint(classifier), str(classifier.mean.tolist()), str(classifier.std.tolist()), layers
    return {
        "name": classifier.name,
        "fingerprint": hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16],
    }


def write_record(path: Path | str, record: Mapping[str, object]) -> Path:
    """Write a certificate as JSON, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Python would write NaN and infinity, which are not JSON: an error is better than such a file.
    text = json.dumps(record, allow_nan=False)
    write_atomic(path, lambda draft: draft.write_text(text, "utf-8"))
    return path


def digest(image: Tensor) -> str:
    """SHA-256 of an image's float32 values (C, H, W), 16 hex digits."""
    values = image.detach().cpu().float().contiguous()
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]


def _finite_or_null(values: Tensor) -> list[object]:
    """Nested lists of the values; JSON has no infinity."""

    def plain(leaf: object) -> object:
        if isinstance(leaf, list):
            return [plain(one) for one in leaf]
        # NaN fails the comparison and becomes null, too.
        return leaf if isinstance(leaf, float) and abs(leaf) < float("inf") else None

    return [plain(row) for row in values.tolist()]
