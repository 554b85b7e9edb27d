"""Pictures: what is drawn is what the masks say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from weakspot.dissection import ConceptSet, demo_concepts
from weakspot.dissection.demo_textures import COLORS, TEXTURES, checkered, grid, ringed, striped, zigzagged
from weakspot.images import read_images


@pytest.fixture(scope="module")
def concepts(tmp_path_factory: pytest.TempPathFactory) -> ConceptSet:
    return ConceptSet.open(demo_concepts(tmp_path_factory.mktemp("demo"), count=40, size=64))


def test_every_color_term_and_every_texture_is_drawn(concepts: ConceptSet) -> None:
    assert [concept.name for concept in concepts.concepts] == [
        *COLORS,
        *(texture.__name__ for texture in TEXTURES),
    ]
    assert len(COLORS) == 11
    assert concepts.categories == ("color", "texture")
    drawn = torch.cat([concepts.annotation(index).concepts for index in range(len(concepts))])
    assert set(drawn.tolist()) == set(range(len(concepts.concepts)))


def test_every_site_has_one_color_and_at_most_one_texture(concepts: ConceptSet) -> None:
    for index in range(len(concepts)):
        annotation = concepts.annotation(index)
        colored = annotation.concepts < len(COLORS)
        assert bool((annotation.masks[colored].sum(0) == 1).all())
        assert bool((annotation.masks[~colored].sum(0) <= 1).all())
        assert bool(annotation.categories.all())


def test_a_site_has_the_color_of_its_mask(concepts: ConceptSet) -> None:
    prototypes = torch.tensor(list(COLORS.values())) / 255
    total, count = torch.zeros(len(COLORS), 3), torch.zeros(len(COLORS))
    right = sites = 0
    for index in range(len(concepts)):
        annotation = concepts.annotation(index)
        picture, _ = read_images(concepts.image(index))
        shown = picture[0, :, 1::2, 1::2]
        for place, mask in zip(annotation.concepts.tolist(), annotation.masks, strict=True):
            if place < len(COLORS):
                pixels = shown[:, mask].T
                total[place] += pixels.sum(0)
                count[place] += len(pixels)
                right += int((torch.cdist(pixels, prototypes).argmin(1) == place).sum())
                sites += len(pixels)
    means = total / count[:, None]
    assert torch.cdist(means, prototypes).argmin(1).tolist() == list(range(len(COLORS)))
    assert right / sites > 0.8  # shade, grain and edges take some


def test_demo_pictures_depend_only_on_number_and_seed(tmp_path: Path) -> None:
    few, same, many, other = (
        demo_concepts(tmp_path / name, count=count, size=33, seed=seed)
        for name, count, seed in (("few", 2, 0), ("same", 2, 0), ("many", 5, 0), ("other", 2, 1))
    )
    files = sorted(path.relative_to(few) for path in few.rglob("*") if path.is_file())
    assert all((few / file).read_bytes() == (same / file).read_bytes() for file in files)
    pictures = [file for file in files if file.suffix == ".png"]
    assert len(pictures) == 6
    assert all((few / file).read_bytes() == (many / file).read_bytes() for file in pictures)
    assert not any((few / file).read_bytes() == (other / file).read_bytes() for file in pictures)
    assert ConceptSet.open(few).annotation(0).masks.shape[1:] == (17, 17)


def places() -> tuple[np.ndarray[Any, np.dtype[np.float64]], np.ndarray[Any, np.dtype[np.float64]]]:
    u, v = np.random.default_rng(0).uniform(-6, 6, (2, 4000))
    return u, v


@pytest.mark.parametrize("texture", TEXTURES)
def test_a_texture_shows_both_colors(texture: Any) -> None:
    for seed in range(20):
        fraction = texture(*places(), np.random.default_rng(seed)).mean()
        assert 0.1 < fraction < 0.8


def test_textures_have_the_symmetry_of_their_name() -> None:
    u, v = places()

    def at(texture: Any, u: Any, v: Any) -> Any:
        return texture(u, v, np.random.default_rng(3))

    assert np.array_equal(at(striped, u, v), at(striped, u, v + 0.37))
    assert np.mean(at(striped, u, v) == at(striped, u + 1, v)) > 0.99
    assert np.array_equal(at(grid, u, v), at(grid, v, u))
    turn = np.cos(0.7) * u + np.sin(0.7) * v, np.cos(0.7) * v - np.sin(0.7) * u
    assert np.mean(at(ringed, u, v) == at(ringed, *turn)) > 0.99
    assert np.mean(at(checkered, u, v) != at(checkered, u + 1 / 1.4, v)) > 0.99
    assert np.mean(at(zigzagged, u, v) == at(zigzagged, -u, v)) > 0.99


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"count": 0}, "count must be an integer of at least 1, got 0"),
        ({"size": 15}, "size must be an integer of at least 16, got 15"),
        ({"size": 5000}, "size must be at most 4096, got 5000"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"seed": 0.5}, "seed must .* got 0.5"),
    ],
)
def test_invalid_arguments_are_errors(tmp_path: Path, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        demo_concepts(tmp_path / "out", **arguments)
    assert not any(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note.txt").write_text("mine")
    with pytest.raises(ValueError, match="which is not empty"):
        demo_concepts(tmp_path / "full", count=1)
