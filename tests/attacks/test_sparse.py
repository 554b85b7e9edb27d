"""Sparse attacks: closed forms on linear models, few groups where few are needed, groups of every kind."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.attacks.test_few_pixels import Leaning, convolutional, random_images
from tests.attacks.test_gradient import margins_of, predicted, region_of
from tests.networks import untouched
from weakspot._checks import ModelWarning
from weakspot.attacks import carlini_wagner, ead, strattack
from weakspot.attacks.tradeoff import group_lengths


def peaked(shape: tuple[int, ...], lead: float) -> Leaning:
    """A linear model of which every tenth entry counts twice as much as most, no two the same."""
    generator = torch.Generator().manual_seed(5)
    weight = (0.3 + 0.2 * torch.rand(shape, generator=generator)) * torch.randn(
        shape, generator=generator
    ).sign()
    peaks = torch.rand(shape, generator=generator) < 0.1
    return Leaning(torch.where(peaks, 2.5 * weight.sign() + weight, weight), lead).eval()


def cells_by_hand(height: int, width: int, side: int) -> Tensor:
    """(1, 1, H, W) numbers of square cells, each given when its first site is met."""
    numbers: dict[tuple[int, int], int] = {}
    rows = [
        [numbers.setdefault((row // side, column // side), len(numbers)) for column in range(width)]
        for row in range(height)
    ]
    return torch.tensor(rows)[None, None]


def changed_groups(perturbation: Tensor, groups: Tensor) -> Tensor:
    """bool (N, G)."""
    return group_lengths(perturbation, groups.expand(len(perturbation), -1, -1, -1)) > 0


def in_one_cell(shape: tuple[int, ...], rows: slice, columns: slice) -> Leaning:
    """A linear model that looks at some rows and columns only; its border goes through gray."""
    weight = torch.zeros(shape)
    weight[:, rows, columns] = 1.0
    return Leaning(weight, 0.3).eval()


@pytest.mark.parametrize("kind", ["everywhere", "scattered"])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 9, 14)], ids=str)
def test_elastic_net_on_a_linear_model_nears_the_smallest_l1_and_is_sparser_than_carlini_wagner(
    shape: tuple[int, ...], kind: str
) -> None:
    model, images = peaked(shape, lead=0.5), random_images(6, *shape, contrast=0.02)
    labels, region = torch.zeros(6, dtype=torch.long), region_of(kind, images)
    sparse = ead(model, images, labels, region=region, steps=400, beta=1.0)
    dense = carlini_wagner(model, images, labels, region=region, steps=100)
    inside = torch.ones(6, 1, *shape[1:]) if region is None else region.float()
    largest = (model.weight.detach() * inside).abs().flatten(1).amax(1)
    ratio = sparse.perturbation.abs().flatten(1).sum(1) * largest / margins_of(model, images, labels)
    assert bool(sparse.success.all())
    assert bool(((ratio >= 1 - 1e-5) & (ratio <= 1.15)).all()), ratio
    counts = [(result.perturbation != 0).flatten(1).sum(1) for result in (sparse, dense)]
    assert bool((counts[0] < counts[1] / 4).all()), counts


def test_a_larger_beta_changes_fewer_entries() -> None:
    model, images = peaked((3, 8, 8), lead=0.5), random_images(4, 3, 8, 8, contrast=0.02)
    labels = torch.zeros(4, dtype=torch.long)
    few, many = (
        (ead(model, images, labels, steps=100, beta=beta).perturbation != 0).flatten(1).sum(1)
        for beta in (1.0, 0.0)
    )
    assert bool((few < many).all())


@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 10, 15), (1, 18, 9)], ids=str)
def test_structured_changes_few_groups_and_the_planted_one_among_them(shape: tuple[int, ...]) -> None:
    _, height, width = shape
    groups, generator = cells_by_hand(height, width, 4), torch.Generator().manual_seed(6)
    planted = int(groups[0, 0, 5, 6])
    weight = 0.2 * torch.randn(shape, generator=generator)
    weight = torch.where(groups[0] == planted, weight.sign(), weight)
    model, images = Leaning(weight, 2.0).eval(), random_images(4, *shape, contrast=0.05)
    labels = torch.zeros(4, dtype=torch.long)
    few = strattack(model, images, labels, group=4, steps=100)
    dense = carlini_wagner(model, images, labels, steps=100)
    assert bool(few.success.all())
    touched, everywhere = (changed_groups(result.perturbation, groups) for result in (few, dense))
    assert bool((touched.sum(1) < everywhere.sum(1) / 2).all()), touched.sum(1)
    assert touched[:, planted].tolist() == [True] * 4


def test_structured_changes_whole_groups_or_nothing_of_them() -> None:
    groups, generator = cells_by_hand(10, 15, 4), torch.Generator().manual_seed(6)
    model = Leaning(torch.randn(3, 10, 15, generator=generator), 1.0).eval()
    images = random_images(4, 3, 10, 15, contrast=0.1)
    result = strattack(model, images, torch.zeros(4, dtype=torch.long), group=4, steps=100)
    changed = (result.perturbation != 0).any(1, keepdim=True).float()
    assert torch.equal(changed.bool(), changed_groups(changed, groups)[:, groups[0, 0]][:, None])
    assert 0 < float(changed.mean()) < 1


def test_more_sparsity_changes_fewer_groups() -> None:
    model, images = peaked((3, 16, 16), lead=1.0), random_images(4, 3, 16, 16, contrast=0.02)
    labels, groups = torch.zeros(4, dtype=torch.long), cells_by_hand(16, 16, 4)
    few, many = (
        changed_groups(
            strattack(model, images, labels, group=4, steps=100, sparsity=sparsity).perturbation, groups
        ).sum(1)
        for sparsity in (2.0, 0.0)
    )
    assert bool((few < many).all())


@pytest.mark.parametrize("region", ["everywhere", "half of the cell"])
def test_structured_refines_to_the_nearest_point_within_its_groups(region: str) -> None:
    groups, generator = cells_by_hand(8, 8, 4), torch.Generator().manual_seed(6)
    weight = torch.where(groups[0] == 1, torch.randn(3, 8, 8, generator=generator), 0)
    model, images = Leaning(weight, 0.5).eval(), random_images(4, 3, 8, 8, contrast=0.1)
    labels, inside = torch.zeros(4, dtype=torch.long), torch.ones(1, 1, 8, 8, dtype=torch.bool)
    if region != "everywhere":
        inside[..., 2:, :] = False
    result = strattack(model, images, labels, group=4, region=inside, steps=300)
    nearest = margins_of(model, images, labels) / float((weight * inside[0]).norm())
    ratio = result.perturbation.flatten(1).norm(dim=1) / nearest
    assert bool(((ratio >= 1 - 1e-5) & (ratio <= 1.05)).all()), ratio


@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [
        ((3, 10, 7), slice(8, 10), slice(4, 7)),
        ((3, 7, 10), slice(0, 4), slice(8, 10)),
        ((1, 10, 7), slice(8, 10), slice(0, 4)),
        ((1, 5, 13), slice(4, 5), slice(12, 13)),
    ],
    ids=["last of all", "first row, last column", "last row, first column", "a single site"],
)
def test_cells_that_the_border_cuts_are_attacked_like_any_other(
    shape: tuple[int, ...], rows: slice, columns: slice
) -> None:
    model, images = in_one_cell(shape, rows, columns), random_images(3, *shape, contrast=0.1)
    result = strattack(model, images, torch.zeros(3, dtype=torch.long), group=4, steps=100)
    assert result.success.tolist() == [True] * 3
    expected = torch.zeros(3, *shape, dtype=torch.bool)
    expected[:, :, rows, columns] = True
    assert torch.equal(result.perturbation != 0, expected)


@pytest.mark.parametrize("shape", [(3, 10, 7), (1, 7, 10), (3, 8, 8)], ids=str)
@pytest.mark.parametrize(
    "relabel", [lambda cells: cells, lambda cells: 10**9 - 7 * cells], ids=["same", "large"]
)
@pytest.mark.parametrize("each", [False, True], ids=["one for all", "one for each"])
def test_a_side_in_pixels_is_square_cells_whatever_their_numbers(
    shape: tuple[int, ...], relabel: Any, each: bool
) -> None:
    model, images = convolutional(shape)
    labels = predicted(model, images)
    groups = relabel(cells_by_hand(shape[1], shape[2], 4)).expand(4 if each else 1, -1, -1, -1)
    with untouched(model, groups):
        by_side, by_number = (
            strattack(model, images, labels, group=group, steps=40).adversarial for group in (4, groups)
        )
    assert torch.equal(by_number, by_side)


def test_every_image_keeps_its_own_groups() -> None:
    model, images = convolutional((3, 8, 8))
    labels = predicted(model, images)
    groups = torch.randint(0, 6, (4, 1, 8, 8), generator=torch.Generator().manual_seed(7))
    groups += 100 * torch.arange(4).view(4, 1, 1, 1)
    together = strattack(model, images, labels, group=groups, steps=60).adversarial
    for index in range(4):
        one = slice(index, index + 1)
        alone = strattack(model, images[one], labels[one], group=groups[one], steps=60).adversarial
        torch.testing.assert_close(alone, together[one], rtol=0, atol=1e-5)


@pytest.mark.parametrize("group", [100, 1], ids=["one cell of all", "every site its own"])
def test_cells_of_any_side_are_taken(group: int) -> None:
    model, images = convolutional((3, 10, 7))
    result = strattack(model, images, predicted(model, images), group=group, steps=100)
    assert bool(result.success.any())


@pytest.mark.parametrize(
    "group",
    [
        0,
        -4,
        True,
        2.5,
        "slic",
        None,
        torch.zeros(4, 1, 8, 8),
        torch.zeros(4, 1, 8, 8, dtype=torch.bool),
        torch.zeros(4, 8, 8, dtype=torch.long),
        torch.zeros(4, 3, 8, 8, dtype=torch.long),
        torch.zeros(3, 1, 8, 8, dtype=torch.long),
        torch.zeros(4, 1, 8, 7, dtype=torch.long),
        torch.full((4, 1, 8, 8), -1),
    ],
    ids=lambda group: f"{tuple(group.shape)} {group.dtype}" if isinstance(group, Tensor) else repr(group),
)
def test_groups_that_do_not_fit_are_refused_in_one_sentence(group: Any) -> None:
    model, images = convolutional((3, 8, 8))
    with (
        untouched(model, images),
        pytest.raises(ValueError, match=r"^group must [^\n]*, got [^\n]*$"),
    ):
        strattack(model, images, predicted(model, images), group=group, steps=10)


@pytest.mark.parametrize("value", [-1, float("nan")])
@pytest.mark.parametrize(("attack", "argument"), [(ead, "beta"), (strattack, "sparsity")])
def test_weights_below_zero_are_refused_by_name(attack: Any, argument: str, value: float) -> None:
    model, images = convolutional((3, 8, 8))
    with untouched(model, images), pytest.raises(ValueError, match=f"^{argument} must be .*, got {value}"):
        attack(model, images, predicted(model, images), **{argument: value})


def test_structured_refuses_fewer_steps_than_its_two_searches_need() -> None:
    model, images = convolutional((3, 8, 8))
    with pytest.raises(ValueError, match=r"^steps must be an integer of at least 10, got 9"):
        strattack(model, images, predicted(model, images), steps=9)


@pytest.mark.parametrize("attack", [carlini_wagner, ead, strattack])
def test_zero_gradients_are_said(attack: Any) -> None:
    """Nothing is found in a network that rounds its input, which says nothing about the network."""

    class Rounded(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            mean = (images > 0.5).float().mean((1, 2, 3))
            return 10 * torch.stack([mean, 1 - mean], 1)

    model, images = Rounded().eval(), random_images(3, 3, 6, 6)
    with pytest.warns(
        ModelWarning, match="the gradient of Rounded is zero everywhere for 3 of 3 images"
    ) as said:
        attack(model, images, model(images).argmax(1), steps=10)
    assert len(said) == 1
    sloped, images = convolutional((3, 6, 6), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ModelWarning)
        attack(sloped, images, predicted(sloped, images), steps=10)
