"""The list of images: independent of order, with labels only where they are certain."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.audit.fixtures import draw_pictures
from weakspot.audit.plan.image_list import entries, list_images
from weakspot.datasets.arrays import array_image

CLASSES = ("cat", "dog", "Fish, aquarium", "owl")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return draw_pictures(tmp_path / "pictures", 7)


def test_order_and_repetition_of_sources_change_nothing(pictures: Path) -> None:
    sources = [str(path) for path in sorted(pictures.rglob("*.png"))]
    listing = list_images(sources, CLASSES, 4)
    assert listing.equals(list_images([*reversed(sources), sources[0]], CLASSES, 4))
    assert listing["name"].to_pylist() == sorted(str(Path(path).relative_to(pictures)) for path in sources)


def test_folders_are_labels_only_if_all_are_named_like_classes(pictures: Path) -> None:
    (pictures / "notes.txt").write_text("no folder, no label")
    listing = list_images([str(pictures)], CLASSES, 4)
    by_name = dict(zip(listing["name"].to_pylist(), listing["label"].to_pylist(), strict=True))
    assert by_name["cat/00.png"] == 0
    assert by_name["dog/01.png"] == 1
    assert by_name["fish/02.png"] == 2  # by the name's first part
    assert by_name["notes.txt"] == -1
    (pictures / "holiday").mkdir()
    (pictures / "cat/00.png").rename(pictures / "holiday/00.png")
    assert set(list_images([str(pictures)], CLASSES, 4)["label_from"].to_pylist()) == {"prediction"}
    with pytest.raises(ValueError, match=r"folder must be one of cat.* got 'holiday'"):
        list_images([str(pictures)], CLASSES, 4, labels="folders")


def test_predictions_can_be_requested(pictures: Path) -> None:
    listing = list_images([str(pictures)], CLASSES, 4, labels="predictions")
    assert set(listing["label"].to_pylist()) == {-1}


def test_a_table_gives_labels_by_name_or_number(pictures: Path, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("file,label\ncat/00.png,owl\ndog/01.png,2\n03.png,FISH\n")
    listing = list_images([str(pictures)], CLASSES, 4, labels=str(table))
    by_name = {entry.name: entry for entry in entries(listing, 0, 7)}
    assert [by_name[name].label for name in ("cat/00.png", "dog/01.png", "cat/03.png")] == [3, 2, 2]
    assert "labels.csv has no class for it" in by_name["fish/02.png"].error
    table.write_text("file,label\ncat/00.png,horse\n")
    with pytest.raises(ValueError, match=r"labels.csv: label of cat/00.png must .* got 'horse'"):
        list_images([str(pictures)], CLASSES, 4, labels=str(table))
    table.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="must have the columns file and label, got a, b"):
        list_images([str(pictures)], CLASSES, 4, labels=str(table))


def test_a_smaller_limit_draws_a_subset(pictures: Path) -> None:
    def draw(limit: int, seed: int = 0) -> set[str]:
        listing = list_images([str(pictures)], CLASSES, 4, limit=limit, seed=seed)
        return set(listing["name"].to_pylist())

    assert [len(draw(limit)) for limit in (1, 3, 100)] == [1, 3, 7]
    assert draw(1) < draw(3) < draw(5) < draw(7)
    assert len({frozenset(draw(3, seed)) for seed in range(10)}) > 3


def test_hidden_files_are_left_out_and_undecodable_names_survive(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    (folder / ".hidden").mkdir(parents=True)
    (folder / ".hidden/a.png").write_bytes(b"")
    odd = os.fsencode(folder) + b"/caf\xe9.png"
    with open(odd, "wb") as file:  # noqa: PTH123 - a name of bytes that are no text
        file.write(b"x")
    (entry,) = entries(list_images([str(folder)], (), 4), 0, 10)
    assert (entry.name, entry.path) == ("caf\\xe9.png", odd)


@pytest.mark.parametrize("shape", ["NHWC", "NCHW", "NHW"])
@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_arrays_are_read_in_any_layout(tmp_path: Path, shape: str, kind: str) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (5, 8, 10, 3), dtype=np.uint8)
    stored = {"NHWC": levels, "NCHW": levels.transpose(0, 3, 1, 2), "NHW": levels[..., 0]}[shape]
    stored = stored if kind == "uint8" else (stored / 255).astype(np.float32)
    np.savez(tmp_path / "a.npz", images=stored, labels=np.arange(5) % 4)
    listing = list_images([str(tmp_path / "a.npz")], CLASSES, 4)
    assert listing["label"].to_pylist() == [0, 1, 2, 3, 0]
    assert listing["name"].to_pylist()[1] == "a.npz#0000001"
    pixels, _, _ = array_image(tmp_path / "a.npz", 1, (8, 10), 3)
    expected = torch.from_numpy(levels[1] / 255).permute(2, 0, 1).float()
    assert pixels is not None
    torch.testing.assert_close(pixels, expected[:1].expand(3, -1, -1) if shape == "NHW" else expected)


def test_invalid_arrays_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "broken.npz").write_bytes(b"PK nothing")
    np.savez(tmp_path / "flat.npz", images=np.zeros((3, 4)))
    np.savez(tmp_path / "short.npz", images=np.zeros((3, 4, 4)), labels=np.arange(2))
    np.savez(tmp_path / "none.npz", pictures=np.zeros((3, 4, 4)))
    for name, why in [
        ("broken", "cannot be read"), ("flat", "shape"), ("short", "labels of shape"), ("none", "array named images"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=rf"{name}.npz .*{why}"):
            list_images([str(tmp_path / f"{name}.npz")], CLASSES, 4)


def test_an_animation_of_another_size_is_one_entry(tmp_path: Path) -> None:
    Image.new("RGB", (5, 5)).save(tmp_path / "a.gif")
    assert len(list_images([str(tmp_path / "a.gif")], (), 4)) == 1


def test_linked_folders_are_followed_once_and_cycles_end(tmp_path: Path) -> None:
    """A link into what is listed anyway, to a parent or to itself adds nothing."""
    for place in ("photos/real", "elsewhere/deep"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / place / "a.png")
    photos = tmp_path / "photos"
    for link, target in {
        "again": "real", "up": "..", "self": ".", "away": "../elsewhere", "twice": "../elsewhere/deep",
        "gone": "nowhere",
    }.items():  # fmt: skip
        (photos / link).symlink_to(target)
    (tmp_path / "elsewhere/deep/back").symlink_to("../../photos")
    names = [str(name) for name in list_images([str(photos)], (), 4)["name"].to_pylist()]
    assert names == ["away/deep/a.png", "gone", "real/a.png"]
