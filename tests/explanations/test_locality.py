"""Locality: a planted trigger shows its receptive field, and controls come out as they must."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from tests.attacks.test_sweep import Triggered
from tests.networks import PoolingNetwork
from weakspot import Locality, Pairs, attacks, locality
from weakspot.explanations.locality_by_radius import (
    MEANINGS,
    RADII,
    locality_of,
    locality_sentence,
    locality_table,
)
from weakspot.explanations.pixel_locality import analyze_locality
from weakspot.statistics import rate_interval


def triggered_pair() -> tuple[Triggered, Pairs]:
    model = Triggered().eval()
    clean = torch.zeros(1, 3, 10, 12)
    adversarial = clean.clone()
    adversarial[0, 2, 4, 6] = 1
    return model, Pairs.of(model, clean, adversarial)


def by_control(result: Locality, column: str) -> dict[str, float]:
    table: dict[str, list[object]] = result.controls.to_dict("list")  # type: ignore[assignment]
    return {str(name): float(str(value)) for name, value in zip(table["control"], table[column], strict=True)}


def test_exactly_the_receptive_field_shares_the_weakness() -> None:
    model, pairs = triggered_pair()
    result = locality(model, pairs, radius=4)
    assert {tuple(place) for place in result.success[0].nonzero().tolist()} == {
        (row, column) for row in range(3, 6) for column in range(5, 8)
    }
    assert torch.equal(result.same_class, result.success)
    assert result.by_radius["rate"].tolist() == pytest.approx([1, 0, 0, 0, 8 / 119])
    rates, images = by_control(result, "rate"), by_control(result, "images")
    assert rates["neighbors"] == 1
    assert rates["moved with the image"] == 1  # by one site the pixel stays in the filter's window
    assert 0 < rates["random color"] < 1
    assert images["neighbors of failed attacks"] == 0


def test_failed_attacks_are_controls_only() -> None:
    model, pairs = triggered_pair()
    weak = pairs.clean.clone()
    weak[0, 2, 4, 6] = 0.3
    both = Pairs.of(
        model,
        torch.cat([pairs.clean, pairs.clean]),
        torch.cat([pairs.adversarial, weak]),
        torch.tensor([0, 0]),
    )
    result = locality(model, both, radius=4)
    assert result.by_radius["images"].tolist() == [1] * 5
    rates, images = by_control(result, "rate"), by_control(result, "images")
    assert (rates["neighbors of failed attacks"], images["neighbors of failed attacks"]) == (0, 1)
    assert rates["random site of failed attacks"] == 0


def test_maps_equal_moving_the_pixel_by_hand() -> None:
    torch.manual_seed(0)
    model = PoolingNetwork().eval()
    images = torch.rand(4, 3, 9, 7) * 0.05 + 0.5
    labels = model(images).argmax(1)
    sweep = attacks.pixel_sweep(model, images, labels)
    pairs = sweep.pairs(images, labels)
    result = locality(model, pairs)
    adversarial_class = model(pairs.adversarial).argmax(1)
    for number in range(4):
        row, column = (pairs.perturbation[number] != 0).any(0).nonzero()[0].tolist()
        color = pairs.adversarial[number, :, row, column]
        for down in range(9):
            for along in range(7):
                edited = images[number : number + 1].clone()
                edited[0, :, down, along] = color
                with torch.no_grad():
                    predicted = int(model(edited).argmax())
                assert bool(result.success[number, down, along]) == (predicted != int(labels[number]))
                same = predicted == int(adversarial_class[number]) != int(labels[number])
                assert bool(result.same_class[number, down, along]) == same


def test_pairs_must_differ_in_exactly_one_pixel() -> None:
    model, pairs = triggered_pair()
    two = pairs.adversarial.clone()
    two[0, 0, 0, 0] = 1
    both = Pairs.of(model, torch.cat([pairs.clean] * 2), torch.cat([pairs.adversarial, two]))
    with pytest.raises(
        ValueError, match=r"must differ in exactly one pixel, got 2 different pixels in pairs\[1\]"
    ):
        locality(model, both)
    with pytest.raises(ValueError, match=r"got 0 different pixels in pairs\[0\]"):
        locality(model, Pairs.of(model, pairs.clean, pairs.clean))
    with pytest.raises(ValueError, match="radius must be an integer of at least 1, got 0"):
        locality(model, pairs, radius=0)


def test_locality_does_not_depend_on_the_batch_size() -> None:
    torch.manual_seed(1)
    model = PoolingNetwork().eval()
    images = torch.rand(3, 3, 8, 8) * 0.05 + 0.5
    labels = model(images).argmax(1)
    pairs = attacks.pixel_sweep(model, images, labels).pairs(images, labels)
    one, other = locality(model, pairs, seed=5), locality(model, pairs, seed=5, batch_size=3)
    assert one.by_radius.equals(other.by_radius)
    assert one.controls.equals(other.controls)


def test_scores_by_radius_are_fractions_of_the_rings() -> None:
    torch.manual_seed(0)
    model = PoolingNetwork().eval()
    images = torch.rand(4, 3, 9, 7) * 0.05 + 0.5
    labels = model(images).argmax(1)
    pairs = attacks.pixel_sweep(model, images, labels).pairs(images, labels)
    result, scores = locality(model, pairs), analyze_locality(model, pairs).scores
    for number in range(4):
        site = (pairs.perturbation[number] != 0).any(0).nonzero()[0].tolist()
        by_ring: dict[int, list[bool]] = {}
        for row in range(9):
            for column in range(7):
                ring = max(abs(row - site[0]), abs(column - site[1]))
                by_ring.setdefault(ring, []).append(bool(result.success[number, row, column]))
        for radius in RADII:
            expected = np.mean(by_ring[radius]) if radius in by_ring else np.nan
            rate = scores[f"fools_at_radius_{radius}"][number]
            assert rate == pytest.approx(expected, nan_ok=True)
        others = [hit for ring, hits in by_ring.items() if ring for hit in hits]
        assert scores["fools_at_random_site"][number] == pytest.approx(np.mean(others))


def test_large_images_are_tried_near_the_pixel_and_on_a_grid() -> None:
    torch.manual_seed(0)
    model = PoolingNetwork().eval()
    images = torch.rand(2, 3, 70, 80) * 0.01 + 0.5
    labels = model(images).argmax(1)
    corners = attacks.pixel_sweep(model, images, labels)
    pairs = corners.pairs(images, labels)
    result, analysis = locality(model, pairs), analyze_locality(model, pairs)
    step = 11  # the square root of 70 x 80 / 49, rounded up
    for number in range(2):
        row, column = (pairs.perturbation[number] != 0).any(0).nonzero()[0].tolist()
        down, along = (np.abs(np.arange(size) - at)[:, None] for size, at in ((70, row), (80, column)))
        rings = np.maximum(down, along.T)
        success = result.success[number].numpy()
        for radius in RADII:
            assert analysis.scores[f"fools_at_radius_{radius}"][number] == success[rings == radius].mean()
        grid = np.zeros((70, 80), bool)
        grid[step // 2 :: step, step // 2 :: step] = True
        assert analysis.scores["fools_at_random_site"][number] == success[grid & (rings > 0)].mean()
        moved, exact = analysis.maps["moved_pixel"][number, 0].numpy(), rings <= max(RADII)
        assert ((moved > 0) == success)[exact | grid].all()
        assert (moved < 3).all()
    assert "one pixel of every 11 x 11 was tried" in analysis.pictures["moved_pixel"].meaning


def rates(images: int, near: float, far: float, seed: int = 0) -> pd.DataFrame:
    """Rates of images whose eight neighbors fool with one probability and whose other sites with another."""
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({name: rng.binomial(64, far, images) / 64 for name in MEANINGS})
    return table.assign(fools_at_radius_1=rng.binomial(8, near, images) / 8)


def test_the_table_by_radius_compares_random_sites_and_failed_attacks() -> None:
    scores = pd.concat([rates(30, 0.4, 0.05), rates(25, 0.02, 0.02, seed=1)], ignore_index=True)
    scores.loc[3] = np.nan  # more than one pixel differs there
    fooled = np.arange(55) < 30
    table = locality_table(scores, fooled, ~fooled).set_index("radius")
    assert table["images"].tolist() == [29] * (len(RADII) + 1)
    assert table["failed_images"].tolist() == [25] * (len(RADII) + 1)
    own = scores["fools_at_radius_1"][fooled].dropna()
    assert table["rate"][1] == pytest.approx(own.mean())
    assert table["excess"][1] == pytest.approx((own - scores["fools_at_random_site"][fooled].dropna()).mean())
    assert table["excess_low"][1] > 0.2
    assert table["excess"].isna().tolist() == [False] * len(RADII) + [True]
    assert locality_sentence(table.reset_index()).startswith(
        "Neighboring sites share the weakness: moved to a neighboring site, the pixel of a successful attack "
        "(29 images) still fools the model at"
    )


@pytest.mark.slow
def test_no_claim_without_evidence_images_or_success() -> None:
    everything = np.ones(30, dtype=bool)
    accused = 0
    for seed in range(60):
        even = locality_sentence(locality_table(rates(30, 0.1, 0.1, seed), everything, ~everything))
        accused += not even.startswith(
            "There is not enough evidence that neighboring sites share the weakness"
        )
    assert accused <= 4  # 1.5 at the nominal 2.5%
    none = locality_table(rates(30, 0.0, 0.0), everything, ~everything)
    assert locality_sentence(none).startswith("There is not enough evidence")
    few = locality_table(rates(19, 0.9, 0.0), everything[:19], ~everything[:19])
    assert few["excess_low"].isna().all()
    assert "no claim is made" in locality_sentence(few)
    assert "no successful pixel to move" in locality_sentence(
        locality_table(rates(30, 0.9, 0.0), ~everything, everything)
    )


def test_many_pairs_of_one_image_are_one_observation() -> None:
    scores = rates(40, 0.9, 0.1).assign(margin_clean=1.0, margin_adversarial=-1.0)
    every = locality_of(scores, np.arange(40))
    assert every is not None
    assert locality_sentence(every).startswith("Neighboring sites share the weakness")
    one = locality_of(scores, np.zeros(40, dtype=int))
    assert one is not None
    assert "(1 image)" in locality_sentence(one)
    assert locality_sentence(one).endswith("With fewer than 20 images, no claim is made.")
    assert one["rate"].to_numpy() == pytest.approx(every["rate"].to_numpy())
    # The same of a whole analysis: two colors of the one trigger of one image, and another image.
    model, pairs = triggered_pair()
    marked = torch.zeros_like(pairs.clean)
    marked[0, 0, 0, 0] = 0.5  # far from the trigger
    clean = torch.cat([pairs.clean, pairs.clean, pairs.clean + marked])
    changed = torch.cat([pairs.adversarial, 0.9 * pairs.adversarial, pairs.adversarial + marked])
    assert locality(model, Pairs.of(model, clean, changed), radius=2).by_radius["images"].tolist() == [2] * 3


def test_rates_that_round_to_nothing_and_images_without_far_sites_are_said_as_they_are() -> None:
    everything = np.ones(30, dtype=bool)
    rare = rates(30, 0.0, 0.0).assign(fools_at_radius_1=[0.05, *[0.0] * 29])
    sentence = locality_sentence(locality_table(rare, everything, ~everything))
    assert "still fools the model at 0.2% [" in sentence
    tiny = rates(30, 0.4, 0.0).assign(fools_at_random_site=np.nan)
    sentence = locality_sentence(locality_table(tiny, everything, ~everything))
    assert sentence.endswith("There are no other sites to compare with, so no claim is made.")
    assert "nan" not in sentence


@pytest.mark.parametrize("images", [5, 10, 20, 50])
def test_the_interval_of_rates_covers_their_mean(images: int) -> None:
    """Shares of few sites, most of them none: nominally 95 of 100, on the mean over five means at least 92."""
    rng = np.random.default_rng(images)
    covered = []
    for mean in (0.05, 0.1, 0.3, 0.5, 0.9):
        for _ in range(200):
            weak = rng.beta(0.3 * mean, 0.3 * (1 - mean), images)
            _, low, high = rate_interval(rng.binomial(8, weak) / 8)
            covered.append(low <= mean <= high)
    assert np.mean(covered) >= 0.92
