"""Data sets by path: the content decides how a file or folder is read. Folders of one class each are read here."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from weakspot._checks import check_choice, check_size
from weakspot.datasets.arrays import read_npz
from weakspot.datasets.binary_files import has_cifar, has_idx, read_cifar_folder, read_idx_folder
from weakspot.datasets.hub import read_hub
from weakspot.datasets.labeled import LabeledImages, from_files

SPLITS = {"train": ("train", "training"), "test": ("val", "valid", "validation", "test", "testing")}
SPLIT_NAMES = [name for names in SPLITS.values() for name in names]
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
FORMS = (
    "a folder of MNIST's IDX files, of CIFAR's binary files or of one folder per class, an .npz file with images and "
    "labels, or hf:DIRECTORY_OR_NAME"
)


def read_labeled(
    source: Path | str, *, split: str = "train", size: tuple[int, int] | None = None, channels: int = 3
) -> LabeledImages:
    """Read images with their classes.

    Args:
        source: a folder of IDX files (MNIST), of CIFAR's binary files, or of one folder per class, which may lie in
            folders train and val or test; an .npz file; "hf:" and a directory or name of a Hugging Face data set.
        split: "train" or "test".
        size: (height, width) to which image files are cropped and resized; arrays keep their size.
        channels: 3 for color, 1 for gray; arrays keep their channels.

    Raises:
        FileNotFoundError: if there is nothing at `source`, or not that split.
        ValueError: if `source` is not a data set, or is damaged.
    """
    check_choice("split", split, SPLITS)
    check_size("size", size)
    if channels not in (1, 3):
        raise ValueError(f"channels must be 3 (color) or 1 (gray), got {channels}")
    if str(source).startswith("hf:"):
        return read_hub(str(source).removeprefix("hf:"), split, size=size, channels=channels)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.suffix == ".npz":
        return read_npz(path, split)
    if path.is_dir():
        arrays = array_folder(path)
        if arrays is not None:
            return read_idx_folder(arrays, split) if has_idx(arrays) else read_cifar_folder(arrays, split)
        if any(_has_classes(root) for root in (path, *(path / name for name in SPLIT_NAMES))):
            return _read_class_folders(path, split, size, channels)
    raise ValueError(f"data must be {FORMS}, got {path}")


def array_folder(path: Path) -> Path | None:
    """The folder with MNIST's or CIFAR's files: this one, or one in it, because archives often unpack to that."""
    folders = (path, *(inner for inner in sorted(path.iterdir()) if inner.is_dir()))
    return next((folder for folder in folders if has_idx(folder) or has_cifar(folder)), None)


def _read_class_folders(
    folder: Path, split: str, size: tuple[int, int] | None, channels: int
) -> LabeledImages:
    """The images of a split; classes are the sorted names of the training split's folders, for both splits."""
    if size is None:
        raise ValueError(f"size must be (height, width) for image files, got none for {folder}")
    roots = {part: _root(folder, part) for part in SPLITS}
    if roots["train"] is None and _has_classes(folder):
        roots["train"] = folder  # no folders of splits: everything is the training split
    root = roots[split]
    if root is None:
        raise FileNotFoundError(
            f"{folder} must have a folder {' or '.join(SPLITS[split])} with a folder per class"
        )
    files_by_class = _files_by_class(root)
    train = roots["train"]
    names = list(files_by_class if train is None or train == root else _files_by_class(train))
    paths: list[Path] = []
    labels: list[int] = []
    for name, files in files_by_class.items():
        if name not in names:
            raise ValueError(
                f"{root / name} must have the name of a class of the training data: {', '.join(names[:20])}"
            )
        paths += files
        labels += [names.index(name)] * len(files)
    name = f"{folder.name} {split}"
    classes = torch.tensor(labels, dtype=torch.int64)
    return from_files(paths, classes, names, size=size, channels=channels, name=name)


def _root(folder: Path, split: str) -> Path | None:
    return next((folder / name for name in SPLITS[split] if _has_classes(folder / name)), None)


def _has_classes(root: Path) -> bool:
    """Whether a folder in `root` holds an image; stops at the first one."""
    return any(True for folder in _class_folders(root) for _ in _image_files(folder))


def _files_by_class(root: Path) -> dict[str, list[Path]]:
    """The sorted image files of every class; each folder is listed once."""
    files = {folder.name: sorted(_image_files(folder)) for folder in _class_folders(root)}
    return {name: paths for name, paths in files.items() if paths}


def _class_folders(root: Path) -> list[Path]:
    """Folders in `root` that may be classes: not hidden, and not named for a split."""
    if not root.is_dir():
        return []
    return [
        path
        for path in sorted(root.iterdir())
        if not path.name.startswith(".") and path.name not in SPLIT_NAMES and path.is_dir()
    ]


def _image_files(folder: Path) -> Iterator[Path]:
    for inner, _, names in os.walk(folder):
        for name in names:
            path = Path(inner, name)
            if path.suffix.lower() in SUFFIXES and not name.startswith("."):
                yield path
