"""Messages between page and server: checked requests, and pictures, masks and arrays as text."""

import base64
import binascii
import io
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from weakspot._checks import quiet, unknown_choice

Message = dict[str, object]  # a JSON object
Send = Callable[[Message], None]
MASK_BYTES = 2 * 2**20
UPLOAD_BYTES = 20 * 2**20
PIXELS = 40_000_000  # of an uploaded picture, decoded
FORMATS = ("PNG", "JPEG", "WEBP")  # of uploaded pictures
LARGEST = 1_000_000  # number in the options of an attack: steps and candidates take time and memory
TEXT = 200  # characters of a text in a request
THUMBNAIL = 96  # pixels


class RequestError(ValueError):
    """A request that cannot be answered, with one sentence for the person at the page.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, sentence: str, status: int = 400) -> None:
        super().__init__(sentence)
        self.status = status


class Request:
    """The JSON object of a request, whose values are checked as they are read."""

    def __init__(self, body: object) -> None:
        if not isinstance(body, Mapping):
            raise RequestError(f"the request must be a JSON object, got {_kind(body)}")
        self.body: Mapping[str, object] = body

    def has(self, name: str) -> bool:
        """Whether there is a value other than null."""
        return self.body.get(name) is not None

    def whole(self, name: str, least: int, most: int, default: int | None = None) -> int:
        """An integer from `least` to `most`."""
        value = self.body.get(name, default) if self.has(name) else default
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # JSON does not tell 3.0 from 3
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise RequestError(f"{name} must be an integer between {least} and {most}, got {_shown(value)}")
        return value

    def number(self, name: str, least: float, most: float, default: float | None = None) -> float:
        """A number from `least` to `most`."""
        value = self.body.get(name) if self.has(name) else default
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
            raise RequestError(f"{name} must be a number between {least:g} and {most:g}, got {_shown(value)}")
        return float(value)

    def text(self, name: str, default: str | None = None) -> str:
        """A short text."""
        value = self.body.get(name) if self.has(name) else default
        if not isinstance(value, str) or len(value) > TEXT:
            raise RequestError(f"{name} must be a text of at most {TEXT} characters, got {_shown(value)}")
        return value

    def choice(self, name: str, choices: Sequence[str], default: str | None = None) -> str:
        """One of some texts."""
        value = self.text(name, default)
        if value not in choices:
            raise RequestError(unknown_choice(name, value, choices))
        return value

    def flag(self, name: str, *, default: bool = False) -> bool:
        """True or false."""
        value = self.body.get(name) if self.has(name) else default
        if not isinstance(value, bool):
            raise RequestError(f"{name} must be true or false, got {_shown(value)}")
        return value

    def color(self, name: str, channels: int) -> Tensor:
        """(C, 1, 1) in [0, 1], from [red, green, blue] or [gray] of 0 to 255; black if none is given.

        A gray network takes the mean of three values.
        """
        value = self.body.get(name) if self.has(name) else [0] * channels
        numbers = value if isinstance(value, list) else []
        if len(numbers) not in {1, 3, channels} or not all(
            isinstance(one, int | float) and not isinstance(one, bool) and 0 <= one <= 255 for one in numbers
        ):
            raise RequestError(f"{name} must be [red, green, blue], each 0 to 255, got {_shown(value)}")
        levels = torch.tensor([float(one) for one in numbers]) / 255
        if len(levels) != channels:
            levels = levels.mean().expand(channels)
        return levels.view(channels, 1, 1)

    def mask(self, name: str, size: tuple[int, int]) -> Tensor | None:
        """Bool (1, 1, H, W), or None if there is none.

        Raises:
            RequestError: if it is no picture of this size, or marks no pixel.
        """
        if not self.has(name):
            return None
        region = read_mask(self.content(name, MASK_BYTES), size, name)
        if not bool(region.any()):
            raise RequestError(f"{name} must have at least one pixel, got none (brush some)")
        return region

    def brushed(self, name: str, size: tuple[int, int]) -> Tensor:
        """A mask that must not be missing."""
        mask = self.mask(name, size)
        if mask is None:
            raise RequestError(f"{name} must be a picture of the brushed pixels, got nothing")
        return mask

    def content(self, name: str, most: int) -> bytes:
        """The bytes of a file in base64."""
        value = self.body.get(name)
        if not isinstance(value, str):
            raise RequestError(f"{name} must be a file in base64, got {_shown(value)}")
        # Base64 takes four letters for three bytes, and pads the last of them.
        if len(value) > most * 4 // 3 + 4:
            raise RequestError(f"{name} must be at most {most // 2**20} MB", 413)
        try:
            return base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise RequestError(f"{name} must be a file in base64") from None

    def settings(self, name: str) -> dict[str, str | int | float | bool | None]:
        """Names to numbers, texts, true, false or null."""
        value = self.body.get(name) if self.has(name) else {}
        if not isinstance(value, Mapping) or len(value) > 30:
            raise RequestError(f"{name} must be an object of names and values, got {_shown(value)}")
        settings: dict[str, str | int | float | bool | None] = {}
        for key, one in value.items():
            plain = one is None or isinstance(one, bool | int | float | str)
            # Negated for NaN, which Python's reader of JSON takes.
            if isinstance(one, int | float) and not abs(one) <= LARGEST:
                raise RequestError(f"{key} must be between {-LARGEST} and {LARGEST}, got {_shown(one)}")
            if not str(key).isidentifier() or not plain or len(str(one)) > TEXT:
                raise RequestError(
                    f"{name} must hold names and plain values, got {_shown(key)}: {_shown(one)}"
                )
            settings[str(key)] = one
        return settings


def open_picture(content: bytes, name: str) -> Image.Image:
    """A picture of a known format, not decoded yet.

    Raises:
        RequestError: if the bytes are no such picture, or hold more than `PIXELS`.
    """
    try:
        # Pillow warns of pictures that it finds large; the limit below is ours.
        with quiet():
            opened = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError:
        raise RequestError(f"{name} must have at most {PIXELS // 10**6} million pixels", 413) from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        raise RequestError(f"{name} must be a PNG, JPEG or WebP picture") from None
    if opened.width * opened.height > PIXELS:
        raise RequestError(
            f"{name} must have at most {PIXELS // 10**6} million pixels, got {opened.width} x {opened.height}",
            413,
        )
    return opened


def decoded(opened: Image.Image, name: str) -> Image.Image:
    """The same picture with its pixels.

    Raises:
        RequestError: if it is damaged.
    """
    try:
        with quiet():
            opened.load()
    except Exception:  # noqa: BLE001 - Pillow's decoders raise nearly anything on damaged input
        raise RequestError(f"{name} must be a whole picture, got a damaged one") from None
    return opened


def read_mask(content: bytes, size: tuple[int, int], name: str = "mask") -> Tensor:
    """Bool (1, 1, H, W): the pixels that are lighter than half, or opaque where a picture has transparent ones."""
    opened = open_picture(content, name)
    height, width = size
    if (opened.height, opened.width) != (height, width):
        raise RequestError(
            f"{name} must be {height} x {width} (height x width) like the image, got {opened.height} x {opened.width}"
        )
    picture = decoded(opened, name)
    try:
        if picture.has_transparency_data:
            opacity = np.array(picture.convert("RGBA").getchannel("A"))
            if (opacity < 255).any():
                return torch.from_numpy(opacity > 127)[None, None]
        levels = np.array(picture.convert("L"))
    except Exception:  # noqa: BLE001
        raise RequestError(f"{name} must be a whole picture, got a damaged one") from None
    return torch.from_numpy(levels > 127)[None, None]


def mask_text(mask: Tensor) -> str:
    """A mask bool (1, 1, H, W) as a 1-bit PNG file in base64."""
    return _file(Image.fromarray(mask[0, 0].cpu().numpy()), "PNG", optimize=True)


def picture_text(image: Tensor) -> str:
    """An image (C, H, W) in [0, 1], rounded to 8 bits, as a PNG file in base64."""
    return _file(Image.fromarray(_eight_bits(image)), "PNG", compress_level=3)


def thumbnail_text(image: Tensor) -> str:
    """A small JPEG file in base64."""
    picture = Image.fromarray(_eight_bits(image)).convert("RGB")
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return _file(picture, "JPEG", quality=82)


def floats(values: Tensor) -> Message:
    """An array as its shape and its float32 values, little-endian, in base64."""
    array = values.detach().cpu().numpy().astype("<f4")
    return {"shape": list(array.shape), "base64": base64.b64encode(array.tobytes()).decode("ascii")}


def with_cautions(warned: Sequence[str]) -> str:
    """What a search warned of, as sentences that precede its result."""
    return "".join(f"Caution: {text}. " for text in dict.fromkeys(warned))


def finite(value: float) -> float | None:
    """A number that JSON can hold."""
    return float(value) if math.isfinite(value) else None


def _eight_bits(image: Tensor) -> NDArray[np.uint8]:
    levels: NDArray[np.uint8] = (image.detach().clamp(0, 1) * 255).round().byte().cpu().numpy()
    if len(levels) == 3:
        return np.ascontiguousarray(levels.transpose(1, 2, 0))
    gray: NDArray[np.uint8] = levels[0] if len(levels) == 1 else levels.mean(0).astype(np.uint8)
    return gray


def _file(picture: Image.Image, kind: str, **options: int | bool) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "nothing", bool: "true or false"}
    return names.get(type(value), "a number")


def _shown(value: object) -> str:
    """A value from outside, short."""
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
