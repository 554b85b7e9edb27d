"""Attacks that look for the smallest change: laws of all of them, and closed forms on linear models."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.attacks.test_few_pixels import (
    SHAPES,
    Constant,
    Needle,
    assert_sound,
    convolutional,
    drawn,
    leaning,
    random_images,
)
from tests.attacks.test_gradient import Watched, bits, margins_of, predicted, region_of, tagged, times
from tests.covering import sampled
from tests.networks import FlatNetwork, doubled, untouched
from weakspot.attacks import carlini_wagner, ead, fmn, minimal_pgd, pgd, strattack
from weakspot.attacks.best_so_far import BestSoFar
from weakspot.attacks.context import attack_context
from weakspot.attacks.gray_levels import STEPS
from weakspot.attacks.tradeoff import squared
from weakspot.budgets import Linf
from weakspot.pairs import AttackResult

Attack = Callable[..., AttackResult]


def structured_in_small_cells(*arguments: Any, **options: Any) -> AttackResult:
    return strattack(*arguments, **{"group": 3, **options})


def fmn_without_a_rate(
    *arguments: Any, learning_rate: float = 0.0, norm: str = "linf", **options: Any
) -> AttackResult:
    del learning_rate  # it has none
    return fmn(*arguments, norm=norm, **options)


WEIGHED: dict[str, Attack] = {
    "carlini_wagner": carlini_wagner,
    "ead": ead,
    "strattack": structured_in_small_cells,
}
ATTACKS: dict[str, Attack] = {
    **WEIGHED,
    "fmn": fmn_without_a_rate,
    "fmn in L2": partial(fmn_without_a_rate, norm="l2"),
}

each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
each_weighed_attack = pytest.mark.parametrize("attack", WEIGHED.values(), ids=WEIGHED)


@sampled("attack, shape, kind", ATTACKS.values(), SHAPES, ["everywhere", "empty for one"])
def test_results_are_in_range_in_the_region_and_verified(
    attack: Attack, shape: tuple[int, ...], kind: str
) -> None:
    model, images = convolutional(shape)
    labels, region = predicted(model, images), region_of(kind, images)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    with untouched(model, images, labels, *([] if region is None else [region])):
        result = attack(model, images, labels, region=region, steps=20, learning_rate=0.1)
    assert_sound(result, model, images, labels, region)
    assert bool(result.success.any())
    moved = (bits(result.adversarial) != bits(images)).flatten(1).any(1)
    assert moved.tolist() == [True, kind != "empty for one", True, True]


@pytest.mark.parametrize("batch_size", [4, None])
@each_attack
def test_counts_equal_the_passes_of_each_image(attack: Attack, batch_size: int | None) -> None:
    network, images = convolutional((3, 8, 8), 6)
    images, region = tagged(images)
    model, through = Watched(network).eval(), 0

    def hook(_: nn.Module, arguments: tuple[Tensor, ...], __: Tensor) -> None:
        nonlocal through
        through += len(arguments[0])

    with model.register_forward_hook(hook):
        result = attack(
            model, images, predicted(network, images), region=region, batch_size=batch_size, steps=40
        )
    assert int(result.n_forward.sum()) == through
    assert result.n_forward.tolist() == times(model.seen, images)
    assert result.n_backward.tolist() == times(model.differentiated, images)
    more = result.n_backward - 40  # to end on the grid: none, a climb, or a climb and a descent
    assert bool((more >= 0).all())
    assert bool((more <= 1 + STEPS).all())
    assert int(more.min()) <= 1
    assert max(len(batch) for batch in model.seen) == (batch_size or 6)


@pytest.mark.parametrize(
    ("attack", "shape"), [*zip(ATTACKS.values(), itertools.cycle([(3, 8, 8), (1, 7, 10)]))], ids=list(ATTACKS)
)
def test_an_images_result_depends_on_no_batch_size_no_order_and_no_neighbor(
    attack: Attack, shape: tuple[int, ...]
) -> None:
    """In double precision: an attack's choices turn last bits, which kernels round by the batch, into more."""
    model, images = doubled(convolutional(shape, 5))
    labels, region = predicted(model, images), region_of("scattered", images)
    assert region is not None
    images[0] = 0.2 * images[0]  # neighbors that could not be less alike

    def adversarial(indices: list[int], batch_size: int | None = None) -> Tensor:
        options: dict[str, Any] = {"region": region[indices], "batch_size": batch_size, "steps": 20}
        return attack(model, images[indices], labels[indices], **options).adversarial

    together = adversarial([0, 1, 2, 3, 4])
    for other in (
        adversarial([2, 0, 4, 1, 3], 2)[[1, 3, 0, 4, 2]],
        torch.cat([adversarial([index]) for index in range(5)]),
    ):
        torch.testing.assert_close(other, together, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", ["everywhere", "scattered"])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 9, 14)], ids=str)
def test_carlini_wagner_on_a_linear_model_finds_the_nearest_point_of_the_border(
    shape: tuple[int, ...], kind: str
) -> None:
    model, images = leaning(shape, lead=1.5), random_images(6, *shape, contrast=0.1)
    labels, region = predicted(model, images), region_of(kind, images)
    result = carlini_wagner(model, images, labels, region=region, steps=500, on_grid=False)
    inside = torch.ones(6, 1, *shape[1:]) if region is None else region.float()
    nearest = margins_of(model, images, labels) / (model.weight.detach() * inside).flatten(1).norm(dim=1)
    ratio = result.perturbation.flatten(1).norm(dim=1) / nearest
    assert bool(result.success.all())
    assert bool(((ratio >= 1 - 1e-5) & (ratio <= 1.05)).all()), ratio


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", ["everywhere", "scattered"])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 9, 14)], ids=str)
def test_fmn_on_a_linear_model_finds_the_distance_to_the_border(
    shape: tuple[int, ...], kind: str, norm: str
) -> None:
    model, images = leaning(shape, lead=1.5), random_images(6, *shape, contrast=0.1)
    labels, region = predicted(model, images), region_of(kind, images)
    result = fmn(model, images, labels, norm=norm, region=region, on_grid=False)
    inside = torch.ones(6, 1, *shape[1:]) if region is None else region.float()
    slope = (model.weight.detach() * inside).flatten(1)
    dual, own = (1, torch.inf) if norm == "linf" else (2, 2)
    nearest = margins_of(model, images, labels) / slope.norm(p=dual, dim=1)
    ratio = result.perturbation.flatten(1).norm(p=own, dim=1) / nearest
    assert bool(result.success.all())
    assert bool(((ratio >= 1 - 1e-4) & (ratio <= 1.01)).all()), ratio


def test_pgd_brackets_what_fmn_finds() -> None:
    model, images = convolutional((3, 12, 12), 8)
    labels, region = predicted(model, images), region_of("scattered", images)
    result = fmn(model, images, labels, region=region, on_grid=False)
    assert bool(result.success.all())
    falls = []
    for image, size in enumerate(result.perturbation.abs().flatten(1).amax(1).tolist()):
        own = (images[image : image + 1], labels[image : image + 1])
        place = None if region is None else region[image : image + 1]
        falls.append(
            [
                bool(pgd(model, *own, budget=Linf(fraction * size), region=place, steps=40).success)
                for fraction in (0.9, 1.1)
            ]
        )
    assert falls == [[False, True]] * 8


def test_fmn_refuses_other_norms_and_no_steps() -> None:
    model, images = convolutional((3, 8, 8), 1)
    with pytest.raises(ValueError, match=r"^norm must be one of linf, l2, got 'l0'"):
        fmn(model, images, predicted(model, images), norm="l0")
    with pytest.raises(ValueError, match=r"^steps must be an integer of at least 1, got 0$"):
        fmn(model, images, predicted(model, images), steps=0)


@each_weighed_attack
def test_confidence_is_the_margin_by_which_images_fool(attack: Attack) -> None:
    model, images = leaning((3, 8, 8), lead=1.0), random_images(4, 3, 8, 8, contrast=0.1)
    labels = predicted(model, images)
    result = attack(model, images, labels, confidence=1.0, steps=100, learning_rate=0.05)
    assert bool(result.success.all())
    assert bool((margins_of(model, result.adversarial, labels) <= -1.0 + 1e-4).all())


def test_each_images_weight_is_raised_tenfold_until_it_fools_and_lowered_tenfold_until_it_does_not() -> None:
    model, images = leaning((3, 8, 8), lead=20), random_images(4, 3, 8, 8)
    needed, tried = torch.tensor([0.3, 2.0, 30.0, 1e9]), []
    with attack_context(model, images, torch.zeros(4, dtype=torch.long)) as problem:

        def descend(best: BestSoFar, weights: Tensor, progress: object) -> None:
            tried.append(weights.tolist())
            best.record(problem.clean, needed - weights - 1e-6)

        BestSoFar(problem, squared, confidence=0.0).search(descend, None)
    assert torch.tensor(tried).T.tolist() == [
        pytest.approx([1, 0.1, 10**-0.5, 10**-0.75, 10**-0.625]),
        pytest.approx([1, 10, 10**0.5, 10**0.25, 10**0.375]),
        pytest.approx([1, 10, 100, 10**1.5, 10**1.25]),
        pytest.approx([1, 10, 100, 1000, 10000]),
    ]


@each_attack
def test_images_already_misclassified_are_returned_as_they_are(attack: Attack) -> None:
    model, images = convolutional((3, 8, 8))
    with torch.no_grad():
        labels = model(images).argmin(1)
    result = attack(model, images, labels, steps=20)
    assert result.success.tolist() == [True] * 4
    assert torch.equal(bits(result.adversarial), bits(images))


@each_attack
def test_an_image_that_is_misclassified_already_is_a_success_whatever_lies_around_it(attack: Attack) -> None:
    image = random_images(1, 3, 8, 8, contrast=0.2)
    assert attack(Needle(image).eval(), image, torch.tensor([0]), steps=20).success.tolist() == [True]


@pytest.mark.parametrize("wrong", [False, True], ids=["correct", "misclassified"])
@each_attack
def test_an_empty_region_returns_the_clean_bits_and_success_as_it_is(attack: Attack, wrong: bool) -> None:
    model, images = convolutional((3, 8, 8))
    labels, region = (predicted(model, images) + wrong) % 4, torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    result = attack(model, images, labels, region=region, steps=20)
    assert torch.equal(bits(result.adversarial), bits(images))
    assert result.success.tolist() == [wrong] * 4


@each_attack
def test_where_no_image_falls_the_best_attempts_are_returned(attack: Attack) -> None:
    model, images = leaning((3, 8, 8), lead=300), random_images(4, 3, 8, 8)
    labels = torch.zeros(4, dtype=torch.long)
    result = attack(model, images, labels, steps=60, learning_rate=0.1)
    assert_sound(result, model, images, labels)
    assert result.success.tolist() == [False] * 4
    weight = model.weight.detach()
    possible = torch.maximum(weight * images, -weight * (1 - images)).flatten(1).sum(1)
    gained = margins_of(model, images, labels) - margins_of(model, result.adversarial, labels)
    assert bool((gained > 0.5 * possible).all()), gained / possible


@pytest.mark.filterwarnings("ignore:the gradient of Constant is zero everywhere")
@each_attack
def test_where_nothing_can_succeed_no_success_is_claimed(attack: Attack) -> None:
    model, images, labels = Constant().eval(), random_images(3, 3, 8, 8), torch.ones(3, dtype=torch.long)
    result = attack(model, images, labels, steps=20)
    assert_sound(result, model, images, labels)
    assert result.success.tolist() == [False] * 3


@each_attack
def test_a_targeted_attack_reaches_its_target(attack: Attack) -> None:
    model, images = convolutional((3, 8, 8))
    labels = predicted(model, images)
    targets = (labels + 1) % 4
    result = attack(model, images, labels, targets=targets, steps=60, learning_rate=0.1)
    assert_sound(result, model, images, labels, targets=targets)
    assert bool(result.success.all())


@each_attack
def test_leaving_the_label_short_of_the_target_is_no_targeted_success(attack: Attack) -> None:
    model, images = convolutional((3, 8, 8))
    with torch.no_grad():
        order = model(images).argsort(1)
    region = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    result = attack(model, images, order[:, 0], targets=order[:, 1], region=region, steps=20)
    assert result.success.tolist() == [False] * 4


@each_attack
def test_two_classes_are_enough(attack: Attack) -> None:
    model, images = drawn(FlatNetwork, (8, 6), 1, 2), random_images(6, 1, 8, 6)
    labels = predicted(model, images)
    result = attack(model, images, labels, steps=60, learning_rate=0.1)
    assert_sound(result, model, images, labels)
    assert bool(result.success.all())


@each_attack
def test_nothing_is_random(attack: Attack) -> None:
    model, images = convolutional((3, 8, 8))
    labels = predicted(model, images)
    first, other = (attack(model, images, labels, seed=seed, steps=20) for seed in (0, 1))
    assert torch.equal(first.adversarial, other.adversarial)


@each_attack
def test_progress_rises_to_one(attack: Attack) -> None:
    model, images = convolutional((3, 8, 8))
    reported: list[float] = []
    attack(model, images, predicted(model, images), steps=40, progress=reported.append)
    assert reported == sorted(reported)
    assert 0 <= reported[0] < 0.2
    assert reported[-1] == 1


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("steps", 0),
        ("steps", 4),
        ("steps", 20.5),
        *(("learning_rate", value) for value in (0.0, float("nan"))),
        *(("confidence", value) for value in (-1.0, float("nan"))),
    ],
)
@each_weighed_attack
def test_a_wrong_argument_is_refused_by_name(attack: Attack, argument: str, value: Any) -> None:
    model, images = convolutional((3, 8, 8), 1)
    with (
        untouched(model, images),
        pytest.raises(ValueError, match=rf"^{argument} must be [^\n]*, got {value}"),
    ):
        attack(model, images, predicted(model, images), **{"steps": 10, argument: value})


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e21])
def test_fmn_finds_the_boundary_of_steep_and_of_flat_networks(norm: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2, bias=False)).eval()
    model[1].weight.data = scale * torch.randn(2, 48, generator=generator)
    images = 0.3 + 0.4 * torch.rand(4, 3, 4, 4, generator=generator)
    labels = model(images).argmax(1)
    found = fmn(model, images, labels, norm=norm, on_grid=False)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(48, 2, bias=False)).eval()
    plain[1].weight.data = model[1].weight.data / scale
    expected = fmn(plain, images, labels, norm=norm, on_grid=False)
    assert bool(found.success.all())
    torch.testing.assert_close(found.adversarial, expected.adversarial, rtol=1e-3, atol=1e-3)


def test_the_default_type_of_new_tensors_changes_no_smallest_change() -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for seed in range(12):  # an image that no straight step fools is searched with steps of equal length
        torch.manual_seed(seed)
        tail = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *tail).eval()
        labels = predicted(model, images)
        expected = minimal_pgd(model, images, labels)
        torch.set_default_dtype(torch.float64)
        try:
            result = minimal_pgd(model, images, labels)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(result.adversarial, expected.adversarial)
