"""Every format returns the images and labels that were written; damaged files are refused."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from PIL import Image
from torch import Tensor

from weakspot.datasets import from_tensors, read_labeled
from weakspot.datasets.binary_files import read_idx

ROWS = torch.arange(12)


def bytes_of(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(side.to_bytes(4, "big") for side in array.shape)
    return head + array.tobytes()


def write_mnist(folder: Path, *, packed: bool) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = bytes_of(12, 9, 7), np.arange(12, dtype=np.uint8) % 10
    for part in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx(array)
            path = folder / f"{part}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)
    return images, labels


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("split", ["train", "test"])
def test_mnist_is_read_as_it_was_written(tmp_path: Path, packed: bool, nested: bool, split: str) -> None:
    images, labels = write_mnist(tmp_path / "raw" if nested else tmp_path, packed=packed)
    data = read_labeled(tmp_path, split=split)
    assert data.shape == (1, 9, 7)
    assert torch.equal(data.pixels(ROWS)[:, 0], torch.from_numpy(images))
    assert torch.equal(data.labels, torch.from_numpy(labels).long())
    assert data.class_names == tuple("0123456789")
    assert float((data.images(ROWS) * 255 - data.pixels(ROWS)).abs().max()) < 1e-4


@given(st_numpy.arrays(np.uint8, st_numpy.array_shapes(max_dims=4, max_side=5)), st.binary(max_size=3))
def test_any_idx_file_comes_back_and_any_other_length_is_damage(array: np.ndarray, more: bytes) -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = Path(folder) / "x-ubyte"
        path.write_bytes(idx(array) + more)
        if more:
            with pytest.raises(ValueError, match="damaged"):
                read_idx(path)
        else:
            assert np.array_equal(read_idx(path).numpy(), array)


def cifar_rows(count: int, head: int) -> tuple[np.ndarray, Tensor, Tensor]:
    rows = bytes_of(count, head + 3072)
    rows[:, :head] %= 10
    images = torch.from_numpy(rows[:, head:].copy()).view(-1, 3, 32, 32)
    return rows, images, torch.from_numpy(rows[:, head - 1].astype(np.int64))


@pytest.mark.parametrize("hundred", [False, True])
def test_cifar_is_read_as_it_was_written(tmp_path: Path, hundred: bool) -> None:
    rows, images, labels = cifar_rows(12, 2 if hundred else 1)
    parts = {"train": rows} if hundred else {"data_batch_1": rows[:5], "data_batch_2": rows[5:]}
    for name, part in parts.items():
        (tmp_path / f"{name}.bin").write_bytes(part.tobytes())
    names = [f"kind{number}" for number in range(10)]
    (tmp_path / ("fine_label_names.txt" if hundred else "batches.meta.txt")).write_text("\n".join(names))
    data = read_labeled(tmp_path)
    assert torch.equal(data.pixels(ROWS), images)
    assert torch.equal(data.labels, labels)
    assert data.class_names == tuple(names)
    with pytest.raises(FileNotFoundError, match="test"):
        read_labeled(tmp_path, split="test")


def test_pickled_cifar_is_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": [1], b"labels": [1]}))
    with pytest.raises(ValueError, match="must hold the binary version of CIFAR, got Python's pickles"):
        read_labeled(tmp_path)


@pytest.mark.parametrize(
    ("name", "head", "label", "expected"),
    [("data_batch_1.bin", 1, 255, "0 and 9, got 255"), ("train.bin", 2, 100, "0 and 99, got 100")],
)
def test_one_wrong_byte_does_not_add_classes(
    tmp_path: Path, name: str, head: int, label: int, expected: str
) -> None:
    rows = np.zeros((3, head + 3072), np.uint8)
    rows[1, head - 1] = label
    (tmp_path / name).write_bytes(rows.tobytes())
    with pytest.raises(ValueError, match=f"{name} is damaged: labels must be between {expected}"):
        read_labeled(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"), [(b"\xff\xfe", "names in UTF-8"), (b"cat dog", "labels must be below 2.* got 9")]
)
def test_class_names_that_do_not_fit_are_refused(tmp_path: Path, names: bytes, message: str) -> None:
    rows = np.full((3, 3073), 9, np.uint8)
    (tmp_path / "data_batch_1.bin").write_bytes(rows.tobytes())
    (tmp_path / "batches.meta.txt").write_bytes(names)
    with pytest.raises(ValueError, match=message):
        read_labeled(tmp_path)


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
@pytest.mark.parametrize("floats", [True, False])
def test_arrays_are_read_as_they_were_written(tmp_path: Path, last: bool, floats: bool) -> None:
    images = bytes_of(12, 3, 8, 6)
    held = images.transpose(0, 2, 3, 1) if last else images
    held = (held / 255).astype(np.float32) if floats else held
    labels = np.arange(12).reshape(-1, 1) % 3
    np.savez(tmp_path / "plain.npz", images=held, labels=labels)
    np.savez(tmp_path / "keras.npz", x_train=held, y_train=labels, x_test=held[:4], y_test=labels[:4])
    for name in ("plain.npz", "keras.npz"):
        data = read_labeled(tmp_path / name)
        torch.testing.assert_close(data.images(ROWS), torch.from_numpy(images).float() / 255)
        assert data.labels.tolist() == [0, 1, 2] * 4
    assert len(read_labeled(tmp_path / "keras.npz", split="test")) == 4


@pytest.mark.parametrize("split", [True, False], ids=["with splits", "without"])
def test_folders_of_classes_are_read_in_order_and_when_asked(tmp_path: Path, split: bool) -> None:
    for part in ("train", "val") if split else (".",):
        for number, name in enumerate(("zebra", "ant")):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for picture in range(3):
                array = np.full((10, 14, 3), 40 * number + 10 * picture, np.uint8)
                Image.fromarray(array).save(folder / f"{picture}.png")
    data = read_labeled(tmp_path, size=(8, 8))
    assert data.class_names == ("ant", "zebra")
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.pixels(torch.tensor([5, 0]))[:, 0, 0, 0].tolist() == [20, 40]
    assert read_labeled(tmp_path, size=(8, 8), channels=1).pixels(ROWS[:1]).shape == (1, 1, 8, 8)
    assert data.subset(torch.tensor([4, 1])).pixels(ROWS[:2])[:, 0, 0, 0].tolist() == [10, 50]
    mask = data.labels == 1
    for rows in (mask, mask.tolist(), [3, 4, 5], torch.tensor([3, 4, 5])):
        chosen = data.subset(rows)
        assert chosen.labels.tolist() == [1, 1, 1]
        assert chosen.images(torch.arange(3)).equal(data.images(torch.tensor([3, 4, 5])))
    with pytest.raises(ValueError, match=r"size must be .height, width. in pixels, both at least 1, got 8"):
        read_labeled(tmp_path, size=8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"channels must be 3 .color. or 1 .gray., got \[3\]"):
        read_labeled(tmp_path, size=(8, 8), channels=[3])  # type: ignore[arg-type]
    numbers: Any = (np.int64(8), np.int64(8))
    assert read_labeled(tmp_path, size=numbers).images(ROWS[:1]).shape == (1, 3, 8, 8)
    pixels = torch.rand(2, 1, 4, 4)
    assert from_tensors(pixels, torch.tensor([0, 1]), class_names=()).class_names == ("0", "1")
    sent = pickle.loads(pickle.dumps(data))  # noqa: S301 - as worker processes are
    assert sent.pixels(ROWS[:1]).shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"size must be .height, width. for image files, got none"):
        read_labeled(tmp_path)
    if split:
        (tmp_path / "val/wasp").mkdir()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "val/wasp/0.png")
        with pytest.raises(
            ValueError, match="wasp must have the name of a class of the training data: ant, zebra"
        ):
            read_labeled(tmp_path, split="test", size=(8, 8))
    (tmp_path / ("train" if split else ".") / "ant/0.png").write_bytes(b"no picture")
    with pytest.raises(
        ValueError, match=r"ant/0.png cannot be read: not an image in a known format .remove it"
    ):
        data.pixels(ROWS[:1])


def test_a_hub_data_set_on_disk_is_read_as_it_was_written(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pictures = [Image.fromarray(array) for array in bytes_of(12, 8, 8, 3)]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    made = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1] * 6}, features=features)
    datasets.DatasetDict({"train": made, "validation": made}).save_to_disk(str(tmp_path / "set"))
    for split in ("train", "test"):
        data = read_labeled(f"hf:{tmp_path / 'set'}", split=split)
        assert data.class_names == ("cat", "dog")
        assert data.labels.tolist() == [0, 1] * 6
        assert torch.equal(data.pixels(ROWS), torch.from_numpy(bytes_of(12, 8, 8, 3)).permute(0, 3, 1, 2))


def test_without_the_library_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'weakspot\[datasets\]'"):
        read_labeled("hf:somewhere")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", b"\x00\x00\x09\x01", "must be an IDX file of bytes"),
        (
            "train-images-idx3-ubyte",
            idx(bytes_of(3, 4, 4))[:-1],
            r"damaged: its header announces \[3, 4, 4\], but it holds 47 bytes",
        ),
        ("train-images-idx3-ubyte.gz", b"\x1f\x8b no", "gzip"),
        ("data_batch_1.bin", b"12345", "must be a multiple of 3073, got 5 bytes"),
        ("x.npz", b"no zip", "cannot be read as a file of arrays"),
        ("nothing.txt", b"", "data must be a folder of MNIST"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(3, np.uint8))) if "idx3" in name else None
    with pytest.raises(ValueError, match=message):
        read_labeled(path if path.suffix == ".npz" else tmp_path)


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    images, labels = torch.zeros(3, 1, 4, 4), torch.tensor([0, 1, 2])
    for given_images, given_labels, names, message in (
        (images[0], labels, None, "images must be a tensor"),
        (images.long(), labels, None, "images must be bytes .* got torch.int64"),
        (images * torch.nan, labels, None, "images must be bytes .* got floats from nan"),
        (images, labels[:2], None, "labels must"),
        (images, -labels, None, "labels must be classes"),
        (images, labels, ["a"], "labels must be below 1, the number of class names"),
    ):
        with pytest.raises(ValueError, match=message):
            from_tensors(given_images, given_labels, class_names=names)
    with pytest.raises(ValueError, match=r"split must .* got 'trian' .did you mean 'train'"):
        read_labeled(tmp_path, split="trian")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_labeled(tmp_path / "missing")
    np.savez(tmp_path / "odd.npz", pictures=np.zeros(3))
    with pytest.raises(ValueError, match=r"must hold images or images_train .* got pictures"):
        read_labeled(tmp_path / "odd.npz")
