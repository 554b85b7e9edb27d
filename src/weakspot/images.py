"""Image files, folders and sample photographs as tensors (N, C, H, W) in [0, 1]."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from weakspot._checks import ImageWarning, check_size, quiet, warn

MAX_PIXELS = 120_000_000  # decoded, 360 MB; the largest photographs of phones are smaller
SAMPLES = ("chelsea", "coffee", "rocket", "motorcycle_left")
SAMPLE_NAMES = ("chelsea", "coffee", "rocket", "motorcycle")


@dataclass(frozen=True, repr=False)
class Picture:
    """One image file.

    Attributes:
        name: path below the source.
        pixels: (C, H, W) in [0, 1], or None if the file was skipped.
        remark: why the file was skipped, or how it was converted; may be empty.
    """

    name: str
    pixels: Tensor | None
    remark: str = ""

    def __repr__(self) -> str:
        sides = "no pixels" if self.pixels is None else " x ".join(map(str, self.pixels.shape))
        return f"Picture({self.name!r}: {sides}{f', {self.remark}' if self.remark else ''})"


def read_images(
    source: Path | str, *, size: tuple[int, int] | None = None, channels: int = 3
) -> tuple[Tensor, list[str]]:
    """Read an image, or every image in a folder and its subfolders, sorted by path.

    EXIF rotation is applied, transparent images are laid on white, 16-bit and CMYK images are converted, and the first
    frame of an animation is read. Files that cannot be read are named in a warning and skipped.

    Args:
        source: a file or a folder; names that start with a dot are ignored.
        size: (height, width); each image is cropped at its center to this aspect ratio and resized with anti-aliasing.
            Without it, images keep their size and must all have the same.
        channels: 3 for color, 1 for gray.

    Returns:
        Images (N, C, H, W), float32 in [0, 1], and the path of each below `source`.

    Raises:
        FileNotFoundError: if there is nothing at `source`.
        ValueError: if no image could be read, or sizes differ and no `size` was given.
    """
    pictures = open_pictures(Path(source), size=size, channels=channels)
    for picture in pictures:
        if picture.remark:
            warn(f"{picture.name}: {picture.remark}", ImageWarning)
    good = [(picture.name, picture.pixels) for picture in pictures if picture.pixels is not None]
    if not good:
        reasons = "; ".join(f"{picture.name}: {picture.remark}" for picture in pictures[:3])
        raise ValueError(
            f"{source} must hold an image that can be read, got none ({reasons or 'it is an empty folder'})"
        )
    first_name, first = good[0]
    for name, pixels in good:
        if pixels.shape != first.shape:
            raise ValueError(
                f"images must have one size, got {tuple(first.shape[1:])} of {first_name} and "
                f"{tuple(pixels.shape[1:])} of {name} (give size=(height, width) to resize them)"
            )
    return torch.stack([pixels for _, pixels in good]), [name for name, _ in good]


def open_pictures(
    source: Path, *, size: tuple[int, int] | None = None, channels: int = 3, marks: bool = False
) -> list[Picture]:
    """Every file at `source`, readable or not, in the order of `read_images`.

    Args:
        source: a file or a folder.
        size: (height, width), as in `read_images`.
        channels: 3 for color, 1 for gray.
        marks: whether the pictures are masks: then a picture with transparent pixels is read by its opacity.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 3 (color) or 1 (gray), got {channels}")
    check_size("size", size)
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist")
    if not source.is_dir():
        return [_open_picture(source, source.name, size, channels, marks)]
    # os.walk passes over folders that it cannot read, unless it is given `onerror`.
    unreadable: list[Path] = []  # folders
    files = [
        Path(folder, name)
        for folder, _, names in os.walk(source, onerror=lambda error: unreadable.append(Path(error.filename)))
        for name in names
    ]
    pictures = []
    for path in sorted(files + unreadable):
        name = path.relative_to(source)
        if any(part.startswith(".") for part in name.parts):
            continue
        if path in unreadable:
            pictures.append(Picture(name.as_posix(), None, "no permission to read the folder; skipped"))
        else:
            pictures.append(_open_picture(path, name.as_posix(), size, channels, marks))
    return pictures


def sample_images(size: tuple[int, int] = (224, 224)) -> tuple[Tensor, list[str]]:
    """Four photographs of scikit-image, available offline: a cat, a coffee, a rocket and a motorcycle.

    Args:
        size: (height, width) to which they are cropped and resized.

    Returns:
        Images (4, 3, height, width), float32 in [0, 1], and their names.
    """
    import skimage.data

    folder = Path(skimage.data.__file__).parent
    files = [
        next(path for path in folder.glob(f"{name}.*") if path.suffix in {".png", ".jpg"}) for name in SAMPLES
    ]
    images = [read_images(file, size=size)[0] for file in files]
    return torch.cat(images), list(SAMPLE_NAMES)


def first_copies(*batches: Tensor) -> NDArray[np.int_]:
    """For each image of the batches (n, ...), in order, the number of the first one with the same content.

    >>> first_copies(torch.tensor([[0.5], [0.7], [0.5]]), torch.tensor([[0.7]])).tolist()
    [0, 1, 0, 1]
    """
    first: dict[bytes, int] = {}
    contents = (content for batch in batches for content in digests(batch))
    return np.array([first.setdefault(one, number) for number, one in enumerate(contents)], dtype=np.int_)


def distinct(images: Tensor) -> Tensor:
    """(n,) the number of the first image of each content, for statistics over images, in order.

    >>> distinct(torch.tensor([[0.5], [0.7], [0.5]])).tolist()
    [0, 1]
    """
    return torch.from_numpy(np.unique(first_copies(images))).to(images.device)


def digests(images: Tensor) -> list[bytes]:
    """A digest of the content of each image (n, ...)."""
    # As bytes, because NumPy does not know all types of torch.
    rows = images.detach().cpu().contiguous().view(torch.uint8).numpy()
    return [hashlib.blake2b(row.tobytes()).digest() for row in rows]


def are_samples(names: Sequence[Path]) -> bool:
    """Whether these are names of sample images, which have no files of their own."""
    return not any(name.exists() for name in names) and {str(name) for name in names} <= set(SAMPLE_NAMES)


def _open_picture(path: Path, name: str, size: tuple[int, int] | None, channels: int, marks: bool) -> Picture:
    try:
        if not path.is_file():
            return Picture(name, None, "not a regular file; skipped")
        if path.stat().st_size == 0:
            return Picture(name, None, "the file is empty (0 bytes); skipped")
        with quiet():  # Pillow's own warnings; the remarks here name the file
            # Loads all of Pillow's formats, so that the list is complete. EPS is left out: Pillow would start
            # another program, Ghostscript, to read it.
            Image.init()
            with Image.open(path, formats=[kind for kind in Image.OPEN if kind != "EPS"]) as opened:
                return _decode(opened, name, size, channels, marks)
    except UnidentifiedImageError:
        return Picture(name, None, "not an image in a known format; skipped")
    except Image.DecompressionBombError:
        return Picture(name, None, f"more than {MAX_PIXELS // 1_000_000} million pixels; refused")
    except PermissionError:
        return Picture(name, None, "no permission to read the file; skipped")
    except MemoryError:
        return Picture(name, None, "too large to decode in memory; skipped")
    # Pillow's decoders raise nearly anything on damaged input.
    except Exception as error:  # noqa: BLE001
        reason = "the image is truncated" if "truncated" in str(error) else f"the image is damaged ({error})"
        return Picture(name, None, f"{reason}; skipped")


def _decode(
    opened: Image.Image, name: str, size: tuple[int, int] | None, channels: int, marks: bool
) -> Picture:
    if opened.width * opened.height > MAX_PIXELS:
        return Picture(
            name,
            None,
            f"{opened.width} x {opened.height} is more than {MAX_PIXELS // 10**6} million pixels; refused",
        )
    frames = int(getattr(opened, "n_frames", 1))
    remark = f"holds {frames} frames, the first is used" if frames > 1 else ""
    if opened.mode == "F":
        return Picture(
            name, None, "floating-point pixels have no known range; convert to 8 or 16 bits; skipped"
        )
    image = fitted(opened, size, channels, marks=marks)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
    return Picture(name, pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous(), remark)


def fitted(
    opened: Image.Image, size: tuple[int, int] | None, channels: int, *, marks: bool = False
) -> Image.Image:
    """An image with EXIF rotation applied, as 8-bit gray or RGB, cropped at the center and resized to `size`."""
    image = _eight_bits(ImageOps.exif_transpose(opened), marks=marks)
    image = image.convert("L" if channels == 1 else "RGB")
    return image if size is None else _fit(image, size)


def _eight_bits(image: Image.Image, *, marks: bool) -> Image.Image:
    """Convert 16 and 32-bit gray to 8 bits, and lay transparent images on white; of marks, take the opacity."""
    if image.mode.startswith("I"):
        deep: NDArray[np.float64] = np.asarray(image).astype(np.float64)
        # Mode I holds 16-bit files as well as 32-bit ones; the values tell which.
        top = 65535 if deep.max() <= 65535 else 2**32 - 1
        return Image.fromarray(np.rint(deep.clip(0) * (255 / top)).astype(np.uint8))
    if image.has_transparency_data:
        solid = image.convert("RGBA")
        opacity = solid.getchannel("A")
        if marks and bool((np.asarray(opacity) < 255).any()):
            return opacity
        return Image.alpha_composite(Image.new("RGBA", solid.size, "white"), solid)
    return image


def _fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The largest centered crop of the aspect ratio of `size`, resized."""
    height, width = size
    scale = min(image.width / width, image.height / height)
    # Clamped, because rounding must not lead out of the image, not even by 1e-14.
    left, top = max(0.0, (image.width - width * scale) / 2), max(0.0, (image.height - height * scale) / 2)
    box = (left, top, min(left + width * scale, image.width), min(top + height * scale, image.height))
    # Crop and resize in one step, so that a long strip does not become a large intermediate image.
    return image.resize((width, height), Image.Resampling.BILINEAR, box=box)
