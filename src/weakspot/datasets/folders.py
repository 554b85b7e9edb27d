"""Folders of classes: DATA/train/CLASS/picture.jpg, or DATA/CLASS/picture.jpg."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from weakspot.datasets.labeled import LabeledImages, from_files

SPLITS = {"train": ("train", "training"), "test": ("val", "valid", "validation", "test", "testing")}
PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}


def has_classes(folder: Path) -> bool:
    """Whether there are folders of pictures."""
    roots = [folder, *(folder / name for names in SPLITS.values() for name in names)]
    return any(_holds_classes(root) for root in roots)


def read_class_folders(
    folder: Path, split: str, *, size: tuple[int, int] | None, channels: int
) -> LabeledImages:
    """The pictures of a split; classes are the names of the folders, sorted, those of the training split for both.

    Args:
        folder: with a folder for each split, or for each class: then that is the training split.
        split: "train" or "test".
        size: (height, width) pictures are cropped and resized to.
        channels: 3 for color, 1 for gray.

    Raises:
        FileNotFoundError: when the split is not there.
        ValueError: when no size is given, or a folder of the split is no class of the training.
    """
    if size is None:
        raise ValueError(f"size is not given; pictures in {folder} need (height, width) to be brought to")
    roots = {part: _root(folder, part) for part in SPLITS}
    if roots["train"] is None and _holds_classes(folder):
        roots["train"] = folder
    root = roots[split]
    if root is None:
        raise FileNotFoundError(f"{folder}: there is no folder {' or '.join(SPLITS[split])} in it")
    listed = _listed(root)
    names = list(listed if roots["train"] in {root, None} else _listed(roots["train"]))
    paths, labels = [], []
    for name, files in listed.items():
        if name not in names:
            raise ValueError(
                f"{root / name} is no class of the training data; accepted: {', '.join(names[:20])}"
            )
        paths += files
        labels += [names.index(name)] * len(files)
    return from_files(
        paths,
        torch.tensor(labels, dtype=torch.int64),
        names,
        size=size,
        channels=channels,
        name=f"{folder.name} {split}",
    )


def _root(folder: Path, split: str) -> Path | None:
    return next((folder / name for name in SPLITS[split] if _holds_classes(folder / name)), None)


def _holds_classes(root: Path) -> bool:
    """Whether a folder in it holds a picture; looks no further than the first."""
    return any(True for folder in _folders(root) for _ in _pictures(folder))


def _listed(root: Path) -> dict[str, list[Path]]:
    """The pictures of every class, sorted; each folder is gone through once."""
    found = {folder.name: sorted(_pictures(folder)) for folder in _folders(root)}
    return {name: pictures for name, pictures in found.items() if pictures}


def _folders(root: Path) -> list[Path]:
    """Folders in it that may be classes; those of splits are none."""
    splits = {name for names in SPLITS.values() for name in names}
    if not root.is_dir():
        return []
    return [
        path
        for path in sorted(root.iterdir())
        if not path.name.startswith(".") and path.name not in splits and path.is_dir()
    ]


def _pictures(folder: Path) -> Iterator[Path]:
    for inner, _, names in os.walk(folder):
        for name in names:
            path = Path(inner, name)
            if path.suffix.lower() in PICTURES and not name.startswith("."):
                yield path
