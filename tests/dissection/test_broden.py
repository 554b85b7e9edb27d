"""Broden: what was labeled is what is read, whatever the files look like."""

from __future__ import annotations

import csv
import itertools
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from tests.dissection.broden_fixture import (
    CATEGORIES,
    CONCEPTS,
    CONTENTS,
    LABELS,
    LAW,
    LEFT,
    TOP,
    label_maps,
    paint,
    twelve_images,
)
from weakspot.dissection import Annotation, ConceptSet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return twelve_images(tmp_path / "twelve")


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), "utf-8")


def content(concepts: ConceptSet, annotation: Annotation) -> dict[tuple[str, str], NDArray[np.bool_]]:
    defined = [concepts.concepts[place] for place in annotation.concepts.tolist()]
    return {
        (concept.name, concept.category): mask.numpy()
        for concept, mask in zip(defined, annotation.masks, strict=True)
    }


def test_the_fixture_matches_its_comments(folder: Path) -> None:
    concepts = ConceptSet.open(str(folder))
    assert len(concepts) == 12
    assert concepts.categories == CATEGORIES
    assert tuple((concept.name, concept.category) for concept in concepts.concepts) == CONCEPTS
    assert all(LABELS[concept.number][0] == concept.name for concept in concepts.concepts)
    for index, expected in enumerate(CONTENTS):
        annotation = concepts.annotation(index)
        assert annotation.concepts.dtype == torch.int64
        assert annotation.masks.dtype == annotation.categories.dtype == torch.bool
        assert annotation.masks.shape == (len(expected), 8, 8)
        assert annotation.concepts.tolist() == sorted(set(annotation.concepts.tolist()))
        read = content(concepts, annotation)
        assert read.keys() == expected.keys()
        assert all(np.array_equal(read[name], expected[name]) for name in expected)
        assert concepts.image(index).is_file()
        assert concepts.split(index) == ("val" if index % 2 else "train")
    annotated = [concepts.annotation(index).categories.tolist() for index in (0, 2, 5, 6, 11)]
    assert annotated == [[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 1]]


def test_the_ious_counted_by_hand_in_the_fixture_are_those_of_its_masks(folder: Path) -> None:
    concepts = ConceptSet.open(folder)
    for everywhere, expected in ((True, 1 / 3), (False, 3 / 7)):
        both = either = 0
        for index in range(12):
            annotation = concepts.annotation(index)
            red = np.asarray(Image.open(concepts.image(index)))[::2, ::2, 0] > 127
            if everywhere or annotation.categories[0]:
                sky = content(concepts, annotation).get(("sky", "object"), np.zeros((8, 8), bool))
                both += (red & sky).sum()
                either += (red | sky).sum()
        assert both / either == expected


@given(planes=st.lists(label_maps(40), min_size=1, max_size=4), whole=st.sets(st.integers(0, 40), max_size=3))
@LAW
def test_a_concept_is_the_union_of_the_masks_of_its_category(
    tmp_path: Path, planes: list[NDArray[np.int64]], whole: set[int]
) -> None:
    (tmp_path / "images").mkdir(exist_ok=True)
    height, width = planes[0].shape
    for number, plane in enumerate(planes):
        paint(tmp_path / "images" / f"{number}.png", plane)
    cell = ";".join([*(f"{number}.png" for number in range(len(planes))), *map(str, whole)])
    (tmp_path / "index.csv").write_text(
        f"image,split,ih,iw,sh,sw,part,object\na.png,train,1,1,{height},{width},,{cell}\n"
    )
    lines = [f"{number},n{number},object(1);part(2)\n" for number in range(1, 41)]
    (tmp_path / "label.csv").write_text("number,name,category\n" + "".join(lines))
    concepts = ConceptSet.open(tmp_path)
    read = content(concepts, concepts.annotation(0))
    for number in range(1, 41):
        expected = np.zeros((height, width), bool)
        for plane in planes:
            for row, column in itertools.product(range(height), range(width)):
                y = int((row + 0.5) * plane.shape[0] / height)
                x = int((column + 0.5) * plane.shape[1] / width)
                expected[row, column] |= plane[y, x] == number
        expected |= number in whole
        assert ((f"n{number}", "object") in read) == expected.any()
        assert np.array_equal(read.get((f"n{number}", "object"), np.zeros_like(expected)), expected)
        assert (f"n{number}", "part") not in read


@given(
    order=st.permutations(range(9)),
    mark=st.booleans(),
    ending=st.sampled_from(["\n", "\r\n"]),
    pad=st.booleans(),
)
@LAW
def test_columns_are_found_by_their_names(
    tmp_path: Path, order: list[int], mark: bool, ending: str, pad: bool
) -> None:
    folder = tmp_path / "twelve"
    if not folder.exists():
        twelve_images(folder)
        (tmp_path / "index.csv").write_bytes((folder / "index.csv").read_bytes())
    with (tmp_path / "index.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    as_wrapped_classifier = "  " if pad else ""
    lines = [
        ",".join(as_wrapped_classifier + row[place] + as_wrapped_classifier for place in order) + ending
        for row in rows
    ]
    (folder / "index.csv").write_bytes(("\ufeff" * mark + "".join(lines) + ending).encode())
    labels = (folder / "label.csv").read_text("utf-8-sig").splitlines()
    (folder / "label.csv").write_bytes(("\ufeff" * mark + ending.join(labels)).encode())
    concepts = ConceptSet.open(folder)
    assert sorted(concepts.categories) == sorted(CATEGORIES)
    for index, expected in enumerate(CONTENTS):
        read = content(concepts, concepts.annotation(index))
        assert read.keys() == expected.keys()
        assert all(np.array_equal(read[name], expected[name]) for name in expected)


def test_duplicate_rows_are_valid_and_opening_reads_no_picture(folder: Path) -> None:
    with (folder / "index.csv").open("a") as file:
        file.write("8,2,06.png,train,,16,,16,8\n8,02_object.png,02.png,train,02_material.png,16,,16,8\n")
    concepts = ConceptSet.open(folder)
    assert len(concepts) == 14
    assert torch.equal(concepts.annotation(13).masks, concepts.annotation(2).masks)
    assert content(concepts, concepts.annotation(12))["sky", "object"].all()
    for path in folder.glob("images/*.png"):
        path.unlink()
    concepts = ConceptSet.open(folder)
    with pytest.raises(
        FileNotFoundError, match=r"images/02\.png does not exist .line 4 of index\.csv names it"
    ):
        concepts.image(2)
    with pytest.raises(FileNotFoundError, match=r"images/02_object\.png does not exist"):
        concepts.annotation(2)
    for index in (14, -1):
        with pytest.raises(ValueError, match=f"index must be between 0 and 13, .* got {index}"):
            concepts.annotation(index)


@pytest.mark.parametrize(
    "path", ["../00.png", "/etc/a.png", "more/../../a.png", "C:\\a.png", "..\\a.png", "\\a.png"]
)
@pytest.mark.parametrize("place", [",00.png,", ",00_object.png,"])
def test_paths_do_not_leave_the_images(folder: Path, path: str, place: str) -> None:
    change(folder / "index.csv", place, f",{path},")
    with pytest.raises(ValueError, match=r"index\.csv, line 2: .* must hold paths below images/, got"):
        ConceptSet.open(folder)


@pytest.mark.parametrize(
    ("name", "old", "new", "sentence"),
    [
        (
            "index.csv",
            ",image,",
            ",picture,",
            r"index\.csv must have the columns image, .* got none named .image",
        ),
        (
            "index.csv",
            "texture",
            "object",
            r"index\.csv, line 1: each column must have a name of its own",
        ),
        ("index.csv", "texture", " ", r"index\.csv, line 1: each column must have a name of its own"),
        ("index.csv", "16,8\n8,,06", "16\n8,,06", r"index\.csv, line 7 must have 9 cells, .* got 8"),
        (
            "index.csv",
            "8,,06.png,train,,16,,16,8",
            "8,,06.png,train,,16,,16,0",
            r"line 8: sh and sw must be .* got '0' and '8'",
        ),
        ("index.csv", "8,,06.png", "8.0,,06.png", r"line 8: sh and sw must be .* got '8' and '8\.0'"),
        ("index.csv", "8,,06.png", f"{'9' * 5000},,06.png", r"line 8: sh and sw must be"),
        ("index.csv", "8,,06.png", "8,,", "line 8: image must be a path below images/, got an empty cell"),
        (
            "label.csv",
            "number",
            "code",
            r"label\.csv must have the columns number, .* got none named .number",
        ),
        (
            "label.csv",
            "44,",
            "300,",
            r"label\.csv, line 6: number must be .* that no other line has, got '300'",
        ),
        ("label.csv", "44,", "-4,", r"label\.csv, line 6: number must be .* got '-4'"),
        (
            "label.csv",
            "44,",
            "65536,",
            r"label\.csv, line 6: number must be an integer from 0 to 65535 .* got '65536'",
        ),
        (
            "label.csv",
            "door,object",
            "door,",
            r"label\.csv, line 6: category must .* got none for label 44",
        ),
    ],
)
def test_an_invalid_table_is_an_error(folder: Path, name: str, old: str, new: str, sentence: str) -> None:
    change(folder / name, old, new)
    with pytest.raises(ValueError, match=sentence):
        ConceptSet.open(folder)


def test_a_file_that_is_no_table_is_an_error(folder: Path) -> None:
    (folder / "label.csv").write_bytes(b"number,name,category\n1,\xff,object\n")
    with pytest.raises(ValueError, match=r"label\.csv must be a CSV file in UTF-8, got"):
        ConceptSet.open(folder)
    (folder / "index.csv").write_text("image,split,ih,iw,sh,sw\n")
    with pytest.raises(ValueError, match=r"index\.csv must have a column for at least one category"):
        ConceptSet.open(folder)
    (folder / "index.csv").write_text("")
    with pytest.raises(ValueError, match=r"index\.csv must have the columns image, .* got none named .image"):
        ConceptSet.open(folder)
    with pytest.raises(FileNotFoundError, match=r"index\.csv does not exist"):
        ConceptSet.open(folder / "images")


@pytest.mark.parametrize(
    ("cell", "sentence"),
    [
        ("5", r"index\.csv, line 2: labels in column object must be .* got 5"),
        ("9" * 5000, r"index\.csv, line 2: labels in column object must be .* got 9+"),
        (
            "3",
            r"index\.csv, line 2: label 3 \(cloth\) must be in a column .* \(material\), got column object",
        ),
        ("new.png", r"images/new\.png: label 3 \(cloth\) must be in a column .* got column object"),
    ],
)
def test_a_label_of_another_column_is_an_error(folder: Path, cell: str, sentence: str) -> None:
    paint(folder / "images" / "new.png", np.where(LEFT, 3, 2))
    change(folder / "index.csv", "00_object.png", cell)
    with pytest.raises(ValueError, match=sentence):
        ConceptSet.open(folder).annotation(0)


def test_label_0_is_unlabeled_even_if_label_csv_lists_it(folder: Path) -> None:
    change(folder / "label.csv", "44,door", "0,-,,,,\n44,door")
    change(folder / "index.csv", "00_object.png", "0")
    annotation = ConceptSet.open(folder).annotation(0)
    assert not len(annotation.concepts)
    assert annotation.masks.shape == (0, 8, 8)
    assert annotation.categories.tolist() == [True, False, False]


def giant() -> bytes:
    """A PNG that claims to be 60000 x 60000."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (header, data, b"IEND")
    )


@pytest.mark.filterwarnings("error")
def test_an_invalid_mask_is_an_error_that_names_the_file(folder: Path) -> None:
    path = folder / "images" / "00_object.png"
    whole = path.read_bytes()
    noise = np.random.default_rng(0).integers(0, 2, (8, 8, 3), dtype=np.uint8)
    palette = Image.fromarray(noise * 2).quantize(4)
    for content, sentence in (
        (b"", "must be a PNG mask, got another format"),
        (b"GIF89a", "must be a PNG mask, got another format"),
        (whole[:45], "got a damaged one"),
        (whole[:33] + b"\0" * 40, "must be a PNG mask, got"),
        (giant(), "must be a mask of at most 120 million pixels"),
        (palette, "must be a PNG in 8-bit RGB, .* got mode P"),
        (Image.fromarray(noise).convert("RGBA"), "got mode RGBA"),
        (Image.fromarray(TOP), "got mode 1"),
        (Image.fromarray(noise * np.array([0, 0, 9], np.uint8)), r"blue 9 at row \d, column \d"),
    ):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content.save(path)
        with pytest.raises(ValueError, match=f"00_object.png .*{sentence}"):
            ConceptSet.open(folder).annotation(0)
    cv2.imwrite(str(path), np.full((8, 8, 3), 300, np.uint16))
    with pytest.raises(ValueError, match="got mode RGB with 16 bits"):
        ConceptSet.open(folder).annotation(0)
