"""The 8-bit grid: minimal-norm attacks end on it and still fool, and files keep within the budget."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.attacks.test_few_pixels import convolutional, leaning, random_images
from tests.attacks.test_gradient import predicted, region_of
from tests.data.test_real_networks import networks
from tests.networks import LinearNetwork
from weakspot.attacks import carlini_wagner, ead, ensemble, fmn, pgd, stored, strattack
from weakspot.attacks.context import attack_context
from weakspot.attacks.gray_levels import settle
from weakspot.budgets import L1, L2, SSIM, Budget, Linf
from weakspot.pairs import AttackResult

__all__ = ["networks"]  # a fixture
Attack = Callable[..., AttackResult]
ATTACKS: dict[str, Attack] = {
    "fmn": partial(fmn, steps=30),
    "fmn in L2": partial(fmn, norm="l2", steps=30),
    "carlini_wagner": partial(carlini_wagner, steps=60, learning_rate=0.05),
    "ead": partial(ead, steps=60, learning_rate=0.05),
    "strattack": partial(strattack, steps=60, learning_rate=0.05, group=3),
}
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


def round_trip(images: Tensor) -> Tensor:
    """The images as PNG files hold them."""
    read = []
    for image in images:
        levels = (image * 255).round().byte().movedim(0, -1).numpy()
        file = io.BytesIO()
        Image.fromarray(levels if levels.shape[-1] == 3 else levels[..., 0]).save(file, "PNG")
        again = np.array(Image.open(file), np.float32) / 255
        read.append(torch.from_numpy(again).view(*image.shape[1:], -1).movedim(-1, 0))
    return torch.stack(read)


def levels_of(images: Tensor) -> Tensor:
    return (255 * images).round() / 255


def near(model: nn.Module, images: Tensor) -> nn.Module:
    """The network with its classes' borders moved close to the images."""
    with torch.no_grad():
        bias = next(
            one for one in reversed(list(model.modules())) if getattr(one, "bias", None) is not None
        ).bias
        assert isinstance(bias, Tensor)
        bias -= model(images).mean(0)
    return model


@pytest.mark.parametrize("between", [False, True], ids=["on the grid", "between levels"])
@each_attack
def test_successes_survive_a_png_file_within_one_more_level_of_their_size(
    attack: Attack, between: bool
) -> None:
    """The attacks end just beyond the border, where plain rounding loses most of them."""
    model, images = convolutional((3, 12, 12), 40)
    images = images if between else levels_of(images)
    model = near(model, images)
    labels, region = predicted(model, images), region_of("scattered", images)
    assert region is not None
    floats = attack(model, images, labels, region=region, on_grid=False)
    result = attack(model, images, labels, region=region)
    fools = floats.success
    assert int(fools.sum()) >= 38
    assert floats.success_8bit is not None
    assert result.success_8bit is not None
    if attack in (ATTACKS["fmn"], ATTACKS["fmn in L2"]):  # which end nearer to the border than the others
        assert int(floats.success_8bit.sum()) <= 0.8 * int(fools.sum())
    survived = predicted(model, round_trip(result.adversarial)) != labels
    # Between levels the file also rounds what the attack did not change, and one level is half a level on the mean.
    kept = int((survived & fools).sum())
    assert kept >= (int(floats.success_8bit.sum()) if between else 0.98 * int(fools.sum()))
    assert torch.equal(survived, result.success_8bit)
    size, own = (255 * one.perturbation.abs().amax((1, 2, 3)) for one in (result, floats))
    assert bool((size <= (own - 1e-3).ceil().clamp(min=1) + 1e-3).all())
    # Confined to the region and [0, 1], on the grid where it is changed, its own bits elsewhere.
    moved = result.adversarial != images
    assert not bool((moved & ~region).any())
    assert 0 <= float(result.adversarial.min()) <= float(result.adversarial.max()) <= 1
    on_grid = (result.adversarial - levels_of(result.adversarial)).abs() < 1e-6
    assert between or bool((on_grid | ~moved)[survived].all())


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("name", ["fmn", "fmn in L2", "carlini_wagner"])
def test_on_a_real_network_nearly_all_survive(networks: object, name: str) -> None:
    model = networks.network("cifar10_resnet20")  # type: ignore[attr-defined]
    images, labels = networks.cifar10("test", 46)  # type: ignore[attr-defined]
    right = (predicted(model, images) == labels).nonzero()[:40, 0]
    images, labels = images[right], labels[right]
    options = {"steps": 200, "learning_rate": 0.01} if name == "carlini_wagner" else {"steps": 100}
    attack = partial(ATTACKS[name], model, images, labels, **options)
    floats, result = attack(on_grid=False), attack()
    assert int(floats.success.sum()) == 40
    assert floats.success_8bit is not None
    assert float(floats.success_8bit.float().mean()) < 0.7
    assert float((predicted(model, round_trip(result.adversarial)) != labels).float().mean()) >= 0.98
    size, own = (255 * one.perturbation.abs().amax((1, 2, 3)) for one in (result, floats))
    assert bool((size <= (own - 1e-3).ceil() + 1e-3).all())


def test_the_end_on_the_grid_of_a_linear_network_is_the_smallest_by_brute_force() -> None:
    """Moved one level each in the order of their slopes, as few values as fool; no smaller count does."""
    slopes = torch.tensor([9.0, -7, 5, 3, -2, 1, 0.5, 0.25]).view(1, 2, 4)
    model, clean = LinearNetwork(slopes).eval(), torch.full((1, 1, 2, 4), 128 / 255)
    labels = predicted(model, clean)
    for lead in (4.0, 10.0, 14.5, 22.0, 26.5):
        # The lead of the label in levels of slope one: 9, 16, 21, ... are what the largest slopes take away.
        shifted = nn.Sequential(model, Lead(lead / 255 - float((slopes * clean[0]).sum())))
        wanted = next(k for k in range(9) if float(slopes.abs().flatten()[:k].sum()) > lead + 0.01)
        float_point = (clean - 0.49 / 255 * slopes.sign()).detach()  # nearest rounds all of it away
        with attack_context(shifted.eval(), clean, torch.zeros_like(labels)) as problem:
            margins = torch.full((1,), -1e-6)
            found = settle(
                problem,
                float_point,
                lambda d: d.abs().flatten(1).sum(1),
                fools=margins < 0,
                needed=torch.zeros(1),
            )
        change = 255 * (found - clean)
        assert int((change.abs() > 0.5).sum()) == wanted
        assert bool((change.abs() <= 1 + 1e-3).all())


class Lead(nn.Module):
    """Two logits of a linear network's difference and a constant: their difference is halved, and moved by it."""

    def __init__(self, constant: float) -> None:
        super().__init__()
        self.constant = constant

    def forward(self, logits: Tensor) -> Tensor:
        score = (logits[:, 0] - logits[:, 1]) / 2 + self.constant
        return torch.stack([score, -score], 1)


@pytest.mark.parametrize("attack", [ATTACKS["fmn"], ATTACKS["fmn in L2"], ATTACKS["carlini_wagner"]])
def test_an_image_that_cannot_fool_on_the_grid_is_returned_unchanged_as_a_failure(attack: Attack) -> None:
    """A network that is fooled only between levels."""
    model = Between().eval()
    images = levels_of(random_images(3, 3, 6, 6))
    labels = torch.zeros(3, dtype=torch.long)
    result, floats = (attack(model, images, labels, on_grid=on_grid) for on_grid in (True, False))
    assert bool(floats.success.any())
    assert result.success_8bit is not None
    assert not bool(result.success_8bit.any())
    assert torch.equal(result.success, floats.success)
    assert torch.equal(result.adversarial[floats.success], floats.adversarial[floats.success])


class Between(nn.Module):
    """The mean distance from the levels of a picture file speaks against the label."""

    def forward(self, images: Tensor) -> Tensor:
        off = 255 * images - (255 * images).round().detach()
        lead = 0.1 - off.abs().mean((1, 2, 3)) + 1e-3 * images.mean((1, 2, 3))
        return torch.stack([lead, -lead], 1)


BUDGETS: list[Budget] = [Linf(4 / 255), Linf(1.5 / 255), Linf(0.4 / 255), L2(0.1), L1(1.0), SSIM(0.001)]


@pytest.mark.parametrize("between", [False, True], ids=["on the grid", "between levels"])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_files_keep_within_the_budget_and_success_is_theirs(budget: Budget, between: bool) -> None:
    model, images = convolutional((3, 12, 12), 12)
    images = images if between else levels_of(images)
    model = near(model, images)
    labels = predicted(model, images)
    result = pgd(model, images, labels, budget=budget, steps=10)
    files, fits = stored(result.adversarial, images, budget)
    before = levels_of(images)
    assert torch.equal(files, levels_of(files))
    assert bool(fits.all())
    assert bool((budget.distance(files - before, before) <= budget.eps * (1 + 1e-5) + 1e-6).all())  # type: ignore[attr-defined]
    assert bool(((files - result.adversarial).abs() <= 1 / 255 + 1e-6).all())
    assert result.success_8bit is not None
    assert torch.equal(result.success_8bit, predicted(model, round_trip(files)) != labels)
    if budget == Linf(4 / 255):  # whole levels: nearest never overspends
        assert torch.equal(files, levels_of(result.adversarial))


def test_as_few_values_as_possible_go_back() -> None:
    """By hand: eight changes of 1.6 levels round to 2; an L1 of 13 levels leaves room for five of these."""
    clean = torch.full((1, 1, 2, 4), 100 / 255)
    files, fits = stored(clean + 1.6 / 255, clean, L1(13 / 255))
    assert sorted((255 * (files - clean)).round().flatten().tolist()) == [1, 1, 1, 2, 2, 2, 2, 2]
    assert bool(fits.all())


def test_a_success_between_levels_is_none_within_a_budget_below_one() -> None:
    model, images = leaning((3, 8, 8), lead=0.2), levels_of(random_images(6, 3, 8, 8, contrast=0.1))
    labels = predicted(model, images)
    result = pgd(model, images, labels, budget=Linf(0.9 / 255), steps=10)
    assert result.success_8bit is not None
    assert bool(result.success.any())
    assert not bool(result.success_8bit.any())


class Half(nn.Module):
    """Falls to the slightest change between levels; on levels, to two of the mean."""

    def forward(self, images: Tensor) -> Tensor:
        value = 255 * images
        off = (value - value.round().detach()).abs().mean((1, 2, 3))
        lead = 2 - (value - 128).abs().mean((1, 2, 3)) - 100 * off * (off > 0.01)
        return torch.stack([lead, -lead], 1)


@pytest.mark.parametrize("attack", [partial(pgd, stop_early=True, steps=20), ensemble], ids=["pgd", "auto"])
def test_a_search_that_leaves_early_leaves_only_when_the_file_fools(attack: Attack) -> None:
    """Any first step fools this network in floats, and no file within a level or two does."""
    images = torch.full((2, 1, 6, 6), 128 / 255)
    result = attack(Half().eval(), images, torch.zeros(2, dtype=torch.long), budget=Linf(4 / 255))
    assert result.success_8bit is not None
    assert bool(result.success_8bit.all())
