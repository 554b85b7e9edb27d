"""CIFAR-10 and CIFAR-100 as their authors ship them: binary files, or pickles of which only arrays are read."""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weakspot.datasets.labeled import LabeledImages, from_tensors

PIXELS = 3 * 32 * 32
FILES = {
    "train": ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "train"),
    "test": ("test_batch", "test"),
}
HUNDRED = {"train", "test"}  # CIFAR-100's names, which other things are called too
LABELS = {"labels": 10, "fine_labels": 100}
BYTES, WHOLE = ("u1",), ("u1", "i4", "i8")  # numpy's names of the types that are read
META = ("batches.meta.txt", "fine_label_names.txt", "batches.meta", "meta")
# What pickles of arrays name, with numpy 1 and 2; "bytes" is how protocol 2 writes b"".
ARRAYS = {
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    ("__builtin__", "bytes"),
    ("builtins", "bytes"),
}
MOST_NESTED = 100  # tuples and sets; those of genuine files are a dozen


def has_cifar(folder: Path) -> bool:
    """Whether any of the files of CIFAR-10 or CIFAR-100 lie there."""
    return any(_files(folder, split) for split in FILES)


def read_cifar_folder(folder: Path, split: str) -> LabeledImages:
    """The images and (fine) labels of a split, in memory; as many of its files as are there.

    Raises:
        FileNotFoundError: when none of them is there.
        ValueError: when one is damaged, or a pickle holds more than arrays.
    """
    files = _files(folder, split)
    if not files:
        raise FileNotFoundError(f"{folder}: there is no {' or '.join(FILES[split])}, with or without .bin")
    read = [_read_binary(path) if path.suffix == ".bin" else _read_pickle(path) for path in files]
    images = torch.cat([images for images, _ in read])
    labels = torch.cat([labels for _, labels in read])
    names = _names(folder)
    try:
        return from_tensors(images, labels, class_names=names, name=f"{folder.name} {split}")
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _files(folder: Path, split: str) -> list[Path]:
    names = [folder / f"{name}{suffix}" for suffix in (".bin", "") for name in FILES[split]]
    found = [path for path in names if path.is_file() and (path.stem not in HUNDRED or _is_hundred(path))]
    binary = [path for path in found if path.suffix == ".bin"]
    return binary or found


def _is_hundred(path: Path) -> bool:
    """Whether it can hold an image, and a pickle starts like one."""
    if path.stat().st_size < PIXELS:
        return False
    with path.open("rb") as file:
        return path.suffix == ".bin" or file.read(1) == pickle.PROTO


def _read_binary(path: Path) -> tuple[Tensor, Tensor]:
    content = np.fromfile(path, np.uint8)
    hundred = path.stem in HUNDRED
    head = 2 if hundred else 1  # CIFAR-100 puts a coarse label before the fine one
    if not len(content) or len(content) % (head + PIXELS):
        raise ValueError(f"{path} is damaged: {len(content)} bytes are no multiple of {head + PIXELS}")
    rows = torch.from_numpy(content).view(-1, head + PIXELS)
    labels = rows[:, head - 1].long()
    _check_labels(path, int(labels.min()), int(labels.max()), LABELS["fine_labels" if hundred else "labels"])
    return rows[:, head:].reshape(-1, 3, 32, 32), labels


def _read_pickle(path: Path) -> tuple[Tensor, Tensor]:
    content = _unpickled(path)
    try:
        images, labels, classes = _images_and_labels(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    _check_labels(path, min(labels), max(labels), classes)
    return torch.from_numpy(images.copy()).view(-1, 3, 32, 32), torch.tensor(labels, dtype=torch.int64)


def _images_and_labels(content: dict[Any, Any]) -> tuple[NDArray[np.uint8], list[int], int]:
    """Rows of pixels, the class of each, and how many classes there can be."""
    images = _array(_value(content, "data"), "data", BYTES)
    if images.ndim != 2 or images.shape[1] != PIXELS or not len(images):
        raise ValueError(f"data is {images.shape}; accepted is (N, {PIXELS})")
    key = next((key for key in LABELS if _value(content, key) is not None), "labels")
    labels = _numbers(_value(content, key), key)
    if len(labels) != len(images):
        raise ValueError(
            f"{key} holds {len(labels)} classes; accepted is one for each of {len(images)} images"
        )
    return images, labels, LABELS[key]


def _check_labels(path: Path, lowest: int, highest: int, classes: int) -> None:
    if lowest < 0 or highest >= classes:
        wrong = lowest if lowest < 0 else highest
        said = wrong if abs(wrong) < 2**63 else "of more than 64 bits"
        raise ValueError(f"{path} holds the label {said}; accepted are 0 to {classes - 1}")


def _names(folder: Path) -> list[str] | None:
    path = next((folder / name for name in META if (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        if path.suffix == ".txt":
            return path.read_text("utf-8").split()
        content = _unpickled(path)
        names = next(
            (
                held
                for key in ("fine_label_names", "label_names")
                if (held := _value(content, key)) is not None
            ),
            None,
        )
        if names is None:
            return None
        if not isinstance(names, list) or any(not isinstance(name, bytes | str) for name in names):
            raise ValueError(
                f"{path} holds label names that are no list of texts; accepted is a list of them"
            )
        return [name.decode() if isinstance(name, bytes) else name for name in names]
    except UnicodeDecodeError:
        raise ValueError(f"{path} holds names that are no text; accepted is UTF-8") from None


def _value(content: dict[Any, Any], key: str) -> Any:
    """What Python 2 wrote under bytes and Python 3 under text."""
    return content.get(key.encode(), content.get(key))


def _numbers(held: Any, key: str) -> list[int]:
    if not isinstance(held, list):
        array = _array(held, key, WHOLE)
        if array.ndim != 1:
            raise ValueError(f"{key} is {array.shape}; accepted is (N,)")
        numbers: list[int] = array.tolist()
        return numbers
    others = [number for number in held if type(number) is not int]  # truth values are none
    if others:
        raise ValueError(f"{key} holds {_kind(others[0])}; accepted are whole numbers")
    return held


def _array(held: Any, key: str, accepted: tuple[str, ...]) -> NDArray[Any]:
    """The array that a pickle describes, built of its bytes.

    Only the names of a few plain types are taken from the file. Types that it describes itself are never built: one of
    records with objects in them would have numpy follow whatever addresses the bytes are.
    """
    asked = (
        f"accepted is an array of {'bytes' if accepted == BYTES else 'whole numbers'} ({', '.join(accepted)})"
    )
    order: Literal["C", "F"]
    match held:
        case _Made(name="_reconstruct", state=(_, tuple(shape), described, int(fortran), bytes(content))):
            order = "F" if fortran else "C"
        case _Made(
            name="_frombuffer", parts=((bytes() | bytearray()) as content, described, tuple(shape), mode)
        ):
            order = "F" if mode == "F" else "C"
        case _:
            raise ValueError(f"{key} is {_kind(held)}; {asked}")
    match described:
        case _Made(
            name="dtype", parts=((str() | bytes()) as kind, *_), state=(_, (str() | bytes()) as end, *_)
        ):
            kind, end = _text(kind).lstrip("|"), _text(end)
        case _:
            raise ValueError(f"{key} is damaged: the type of the array is not said")
    if kind not in accepted or end not in {"|", "<", ">", "="}:
        raise ValueError(f"{key} is an array of {reprlib.repr(kind)}; {asked}")
    dtype = np.dtype(end + kind)
    if len(shape) > 2 or any(type(side) is not int or side < 0 for side in shape):
        raise ValueError(f"{key} is damaged: the array's shape is {reprlib.repr(shape)}")
    if math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(
            f"{key} is damaged: {len(content)} bytes are no {kind} of shape {reprlib.repr(shape)}"
        )
    array: NDArray[Any] = np.frombuffer(content, dtype).reshape(shape, order=order)
    return array


def _kind(held: Any) -> str:
    if held is None:
        return "missing"
    return f"a {held.name if isinstance(held, _Asked | _Made) else type(held).__name__}"


def _text(held: str | bytes) -> str:
    return held.decode("latin1") if isinstance(held, bytes) else held


def _unpickled(path: Path) -> dict[Any, Any]:
    """The mapping in a pickle that holds numbers, text and arrays; anything else in it is refused, not run."""
    try:
        stored = path.read_bytes()
        _check_steps(stored)
        content = _OnlyArrays(io.BytesIO(stored), encoding="bytes").load()
    except Exception as error:  # noqa: BLE001 - damaged pickles raise nearly anything
        raise ValueError(f"{path} cannot be read as CIFAR's arrays ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {_kind(content)}; accepted is CIFAR's mapping of arrays")
    return content


def _check_steps(stored: bytes) -> None:
    """Refuses the pickles that would end the process: by taking its memory, or its stack for the hash of a key."""
    nested = 0
    for step, argument, _ in pickletools.genops(stored):
        nested += step.name.startswith("TUPLE") or step.name == "FROZENSET"
        if nested > MOST_NESTED:
            raise pickle.UnpicklingError(f"it holds more than {MOST_NESTED} tuples")
        if step.name.endswith("PUT") and isinstance(argument, int) and argument > len(stored):
            raise pickle.UnpicklingError(f"it remembers more than its {len(stored)} bytes can hold")


class _OnlyArrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which could run code; accepted are arrays, numbers and text"
            )
        return _Asked(name)


# The pickle is given these in place of numpy's: they write down what it says and do nothing.
@dataclass(frozen=True, eq=False, repr=False)
class _Asked:
    name: str

    def __call__(self, *parts: Any) -> Any:
        if self.name == "bytes" and not parts:
            return b""
        if self.name != "encode":
            return _Made(self.name, parts)
        match parts:  # how Python 3 writes bytes for Python 2
            case (str(text), "latin1" | b"latin1"):
                return text.encode("latin1")
        raise pickle.UnpicklingError("it encodes what is no bytes")

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"it changes {self.name}")


@dataclass(eq=False, repr=False)  # what it holds may be endless
class _Made:
    name: str
    parts: tuple[Any, ...]
    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state
