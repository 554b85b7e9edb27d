"""CIFAR's pickles are read from every numpy and protocol, and nothing else that a pickle can say is."""

from __future__ import annotations

import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from weakspot.datasets import read_labeled

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
LABELS = [0, 1, 2, 3, 4, 9]


def write(folder: Path, content: object, name: str = "data_batch_1", protocol: int = 2) -> Path:
    (folder / name).write_bytes(pickle.dumps(content, protocol))
    return folder


def refused(source: Path, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(str(source))) as told:
        read_labeled(source)
    assert re.search(said, str(told.value)), told.value
    assert "\n" not in str(told.value)


def as_numpy_1(stored: bytes) -> bytes:
    """The same pickle with numpy 1's names; frames, which say their length, are left away."""
    if stored[1] >= 4:
        stored = stored[:2] + stored[11:]
    for module in (b"multiarray", b"numeric"):
        old, new = b"numpy._core." + module, b"numpy.core." + module
        stored = stored.replace(bytes([len(old)]) + old, bytes([len(new)]) + new).replace(
            b"c" + old, b"c" + new
        )
    return stored


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("numpy_1", [True, False])
@pytest.mark.parametrize(
    "labels", [list, np.uint8, np.dtype(">i4"), np.int64], ids=["list", "u1", "big-endian i4", "i8"]
)
def test_genuine_arrays_of_every_protocol_are_read(
    tmp_path: Path, protocol: int, numpy_1: bool, labels: Any
) -> None:
    held = LABELS if labels is list else np.array(LABELS, labels)
    for images in (IMAGES, np.asfortranarray(IMAGES)):
        stored = pickle.dumps({b"data": images, "labels": held, b"": b""}, protocol)
        (tmp_path / "data_batch_1").write_bytes(as_numpy_1(stored) if numpy_1 else stored)
        data = read_labeled(tmp_path)
        assert torch.equal(data.pixels(torch.arange(6)), torch.from_numpy(IMAGES).view(-1, 3, 32, 32))
        assert data.labels.tolist() == LABELS


def test_what_python_2_wrote_is_read(tmp_path: Path) -> None:
    raw = IMAGES.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85U\x01b\x87Rq\x03"
        b"(K\x01K\x06M\x00\x0c\x86cnumpy\ndtype\nq\x04U\x02u1K\x00K\x01\x87Rq\x05"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<I", len(raw))
        + raw
        + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in LABELS) + b"e"
    names = b"](U\x05a.pngU\x06\xe9b.pnge"
    content = (
        b"\x80\x02}q\x00(U\x04data" + array + b"U\x06labels" + numbers + b"U\x09filenames" + names + b"u."
    )
    (tmp_path / "data_batch_1").write_bytes(content)
    data = read_labeled(tmp_path)
    assert torch.equal(data.pixels(torch.arange(6)), torch.from_numpy(IMAGES).view(-1, 3, 32, 32))
    assert data.labels.tolist() == LABELS


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def plain(value: object) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def test_a_pickle_cannot_have_numpy_follow_addresses(tmp_path: Path) -> None:
    """A type of records with an object in them and no flag that says so; its bytes would be taken for pointers."""
    objects = named("numpy", "dtype") + b"(" + plain("O8") + b"\x89\x88tR"
    fields = b"}" + plain("f") + b"(" + objects + plain(0) + b"ts"
    state = (
        b"("
        + plain(3)
        + plain("|")
        + b"N("
        + plain("f")
        + b"t"
        + fields
        + plain(8)
        + plain(1)
        + plain(0)
        + b"t"
    )
    kind = named("numpy", "dtype") + b"(" + plain("V8") + b"\x89\x88tR" + state + b"b"
    raw = b"\x41" * 8 * 2 * 3072
    array = (
        named("numpy._core.multiarray", "_reconstruct") + b"(" + named("numpy", "ndarray") + b"(" + plain(0)
        + b"tC\x01btR(" + plain(1) + b"(" + plain(2) + plain(3072) + b"t" + kind + b"\x89B"
        + struct.pack("<I", len(raw)) + raw + b"tb"
    )  # fmt: skip
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x03}(C\x04data" + array + b"C\x06labels](K\x00K\x00eu.")
    said = "import sys; from weakspot.datasets import read_labeled; read_labeled(sys.argv[1])"
    ended = subprocess.run([sys.executable, "-c", said, str(tmp_path)], capture_output=True, check=False)
    assert ended.returncode == 1, "a crash is below zero"
    refused(tmp_path, "data is an array of 'V8'; accepted is an array of bytes")


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (b"\x80\x02cnumpy\ndtype\n}U\x01aK\x01sb.", "changes dtype"),
        (b"\x80\x02cnumpy\nload\nU\x01x\x85R.", "asks for numpy.load, which could run code"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "cannot be read"),
        (b"\x80\x02}(" + b")" + b"\x85" * 1_000_000 + b"K\x01u.", "more than 100 tuples"),
        (b"\x80\x02Nr\xff\xff\xff\xff.", "remembers more"),
        (b"\x80\x02" + b"]" * 10, "cannot be read"),
        (
            b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.",
            "encodes what is no bytes",
        ),
        (b"", "cannot be read"),
    ],
    ids=["changes a name", "other name", "new", "deep key", "far memory", "cut off", "other codec", "empty"],
)
def test_pickles_that_do_more_are_refused(tmp_path: Path, stored: bytes, said: str) -> None:
    (tmp_path / "data_batch_1").write_bytes(stored)
    refused(tmp_path, said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {b"data": IMAGES / 255, b"labels": LABELS},
            "data is an array of 'f8'; accepted is an array of bytes",
        ),
        ({b"data": IMAGES.astype(np.int64), b"labels": LABELS}, "'i8'"),
        ({b"data": IMAGES.astype(object), b"labels": LABELS}, "cannot be read|data is"),
        ({b"data": IMAGES[:, :-1], b"labels": LABELS}, r"data is \(6, 3071\); accepted is \(N, 3072\)"),
        ({b"data": IMAGES[:0], b"labels": []}, r"data is \(0, 3072\)"),
        ({b"data": IMAGES.tolist(), b"labels": LABELS}, "data is a list"),
        ({b"data": IMAGES}, "labels is missing"),
        ({b"labels": LABELS}, "data is missing"),
        ({b"data": IMAGES, b"labels": [0.0] * 6}, "labels holds a float; accepted are whole numbers"),
        (
            {b"data": IMAGES, b"labels": np.zeros(6)},
            "labels is an array of 'f8'; accepted is an array of whole",
        ),
        ({b"data": IMAGES, b"labels": ["a"] * 6}, "labels holds a str"),
        ({b"data": IMAGES, b"labels": "abcdef"}, "labels is a str"),
        ({b"data": IMAGES, b"labels": [True] * 6}, "labels holds a bool"),
        ({b"data": IMAGES, b"labels": [[0], [1, 2]]}, "labels holds a list"),
        ({b"data": IMAGES, b"labels": np.zeros((6, 1), np.int64)}, r"labels is \(6, 1\); accepted is \(N,\)"),
        ({b"data": IMAGES, b"labels": LABELS[:4]}, "labels holds 4 classes; accepted is one for each of 6"),
        ({b"data": IMAGES, b"labels": [*LABELS[:5], 10]}, "the label 10; accepted are 0 to 9"),
        ({b"data": IMAGES, b"labels": [*LABELS[:5], -1]}, "the label -1; accepted are 0 to 9"),
        ({b"data": IMAGES, b"fine_labels": [*LABELS[:5], 100]}, "the label 100; accepted are 0 to 99"),
        ({b"data": IMAGES, b"labels": [1 << 100_000, *LABELS[:5]]}, "the label of more than 64 bits"),
    ],
)
def test_other_contents_are_told_with_the_file(tmp_path: Path, content: object, said: str) -> None:
    refused(write(tmp_path, content), f"data_batch_1.*({said})")


@pytest.mark.parametrize(
    ("name", "head", "label", "said"),
    [("data_batch_1.bin", 1, 255, "accepted are 0 to 9"), ("train.bin", 2, 100, "accepted are 0 to 99")],
)
def test_one_wrong_byte_makes_no_more_classes(
    tmp_path: Path, name: str, head: int, label: int, said: str
) -> None:
    rows = np.zeros((3, head + 3072), np.uint8)
    rows[1, head - 1] = label
    (tmp_path / name).write_bytes(rows.tobytes())
    refused(tmp_path, f"{name} holds the label {label}; {said}")


@pytest.mark.parametrize(
    ("name", "stored", "said"),
    [
        ("batches.meta", pickle.dumps({"label_names": 5}, 2), "no list of texts"),
        ("batches.meta", pickle.dumps({"label_names": [1, 2]}, 2), "no list of texts"),
        ("batches.meta", pickle.dumps({b"label_names": [b"\xff"]}, 3), "accepted is UTF-8"),
        ("batches.meta.txt", b"\xff\xfe", "accepted is UTF-8"),
        ("batches.meta.txt", b"cat dog", "labels holds class 9; there are names for 2 classes"),
    ],
)
def test_names_that_are_none_are_told(tmp_path: Path, name: str, stored: bytes, said: str) -> None:
    write(tmp_path, {b"data": IMAGES, b"labels": LABELS})
    (tmp_path / name).write_bytes(stored)
    refused(tmp_path, said)


@pytest.mark.parametrize("stray", [b"", b"a.png\n", b"a.png\n" * 2000])
def test_another_file_called_train_is_no_cifar(tmp_path: Path, stray: bytes) -> None:
    from PIL import Image

    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    (tmp_path / "train").write_bytes(stray)
    (tmp_path / "test").write_bytes(stray)
    (tmp_path / "ant/train").write_bytes(stray)
    assert read_labeled(tmp_path, size=(8, 8)).class_names == ("ant", "bee")
