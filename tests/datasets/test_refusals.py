"""Damaged, missing and unsuitable data is refused in one sentence that names the file; unusual data is read."""

from __future__ import annotations

import gzip
import os
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from weakspot.datasets import from_tensors, read_labeled
from weakspot.datasets.binary_files import read_idx

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
LABELS = np.arange(6) % 3
ROWS = torch.arange(6)


def refused(
    source: Path | str, message: str, *, kind: type[Exception] = ValueError, split: str = "train"
) -> None:
    with pytest.raises(kind, match=re.escape(str(source))) as error:
        read_labeled(source, split=split)
    assert type(error.value) is kind
    assert re.search(message, str(error.value)), error.value
    assert "\n" not in str(error.value)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


# .npz


def test_arrays_without_a_split_are_those_of_training(tmp_path: Path) -> None:
    np.savez(tmp_path / "plain.npz", images=IMAGES, labels=LABELS)
    message = "plain.npz must hold images_test .or x_test., got images, labels"
    refused(tmp_path / "plain.npz", message, kind=FileNotFoundError, split="test")
    np.savez(tmp_path / "test.npz", x_test=IMAGES, y_test=LABELS)
    refused(
        tmp_path / "test.npz",
        "must hold images or images_train .or x_train., got x_test, y_test",
        kind=FileNotFoundError,
    )
    assert len(read_labeled(tmp_path / "test.npz", split="test")) == 6
    np.save(tmp_path / "one.npy", IMAGES)
    refused((tmp_path / "one.npy").rename(tmp_path / "one.npz"), "got one array")
    np.savez(tmp_path / "odd.npz", pictures=IMAGES)
    refused(tmp_path / "odd.npz", "must hold images_test .* got pictures", split="test")


def test_numbers_of_the_other_byte_order_are_read(tmp_path: Path) -> None:
    floats = IMAGES / 255
    np.savez(tmp_path / "x.npz", images=floats.astype(">f4"), labels=LABELS.astype(">i4"))
    data = read_labeled(tmp_path / "x.npz")
    torch.testing.assert_close(data.images(ROWS)[:, 0], torch.from_numpy(floats).float())
    assert data.labels.tolist() == LABELS.tolist()
    np.savez(tmp_path / "long.npz", images=floats.astype(np.longdouble), labels=LABELS.astype(np.uint64))
    assert read_labeled(tmp_path / "long.npz").labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES.astype("U"), LABELS, "images must be uint8 or floats .* got text"),
        (IMAGES.astype(np.int64), LABELS, "images must be .* got int64"),
        (IMAGES > 9, LABELS, "images must be .* got bool"),
        (IMAGES + 0j, LABELS, "images must be .* got complex128"),
        (IMAGES.astype(object), LABELS, "cannot be read as a file of arrays of numbers"),
        (IMAGES, LABELS.astype("U"), "labels must be integers, got text"),
        (IMAGES, LABELS.astype("S"), "labels must be integers, got text"),
        (IMAGES, LABELS / 2, "labels must be integers, got float64"),
        (IMAGES, LABELS.astype(object), "cannot be read as a file of arrays of numbers"),
        (
            IMAGES,
            np.eye(3, dtype=int)[LABELS],
            r"labels must be one class .* got shape \(6, 3\) with .*argmax",
        ),
        (IMAGES, np.eye(3)[LABELS], "with a column for every class"),
        (IMAGES, LABELS[:4], r"labels must .* got \(4,\)"),
        (IMAGES, np.int64(3), r"labels must .* got \(\)"),
        (IMAGES, LABELS - 1, "labels must be classes at least 0, got -1"),
        (IMAGES, LABELS * 1_500_000, "labels must be below 100000, got 3000000?"),
        (IMAGES, LABELS.astype(np.uint64) + np.uint64(2**64 - 9), "labels must be below 2..63"),
        (IMAGES[:0], LABELS[:0], "images must be a tensor .* with at least one pixel"),
    ],
)
def test_unsuitable_arrays_are_refused(tmp_path: Path, images: Any, labels: Any, message: str) -> None:
    np.savez(tmp_path / "x.npz", images=images, labels=labels)
    refused(tmp_path / "x.npz", message)


def test_only_arrays_of_the_split_are_read(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "x.npz",
        x_train=IMAGES.astype(object),
        y_train=LABELS,
        notes=np.array([None]),
        x_test=IMAGES,
        y_test=LABELS,
    )
    assert len(read_labeled(tmp_path / "x.npz", split="test")) == 6


# IDX


@pytest.mark.parametrize("between", ["-", "."])
@pytest.mark.parametrize("packed", [True, False])
def test_both_ways_to_write_the_names_are_found(tmp_path: Path, between: str, packed: bool) -> None:
    for kind, array in (("images", IMAGES), ("labels", LABELS.astype(np.uint8))):
        name = f"train-{kind}{between}idx{array.ndim}-ubyte"
        (tmp_path / name).mkdir() if packed else None  # some archives unpack to folders of these names
        stored = gzip.compress(idx(array)) if packed else idx(array)
        (tmp_path / f"{name}{'.gz' if packed else ''}").write_bytes(stored)
    data = read_labeled(tmp_path)
    assert torch.equal(data.pixels(ROWS)[:, 0], torch.from_numpy(IMAGES))
    assert data.labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (
            b"\x00\x00\x08\x03" + b"\x80\x00\x00\x00" * 2 + b"\x00\x00\x00\x04",
            "18446744073709551616 bytes, but it can hold",
        ),
        (b"\x00\x00\x08\x09" + b"\x00\x00\x00\x01" * 9 + b"x", "must announce 1 to 4 axes, got 9"),
        (b"\x00\x00\x08\x00x", "axes, got 0"),
        (b"\x00\x00\x08\x03\x00\x00", "ends within its header"),
        (idx(IMAGES) + b"x", r"announces \[6, 8, 8\], but it holds more bytes"),
        (idx(IMAGES)[:-1], r"announces \[6, 8, 8\], but it holds 383 bytes"),
        (b"", "must be an IDX file of bytes"),
    ],
    ids=["overflow", "nine axes", "no axes", "short head", "more", "fewer", "empty"],
)
@pytest.mark.parametrize("packed", [True, False])
def test_wrong_headers_are_refused(tmp_path: Path, stored: bytes, message: str, packed: bool) -> None:
    path = tmp_path / ("a-ubyte.gz" if packed else "a-ubyte")
    path.write_bytes(gzip.compress(stored) if packed else stored)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
        read_idx(path)


def test_any_damaged_byte_of_a_gzip_file_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(idx(IMAGES), mtime=0)
    path = tmp_path / "a-ubyte.gz"
    for place in range(10, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"a-ubyte\.gz"):
            read_idx(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a-ubyte.gz cannot be read as a gzip file"):
        read_idx(path)


def test_a_file_that_unpacks_to_more_than_it_says_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "a-ubyte.gz"
    path.write_bytes(gzip.compress(idx(IMAGES) + bytes(200_000_000), compresslevel=1))
    tracemalloc.start()
    with pytest.raises(ValueError, match="holds more bytes"):
        read_idx(path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 20_000_000


def test_files_without_images_are_refused_with_the_folder(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(IMAGES[:0]))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS[:0].astype(np.uint8)))
    refused(tmp_path, "images must be a tensor .* with at least one pixel")


# Tensors


def test_images_that_require_gradients_are_detached() -> None:
    images = torch.rand(3, 1, 4, 4, requires_grad=True)
    data = from_tensors(images, torch.arange(3))
    assert not data.images(torch.arange(3)).requires_grad
    with torch.no_grad():
        images[0] = 0.5
    assert torch.equal(data.pixels(ROWS[:1]), images[:1]), "it is not copied"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8])
def test_classes_may_be_any_whole_numbers(dtype: torch.dtype) -> None:
    assert from_tensors(torch.rand(3, 1, 4, 4), torch.arange(3).to(dtype)).labels.tolist() == [0, 1, 2]


def test_huge_class_numbers_are_refused_without_memory() -> None:
    with pytest.raises(ValueError, match="labels must be below 100000, got 1099511627776"):
        from_tensors(torch.rand(2, 1, 4, 4), torch.tensor([0, 2**40]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_images_stay_on_their_device_and_classes_come_to_the_cpu() -> None:
    images = torch.rand(3, 1, 4, 4, device="cuda")
    data = from_tensors(images, torch.arange(3, device="cuda"))
    assert data.labels.device.type == "cpu"
    for rows in (torch.tensor([2, 0]), torch.tensor([2, 0], device="cuda")):
        assert torch.equal(data.pixels(rows), images[[2, 0]])
    assert from_tensors(images.cpu(), torch.arange(3)).pixels(rows).device.type == "cpu"


# Folders


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    for part in ("train", "val"):
        for name in ("ant", "bee"):
            inner = tmp_path / part / name / "inner"
            inner.mkdir(parents=True)
            for path in (inner.parent / "1.png", inner / "0.PNG"):
                Image.new("RGB", (8, 8)).save(path)
            (inner / ".hidden.png").write_bytes(b"")
            (inner / "notes.txt").write_bytes(b"")
    return tmp_path


def test_a_folder_is_listed_once(classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scanned: list[str] = []
    real = os.scandir

    def scandir(path: Any = ".") -> Any:
        scanned.append(str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    data = read_labeled(classes, size=(8, 8))
    monkeypatch.undo()
    assert len(data) == 4
    assert data.labels.tolist() == [0, 0, 1, 1]
    pictures = [path for path in scanned if path.endswith(("ant", "bee", "inner"))]
    assert pictures.count(str(classes / "train/bee/inner")) == 1
    # Whether there is a class at all is asked thrice, and stops at the first picture.
    assert len(pictures) <= 4 + 3, pictures


def test_a_deleted_image_is_named(classes: Path) -> None:
    data = read_labeled(classes, size=(8, 8))
    (classes / "train/ant/1.png").unlink()
    with pytest.raises(ValueError, match=r"ant/1.png does not exist any more") as error:
        data.pixels(ROWS[:4])
    assert type(error.value) is ValueError


# Hugging Face


Make = Callable[..., str]


@pytest.fixture
def hub(tmp_path: Path) -> Make:
    """Writes a data set of one split, with other columns where they are given, and returns how to name it."""
    datasets = pytest.importorskip("datasets")

    def make(split: str | None = None, features: dict[str, str] | None = None, **columns: Any) -> str:
        kinds: dict[str, Any] = {"image": datasets.Image(), "label": datasets.Value("int64")}
        for name, kind in (features or {}).items():
            inner = datasets.Value(kind.removesuffix("s") if kind == "int64s" else kind)
            kinds[name] = datasets.Sequence(inner) if kind == "int64s" else inner
        usual = {"image": [Image.fromarray(array) for array in IMAGES], "label": LABELS.tolist()}
        made = datasets.Dataset.from_dict(usual | columns, features=datasets.Features(kinds), split=split)
        made.save_to_disk(str(tmp_path / "set"))
        return f"hf:{tmp_path / 'set'}"

    return make


def test_a_data_set_without_splits_is_the_training_split(hub: Make) -> None:
    source = hub()
    assert len(read_labeled(source)) == 6
    refused(
        source,
        "must have a split test or validation or valid, got train",
        kind=FileNotFoundError,
        split="test",
    )


def test_a_data_set_of_the_test_split_is_not_the_training_split(hub: Make) -> None:
    source = hub(split="test")
    assert len(read_labeled(source, split="test")) == 6
    refused(source, "must have a split train, got test", kind=FileNotFoundError)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [0, 1, -1, 0, 1, 2]}, "label must be a class .* got -1 in row 2"),
        ({"label": [0, None, 1, 0, 1, 2]}, "label must be .* got None in row 1"),
        ({"label": [0, 10**9, 1, 0, 1, 2]}, "labels must be below 100000, got 1000000000"),
        (
            {"label": list("abcdef"), "features": {"label": "string"}},
            "column label must hold integers, got string",
        ),
        (
            {"label": [0.5] * 6, "features": {"label": "float64"}},
            "column label must hold integers, got float64",
        ),
        (
            {"label": [[0]] * 6, "features": {"label": "int64s"}},
            "column label must hold integers, got",
        ),
        (
            {"image": ["a.png"] * 6, "features": {"image": "string"}},
            "column image must hold images .datasets.Image., got string",
        ),
        ({"image": [None] * 6}, "row 0 must hold an image, got none"),
        ({"image": [{"bytes": b"no picture", "path": None}] * 6}, "the image in row 0 cannot be read"),
        ({"image": [], "label": []}, "at least one row|cannot be loaded"),
    ],
)
def test_unsuitable_columns_are_refused(hub: Make, columns: dict[str, Any], message: str) -> None:
    refused(hub(**columns), message)


def test_a_missing_image_is_refused_when_it_is_read(hub: Make) -> None:
    pictures: list[Any] = [Image.fromarray(array) for array in IMAGES]
    pictures[4] = None
    data = read_labeled(hub(image=pictures))
    assert data.pixels(ROWS[:3]).shape == (3, 3, 8, 8)
    with pytest.raises(ValueError, match=r"set: row 4 must hold an image, got none .remove it from the data"):
        data.pixels(ROWS)
