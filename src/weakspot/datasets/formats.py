"""Data sets by path: what lies there says what it is."""

from __future__ import annotations

from pathlib import Path

from weakspot._checks import check_choice
from weakspot.datasets.arrays import read_npz
from weakspot.datasets.cifar import has_cifar, read_cifar_folder
from weakspot.datasets.folders import has_classes, read_class_folders
from weakspot.datasets.hub import read_hub
from weakspot.datasets.idx import has_idx, read_idx_folder
from weakspot.datasets.labeled import LabeledImages

SPLITS = ("train", "test")
FORMS = (
    "a folder of MNIST's IDX files, of CIFAR's batches or of one folder per class, an .npz file with images and "
    "labels, or hf:DIRECTORY_OR_NAME"
)


def read_labeled(
    source: Path | str, *, split: str = "train", size: tuple[int, int] | None = None, channels: int = 3
) -> LabeledImages:
    """Images with their classes.

    Args:
        source: a folder of IDX files (MNIST), of CIFAR's files (binary or Python's) or of folders that are classes,
            with or without folders train and val or test above them; an .npz file; "hf:" and a directory or name.
        split: "train" or "test".
        size: (height, width) pictures are brought to; files of arrays keep theirs.
        channels: 3 for color, 1 for gray; files of arrays keep theirs.

    Raises:
        FileNotFoundError: when there is nothing at `source`, or not that split.
        ValueError: when it is nothing of the kind, or damaged.
    """
    check_choice("split", split, SPLITS)
    if channels not in {1, 3}:
        raise ValueError(f"channels is {channels}; accepted are 3 (color) and 1 (gray)")
    if str(source).startswith("hf:"):
        return read_hub(str(source).removeprefix("hf:"), split, size=size, channels=channels)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    if path.suffix == ".npz":
        return read_npz(path, split)
    if path.is_dir():
        # Archives often unpack to a folder in a folder.
        for folder in (path, *(inner for inner in sorted(path.iterdir()) if inner.is_dir())):
            if has_idx(folder):
                return read_idx_folder(folder, split)
            if has_cifar(folder):
                return read_cifar_folder(folder, split)
        if has_classes(path):
            return read_class_folders(path, split, size=size, channels=channels)
    raise ValueError(f"{path} is no data set; accepted is {FORMS}")
