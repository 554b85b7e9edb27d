"""Building: what the pictures and masks say is what the concept set says."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from tests.dissection.broden_fixture import class_maps, deep, gray, palette
from weakspot import ImageWarning
from weakspot.dissection import ConceptSet, build_concepts
from weakspot.images import read_images

NAMES = ("road", "sky", "tree")


def write(
    folder: Path, maps: list[NDArray[np.int64]], form: Callable[[NDArray[np.int64]], Image.Image] = gray
) -> tuple[Path, Path]:
    """Pictures whose gray tells the class, and masks."""
    images, masks = folder / "images", folder / "masks"
    images.mkdir(parents=True)
    masks.mkdir()
    for number, classes in enumerate(maps):
        gray(classes * 50 % 251).save(images / f"{number}.png")
        form(classes).save(masks / f"{number}.png")
    return images, masks


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def by_name(concepts: ConceptSet, index: int) -> dict[str, torch.Tensor]:
    annotation = concepts.annotation(index)
    names = [concepts.concepts[place].name for place in annotation.concepts.tolist()]
    return dict(zip(names, annotation.masks, strict=True))


def tree_bytes(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("form", [gray, deep, palette])
def test_classes_lie_where_their_masks_are_and_void_nowhere(
    tmp_path: Path, form: Callable[[NDArray[np.int64]], Image.Image]
) -> None:
    maps = class_maps()
    images, masks = write(tmp_path, maps, form)
    out = build_concepts(images, tmp_path / "out", masks=masks, names=NAMES, void=[255])
    assert out == tmp_path / "out"
    concepts = ConceptSet.open(out)
    assert [(concept.number, concept.name) for concept in concepts.concepts] == list(enumerate(NAMES, 1))
    assert len(concepts) == len(maps)
    for index, classes in enumerate(maps):
        read = by_name(concepts, index)
        for value, name in enumerate(NAMES):
            expected = torch.from_numpy(classes[1::2, 1::2] == value)
            assert (name in read) == bool(expected.any())
            assert torch.equal(read.get(name, torch.zeros_like(expected)), expected)
        assert concepts.image(index).read_bytes() == (images / f"{index}.png").read_bytes()


def test_names_may_be_a_list_a_mapping_or_a_file(tmp_path: Path) -> None:
    images, masks = write(tmp_path, class_maps())
    (tmp_path / "names.txt").write_bytes("\ufeffroad\r\nsky\r\ntree\r\n".encode())
    forms: list[Any] = [
        NAMES,
        list(NAMES),
        dict(enumerate(NAMES)),
        tmp_path / "names.txt",
        str(tmp_path / "names.txt"),
    ]
    builds = [
        tree_bytes(build_concepts(images, tmp_path / str(number), masks=masks, names=names, void={255}))
        for number, names in enumerate(forms)
    ]
    assert all(build == builds[0] for build in builds)


def test_a_class_number_over_255_keeps_its_name(tmp_path: Path) -> None:
    images, masks = write(tmp_path, [np.where(np.arange(64).reshape(8, 8) < 32, 300, 45)], deep)
    concepts = ConceptSet.open(
        build_concepts(images, tmp_path / "out", masks=masks, names={300: "lamp", 45: "door"})
    )
    assert [concept.number for concept in concepts.concepts] == [46, 301]
    assert by_name(concepts, 0)["lamp"].flatten().tolist() == [True] * 8 + [False] * 8


@pytest.mark.parametrize("form", [lambda m: gray(m * 255), gray, lambda m: Image.fromarray(m.astype(bool))])
def test_masks_of_two_values_may_be_written_in_three_ways(
    tmp_path: Path, form: Callable[[NDArray[np.int64]], Image.Image]
) -> None:
    maps = [(classes == 1).astype(np.int64) for classes in class_maps()] + [np.zeros((12, 18), np.int64)]
    images, masks = write(tmp_path, maps, form)
    concepts = ConceptSet.open(
        build_concepts(
            images, tmp_path / "out", masks=masks, names=["background", "horse"], category="animal"
        )
    )
    assert concepts.categories == ("animal",)
    for index, figure in enumerate(maps):
        read = by_name(concepts, index)
        assert ("horse" in read) == bool(figure.any())
        assert torch.equal(read["background"], torch.from_numpy(figure[1::2, 1::2] == 0))


def test_without_masks_the_first_folder_is_the_label_of_the_whole_picture(tmp_path: Path) -> None:
    for name in (
        "striped/a.png",
        "dotted/a.png",
        "dotted/more/b.jpg",
        ".hidden/c.png",
        "astray.png",
        "dotted/x.txt",
    ):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("no picture")
        else:
            gray(np.full((9, 7), 60)).save(path)
    with pytest.warns(
        ImageWarning, match="1 of 4 pictures are in no folder that names a label .* astray.png"
    ):
        out = build_concepts(tmp_path / "images", tmp_path / "out", category="texture")
    concepts = ConceptSet.open(out)
    assert [(concept.name, concept.category) for concept in concepts.concepts] == [
        ("dotted", "texture"),
        ("striped", "texture"),
    ]
    assert [list(by_name(concepts, index)) for index in range(3)] == [["dotted"], ["dotted"], ["striped"]]
    assert all(bool(concepts.annotation(index).masks.all()) for index in range(3))
    assert concepts.annotation(0).masks.shape == (1, 5, 4)
    assert [concept["coverage"] for concept in rows(out / "label.csv")] == ["2", "1"]


@pytest.mark.parametrize("sides", [(12, 12), (24, 12), (12, 36)])
def test_cropped_and_resized_pictures_and_masks_stay_aligned(tmp_path: Path, sides: tuple[int, int]) -> None:
    images, masks = write(tmp_path, [classes.repeat(4, 0).repeat(4, 1) for classes in class_maps(3)])
    concepts = ConceptSet.open(
        build_concepts(images, tmp_path / "out", masks=masks, names=NAMES, void=(255,), size=sides)
    )
    for index in range(3):
        picture, _ = read_images(concepts.image(index), channels=1)
        expected, _ = read_images(images / f"{index}.png", channels=1, size=sides)
        assert torch.allclose(picture, expected, atol=0.5 / 255 + 1e-6)
        read = by_name(concepts, index)
        assert concepts.annotation(index).masks.shape[1:] == (sides[0] // 2, sides[1] // 2)
        # Of four pixels that agree, no edge runs through the site, so the mask says what the picture shows.
        squares = (expected[0, 0] * 255).unfold(0, 2, 2).unfold(1, 2, 2).flatten(2)
        flat = squares.amax(2) - squares.amin(2) < 1e-3
        for value, name in enumerate(NAMES):
            shown = (squares[..., 0] - value * 50).abs() < 1e-3
            assert torch.equal(read.get(name, torch.zeros_like(shown))[flat], shown[flat])
        assert bool(flat.any())


def test_the_tables_count_what_is_in_the_masks(tmp_path: Path) -> None:
    images, masks = write(tmp_path, class_maps(9))
    out = build_concepts(images, tmp_path / "out", masks=masks, names=NAMES, void=[255])
    concepts = ConceptSet.open(out)
    result: dict[str, list[float]] = {name: [] for name in NAMES}
    for index in range(len(concepts)):
        for name, mask in by_name(concepts, index).items():
            result[name].append(float(mask.double().mean()))
    for file in ("label.csv", "c_object.csv"):
        for row in rows(out / file):
            assert int(row["frequency"]) == len(result[row["name"]])
            assert float(row["coverage"]) == pytest.approx(sum(result[row["name"]]), rel=1e-5)
    assert [row["category"] for row in rows(out / "label.csv")] == [
        f"object({len(result[name])})" for name in NAMES
    ]
    (category,) = rows(out / "category.csv")
    assert category == {"name": "object", "first": "1", "last": "3", "count": "3", "frequency": "9"}


def test_pictures_without_mask_and_unreadable_ones_are_skipped_with_a_warning(tmp_path: Path) -> None:
    images, masks = write(tmp_path, class_maps(4))
    (masks / "1.png").unlink()
    (masks / "3.png").unlink()
    with pytest.warns(ImageWarning, match=r"2 of 4 pictures have no mask in .* the first is 1\.png"):
        out = build_concepts(images, tmp_path / "out", masks=masks, names=NAMES, void=[255])
    assert [row["image"] for row in rows(out / "index.csv")] == ["0.png", "2.png"]
    write(tmp_path / "new", class_maps(2))
    (tmp_path / "new/images/0.png").write_bytes(b"text")
    with pytest.warns(
        ImageWarning, match=r"1 of 2 pictures cannot be read and are skipped; the first is 0\.png"
    ):
        out = build_concepts(
            tmp_path / "new/images", tmp_path / "out2", masks=tmp_path / "new/masks", names=NAMES, void=[255]
        )
    assert len(ConceptSet.open(out)) == 1


def test_masks_may_lie_among_the_pictures_in_subfolders(tmp_path: Path) -> None:
    images, masks = write(tmp_path, class_maps(2))
    for folder in (images, masks):
        (folder / "left, right").mkdir()
        (folder / "0.png").rename(folder / "left, right" / "0.png")
    masks.rename(images / "masks")
    out = build_concepts(images, tmp_path / "out", masks=images / "masks", names=NAMES, void=[255])
    concepts = ConceptSet.open(out)
    assert [row["image"] for row in rows(out / "index.csv")] == ["1.png", "left, right/0.png"]
    assert by_name(concepts, 1).keys() <= set(NAMES)
    assert not (out / "images/masks/1.png").exists()  # where a picture of that name would lie


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"void": ()},
            r"masks/0\.png must hold values in names or void \(0, 1, 2.* got 255 at row \d+, column \d+",
        ),
        ({"names": ["road", "sky"]}, r"masks/\d\.png must hold .* got 2 at row"),
        ({"void": 255}, r"void must be a list of values, such as \[255\], got 255"),
        ({"names": None}, "names must be the class names .* got None"),
        ({"names": {-1: "road"}}, "names must hold values from 0 to 65534 .* got -1"),
        ({"names": {70_000: "road"}}, "names must hold values from 0 to 65534 .* got 70000"),
        ({"names": {65_535: "road"}}, "names must hold values from 0 to 65534 .* got 65535"),
        ({"void": [65_536]}, "and void from 0 to 65535, got 65536"),
        ({"names": ["road"], "void": [0]}, "names must leave at least one class besides void"),
        ({"masks": None}, "masks must be given together with names and void"),
        ({"category": "split"}, "category must be .* got 'split'"),
        ({"category": "a;b"}, "category must be .* got 'a;b'"),
        ({"category": " "}, "category must be .* got ' '"),
        ({"size": (0, 4)}, r"size must be \(height, width\).*got \(0, 4\)"),
    ],
)
def test_invalid_arguments_are_errors_and_leave_no_files(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    images, masks = write(tmp_path / "in", class_maps())
    arguments: dict[str, Any] = {"masks": masks, "names": NAMES, "void": [255]} | change
    with pytest.raises(ValueError, match=sentence):
        build_concepts(images, tmp_path / "out", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_masks_of_another_shape_or_in_color_are_errors(tmp_path: Path) -> None:
    images, masks = write(tmp_path / "in", class_maps(1))
    with Image.open(masks / "0.png") as image:
        stretched, colored = image.resize((12, 18), Image.Resampling.NEAREST), image.convert("RGB")
    for mask, sentence in (
        (stretched, r"must have the shape of its picture, 12 x 18 \(height x width\), got 18 x 12"),
        (colored, r"0\.png must hold class numbers .* got a PNG of mode RGB"),
    ):
        mask.save(masks / "0.png")
        with pytest.raises(ValueError, match=sentence):
            build_concepts(images, tmp_path / "out", masks=masks, names=NAMES, void=[255])
    (masks / "0.png").unlink()
    with (
        pytest.warns(ImageWarning, match="have no mask"),
        pytest.raises(ValueError, match="must hold pictures with a PNG of the same stem"),
    ):
        build_concepts(images, tmp_path / "out", masks=masks, names=NAMES)
    with pytest.raises(FileNotFoundError, match="does not exist or is not a folder"):
        build_concepts(tmp_path / "none", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="with one class name per line"):
        build_concepts(images, tmp_path / "out", masks=masks, names=tmp_path / "names.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_only_an_empty_folder_is_written_to(tmp_path: Path) -> None:
    images, masks = write(tmp_path, class_maps(1))
    for path in (images, images / "0.png"):
        before = tree_bytes(tmp_path)
        with pytest.raises(ValueError, match=f"out must be an empty or a new folder, got {path}, which is"):
            build_concepts(images, path, masks=masks, names=NAMES, void=[255])
        assert tree_bytes(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert (
        len(ConceptSet.open(build_concepts(images, tmp_path / "empty", masks=masks, names=NAMES, void=[255])))
        == 1
    )
