"""Labels: the class of each image, from a CSV table or from folder names.

Every command reads labels here, so that a table or a folder that one command accepts is accepted by all, with the same
classes. Labels that are stored beside images in an array are in `arrays`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath

from weakspot._checks import unknown_choice

FOLDERS = "folders"
FILE_COLUMNS = ("file", "filename", "image", "path", "name")
CLASS_COLUMNS = ("class_index", "label", "class", "target", "index")
NUMBER_COLUMNS = ("class_index", "index")  # a class whose name is another class's number is not meant there


@dataclass(frozen=True)
class ClassIndex:
    """Class numbers by every spelling that a user may give.

    Names match whatever their case, with "_" and "-" as spaces, whole or up to the first comma ("fish" for "Fish,
    aquarium"). Numbers match as "3" and as "class 3". A name that fits two classes matches none.

    Attributes:
        names: of the classes; may be empty.
        count: how many classes the model has.
    """

    names: tuple[str, ...]
    count: int

    def find(self, text: str, *, numbers_first: bool = False) -> int | None:
        """The class that the text names, or None.

        Args:
            text: a class name or number.
            numbers_first: whether "3" is class 3 even if another class has the name "3".
        """
        plain = _plain(text)
        tables = (self._by_number, self._by_name) if numbers_first else (self._by_name, self._by_number)
        return next((table[plain] for table in tables if plain in table), None)

    def index(self, text: str, argument: str = "target") -> int:
        """The class that the text names.

        Raises:
            ValueError: if it names no class, or a name that two classes have.
        """
        number = self.find(text)
        if number is None:
            remedy = f"or give a number from 0 to {self.count - 1}"
            raise ValueError(unknown_choice(argument, text, self.names, remedy=remedy))
        return number

    @cached_property
    def _by_name(self) -> Mapping[str, int]:
        spellings: dict[str, int] = {}
        for number, name in enumerate(self.names):
            for spelling in {_plain(name), _plain(name.partition(",")[0])}:
                spellings[spelling] = -1 if spelling in spellings else number
        return {spelling: number for spelling, number in spellings.items() if number >= 0}

    @cached_property
    def _by_number(self) -> Mapping[str, int]:
        return {form.format(number): number for number in range(self.count) for form in ("{}", "class {}")}


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", " ").replace("-", " ")


@dataclass(frozen=True)
class LabelTable:
    """A CSV file of labels.

    Attributes:
        path: of the file.
        classes: class of each file, by the path that the table gives.
    """

    path: Path
    classes: Mapping[str, int]

    @classmethod
    def read(cls, path: Path, classes: ClassIndex) -> LabelTable:
        """Read a CSV file with a header; see FILE_COLUMNS and CLASS_COLUMNS for the accepted titles.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if a column is missing, a label is not a class, or one file has two labels.
        """
        if not path.is_file():
            raise FileNotFoundError(
                f"labels must be a CSV file with the columns file and label, or {FOLDERS}, got {path}, which does not "
                "exist"
            )
        table: dict[str, int] = {}
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            titles = [(title or "").strip().lower() for title in reader.fieldnames or []]
            file_column, class_column = (
                next((name for name in names if name in titles), None)
                for names in (FILE_COLUMNS, CLASS_COLUMNS)
            )
            if file_column is None or class_column is None:
                raise ValueError(
                    f"labels: {path} must have the columns file and label, got {', '.join(titles) or 'none'} (also "
                    f"accepted: {', '.join(FILE_COLUMNS[1:])}; {', '.join(CLASS_COLUMNS)})"
                )
            reader.fieldnames = titles
            for row in reader:
                name, text = ((row[column] or "").strip() for column in (file_column, class_column))
                number = classes.find(text, numbers_first=class_column in NUMBER_COLUMNS)
                if number is None:
                    message = unknown_choice(f"label of {name}", text, classes.names)
                    raise ValueError(
                        f"labels: {path}: {message} (or give a number from 0 to {classes.count - 1})"
                    )
                key = Path(name).as_posix()
                if table.setdefault(key, number) != number:
                    raise ValueError(
                        f"labels: {path} must give one label for {name}, got {table[key]} and {number}"
                    )
        return cls(path, table)

    def find_all(self, paths: Iterable[PurePath], *, complete: bool = False) -> dict[PurePath, int]:
        """The class of every file that the table lists.

        The table may give any trailing part of a path; the longest part that it gives counts, so "b/1.png" before
        "1.png" for "a/b/1.png".

        Args:
            paths: of files; the same path may occur twice.
            complete: whether every file must be listed.

        Raises:
            ValueError: if one line fits two files, or a file is not listed and `complete`.
        """
        used: dict[str, PurePath] = {}
        labels: dict[PurePath, int] = {}
        for path in paths:
            ends = (PurePath(*path.parts[start:]).as_posix() for start in range(len(path.parts)))
            key = next((end for end in ends if end in self.classes), None)
            if key is None:
                if complete:
                    raise ValueError(
                        f"labels: {self.path} must have a line for every image, got none for {path}"
                    )
                continue
            if used.setdefault(key, path) != path:
                raise ValueError(
                    f"labels: {self.path} must tell {used[key]} and {path} apart, got {key} (give more of the paths)"
                )
            labels[path] = self.classes[key]
        return labels


def folder_classes(
    folders: Iterable[str], classes: ClassIndex, *, sorted_order: bool = False
) -> dict[str, int]:
    """The class that each folder is named for.

    Args:
        folders: names.
        classes: of the model.
        sorted_order: whether folders stand for the classes in sorted order if there are as many as classes and none is
            named for a class (data sets with folders such as n01440764).

    Raises:
        ValueError: if a folder is not named for a class.
    """
    names = sorted(set(folders))
    numbers = {name: classes.find(name) for name in names}
    unknown = [name for name in names if numbers[name] is None]
    if sorted_order and len(unknown) == len(names) == classes.count:
        return {name: number for number, name in enumerate(names)}
    if unknown:
        raise ValueError(unknown_choice("labels: a folder", unknown[0], classes.names))
    return {name: number for name, number in numbers.items() if number is not None}
