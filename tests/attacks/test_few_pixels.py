"""Few-pixel attacks: laws of both methods, a brute-force twin, closed forms and reproducibility."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.attacks.test_gradient import Watched, bits, margins_of, predicted, region_of, tagged, times
from tests.covering import sampled
from tests.networks import FlatNetwork, Made, PoolingNetwork, untouched
from weakspot.attacks import few_pixel
from weakspot.pairs import AttackResult

METHODS = ("evolution", "guided")
SHAPES = [(3, 6, 6), (3, 8, 5), (1, 6, 6), (1, 5, 8)]
SHORT: dict[str, Any] = {"population": 24, "generations": 6}
CORNERS = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))

each_method = pytest.mark.parametrize("method", METHODS)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def drawn(build: type[nn.Module], *arguments: Any, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(*arguments).eval()


def random_images(count: int, *shape: int, contrast: float = 1.0) -> Tensor:
    noise = torch.rand(count, *shape, generator=torch.Generator().manual_seed(1))
    return 0.5 + contrast * (noise - 0.5)


def convolutional(shape: tuple[int, ...], count: int = 4) -> Made:
    """A network of four classes, images near its borders, so that few pixels fool some of them."""
    network, images = drawn(PoolingNetwork, shape[0]), random_images(count, *shape)
    with torch.no_grad():
        network.get_submodule("head").bias -= network(images).mean(0)
    return network, images


class Leaning(nn.Module):
    """Two logits, half of +-(<weight, image - gray> + lead); sums are exact enough not to depend on the batch."""

    def __init__(self, weight: Tensor, lead: float) -> None:
        super().__init__()
        self.weight, self.lead = nn.Parameter(weight), lead

    def forward(self, images: Tensor) -> Tensor:
        score = ((images.double() - 0.5) * self.weight).sum((1, 2, 3)) + self.lead
        return torch.stack([score, -score], 1).float() / 2


class Constant(nn.Module):
    """Says the second class, whatever it sees."""

    def forward(self, images: Tensor) -> Tensor:
        return images.new_tensor([-40.0, 40.0, 0.0]).expand(len(images), 3)


class Needle(nn.Module):
    """Misreads the very image that it is given, and none near it."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.image = nn.Parameter(image)

    def forward(self, images: Tensor) -> Tensor:
        distance = (images - self.image).abs().amax((1, 2, 3))
        return torch.stack([distance, 1e-3 - distance], 1)


def leaning(shape: tuple[int, ...], lead: float) -> Leaning:
    return Leaning(torch.randn(shape, generator=torch.Generator().manual_seed(2)), lead).eval()


def changed_sites(result: AttackResult) -> Tensor:
    """(N,) sites of which any bit differs."""
    return (bits(result.adversarial) != bits(result.clean)).any(1).flatten(1).sum(1)


def assert_sound(
    result: AttackResult,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    region: Tensor | None = None,
    targets: Tensor | None = None,
) -> None:
    """Images in range, the clean bits outside the region, every claim true of a fresh forward pass."""
    adversarial = result.adversarial
    assert 0 <= float(adversarial.min()) <= float(adversarial.max()) <= 1
    if region is not None:
        kept = ~region.expand(len(images), images.shape[1], -1, -1)
        assert torch.equal(bits(adversarial)[kept], bits(images)[kept])

    def fooled(shown: Tensor) -> Tensor:
        found = predicted(model, shown)
        return found != labels if targets is None else found == targets

    assert torch.equal(result.success, fooled(adversarial))
    assert result.success_8bit is not None
    assert torch.equal(result.success_8bit, fooled((adversarial * 255).round() / 255))
    assert torch.equal(result.targets, predicted(model, adversarial) if targets is None else targets)
    assert torch.equal(result.clean, images)
    assert torch.equal(result.labels, labels)
    assert not adversarial.requires_grad


def one_pixel_margins(model: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    """(H * W, 8) margins of an image with one site painted in each corner of the color cube, one by one."""
    _, height, width = image.shape
    candidates = image.repeat(height * width * len(CORNERS), 1, 1, 1)
    for number, (row, column, corner) in enumerate(itertools.product(range(height), range(width), CORNERS)):
        candidates[number, :, row, column] = corner
    return margins_of(model, candidates, label.expand(len(candidates))).view(-1, len(CORNERS))


@sampled("method, shape, count, kind", METHODS, SHAPES, [1, 2, 3], ["everywhere", "scattered"])
def test_results_are_in_range_of_few_pixels_in_the_region_and_verified(
    method: str, shape: tuple[int, ...], count: int, kind: str
) -> None:
    model, images = convolutional(shape)
    labels, region = predicted(model, images), region_of(kind, images)
    with untouched(model, images, labels, *([] if region is None else [region])):
        result = few_pixel(model, images, labels, count=count, region=region, method=method, **SHORT)
    assert_sound(result, model, images, labels, region)
    assert int(changed_sites(result).max()) <= count
    assert torch.equal((result.perturbation != 0).any(1).flatten(1).sum(1), changed_sites(result))


@each_method
@each_shape
def test_colors_are_8_bit_so_that_files_keep_every_success(method: str, shape: tuple[int, ...]) -> None:
    model, images = convolutional(shape)
    images = (images * 255).round() / 255
    result = few_pixel(model, images, predicted(model, images), count=2, method=method, **SHORT)
    assert torch.equal((result.adversarial * 255).round() / 255, result.adversarial)
    assert result.success_8bit is not None
    assert torch.equal(result.success_8bit, result.success)


@pytest.mark.parametrize("batch_size", [1, 5, None])
@pytest.mark.parametrize("count", [1, 2])
@each_method
def test_counts_equal_the_passes_of_each_image(method: str, count: int, batch_size: int | None) -> None:
    network, images = convolutional((3, 8, 8), 6)
    images, region = tagged(images)
    model = Watched(network).eval()
    through = 0

    def hook(_: nn.Module, arguments: tuple[Tensor, ...], __: Tensor) -> None:
        nonlocal through
        through += len(arguments[0])

    with model.register_forward_hook(hook):
        result = few_pixel(
            model,
            images,
            predicted(network, images),
            count=count,
            region=region,
            method=method,
            batch_size=batch_size,
            **SHORT,
        )
    assert int(result.n_forward.sum()) == through
    assert result.n_forward.tolist() == times(model.seen, images)
    assert max(len(batch) for batch in model.seen) <= (batch_size or 10**6)
    if method == "guided":
        assert result.n_backward.tolist() == times(model.differentiated, images)
    else:
        assert not model.differentiated
        assert not result.n_backward.any()
        assert int(result.n_forward.max()) <= SHORT["population"] * (SHORT["generations"] + 1) + 3


def test_evolution_asks_for_no_candidate_that_its_population_holds_and_for_none_twice_at_once() -> None:
    model, image = Watched(Constant()).eval(), random_images(1, 1, 4, 4)
    site = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    site[..., 2, 1] = True
    few_pixel(model, image, torch.tensor([1]), region=site, population=60, generations=5)
    # Where all candidates are equally bad none replaces its parent: the population stays the first one.
    first, *later = [set(batch[:, 0, 2, 1].tolist()) for batch in model.seen[:-2]]
    assert [len(batch) for batch in model.seen[:-2]] == [len(first), *map(len, later)]
    assert len(later) > 1
    assert not first & set().union(*later)


def between_corners(model: nn.Module, image: Tensor, label: Tensor, site: int) -> float:
    """The lowest margin at a site over colors of five levels a channel, in 255ths."""
    levels = (torch.linspace(0, 1, 5) * 255).round() / 255
    painted = image.repeat(125, 1, 1, 1)
    painted[:, :, site // image.shape[2], site % image.shape[2]] = torch.cartesian_prod(
        levels, levels, levels
    )
    return float(margins_of(model, painted, label.expand(125)).min())


def test_guided_finds_what_brute_force_over_all_sites_and_corner_colors_finds() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Flatten(), drawn(nn.Linear, 288, 3))
    network[0] = drawn(nn.Conv2d, 3, 8, 3, 1, 1)
    model, images = network.eval(), random_images(40, 3, 6, 6)
    labels = predicted(model, images)
    lowest = torch.zeros(40)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        corners = one_pixel_margins(model, image, label).view(36, 8).amin(1)
        best = corners.topk(4, largest=False).indices.tolist()
        finer = [between_corners(model, image, label, site) for site in best]
        lowest[index] = corners.min() if corners.min() < 0 else min(finer)
    result = few_pixel(model, images, labels, method="guided", population=100, generations=100)
    assert 0 < int(result.success.sum()) < 40
    assert torch.equal(result.success, lowest < 0)
    failed = ~result.success
    reached = margins_of(model, result.adversarial, labels)
    torch.testing.assert_close(reached[failed], lowest[failed], rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("region_fraction", [1.0, 0.4])
@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 7, 10)], ids=str)
def test_guided_on_a_linear_model_paints_the_best_sites_in_their_best_colors(
    shape: tuple[int, ...], region_fraction: float, count: int
) -> None:
    model, images = leaning(shape, lead=60), random_images(4, *shape)
    labels = torch.zeros(4, dtype=torch.long)
    region = torch.rand(4, 1, *shape[1:], generator=torch.Generator().manual_seed(3)) < region_fraction
    result = few_pixel(model, images, labels, count=count, region=region, method="guided")
    for index in range(4):
        weight = model.weight.detach()
        gain = torch.maximum(weight * images[index], -weight * (1 - images[index])).sum(0)
        best = gain[region[index, 0]].topk(count)
        before, after = (margins_of(model, x[[index]], labels[[index]]) for x in (images, result.adversarial))
        assert float(before - after) == pytest.approx(float(best.values.sum()), rel=1e-4)


def test_evolution_on_a_linear_model_nears_the_best_corner_pixel_of_brute_force() -> None:
    model, images = leaning((3, 8, 8), lead=9), random_images(6, 3, 8, 8, contrast=0.2)
    labels = torch.zeros(6, dtype=torch.long)
    result = few_pixel(model, images, labels, population=100, generations=40)
    before, after = margins_of(model, images, labels), margins_of(model, result.adversarial, labels)
    assert not result.success.any()
    for index in range(6):
        best = before[index] - one_pixel_margins(model, images[index], labels[index]).min()
        assert 0.9 * best <= before[index] - after[index] <= best + 1e-4


@each_method
def test_a_success_is_one_truly_changed_pixel(method: str) -> None:
    model, images = convolutional((3, 8, 8), 12)
    labels = predicted(model, images)
    result = few_pixel(model, images, labels, method=method, population=60, generations=20)
    assert int(result.success.sum()) > 0
    assert changed_sites(result)[result.success].tolist() == [1] * int(result.success.sum())


@pytest.mark.parametrize("lead", [2.0, 40.0], ids=["some fall", "none falls"])
@each_method
def test_an_images_result_depends_on_no_batch_size_no_order_and_no_neighbor(method: str, lead: float) -> None:
    model, images = leaning((3, 10, 7), lead), random_images(5, 3, 10, 7)
    labels, region = predicted(model, images), region_of("scattered", images)
    assert region is not None

    def adversarial(indices: list[int], batch_size: int | None = None) -> Tensor:
        options = {"region": region[indices], "batch_size": batch_size, "method": method, **SHORT}
        return few_pixel(model, images[indices], labels[indices], count=2, **options).adversarial

    together = adversarial([0, 1, 2, 3, 4])
    for other in (
        adversarial([0, 1, 2, 3, 4], 1),
        adversarial([0, 1, 2, 3, 4], 3),
        adversarial([2, 0, 4, 1, 3])[[1, 3, 0, 4, 2]],
        torch.cat([adversarial([index]) for index in range(5)]),
    ):
        assert torch.equal(bits(other), bits(together))


class Rough(nn.Module):
    """Margins that gradients say little of: many short waves of every pixel's color."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.phases = nn.Parameter(20 * torch.rand(shape, generator=torch.Generator().manual_seed(4)))

    def forward(self, images: Tensor) -> Tensor:
        score = 100 + torch.sin(300 * (images.double() + 1) * self.phases).sum((1, 2, 3))
        return torch.stack([score, -score], 1).float()


def test_a_neighbor_with_a_small_region_gives_and_takes_no_guided_forward_passes() -> None:
    model, images = Rough(3, 16, 16).eval(), random_images(4, 3, 16, 16)
    labels = torch.zeros(4, dtype=torch.long)
    region = torch.ones(4, 1, 16, 16, dtype=torch.bool)
    region[:3, :, 1:] = False
    options: dict[str, Any] = {"method": "guided", "population": 64, "generations": 100}
    together = few_pixel(model, images, labels, region=region, **options)
    alone = few_pixel(model, images[3:], labels[3:], region=region[3:], **options)
    assert int(together.n_forward[3]) == int(alone.n_forward[0])
    assert torch.equal(together.adversarial[3:], alone.adversarial)


def test_another_seed_gives_another_evolution_and_no_other_guided_search() -> None:
    model, images = leaning((3, 8, 8), 40), random_images(3, 3, 8, 8)
    labels = predicted(model, images)
    evolved, guided = (
        [
            few_pixel(model, images, labels, method=method, seed=seed, **SHORT).adversarial
            for seed in (0, 0, 1)
        ]
        for method in METHODS
    )
    assert torch.equal(evolved[0], evolved[1])
    for index in range(3):
        assert not torch.equal(evolved[0][index], evolved[2][index])
    assert torch.equal(guided[0], guided[2])


@each_method
def test_global_generators_are_neither_read_nor_moved(method: str) -> None:
    model, images = leaning((3, 8, 8), 2), random_images(3, 3, 8, 8)
    labels = predicted(model, images)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the global generator is the point
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]  # noqa: NPY002
        found.append(few_pixel(model, images, labels, method=method, **SHORT).adversarial)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]  # noqa: NPY002
        assert random.getstate() == before[2]
    assert torch.equal(found[0], found[1])


@each_method
def test_two_classes_are_enough(method: str) -> None:
    model, images = drawn(FlatNetwork, (8, 6), 1, 2), random_images(6, 1, 8, 6)
    with torch.no_grad():
        model.get_submodule("head").bias -= model(images).mean(0)
    labels = predicted(model, images)
    result = few_pixel(model, images, labels, method=method, **SHORT)
    assert_sound(result, model, images, labels)
    assert bool(result.success.any())


@pytest.mark.parametrize("count", [1, 4], ids=["as many pixels as sites", "more pixels than sites"])
@each_method
def test_a_region_of_a_single_site_changes_that_site_only(method: str, count: int) -> None:
    model, images = convolutional((3, 8, 6))
    labels, region = predicted(model, images), torch.zeros(4, 1, 8, 6, dtype=torch.bool)
    for index in range(4):
        region[index, 0, 2 * index, index] = True
    result = few_pixel(model, images, labels, count=count, region=region, method=method, **SHORT)
    assert_sound(result, model, images, labels, region)
    assert changed_sites(result).unique().tolist()[-1] == 1


@pytest.mark.parametrize("wrong", [False, True], ids=["correct", "misclassified"])
@each_method
def test_an_empty_region_returns_the_clean_bits_and_success_as_it_is(method: str, wrong: bool) -> None:
    model, images = convolutional((3, 8, 8))
    labels = (predicted(model, images) + wrong) % 4
    region = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    result = few_pixel(model, images, labels, region=region, method=method, **SHORT)
    assert torch.equal(bits(result.adversarial), bits(images))
    assert result.success.tolist() == [wrong] * 4
    assert int(result.n_forward.max()) <= 3  # the clean pass and two verifications


@each_method
def test_a_neighbor_with_an_empty_region_is_left_as_it_is(method: str) -> None:
    model, images = convolutional((3, 8, 8))
    labels, region = predicted(model, images), region_of("empty for one", images)
    result = few_pixel(model, images, labels, region=region, method=method, **SHORT)
    assert_sound(result, model, images, labels, region)
    assert [bool(sites) for sites in changed_sites(result)] == [True, False, True, True]


@each_method
def test_images_already_misclassified_are_successes_at_little_cost(method: str) -> None:
    model, images = convolutional((3, 8, 8))
    with torch.no_grad():
        labels = model(images).argmin(1)
    result = few_pixel(model, images, labels, method=method, population=24, generations=100)
    assert_sound(result, model, images, labels)
    assert result.success.tolist() == [True] * 4
    assert int(result.n_forward.max()) <= 110  # one generation or round, not all of them


@each_method
def test_an_image_that_is_misclassified_already_is_a_success_whatever_lies_around_it(method: str) -> None:
    image = random_images(1, 3, 8, 8, contrast=0.2)
    model = Needle(image).eval()
    assert predicted(model, image).tolist() == [1]
    assert few_pixel(model, image, torch.tensor([0]), method=method, **SHORT).success.tolist() == [True]


@each_method
def test_where_nothing_can_succeed_no_success_is_claimed(method: str) -> None:
    model, images, labels = Constant().eval(), random_images(3, 3, 8, 8), torch.ones(3, dtype=torch.long)
    result = few_pixel(model, images, labels, count=3, method=method, **SHORT)
    assert_sound(result, model, images, labels)
    assert result.success.tolist() == [False] * 3


@each_method
def test_where_no_image_falls_the_best_attempts_are_returned(method: str) -> None:
    model, images = leaning((3, 8, 8), lead=12), random_images(4, 3, 8, 8)
    labels = torch.zeros(4, dtype=torch.long)
    result = few_pixel(model, images, labels, method=method, **SHORT)
    assert result.success.tolist() == [False] * 4
    assert bool((margins_of(model, result.adversarial, labels) < margins_of(model, images, labels)).all())


@each_method
def test_an_attempt_is_never_worse_than_the_clean_image(method: str) -> None:
    image = random_images(1, 3, 8, 8, contrast=0.2)
    # Just classified correctly; whatever is painted leads away from where it would not be.
    model, labels = Needle(image + 0.001).eval(), torch.tensor([0])
    assert predicted(model, image).tolist() == [0]
    result = few_pixel(model, image, labels, method=method, **SHORT)
    assert bool((margins_of(model, result.adversarial, labels) <= margins_of(model, image, labels)).all())


@pytest.mark.parametrize("count", [1, 2])
@each_method
def test_a_targeted_success_lands_in_its_target(method: str, count: int) -> None:
    model, images = convolutional((3, 8, 8), 12)
    labels = predicted(model, images)
    with torch.no_grad():
        targets = model(images).argsort(1, descending=True)[:, 1]
    targets[::3] = (labels[::3] + 2) % 4
    result = few_pixel(
        model, images, labels, targets=targets, count=count, method=method, population=60, generations=10
    )
    assert_sound(result, model, images, labels, targets=targets)
    assert 0 < int(result.success.sum()) < 12


def test_a_larger_region_never_loses_a_guided_success_on_a_linear_model() -> None:
    model, images = leaning((3, 8, 8), lead=2.0), random_images(40, 3, 8, 8)
    labels, order = predicted(model, images), torch.rand(40, 1, 8, 8)
    fooled, counts = torch.zeros(40, dtype=torch.bool), []
    for fraction in (0.02, 0.1, 0.4, 1.0):
        result = few_pixel(model, images, labels, region=order < fraction, method="guided", **SHORT)
        assert not bool((fooled & ~result.success).any())
        fooled = result.success
        counts.append(int(fooled.sum()))
    assert counts[0] < counts[-1]


@each_method
def test_progress_rises(method: str) -> None:
    model, images = leaning((3, 8, 8), 40), random_images(3, 3, 8, 8)
    reported: list[float] = []
    few_pixel(
        model, images, predicted(model, images), count=2, method=method, progress=reported.append, **SHORT
    )
    assert len(reported) > 1
    assert reported == sorted(reported)
    assert 0 <= reported[0] <= reported[-1] == 1


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("count", 0),
        ("count", 65),
        ("count", 1.5),
        ("population", 3),
        ("generations", 0),
        ("method", "evolutoin"),
        ("seed", 0.5),
    ],
)
def test_a_wrong_argument_is_refused_by_name(argument: str, value: Any) -> None:
    model, images = convolutional((3, 8, 8))
    with (
        untouched(model, images),
        pytest.raises(ValueError, match=rf"^{argument} (is|must) .*{value}[^\n]*$"),
    ):
        few_pixel(model, images, predicted(model, images), **{argument: value})


@each_method
def test_the_default_type_of_new_tensors_changes_nothing(method: str) -> None:
    model, images = drawn(FlatNetwork, (8, 6), 1, 2), random_images(3, 1, 8, 6)
    labels = predicted(model, images)
    expected = few_pixel(model, images, labels, method=method, **SHORT)
    torch.set_default_dtype(torch.float64)
    try:
        result = few_pixel(model, images, labels, method=method, **SHORT)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(result.success, expected.success)
    assert result.adversarial.dtype == torch.float32
