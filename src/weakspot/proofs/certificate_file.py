"""Reading the certificates that `to_json` wrote, with the images that they are about."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from weakspot.proofs.allowed_colors import AllowedColors
from weakspot.proofs.certificate import FORMAT, STATEMENTS, ColorBoxes, PixelCertificate, digest
from weakspot.proofs.mask_set import MaskSet
from weakspot.proofs.two_masks import PATCH_FORMAT, PatchCertificate
from weakspot.statistics.number_format import counted


@dataclass(frozen=True, eq=False)
class CertificateFile:
    """The content of a certificate's file, whose parts are read with their types and shapes checked.

    Attributes:
        path: of the file.
        record: what it holds.
    """

    path: Path
    record: Mapping[str, object]

    @staticmethod
    def open(path: Path | str) -> CertificateFile:
        """Read a file.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is not a certificate.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}")
        try:
            record = json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError):
            record = None
        file = CertificateFile(path, record if isinstance(record, dict) else {})
        kind = file.record.get("format")
        if not isinstance(kind, str) or kind not in {FORMAT, PATCH_FORMAT}:
            raise file.error(f'has no format "{FORMAT}" or "{PATCH_FORMAT}"')
        return file

    def __repr__(self) -> str:
        return f"CertificateFile({self.path}, {self.record.get('format')})"

    @property
    def of_patches(self) -> bool:
        """Whether it is a certificate against patches, and not of pixels."""
        return self.record["format"] == PATCH_FORMAT

    def error(self, what: str) -> ValueError:
        """The error of a file that is not as `to_json` writes it."""
        return ValueError(f"{self.path} must be a certificate that weakspot certify wrote, but {what}")

    def part(self, *keys: str) -> object:
        """A value inside nested objects."""
        value: object = self.record
        for key in keys:
            if not isinstance(value, dict) or key not in value:
                raise self.error(f"lacks {'.'.join(keys)}")
            value = value[key]
        return value

    def texts(self, *keys: str) -> list[str]:
        """A list of texts."""
        values = self.part(*keys)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise self.error(f"{'.'.join(keys)} is not a list of texts")
        return values

    def text(self, *keys: str) -> str:
        """A text."""
        value = self.part(*keys)
        if not isinstance(value, str):
            raise self.error(f"{'.'.join(keys)} is not text")
        return value

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, *keys: str, bounds: bool = False) -> Tensor:
        """Numbers of a shape, whose first side may be -1 for any length; null is minus infinity, for bounds only."""
        try:
            values = _tensor(self.part(*keys), dtype, bounds=bounds)
        except (ValueError, TypeError, RuntimeError, OverflowError):
            raise self.error(f"{'.'.join(keys)} holds something else than finite numbers") from None
        # An empty list has lost its other sides in JSON; a first side of any length is 0 here.
        empty = [max(0, side) for side in shape]
        if not values.numel() and 0 in empty:
            values = values.view(empty)
        expected = [values.shape[0] if side == -1 and values.ndim else side for side in shape]
        if list(values.shape) != expected:
            sides = " x ".join("any" if side == -1 else str(side) for side in shape)
            raise self.error(f"{'.'.join(keys)} has the shape {tuple(values.shape)} instead of {sides}")
        return values

    def images_among(self, images: Tensor) -> Tensor:
        """The images (N, C, H, W) of the certificate, in its order, by their content.

        Raises:
            ValueError: if one is not among those given.
        """
        known = {digest(image): number for number, image in enumerate(images)}
        names, wanted = self.texts("names"), self.texts("images")
        if not wanted:
            raise self.error("has no images")
        if len(names) not in {0, len(wanted)}:
            raise self.error(f"names has {counted(len(names), 'text')} for {counted(len(wanted))}")
        for number, key in enumerate(wanted):
            if key not in known:
                name = f" ({names[number]})" if number < len(names) else ""
                raise ValueError(
                    f"images must hold every image of the certificate, but image {number + 1}{name} is not among the "
                    f"{len(images)} given, or has other pixels"
                )
        return images[[known[key] for key in wanted]]

    def misnamed(self, names: Sequence[str], images: Tensor) -> Iterator[str]:
        """The names that the certificate gives to other images than those of these names, (N, C, H, W)."""
        held = {name: digest(image) for name, image in zip(names, images, strict=True)}
        for name, content in zip(self.texts("names"), self.texts("images"), strict=True):
            if held.get(name, content) != content:
                yield f"{name} holds another image than the one that is certified under this name"

    def altered(self, record: Mapping[str, object]) -> Iterator[str]:
        """Parts that are not what `to_json` writes of the certificate that was read.

        Args:
            record: of that certificate. Versions and settings are those of another machine, and are not compared.
        """
        for key in sorted({*self.record, *record} - {"versions", "settings"}):
            if key not in record:
                yield f"it has the part {key!r}, which no certificate has"
            elif self.record.get(key) != record[key]:
                yield f"its part {key!r} is not what weakspot certify writes of its other parts"

    def pixel_certificate(self, images: Tensor) -> PixelCertificate:
        """The certificate of pixels.

        Args:
            images: (M, C, H, W), among them those of the certificate.

        Raises:
            ValueError: if a part is missing or malformed, or an image is not among those given.
        """
        chosen = self.images_among(images)
        count, channels, height, width = chosen.shape
        area = (count, height, width)
        pixels = self.tensor((-1, 3), torch.long, "counterexamples", "pixels")
        if bool(((pixels < 0) | (pixels >= torch.tensor(area))).any()):
            raise self.error("counterexamples.pixels names pixels outside the images")
        places = pixels.unbind(1)
        refuting = self.tensor((len(pixels), channels), torch.float64, "counterexamples", "colors")
        # Only refuted pixels are stored; all others keep the image's own color and have no class.
        color, predicted = chosen.clone(), torch.full(area, -1)
        color[places[0], :, places[1], places[2]] = refuting.to(color)
        predicted[places] = self.tensor((len(pixels),), torch.long, "counterexamples", "predicted")
        statement = self.text("statement")
        if statement not in STATEMENTS:
            raise self.error(f"makes the unknown statement {statement!r}")
        radius = self.part("colors", "radius")
        eight_bit = self.part("colors", "eight_bit")
        if not isinstance(radius, int | float) or not isinstance(eight_bit, bool) or not 0 < radius <= 1:
            raise self.error("colors is not as written")
        return PixelCertificate(
            status=self.tensor(area, torch.int8, "status"),
            statement=statement,
            lower_bound=self.tensor(area, torch.float64, "lower_bound", bounds=True),
            color=color,
            predicted=predicted,
            reason=self.tensor(area, torch.int16, "reason"),
            reasons=tuple(self.texts("reasons")),
            boxes=self._boxes(channels),
            colors=AllowedColors(float(radius), eight_bit),
            region=self.tensor(area, torch.bool, "region")[:, None],
            images=chosen,
            labels=self.tensor((count,), torch.long, "labels"),
            network={key: self.text("network", key) for key in ("name", "fingerprint")},
            names=tuple(self.texts("names")),
        )

    def patch_certificate(self, images: Tensor) -> PatchCertificate:
        """The certificate against patches; arguments and errors are those of `pixel_certificate`."""
        chosen = self.images_among(images)
        size, count = (chosen.shape[2], chosen.shape[3]), (len(chosen),)
        side = int(self.tensor((), torch.long, "patch"))
        mask = self.tensor((2,), torch.long, "mask").tolist()
        tops, lefts = (tuple(self.tensor((-1,), torch.long, key).tolist()) for key in ("tops", "lefts"))
        return PatchCertificate(
            certified=self.tensor(count, torch.bool, "certified"),
            labels=self.tensor(count, torch.long, "labels"),
            margin=self.tensor(count, torch.float32, "margin"),
            pair=self.tensor((*count, 2), torch.long, "pair"),
            predicted=self.tensor(count, torch.long, "predicted"),
            masks=MaskSet(size, side, (mask[0], mask[1]), tops, lefts),
            images=chosen,
            n_forward=self.tensor(count, torch.long, "n_forward"),
            network={key: self.text("network", key) for key in ("name", "fingerprint")},
            names=tuple(self.texts("names")),
        )

    def _boxes(self, channels: int) -> ColorBoxes:
        pixels = self.tensor((-1, 3), torch.long, "boxes", "pixels")
        colors, count = (len(pixels), channels), (len(pixels),)
        return ColorBoxes(
            pixels,
            self.tensor(colors, torch.float64, "boxes", "low"),
            self.tensor(colors, torch.float64, "boxes", "high"),
            self.tensor(count, torch.float64, "boxes", "bound", bounds=True),
            self.tensor(count, torch.int8, "boxes", "method"),
        )


def _tensor(values: object, dtype: torch.dtype, *, bounds: bool) -> Tensor:
    """Nested lists of numbers as a tensor: finite ones, or null for a bound that is not known; integers are whole."""

    def known(leaf: object) -> object:
        if isinstance(leaf, list):
            return [known(one) for one in leaf]
        if isinstance(leaf, float) and not math.isfinite(leaf):  # Python reads NaN, which is no JSON
            raise ValueError("not finite")
        return -torch.inf if leaf is None and bounds else leaf

    # By way of float64, so that 0.5 or 300 is refused and not cut to fit an integer type.
    precise = torch.tensor(known(values), dtype=torch.float64)
    converted = precise.to(dtype)
    if not dtype.is_floating_point and not bool((converted.double() == precise).all()):
        raise ValueError("not whole")
    return converted
