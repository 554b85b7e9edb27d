"""Pictures: every kind of file becomes the pixels a viewer shows, and what cannot be read is named, not fatal."""

from __future__ import annotations

import io
import os
import random
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from weakspot._checks import ImageWarning
from weakspot.images import first_copies, read_images, sample_images

Bytes = NDArray[np.uint8]

ROTATIONS: dict[int, Callable[[Bytes], Bytes]] = {
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}
LOSSLESS: dict[str, dict[str, Any]] = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}
ENCODINGS: dict[str, dict[str, Any]] = {**LOSSLESS, "JPEG": {}, "GIF": {}}


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> Bytes:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(height: int, width: int, channels: int = 3) -> Bytes:
    """A picture that survives lossy coding: slow ramps, different in each channel and direction."""
    rows, columns = np.mgrid[0:height, 0:width]
    ramps = [
        255 * rows / height,
        255 * columns / width,
        255 * (rows + columns) / (height + width),
        60 + 0 * rows,
    ]
    return np.stack(ramps[:channels], 2).round().astype(np.uint8)


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def as_tensor(pixels: NDArray[Any]) -> Tensor:
    """Bytes (H, W) or (H, W, 3) as read_images returns them, (1, 3, H, W)."""
    color = np.broadcast_to(pixels[..., None], (*pixels.shape, 3)) if pixels.ndim == 2 else pixels
    return torch.from_numpy(np.ascontiguousarray(color, np.float32) / 255).permute(2, 0, 1)[None]


def assert_reads(path: Path, expected: NDArray[Any], *, levels: float = 0) -> None:
    """`path` reads as the bytes `expected`, off by at most so many of 255 levels."""
    images, names = read_images(path)
    assert names == [path.name]
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, as_tensor(expected), rtol=0, atol=levels / 255)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of under 100 bytes whose header promises any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(16))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, content) for kind, content in chunks)


@contextmanager
def remarks() -> Iterator[list[str]]:
    """The sentences of every ImageWarning given inside."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    said.extend(str(warning.message) for warning in caught if warning.category is ImageWarning)


# ---------------------------------------------------------------- kinds of pictures


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("orientation", ROTATIONS)
def test_exif_orientation_is_applied(tmp_path: Path, kind: str, orientation: int) -> None:
    stored = noise(5, 9)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.img"
    path.write_bytes(encoded(Image.fromarray(stored), kind, exif=exif, **LOSSLESS[kind]))
    assert_reads(path, ROTATIONS[orientation](stored))


@pytest.mark.parametrize("orientation", ROTATIONS)
def test_exif_orientation_of_a_phones_jpeg_is_applied(tmp_path: Path, orientation: int) -> None:
    stored = smooth(40, 64)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "phone.jpg"
    path.write_bytes(encoded(Image.fromarray(stored), "JPEG", exif=exif, quality=100, subsampling=0))
    assert_reads(path, ROTATIONS[orientation](stored), levels=4)


def test_gray_fills_all_three_channels(tmp_path: Path) -> None:
    gray = noise(4, 7, 1)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    assert_reads(tmp_path / "gray.png", gray)


def test_a_one_bit_picture_is_black_and_white(tmp_path: Path) -> None:
    bits = noise(4, 7, 1) > 127
    Image.fromarray(bits).save(tmp_path / "bits.png")
    with Image.open(tmp_path / "bits.png") as stored:
        assert stored.mode == "1"
    assert_reads(tmp_path / "bits.png", bits * 255)


def test_a_palette_picture_has_its_palettes_colors(tmp_path: Path) -> None:
    palette, indices = noise(1, 8)[0], noise(4, 7, 1) % 8
    picture = Image.fromarray(indices).convert("P")
    picture.putdata(indices.flatten().tolist())
    picture.putpalette(palette.tobytes())
    picture.save(tmp_path / "palette.png")
    with Image.open(tmp_path / "palette.png") as stored:
        assert stored.mode == "P"
    assert_reads(tmp_path / "palette.png", palette[indices])


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_entry_is_white(tmp_path: Path, kind: str) -> None:
    palette, indices = noise(1, 8)[0], noise(4, 7, 1) % 8
    indices[0, :] = range(7)
    picture = Image.new("P", (7, 4))
    picture.putdata(indices.flatten().tolist())
    picture.putpalette(palette.tobytes())
    path = tmp_path / "hole.img"
    path.write_bytes(encoded(picture, kind, transparency=3))
    expected = palette[indices]
    expected[indices == 3] = 255
    assert_reads(path, expected)


def test_a_half_transparent_palette_entry_is_mixed_with_white(tmp_path: Path) -> None:
    palette, indices, opacity = noise(1, 4)[0], noise(4, 7, 1) % 4, np.array([0, 80, 200, 255])
    picture = Image.new("P", (7, 4))
    picture.putdata(indices.flatten().tolist())
    picture.putpalette(palette.tobytes())
    picture.save(tmp_path / "veil.png", transparency=bytes(opacity.tolist()))
    cover = opacity[indices][..., None] / 255
    assert_reads(tmp_path / "veil.png", palette[indices] * cover + 255 * (1 - cover), levels=1)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_transparency_is_laid_on_white(tmp_path: Path, kind: str) -> None:
    pixels = noise(6, 5, 4)
    pixels[0, :, 3], pixels[1, :, 3] = 0, 255
    path = tmp_path / "glass.img"
    path.write_bytes(encoded(Image.fromarray(pixels), kind, **LOSSLESS[kind] | {"exact": True}))
    color, cover = pixels[..., :3].astype(float), pixels[..., 3:] / 255
    expected = color * cover + 255 * (1 - cover)
    assert_reads(path, expected, levels=1)
    images, _ = read_images(path)
    assert torch.equal(images[:, :, 0], torch.ones(1, 3, 5))
    assert torch.equal(images[:, :, 1], as_tensor(pixels[..., :3])[:, :, 1])


def test_gray_with_transparency_is_laid_on_white(tmp_path: Path) -> None:
    pixels = noise(6, 5, 2)
    Image.merge("LA", [Image.fromarray(pixels[..., 0]), Image.fromarray(pixels[..., 1])]).save(
        tmp_path / "la.png"
    )
    cover = pixels[..., 1] / 255
    assert_reads(tmp_path / "la.png", pixels[..., 0] * cover + 255 * (1 - cover), levels=1)


def test_a_color_declared_transparent_is_white(tmp_path: Path) -> None:
    pixels = noise(4, 7)
    pixels[2, 3] = pixels[1, 1] = (10, 20, 30)
    Image.fromarray(pixels).save(tmp_path / "key.png", transparency=(10, 20, 30))
    pixels[2, 3] = pixels[1, 1] = 255
    assert_reads(tmp_path / "key.png", pixels)


@pytest.mark.parametrize(("kind", "levels"), [("TIFF", 1), ("JPEG", 6)])
def test_cmyk_comes_back_close_to_its_colors(tmp_path: Path, kind: str, levels: int) -> None:
    pixels = smooth(24, 32)
    path = tmp_path / "print.img"
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    path.write_bytes(encoded(Image.fromarray(pixels).convert("CMYK"), kind, **options))
    with Image.open(path) as stored:
        assert stored.mode == "CMYK"
    assert_reads(path, pixels, levels=levels)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("brightest", [65535, 255, 3000])
def test_16_bit_gray_keeps_its_brightness(tmp_path: Path, kind: str, brightest: int) -> None:
    deep = np.random.default_rng(0).integers(0, brightest + 1, (6, 5)).astype(np.uint16)
    deep[0, 0], deep[0, 1] = 0, brightest
    path = tmp_path / "deep.img"
    path.write_bytes(encoded(Image.fromarray(deep), kind))
    images, _ = read_images(path)
    expected = torch.from_numpy(deep.astype(np.float32) / 65535).expand(1, 3, -1, -1)
    torch.testing.assert_close(images, expected, rtol=0, atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_read_with_a_warning(tmp_path: Path, kind: str) -> None:
    frames = [Image.fromarray(np.full((4, 6, 3), level, np.uint8)) for level in (200, 40, 90)]
    path = tmp_path / "moving.img"
    options = {"lossless": True} if kind == "WEBP" else {}
    path.write_bytes(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    with pytest.warns(ImageWarning, match=r"moving\.img: holds 3 frames, the first is used"):
        images, _ = read_images(path)
    torch.testing.assert_close(images, torch.full((1, 3, 4, 6), 200 / 255), rtol=0, atol=0)


def test_floating_point_pixels_are_refused_because_their_range_is_unknown(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32) * 7).save(tmp_path / "float.tif")
    with pytest.warns(ImageWarning, match="float"), pytest.raises(ValueError, match="floating-point"):
        read_images(tmp_path / "float.tif")


def test_one_channel_asks_for_luma(tmp_path: Path) -> None:
    pixels = noise(4, 7)
    Image.fromarray(pixels).save(tmp_path / "color.png")
    images, _ = read_images(tmp_path / "color.png", channels=1)
    luma = pixels @ np.array([0.299, 0.587, 0.114]) / 255
    torch.testing.assert_close(images, torch.from_numpy(luma).float()[None, None], rtol=0, atol=1 / 255)


def test_a_single_pixel_is_a_picture(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (10, 20, 30)).save(tmp_path / "dot.png")
    assert_reads(tmp_path / "dot.png", np.array([[[10, 20, 30]]]))
    images, _ = read_images(tmp_path / "dot.png", size=(2, 3))
    torch.testing.assert_close(images, torch.tensor([10, 20, 30.0]).view(1, 3, 1, 1).expand(1, 3, 2, 3) / 255)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3]), st.integers(0, 2**32 - 1))
def test_any_png_reads_back_exactly(height: int, width: int, channels: int, seed: int) -> None:
    pixels = noise(height, width, channels, seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.png"
        Image.fromarray(pixels).save(path)
        assert_reads(path, pixels)
        images, _ = read_images(path, channels=channels)
        assert torch.equal(
            (images * 255).round().byte()[0],
            torch.from_numpy(pixels.reshape(height, width, -1)).permute(2, 0, 1),
        )


# ---------------------------------------------------------------- size


@pytest.mark.parametrize(
    ("size", "crop"),
    [
        ((20, 20), (20, 0, 60, 40)),  # a square from the middle of 80 x 40
        ((10, 5), (30, 0, 50, 40)),
        ((5, 20), (0, 10, 80, 30)),
        ((20, 40), (0, 0, 80, 40)),
        ((80, 80), (20, 0, 60, 40)),
    ],
)
def test_the_crop_is_centered_and_the_resize_is_anti_aliased(
    tmp_path: Path, size: tuple[int, int], crop: tuple[int, int, int, int]
) -> None:
    picture = Image.fromarray(noise(40, 80))
    picture.save(tmp_path / "wide.png")
    images, _ = read_images(tmp_path / "wide.png", size=size)
    twin = as_tensor(np.asarray(picture.crop(crop).resize(size[::-1], Image.Resampling.BILINEAR)))
    inner = (..., slice(1, -1), slice(1, -1))  # at its edge the filter sees what lies beyond the crop
    assert torch.equal(images[inner], twin[inner])
    torch.testing.assert_close(images, twin, rtol=0, atol=0.3)


@settings(max_examples=200, deadline=None)
@given(*[st.integers(1, 60)] * 4)
@example(width=451, height=300, rows=60, columns=97)
def test_any_picture_comes_in_any_size(width: int, height: int, rows: int, columns: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.bmp"
        Image.new("RGB", (width, height), (10, 200, 77)).save(path)
        images, _ = read_images(path, size=(rows, columns))
    expected = as_tensor(np.full((rows, columns, 3), (10, 200, 77), np.uint8))
    torch.testing.assert_close(images, expected, rtol=0, atol=0)


def test_fine_stripes_become_gray_and_not_one_of_the_stripes(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    images, _ = read_images(tmp_path / "stripes.png", size=(8, 8))
    torch.testing.assert_close(images, torch.full((1, 3, 8, 8), 0.5), rtol=0, atol=0.05)


def test_a_size_that_a_picture_has_already_changes_nothing(tmp_path: Path) -> None:
    pixels = noise(6, 9)
    Image.fromarray(pixels).save(tmp_path / "same.png")
    images, _ = read_images(tmp_path / "same.png", size=(6, 9))
    assert torch.equal(images, as_tensor(pixels))


@pytest.mark.parametrize("upright", [False, True])
def test_the_middle_of_a_long_strip_is_read(tmp_path: Path, upright: bool) -> None:
    strip = np.zeros((10, 20_000, 3), np.uint8)
    strip[:, 9_995:10_005] = (255, 128, 0)
    Image.fromarray(np.rot90(strip) if upright else strip).save(tmp_path / "strip.png")
    images, _ = read_images(tmp_path / "strip.png", size=(10, 10))
    torch.testing.assert_close(images, as_tensor(np.full((10, 10, 3), (255, 128, 0), np.uint8)))


def test_pictures_of_one_size_need_no_size_and_others_name_both_files(tmp_path: Path) -> None:
    for name, height in (("a.png", 4), ("b.png", 4), ("c.png", 5)):
        Image.fromarray(noise(height, 6)).save(tmp_path / name)
    with pytest.raises(ValueError, match=r"got \(4, 6\) of a\.png and \(5, 6\) of c\.png .give size="):
        read_images(tmp_path)
    (tmp_path / "c.png").unlink()
    assert len(read_images(tmp_path)[0]) == 2


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (5,), (5, 5, 5), (5.0, 5.0), 224])
def test_an_invalid_size_is_refused(tmp_path: Path, size: Any) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "fine.png")
    with pytest.raises(ValueError, match=r"^size must be \(height, width\)"):
        read_images(tmp_path, size=size)


def test_channels_other_than_one_and_three_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^channels must be .* got 4"):
        read_images(tmp_path, channels=4)


# ---------------------------------------------------------------- folders and what cannot be read


def truncated(kind: str) -> bytes:
    content = encoded(Image.fromarray(noise(64, 64)), kind)
    return content[: len(content) // 2]


def claims_too_much(path: Path) -> None:
    path.write_bytes(png_that_claims(30_000, 30_000))


BROKEN: dict[str, Callable[[Path], object]] = {
    "cut.jpg": lambda path: path.write_bytes(truncated("JPEG")),
    "cut.png": lambda path: path.write_bytes(truncated("PNG")),
    "empty.jpg": lambda path: path.write_bytes(b""),
    "text.png": lambda path: path.write_text("this is no picture"),
    "bomb.png": claims_too_much,
    "gone.png": lambda path: path.symlink_to("nowhere.png"),
    "pipe.png": os.mkfifo,
}


def test_readable_files_of_a_folder_are_read_in_order_and_the_others_are_named_once(tmp_path: Path) -> None:
    colors = {"zebra.png": 10, "middle/horse.png": 20, "ant.jpg": 30}
    for name, level in colors.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (level, level, level)).save(tmp_path / name)
    for name, spoil in BROKEN.items():
        spoil(tmp_path / name)
    with remarks() as said:
        images, names = read_images(tmp_path)
    assert names == ["ant.jpg", "middle/horse.png", "zebra.png"]
    torch.testing.assert_close(images[:, 0, 0, 0], torch.tensor([30, 20, 10.0]) / 255)
    assert sorted(sentence.split(":")[0] for sentence in said) == sorted(BROKEN)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cut.jpg", "truncated"),
        ("cut.png", "truncated"),
        ("empty.jpg", "empty"),
        ("text.png", "not an image"),
        ("bomb.png", "million pixels"),
        ("pipe.png", "not a regular file"),
    ],
)
def test_the_reason_a_file_cannot_be_read_is_given(tmp_path: Path, name: str, reason: str) -> None:
    BROKEN[name](tmp_path / name)
    with pytest.warns(ImageWarning, match=reason), pytest.raises(ValueError, match=rf"{name}.*{reason}"):
        read_images(tmp_path / name)


@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (12_500, 10_000), (2_000_000, 61)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(
    tmp_path: Path, width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("the bomb was decoded")

    monkeypatch.setattr(Image.Image, "load", decode)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    (tmp_path / "bomb.png").write_bytes(png_that_claims(width, height))
    with (
        pytest.warns(ImageWarning, match=r"bomb\.png: .*million pixels; refused"),
        pytest.raises(ValueError, match=r"bomb\.png"),
    ):
        read_images(tmp_path)


def test_a_folder_named_like_a_picture_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    Image.new("RGB", (4, 4), "red").save(tmp_path / "folder.png" / "inside.png")
    images, names = read_images(tmp_path)
    assert names == ["folder.png/inside.png"]
    assert images[0, :, 0, 0].tolist() == [1, 0, 0]


def test_hidden_files_are_ignored(tmp_path: Path) -> None:
    for name in ("seen.png", ".hidden.png", ".thumbnails/small.png", "below/.DS_Store.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    with remarks() as said:
        assert read_images(tmp_path)[1] == ["seen.png"]
    assert said == []


@contextmanager
def nobody() -> Iterator[None]:
    """As a user whom permissions bind; the superuser reads everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        path.chmod(0o755)
        with nobody():
            reachable = os.access(
                path, os.R_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids
            )
        if not reachable:
            pytest.skip(f"other users may not enter {path}")
        yield path


def test_a_file_without_permission_is_named_and_skipped(open_folder: Path) -> None:
    for name in ("mine.png", "secret.png"):
        Image.new("RGB", (4, 4)).save(open_folder / name)
        (open_folder / name).chmod(0o444)
    (open_folder / "secret.png").chmod(0)
    with nobody(), pytest.warns(ImageWarning, match=r"secret\.png: no permission"):
        assert read_images(open_folder)[1] == ["mine.png"]


def test_a_subfolder_without_permission_is_named(open_folder: Path) -> None:
    for name in ("mine.png", "closed/secret.png"):
        (open_folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(open_folder / name)
    (open_folder / "closed").chmod(0)
    try:
        with nobody(), remarks() as said:
            assert read_images(open_folder)[1] == ["mine.png"]
    finally:
        (open_folder / "closed").chmod(0o700)
    assert [sentence.split(":")[0] for sentence in said] == ["closed"]


@pytest.mark.parametrize("name", ["nothing", "nothing.png", "nothing/at/all"])
def test_a_missing_path_is_file_not_found(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=name):
        read_images(tmp_path / name)


def test_a_broken_link_by_itself_is_file_not_found(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to("nowhere.png")
    with pytest.raises(FileNotFoundError, match=r"link\.png"):
        read_images(tmp_path / "link.png")


def test_a_folder_of_bad_files_only_is_an_error_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_text("no")
    (tmp_path / "two.png").write_bytes(b"")
    with pytest.warns(ImageWarning), pytest.raises(ValueError, match=r"one\.png: .*two\.png: "):
        read_images(tmp_path)


def test_an_empty_folder_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty folder"):
        read_images(tmp_path)


# ---------------------------------------------------------------- damage


def outcome(content: bytes, suffix: str = "") -> Tensor | None:
    """What a file with this content reads as; None when it is refused with a ValueError."""
    with tempfile.TemporaryDirectory() as folder, remarks():
        path = Path(folder) / f"damaged{suffix}"
        path.write_bytes(content)
        try:
            images, _ = read_images(path)
        except ValueError:
            return None
    assert bool(((images >= 0) & (images <= 1)).all())
    return images


MAGIC = [
    b"",
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff\xe0",
    b"GIF89a",
    b"II*\x00",
    b"MM\x00*",
    b"RIFF\x20\x00\x00\x00WEBP",
    b"BM",
]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(MAGIC), st.binary(max_size=200))
@example(b"", b"")
def test_random_bytes_are_refused_and_nothing_worse(magic: bytes, rest: bytes) -> None:
    assert outcome(magic + rest) is None


def whole_file(kind: str) -> bytes:
    return encoded(Image.fromarray(noise(9, 7)), kind, **ENCODINGS[kind])


@pytest.mark.parametrize("kind", ENCODINGS)
def test_a_file_cut_anywhere_is_refused_or_whole_and_never_half_a_picture(kind: str) -> None:
    content = whole_file(kind)
    whole = outcome(content)
    assert whole is not None
    read = {length: outcome(content[:length]) for length in range(0, len(content), 1 + len(content) // 200)}
    assert read[0] is None
    assert all(torch.equal(images, whole) for images in read.values() if images is not None)
    assert sum(images is None for images in read.values()) > len(read) / 2


def test_an_animation_cut_anywhere_is_refused_or_its_first_frame() -> None:
    frames = [Image.fromarray(noise(9, 7, 1, seed)) for seed in range(3)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], loop=0)
    whole = outcome(content)
    assert whole is not None
    read = [outcome(content[:length]) for length in range(len(content))]
    assert all(torch.equal(images, whole) for images in read if images is not None)


@pytest.mark.parametrize("kind", ENCODINGS)
def test_flipped_bytes_are_refused_or_read_and_nothing_worse(kind: str) -> None:
    content, dice = whole_file(kind), random.Random(0)  # noqa: S311 - no secret
    read = []
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(dice.choice([1, 2, 8])):
            damaged[dice.randrange(dice.choice([30, len(damaged)]))] = dice.choice([0, 1, 128, 255])
        read.append(outcome(bytes(damaged)))
    assert 0 < sum(images is None for images in read) < len(read)
    assert all(images.shape[:2] == (1, 3) for images in read if images is not None)


def dds_of_unknown_format() -> bytes:
    content = bytearray(encoded(Image.fromarray(noise(4, 4)), "DDS"))
    content[80:84] = bytes(4)
    return bytes(content)


def avif_with_a_damaged_item() -> bytes:
    if ".avif" not in Image.registered_extensions():
        pytest.skip("this Pillow reads no AVIF")
    content = encoded(Image.fromarray(noise(13, 17)), "AVIF")
    place = content.index(b"av01", 30)
    return content[:place] + b"\xff\xff\xff\xff" + content[place + 4 :]


@pytest.mark.parametrize("damaged", [dds_of_unknown_format, avif_with_a_damaged_item])
def test_a_decoder_that_raises_what_no_other_does_is_still_a_damaged_picture(
    damaged: Callable[[], bytes],
) -> None:
    assert outcome(damaged()) is None


def test_no_subprocess_is_started_to_read_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands PostScript, whatever the file is called, to Ghostscript."""
    ghostscript = tmp_path / "programs" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\n: > '{tmp_path}/started'\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(ghostscript.parent), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    assert outcome(script, ".jpg") is None
    assert not (tmp_path / "started").exists()


# ---------------------------------------------------------------- photographs that ship


def test_the_sample_photographs_are_scikit_images_own() -> None:
    import skimage.data

    for index, (name, photograph) in enumerate(
        [
            ("chelsea", skimage.data.chelsea()),
            ("coffee", skimage.data.coffee()),
            ("rocket", skimage.data.rocket()),
        ]
    ):
        images, names = sample_images(photograph.shape[:2])
        assert names[index] == name
        torch.testing.assert_close(images[index : index + 1], as_tensor(photograph), rtol=0, atol=2 / 255)


@pytest.mark.parametrize("size", [(224, 224), (60, 97)])
def test_the_sample_photographs_come_in_any_size_and_are_four_different_pictures(
    size: tuple[int, int],
) -> None:
    images, names = sample_images(size)
    assert names == ["chelsea", "coffee", "rocket", "motorcycle"]
    assert images.shape == (4, 3, *size)
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert all(float(image.std()) > 0.1 for image in images)
    assert len({image.numpy().tobytes() for image in images}) == 4


def test_copies_are_found_in_every_type_of_tensor() -> None:
    images = torch.rand(2, 3, 2, 2)
    for kind in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert first_copies(images.to(kind), images[1:].to(kind)).tolist() == [0, 1, 1]
