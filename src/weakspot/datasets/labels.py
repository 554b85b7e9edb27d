"""Labels: the class of each image of a model that exists already, from a label file or from folder names.

`explain`, `attack`, `defend` and `audit` read `--labels` here, so that a line of a label file or the name of a folder
means the same class to all of them. They differ in what they do with an image that the file does not list: `audit`
skips it, the others refuse the file.

Two sources of labels are elsewhere: labels stored beside images in an array (`arrays`), and the folders of training
data (`folders`), which define the classes of a model instead of naming those of one.
"""

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import NamedTuple

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
            raise ValueError(self.unknown(argument, text))
        return number

    def unknown(self, argument: str, text: str) -> str:
        """The message for a text that names no class."""
        numbers = f"a number from 0 to {self.count - 1}"
        if not self.names:
            return f"{argument} must be {numbers}, got {text!r} (the model has no class names; --classes gives them)"
        same = [number for number, name in enumerate(self.names) if _plain(text) in _spellings(name)]
        if len(same) > 1:
            listed = " and ".join(map(str, same))
            return f"{argument} must name one class, got {text!r}, which classes {listed} are called (give a number)"
        return unknown_choice(argument, text, self.names, remedy=f"or give {numbers}")

    @cached_property
    def _by_name(self) -> Mapping[str, int]:
        spellings: dict[str, int] = {}
        for number, name in enumerate(self.names):
            for spelling in _spellings(name):
                # -1 marks a spelling of two classes, which then stands for neither.
                spellings[spelling] = -1 if spelling in spellings else number
        return {spelling: number for spelling, number in spellings.items() if number >= 0}

    @cached_property
    def _by_number(self) -> Mapping[str, int]:
        return {form.format(number): number for number in range(self.count) for form in ("{}", "class {}")}


def _spellings(name: str) -> set[str]:
    return {_plain(name), _plain(name.partition(",")[0])}


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", " ").replace("-", " ")


class LabelLine(NamedTuple):
    """What a label file says about one image.

    Attributes:
        file: path of the image, or a trailing part of it.
        label: a class name or number.
        is_number: whether the label is a number even if a class has that name.
    """

    file: str
    label: str
    is_number: bool


def read_csv(path: Path) -> Iterator[LabelLine]:
    """The lines of a CSV file with a header; see FILE_COLUMNS and CLASS_COLUMNS for the accepted titles.

    Raises:
        ValueError: if a column is missing.
    """
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        titles = [(title or "").strip().lower() for title in reader.fieldnames or []]
        file_column, class_column = (
            next((name for name in names if name in titles), None) for names in (FILE_COLUMNS, CLASS_COLUMNS)
        )
        if file_column is None or class_column is None:
            raise ValueError(
                f"labels: {path} must have the columns file and label, got {', '.join(titles) or 'none'} (also "
                f"accepted: {', '.join(FILE_COLUMNS[1:])}; {', '.join(CLASS_COLUMNS)})"
            )
        reader.fieldnames = titles
        for row in reader:
            name, label = ((row[column] or "").strip() for column in (file_column, class_column))
            yield LabelLine(name, label, class_column in NUMBER_COLUMNS)


class LabelFormat(NamedTuple):
    """A format of label files.

    Attributes:
        name: in the column `label_from` of an audit's records.
        title: in sentences.
        content: what must be in the file, for help and errors.
        read: the lines of a file.
    """

    name: str
    title: str
    content: str
    read: Callable[[Path], Iterator[LabelLine]]


CSV = LabelFormat("csv", "a CSV file", "the columns file and label", read_csv)
FORMATS = {".csv": CSV}  # by suffix; files with other suffixes are read as CSV
LABEL_FILE = " or ".join(f"{one.title} with {one.content}" for one in FORMATS.values())


@dataclass(frozen=True)
class LabelTable:
    """The content of a label file.

    Attributes:
        path: of the file.
        classes: class of each file, by the path that the table gives.
        format: of the file.
    """

    path: Path
    classes: Mapping[str, int]
    format: LabelFormat = CSV

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
            # From the whole path down to the name of the file, so that the longest end counts.
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


def read_labels(path: Path, classes: ClassIndex) -> LabelTable:
    """Read a label file in the format that its suffix names.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not valid, a label is not a class, or one file has two labels.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"labels must be {LABEL_FILE}, or {FOLDERS}, got {path}, which {what}")
    table: dict[str, int] = {}
    form = FORMATS.get(path.suffix.lower(), CSV)
    for name, label, is_number in form.read(path):
        number = classes.find(label, numbers_first=is_number)
        if number is None:
            raise ValueError(f"labels: {path}: {classes.unknown(f'label of {name}', label)}")
        key = Path(name).as_posix()
        if table.setdefault(key, number) != number:
            raise ValueError(f"labels: {path} must give one label for {name}, got {table[key]} and {number}")
    return LabelTable(path, table, form)


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
        raise ValueError(classes.unknown("labels: a folder", unknown[0]))
    return {name: number for name, number in numbers.items() if number is not None}
