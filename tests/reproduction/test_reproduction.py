"""Claims are confirmed where they hold, and only there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from weakspot import zoo
from weakspot.pairs import AttackResult
from weakspot.reproduction import PAPERS, VERDICTS, Claim, Material, read_reproduction, reproduce
from weakspot.reproduction.claims import CAUTION, CONFIRMED, NOT_CONFIRMED, UNTESTED, Difference
from weakspot.reproduction.localized import Localized
from weakspot.reproduction.one_pixel import OnePixel
from weakspot.reproduction.spatial import Spatial


class Bright(nn.Module):
    """Class 1 if any pixel is bright: one pixel fools it, wherever it is."""

    def forward(self, images: Tensor) -> Tensor:
        peak = images.amax((1, 2, 3))
        return torch.stack([torch.full_like(peak, 0.7), peak], 1)


class Window(nn.Module):
    """Class 1 if the patch of 5 x 5 pixels in the middle has a bright pixel: neighbors share the weakness."""

    def forward(self, images: Tensor) -> Tensor:
        peak = images[..., 4:9, 4:9].amax((1, 2, 3))
        return torch.stack([torch.full_like(peak, 0.7), peak], 1)


def material(
    model: nn.Module, count: int = 24, *, size: int = 13, channels: int = 3, seed: int = 0
) -> Material:
    images = 0.5 * torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        labels = model.eval()(images).argmax(1)
    return Material(model, images, labels, "random images")


@pytest.fixture(scope="module")
def random_network() -> nn.Module:
    torch.manual_seed(0)
    return zoo.two_conv(classes=4, channels=3, size=(16, 16)).eval()


def test_the_own_entries_of_the_matrix_are_the_scores_of_overlap(random_network: nn.Module) -> None:
    spatial = Spatial(material(random_network, size=16))
    claim = spatial.looks()
    assert claim.numbers["value"] == pytest.approx(spatial.overlap.scores["effect_in_roi"].mean(), abs=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_unrelated_attacks_and_maps_do_not_confirm_a_relation(random_network: nn.Module, seed: int) -> None:
    spatial = Spatial(material(random_network, size=16, seed=seed))
    unrelated = replace(spatial.overlap, vulnerability=torch.rand_like(spatial.overlap.vulnerability))
    spatial.__dict__["overlap"] = unrelated
    assert spatial.looks().verdict == NOT_CONFIRMED


def test_attacks_inside_their_own_region_of_importance_confirm_it(random_network: nn.Module) -> None:
    spatial = Spatial(material(random_network, size=16))
    rows = torch.arange(24)
    roi = torch.zeros_like(spatial.overlap.roi)
    roi[rows, 0, rows % 16, :3] = True  # every image looks elsewhere
    roi[rows, 0, (rows * 5) % 16, 5:12] = True
    planted = replace(spatial.overlap, roi=roi, vulnerability=roi.float() + 0.01)
    spatial.__dict__["overlap"] = planted
    assert spatial.looks().verdict == CONFIRMED


def test_a_weakness_of_one_place_is_shared_by_neighbors_and_one_of_every_place_is_not() -> None:
    local, everywhere = (OnePixel(material(model)).neighbors() for model in (Window(), Bright()))
    assert local.verdict in {CONFIRMED, CAUTION}
    assert local.numbers["neighbors"] > 2 * local.numbers["random"]
    assert everywhere.verdict == NOT_CONFIRMED


def test_too_few_attacks_decide_nothing() -> None:
    class Deaf(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.new_tensor([2.0, -1.0]).repeat(len(images), 1) + 0 * images.sum()

    paper = OnePixel(material(Deaf()))
    assert {claim().verdict for claim in paper.claims.values()} == {UNTESTED}
    assert "0 of 24 images can be fooled" in paper.neighbors().measured


def test_photographs_are_too_large_for_one_pixel(random_network: nn.Module) -> None:
    large = Material(random_network, torch.rand(2, 3, 80, 80), torch.zeros(2, dtype=torch.long), "")
    assert OnePixel(large).reaches().verdict == UNTESTED


def test_training_needs_training_data(random_network: nn.Module, tmp_path: Path) -> None:
    assert Localized(material(random_network, size=16), tmp_path).training().verdict == UNTESTED


@pytest.mark.parametrize("paper", ["spatial", "one-pixel"])
def test_the_same_seed_gives_the_same_claims_and_finished_ones_are_not_measured_again(
    paper: str, random_network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = material(random_network, 12, size=16)
    first = reproduce(paper, given, tmp_path / "one")
    assert reproduce(paper, replace(given), tmp_path / "two") == first
    monkeypatch.setattr(AttackResult, "__getitem__", _never)
    assert reproduce(paper, replace(given), tmp_path / "one") == first
    assert read_reproduction(tmp_path / "one" / f"{paper}.json") == first
    assert {claim.verdict for claim in first.claims} <= set(VERDICTS)
    assert all(claim.quote in first.to_markdown() for claim in first.claims)


def _never(*_: object) -> None:
    raise AssertionError("measured again")


def test_a_stored_reproduction_that_is_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "spatial.json"
    path.write_text(json.dumps({"paper": "spatial"}))
    with pytest.raises(ValueError, match=r"spatial\.json is not a stored reproduction"):
        read_reproduction(path)


def test_other_images_are_never_the_own() -> None:
    given = material(Bright(), 9)
    maps = torch.arange(9)[:, None, None, None].float()
    assert (given.others(maps) != maps).all()
    assert sorted(given.others(maps).flatten().tolist()) == list(range(9))


@pytest.mark.parametrize(
    ("first", "second", "beyond"),
    [
        (lambda n: np.ones(n, bool), lambda n: np.zeros(n, bool), True),
        (lambda n: np.arange(n) % 2 == 0, lambda n: np.arange(n) % 2 == 1, False),
    ],
)
def test_a_difference_is_beyond_zero_if_its_interval_is(
    first: Callable[[int], np.ndarray], second: Callable[[int], np.ndarray], beyond: bool
) -> None:
    assert Difference.of(first(40), second(40)).beyond_zero == beyond


def test_every_paper_has_claims_with_words_of_the_abstract(random_network: nn.Module, tmp_path: Path) -> None:
    for paper in PAPERS.values():
        assert paper.claims(material(random_network, 2, size=16), tmp_path).claims
    claim = Claim("name", "the words", "measured", "control", CONFIRMED)
    assert "the words" in str(claim)
