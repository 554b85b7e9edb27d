"""Label files and folder names: they mean the same classes to every command that takes --labels."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer

from tests.audit.fixtures import draw_pictures
from weakspot._progress import Display
from weakspot.audit.plan.image_list import list_images
from weakspot.classifier import Classifier
from weakspot.cli.app import app
from weakspot.cli.labeled_images import find_labels
from weakspot.cli.options import ModelOptions, OutputOptions
from weakspot.cli.session import Images, Session
from weakspot.datasets import from_tensors
from weakspot.datasets.labels import (
    CLASS_COLUMNS,
    FILE_COLUMNS,
    FORMATS,
    ClassIndex,
    LabelFormat,
    LabelLine,
    LabelTable,
    folder_classes,
    read_labels,
)

NAMES = ("cat", "Dog", "Fish, aquarium", "7")
FILES = ("cat/00.png", "dog/01.png", "fish/02.png")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return draw_pictures(tmp_path / "pictures", 3)


def session() -> Session:
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 4))
    classifier = Classifier.wrap(network.eval(), input_size=(8, 8), class_names=NAMES)
    context = typer.Context(typer.main.get_command(app))
    return Session(
        context, OutputOptions(), ModelOptions("tiny"), Path("out"), Display(), classifier, sys.stdout
    )


def of_defend(table: Path, pictures: Path) -> list[int]:
    paths = [str(pictures / file) for file in FILES]
    return find_labels(str(table), session(), Images(torch.rand(3, 3, 8, 8), paths, paths)).labels.tolist()


def of_audit(table: Path, pictures: Path) -> list[int]:
    return list_images([str(pictures)], NAMES, 4, labels=str(table))["label"].to_pylist()  # type: ignore[no-any-return]


TABLES = {
    **{f"column {name}": f"{name},label\n{FILES[0]},cat\n01.png,1\n02.png,2\n" for name in FILE_COLUMNS},
    **{f"column {name}": f"file,{name}\n{FILES[0]},0\n01.png,1\n02.png,2\n" for name in CLASS_COLUMNS},
    "titles in capitals, a byte order mark": "\ufeffFile, Label\n00.png, CAT\n01.png, dog\n02.png, fish\n",
    "names and numbers": "file,label\n00.png,class 0\n01.png,DOG\n02.png,Fish_aquarium\n",
    "more columns, the file's name last": "label,note,filename\n0,x,cat/00.png\n1,y,dog/01.png\n2,z,02.png\n",
    "the longest path counts": "file,label\n00.png,0\n02.png,0\ndog/01.png,1\npictures/fish/02.png,2\n",
}


@pytest.mark.parametrize("text", TABLES.values(), ids=TABLES)
def test_a_table_that_one_command_accepts_is_accepted_by_all(pictures: Path, text: str) -> None:
    table = pictures.parent / "labels.csv"
    if "Fish_aquarium" in text:
        text = text.replace("Fish_aquarium", '"Fish, aquarium"')
    table.write_text(text)
    assert of_defend(table, pictures) == of_audit(table, pictures) == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("picture,label\n00.png,0\n", r"must have the columns file and label, got picture, label"),
        ("", "got none"),
        ("file,label\n00.png,horse\n", r"label of 00\.png must be one of cat, Dog.* got 'horse'"),
        ("file,label\n00.png,4\n", r"got '4'.*from 0 to 3"),
        ("file,label\n00.png,0\n00.png,1\n", r"must give one label for 00\.png, got 0 and 1"),
    ],
)
def test_a_table_that_one_command_refuses_is_refused_by_all(pictures: Path, text: str, message: str) -> None:
    table = pictures.parent / "labels.csv"
    table.write_text(text)
    for read in (of_defend, of_audit):
        with pytest.raises(ValueError, match=message):
            read(table, pictures)


def test_a_line_that_fits_two_images_is_refused_by_all(pictures: Path) -> None:
    (pictures / "dog/01.png").rename(pictures / "dog/00.png")
    table = pictures.parent / "labels.csv"
    table.write_text("file,label\n00.png,0\n")
    paths = [str(pictures / "cat/00.png"), str(pictures / "dog/00.png")]
    with pytest.raises(ValueError, match=r"must tell .*cat/00\.png and .*dog/00\.png apart"):
        find_labels(str(table), session(), Images(torch.rand(2, 3, 8, 8), paths, paths))
    with pytest.raises(ValueError, match="apart"):
        of_audit(table, pictures)


@pytest.mark.parametrize("name", ["labels", "labels.txt", "labels.CSV"])
def test_a_file_with_another_suffix_or_none_is_read_as_csv(pictures: Path, name: str) -> None:
    table = pictures.parent / name
    table.write_text("file,label\n00.png,2\n01.png,1\n02.png,0\n")
    assert of_defend(table, pictures) == of_audit(table, pictures) == [2, 1, 0]


def test_a_new_format_is_read_and_named_by_its_suffix(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path) -> Iterator[LabelLine]:
        for line in path.read_text().splitlines():
            file, _, label = line.partition(" = ")
            yield LabelLine(file, label, is_number=False)

    monkeypatch.setitem(FORMATS, ".lines", LabelFormat("lines", "a file of lines", "FILE = LABEL", read))
    table = pictures.parent / "labels.lines"
    table.write_text("00.png = fish\n01.png = dog\n02.png = cat\n")
    assert of_defend(table, pictures) == of_audit(table, pictures) == [2, 1, 0]
    listing = list_images([str(pictures)], NAMES, 4, labels=str(table))
    assert set(listing["label_from"].to_pylist()) == {"lines"}


def test_a_table_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"got .*nowhere\.csv, which does not exist"):
        read_labels(tmp_path / "nowhere.csv", ClassIndex(NAMES, 4))
    with pytest.raises(FileNotFoundError, match=r"which is a folder$"):
        read_labels(tmp_path, ClassIndex(NAMES, 4))


def test_an_unlisted_image_is_left_out_or_refused(tmp_path: Path) -> None:
    table = LabelTable(tmp_path / "labels.csv", {"a.png": 1})
    assert table.find_all([Path("a.png"), Path("b.png")]) == {Path("a.png"): 1}
    with pytest.raises(ValueError, match=r"must have a line for every image, got none for b\.png"):
        table.find_all([Path("a.png"), Path("b.png")], complete=True)


def test_a_name_that_is_another_classs_number_is_a_name_except_in_a_column_of_numbers(tmp_path: Path) -> None:
    classes = ClassIndex(("1", "2", "0"), 3)
    assert classes.find("1") == 0
    assert classes.find("class 1") == 1
    table = tmp_path / "labels.csv"
    for column, expected in (("label", 0), ("class_index", 1)):
        table.write_text(f"file,{column}\na.png,1\n")
        assert read_labels(table, classes).classes == {"a.png": expected}


def test_a_name_of_two_classes_names_neither() -> None:
    classes = ClassIndex(("crane", "owl", "crane"), 3)
    with pytest.raises(
        ValueError, match=r"^target must name one class, got 'crane', which classes 0 and 2 are called"
    ):
        classes.index("crane")
    assert classes.find("crane") is None


def test_folders_are_classes_by_name_or_in_sorted_order() -> None:
    classes = ClassIndex(NAMES, 4)
    assert folder_classes(["dog", "fish", "cat"], classes) == {"cat": 0, "dog": 1, "fish": 2}
    wordnet = ["n3", "n0", "n2", "n1"]
    assert folder_classes(wordnet, classes, sorted_order=True) == {
        f"n{number}": number for number in range(4)
    }
    with pytest.raises(ValueError, match=r"a folder must be one of cat.* got 'n0'"):
        folder_classes(wordnet, classes)
    with pytest.raises(
        ValueError, match="got 'holiday'"
    ):  # one odd folder does not turn the others into an order
        folder_classes(["cat", "dog", "fish", "holiday"], classes, sorted_order=True)


def test_a_target_is_a_class_by_the_same_spellings() -> None:
    classes = ClassIndex(NAMES, 4)
    assert [classes.index(text) for text in ("fish", "FISH, aquarium", "2", "class 2")] == [2] * 4


def test_without_class_names_only_numbers_are_classes() -> None:
    classes = ClassIndex((), 3)
    message = r"must be a number from 0 to 2, got '{}' \(the model has no class names; --classes gives them\)"
    with pytest.raises(ValueError, match="target " + message.format(5)):
        classes.index("5")
    with pytest.raises(ValueError, match="labels: a folder " + message.format("cat")):
        folder_classes(["cat", "1"], classes)


def test_data_sets_and_classifiers_print_in_one_line() -> None:
    data = from_tensors(torch.rand(5, 3, 8, 6), torch.arange(5), name="digits")
    assert repr(data) == "LabeledImages('digits': 5 x 3 x 8 x 6, 5 classes, in memory)"
    assert (
        repr(session().classifier)
        == "Classifier(Sequential: images 3 x 8 x 8, mean [0.0], std [1.0], 4 class names)"
    )
