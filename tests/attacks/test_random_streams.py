"""Random numbers that belong to an image: uniform, independent, repeatable."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from weakspot import _random

MANY = 200_000


def images(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 6, 5, generator=torch.Generator().manual_seed(0))


def correlation(first: Tensor, second: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first.double(), second.double()]))[0, 1])


def mixed(number: int) -> int:
    """The finalizer of splitmix64 in whole numbers of any size."""
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
    return number ^ number >> 31


@pytest.mark.parametrize("stream", [0, 1, 7, 10**6])
def test_uniform_is_splitmix64_of_the_counter(stream: int) -> None:
    golden = 0x9E3779B97F4A7C15
    keys = _random.keys(images(), 5)
    found = _random.uniform(keys, stream, 2, 3)
    assert found.shape == (3, 2, 3)
    for key, numbers in zip(keys.tolist(), found.flatten(1).tolist(), strict=True):
        start = mixed((key + stream * golden) % 2**64)
        expected = [((mixed((start + place * golden) % 2**64) >> 40) + 0.5) / 2**24 for place in range(1, 7)]
        assert numbers == pytest.approx(expected, abs=2**-24)


@pytest.mark.parametrize("stream", [0, 3, 2**31])
def test_uniform_fills_the_open_interval_evenly(stream: int) -> None:
    for numbers in _random.uniform(_random.keys(images(), 0), stream, MANY):
        assert 0 < float(numbers.min()) < 1e-4
        assert 1 - 1e-4 < float(numbers.max()) < 1
        # Five standard errors each.
        assert abs(float(numbers.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / MANY)
        assert abs(float(numbers.var()) - 1 / 12) < 5 * math.sqrt(1 / 180 / MANY)
        counts = torch.histc(numbers, 64, 0, 1)
        chi_square = float(((counts - MANY / 64).square() / (MANY / 64)).sum())
        assert abs(chi_square - 63) < 5 * math.sqrt(2 * 63)


def key_of_first_bits(bits: int) -> Tensor:
    """The key whose stream 0 begins with these 64 bits: splitmix64 run backwards."""

    def unmixed(number: int) -> int:
        for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
            seen = number
            for _ in range(3):
                seen = number ^ seen >> shift
            number = seen * pow(factor, -1, 2**64) % 2**64
        return number

    key = unmixed((unmixed(bits) - 0x9E3779B97F4A7C15) % 2**64)
    return torch.tensor([key - 2**64 if key >= 2**63 else key])


@pytest.mark.parametrize("bits", [0, 1, 2**63 - 1, 2**63, 2**64 - 2**40, 2**64 - 1])
def test_the_ends_of_the_interval_are_never_drawn(bits: int) -> None:
    key = key_of_first_bits(bits)
    (number,) = _random.uniform(key, 0, 1)[0].tolist()
    assert number == pytest.approx(bits / 2**64, abs=2**-22)
    assert 0 < number < 1
    assert math.isfinite(float(_random.normal(key, 0, 1)))


def test_normal_has_the_moments_of_a_standard_normal() -> None:
    for numbers in _random.normal(_random.keys(images(), 0), 2, MANY):
        for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            assert abs(float(numbers.double().pow(power).mean()) - moment) < 5 * math.sqrt(variance / MANY)
        # The share within one standard deviation.
        assert abs(float((numbers.abs() < 1).double().mean()) - math.erf(math.sqrt(0.5))) < 5e-3


@pytest.mark.parametrize("lag", [1, 2, 3, 5, 16, 28, 224])
def test_a_stream_does_not_repeat_itself(lag: int) -> None:
    numbers = _random.uniform(_random.keys(images(1), 0), 0, MANY)[0]
    assert abs(correlation(numbers[:-lag], numbers[lag:])) < 5 / math.sqrt(MANY)


def test_streams_images_and_seeds_are_independent_of_each_other() -> None:
    streams = torch.cat(
        [
            _random.uniform(_random.keys(images(), seed), stream, 20_000)
            for seed in (0, 1, 2)
            for stream in (0, 1, 2, 3, 1000)
        ]
    )
    correlations = torch.corrcoef(streams.double()).fill_diagonal_(0)
    assert float(correlations.abs().max()) < 5.5 / math.sqrt(20_000)
    for lag in (1, 2):  # neighboring streams are no shifted copies either
        shifted = torch.corrcoef(torch.cat([streams[:, lag:], streams[:, :-lag]]).double()).fill_diagonal_(0)
        assert float(shifted.abs().max()) < 5.5 / math.sqrt(20_000)


def test_numbers_are_the_same_in_any_batch_and_any_shape_and_leave_the_generator_alone() -> None:
    pictures, before = images(), torch.random.get_rng_state()
    keys = _random.keys(pictures, 4)
    together = _random.uniform(keys, 2, 3, 6, 5)
    assert torch.equal(_random.keys(pictures.flip(0), 4).flip(0), keys)
    for row in range(3):
        key = _random.keys(pictures[row : row + 1], 4)
        assert torch.equal(_random.uniform(key, 2, 3, 6, 5), together[row : row + 1])
    assert torch.equal(_random.uniform(keys, 2, 90).view_as(together), together)
    # More numbers begin with the fewer.
    assert torch.equal(_random.uniform(keys, 2, 200)[:, :90], together.flatten(1))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_keys_depend_on_content_and_seed_alone() -> None:
    pictures = (images(4) * 255).round() / 255
    pictures[3] = pictures[0]
    keys = _random.keys(pictures, 0)
    assert torch.equal(keys, _random.keys(pictures.clone(), 0))
    assert keys[0] == keys[3]
    assert len(set(keys.tolist())) == 3
    # What an 8-bit file does not keep does not count, nor do layout in memory and precision.
    assert torch.equal(_random.keys(pictures + 0.4 / 255 * (pictures < 0.5), 0), keys)
    assert torch.equal(_random.keys(pictures.contiguous(memory_format=torch.channels_last), 0), keys)
    assert torch.equal(_random.keys(pictures.double(), 0), keys)
    seeds = [0, 1, 2, 10, 2**31, 2**63 - 1]
    assert len({int(_random.keys(pictures[:1], seed)) for seed in seeds}) == len(seeds)


def test_one_level_of_one_pixel_makes_another_key() -> None:
    gray = torch.full((1, 1, 4, 4), 100 / 255)
    others = gray.repeat(16, 1, 1, 1)
    others.view(16, 16).diagonal().add_(1 / 255)
    assert len(set(_random.keys(torch.cat([gray, others]), 0).tolist())) == 17
