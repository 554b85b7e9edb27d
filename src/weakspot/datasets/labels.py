"""Labels: the class of each picture, from a table, from its folder's name, or as the model reads it."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weakspot.cli.app import UNREADABLE, USAGE, Failure, note
from weakspot.cli.aims import class_index

if TYPE_CHECKING:
    from torch import Tensor

    from weakspot.classifier import Classifier


FOLDERS = "folders"
COLUMNS = ("file", "label")


def find_labels(
    text: str | None, classifier: Classifier, images: Tensor, paths: Sequence[str]
) -> tuple[Tensor, str]:
    """Labels (N,) and where they are from.

    Args:
        text: a CSV file with the columns file and label, "folders", or None for the model's predictions.
        classifier: which gives classes their names.
        images: (N, C, H, W).
        paths: of the pictures.
    """
    import torch

    from weakspot.classifier import check_images, evaluating, predict

    with evaluating(classifier):
        logits = predict(classifier, check_images(images, classifier))
    if text is None:
        return logits.argmax(1), "the model's own predictions on the clean pictures"
    count = logits.shape[1]
    if text == FOLDERS:
        said = [Path(path).absolute().parent.name for path in paths]
        classes = _classes_of_folders(said, classifier, count)
        where = "names of the pictures' folders"
    else:
        said = _from_table(Path(text), paths)
        classes = {name: class_index(classifier, name, count, "labels") for name in set(said)}
        where = text
    return torch.tensor([classes[name] for name in said], device=logits.device), where


def _classes_of_folders(said: Sequence[str], classifier: Classifier, count: int) -> Mapping[str, int]:
    """By name or number; where there are as many folders as classes and none is either, in sorted order."""
    folders = sorted(set(said))
    try:
        return {name: class_index(classifier, name, count, "labels") for name in folders}
    except Failure:
        if len(folders) != count:
            raise
    note(
        f"labels: the {count} folders stand for the {count} classes in sorted order ({folders[0]} is class 0)"
    )
    return {name: number for number, name in enumerate(folders)}


def _from_table(table: Path, paths: Sequence[str]) -> list[str]:
    """What the table says of each picture, which it may call by any end of its path."""
    rows = _read_table(table)
    said: list[str] = []
    used: dict[str, str] = {}
    for path in paths:
        parts = Path(path).absolute().parts
        ends = (Path(*parts[start:]).as_posix() for start in range(len(parts)))
        found = next((end for end in ends if end in rows), None)
        if found is None:
            raise Failure(f"labels: {table} has no line for {path}", USAGE)
        if found in used:
            raise Failure(
                f"labels: {found} in {table} may be {used[found]} or {path}; give more of their paths", USAGE
            )
        used[found] = path
        said.append(rows[found])
    return said


def _read_table(table: Path) -> dict[str, str]:
    """File to label."""
    if not table.is_file():
        raise Failure(
            f"labels: {table}: there is no such file; accepted is a CSV file with the columns file and label, or "
            f"{FOLDERS}",
            UNREADABLE,
        )
    rows: dict[str, str] = {}
    with table.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        titles = [(title or "").strip().lower() for title in reader.fieldnames or []]
        missing = [name for name in COLUMNS if name not in titles]
        if missing:
            raise Failure(
                f"labels: {table} has the columns {', '.join(titles) or 'none'}; accepted are file and label",
                UNREADABLE,
            )
        reader.fieldnames = titles
        for row in reader:
            name, label = ((row[column] or "").strip() for column in COLUMNS)
            key = Path(name).as_posix()
            if rows.setdefault(key, label) != label:
                raise Failure(f"labels: {table} says both {rows[key]} and {label} of {name}", USAGE)
    return rows
