"""Locality: a planted trigger shows its receptive field, and controls come out as they must."""

from __future__ import annotations

import pytest
import torch

from tests.attacks.test_sweep import Triggered
from tests.conftest import PoolingNetwork
from weakspot import Locality, Pairs, attacks, locality


def triggered_pair() -> tuple[Triggered, Pairs]:
    model = Triggered().eval()
    clean = torch.zeros(1, 3, 10, 12)
    adversarial = clean.clone()
    adversarial[0, 2, 4, 6] = 1
    return model, Pairs.of(model, clean, adversarial)


def by_control(found: Locality, column: str) -> dict[str, float]:
    table: dict[str, list[object]] = found.controls.to_dict("list")  # type: ignore[assignment]
    return {str(name): float(str(value)) for name, value in zip(table["control"], table[column], strict=True)}


def test_exactly_the_receptive_field_shares_the_weakness() -> None:
    model, pairs = triggered_pair()
    found = locality(model, pairs, radius=4)
    assert {tuple(place) for place in found.success[0].nonzero().tolist()} == {
        (row, column) for row in range(3, 6) for column in range(5, 8)
    }
    assert torch.equal(found.same_class, found.success)
    assert found.by_radius["rate"].tolist() == pytest.approx([1, 0, 0, 0, 8 / 119])
    rates, images = by_control(found, "rate"), by_control(found, "images")
    assert rates["neighbours"] == 1
    assert rates["moved with the image"] == 1  # by one site the pixel stays in the filter's window
    assert 0 < rates["random colour"] < 1
    assert images["neighbours of failed attacks"] == 0


def test_failures_are_controls_and_not_results() -> None:
    model, pairs = triggered_pair()
    weak = pairs.clean.clone()
    weak[0, 2, 4, 6] = 0.3
    both = Pairs.of(
        model,
        torch.cat([pairs.clean, pairs.clean]),
        torch.cat([pairs.adversarial, weak]),
        torch.tensor([0, 0]),
    )
    found = locality(model, both, radius=4)
    assert found.by_radius["images"].tolist() == [1] * 5
    rates, images = by_control(found, "rate"), by_control(found, "images")
    assert (rates["neighbours of failed attacks"], images["neighbours of failed attacks"]) == (0, 1)
    assert rates["random site of failed attacks"] == 0


def test_maps_equal_moving_the_pixel_by_hand() -> None:
    torch.manual_seed(0)
    model = PoolingNetwork().eval()
    images = torch.rand(4, 3, 9, 7) * 0.05 + 0.5
    labels = model(images).argmax(1)
    sweep = attacks.pixel_sweep(model, images, labels)
    pairs = sweep.pairs(images, labels)
    found = locality(model, pairs)
    landed = model(pairs.adversarial).argmax(1)
    for number in range(4):
        row, column = (pairs.perturbation[number] != 0).any(0).nonzero()[0].tolist()
        color = pairs.adversarial[number, :, row, column]
        for down in range(9):
            for along in range(7):
                edited = images[number : number + 1].clone()
                edited[0, :, down, along] = color
                with torch.no_grad():
                    predicted = int(model(edited).argmax())
                assert bool(found.success[number, down, along]) == (predicted != int(labels[number]))
                same = predicted == int(landed[number]) != int(labels[number])
                assert bool(found.same_class[number, down, along]) == same


def test_pairs_that_differ_in_more_than_one_pixel_are_refused_by_number() -> None:
    model, pairs = triggered_pair()
    two = pairs.adversarial.clone()
    two[0, 0, 0, 0] = 1
    both = Pairs.of(model, torch.cat([pairs.clean] * 2), torch.cat([pairs.adversarial, two]))
    with pytest.raises(ValueError, match=r"pairs\[1\] differ in 2 pixels; accepted are pairs"):
        locality(model, both)
    with pytest.raises(ValueError, match=r"pairs\[0\] differ in 0 pixels"):
        locality(model, Pairs.of(model, pairs.clean, pairs.clean))
    with pytest.raises(ValueError, match="radius is 0"):
        locality(model, pairs, radius=0)


def test_the_same_seed_gives_the_same_table_whatever_the_batch() -> None:
    torch.manual_seed(1)
    model = PoolingNetwork().eval()
    images = torch.rand(3, 3, 8, 8) * 0.05 + 0.5
    labels = model(images).argmax(1)
    pairs = attacks.pixel_sweep(model, images, labels).pairs(images, labels)
    one, other = locality(model, pairs, seed=5), locality(model, pairs, seed=5, batch_size=3)
    assert one.by_radius.equals(other.by_radius)
    assert one.controls.equals(other.controls)
