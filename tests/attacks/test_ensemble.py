"""The ensemble: laws of every attack, planted weaknesses that it must find, and warnings that it must not give."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn

from tests.attacks.test_gradient import Watched, balanced, bits, limit, predicted, region_of, tagged, times
from tests.covering import sampled
from tests.networks import NETWORKS, LinearNetwork, Made, doubled, untouched
from weakspot import Classifier, attacks
from weakspot._checks import ModelWarning
from weakspot.attacks import ensemble
from weakspot.attacks.auto_pgd import _State, adaptive_descent, checkpoints
from weakspot.attacks.context import AttackOptions, attack_context
from weakspot.attacks.ensembles import _warn_of_hidden_gradients
from weakspot.attacks.losses import cross_entropy
from weakspot.attacks.square_search import square_search
from weakspot.budgets import L1, L2, SSIM, Budget, Linf

BUDGETS: list[Budget] = [Linf(4 / 255), L2(0.3), L1(2.0), SSIM(0.002), SSIM(0.002, mode="local")]
SHORT = {"STEPS": 8, "QUERIES": 30}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SHORT.items():
        monkeypatch.setitem(ensemble.__globals__, name, value)


def on_the_margin(score: float, shape: tuple[int, int, int] = (3, 16, 16)) -> tuple[LinearNetwork, Tensor]:
    """A linear model, and eight images far from the box on which its score, half of the margin, is the given one."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    images = 0.4 + 0.2 * torch.rand(8, *shape, generator=generator)
    own = (images * weight).sum((1, 2, 3), keepdim=True)
    return LinearNetwork(weight).eval(), images + (score - own) * weight / weight.square().sum()


class Hiding(nn.Module):
    """A network behind something that gradients do not pass, or not as they are."""

    def __init__(self, network: nn.Module, hide: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.hide = network, hide

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(self.hide(images))
        return logits


@sampled("network, budget, kind", NETWORKS, BUDGETS, ["everywhere", "empty for one"])
def test_results_are_in_range_in_budget_in_region_and_verified(
    network: str, budget: Budget, kind: str
) -> None:
    model, images = NETWORKS[network]()
    labels, region = predicted(model, images), region_of(kind, images)
    with untouched(model, images, labels, *([] if region is None else [region])):
        result = ensemble(model, images, labels, budget=budget, region=region)
    adversarial = result.adversarial
    assert 0 <= float(adversarial.min()) <= float(adversarial.max()) <= 1
    assert bool((budget.distance(result.perturbation, images) <= limit(budget) + 1e-6).all())
    if region is not None:
        kept = ~region.expand(len(images), images.shape[1], -1, -1)
        assert torch.equal(bits(adversarial)[kept], bits(images)[kept])
    assert torch.equal(result.success, predicted(model, adversarial) != labels)
    assert torch.equal(result.targets, predicted(model, adversarial))
    assert result.success_8bit is not None
    stored = (adversarial * 255).round() / 255
    assert torch.equal(result.success_8bit, predicted(model, stored) != labels)
    assert torch.equal(result.clean, images)
    assert not adversarial.requires_grad


@pytest.mark.parametrize(("network", "budget"), [*zip(NETWORKS, BUDGETS, strict=True)], ids=str)
def test_an_images_result_depends_on_no_batch_size_no_order_and_no_neighbor(
    network: str, budget: Budget
) -> None:
    """In double precision: an attack's choices turn last bits, which kernels round by the batch, into more."""
    model, images = doubled(NETWORKS[network]())
    labels, region = predicted(model, images), region_of("scattered", images)
    assert region is not None

    def adversarial(indices: list[int], batch_size: int | None = None) -> Tensor:
        options: dict[str, Any] = {"region": region[indices], "batch_size": batch_size}
        return ensemble(model, images[indices], labels[indices], budget=budget, **options).adversarial

    together = adversarial([0, 1, 2])
    for other in (
        adversarial([0, 1, 2], 2),
        adversarial([2, 0, 1])[[1, 2, 0]],
        torch.cat([adversarial([index]) for index in range(3)]),
    ):
        torch.testing.assert_close(other, together, rtol=0, atol=1e-8)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("batch_size", [1, 5, None])
def test_counts_equal_the_passes_of_each_image(batch_size: int | None, targeted: bool) -> None:
    network, images = balanced(12)
    images, region = tagged(images)
    labels, model = predicted(network, images), Watched(network).eval()
    targets = (labels + 1) % 4 if targeted else None
    result = ensemble(model, images, labels, region=region, targets=targets, batch_size=batch_size)
    assert result.n_forward.tolist() == times(model.seen, images)
    assert result.n_backward.tolist() == times(model.differentiated, images)
    # The clean pass, every stage in full and two verifications are the most there can be.
    stages = 2 if targeted else 2 + 3
    assert int(result.n_forward.max()) <= 1 + stages * (SHORT["STEPS"] + 1) + SHORT["QUERIES"] + 2
    assert int(result.n_backward.max()) <= stages * SHORT["STEPS"]


@pytest.mark.parametrize("budget", [Linf(0.01), L2(0.2), L1(1.0), SSIM(0.00003)], ids=str)
def test_every_success_of_the_first_stage_is_returned_as_it_is(budget: Budget) -> None:
    model, images = balanced()
    labels = predicted(model, images)
    options = AttackOptions(budget)
    with attack_context(model, images, labels, options) as problem, problem.fused_model():
        found, lowest = adaptive_descent(problem, cross_entropy, steps=SHORT["STEPS"], stream=0)
    result = ensemble(model, images, labels, budget=budget)
    fallen = lowest < 0
    assert 0 < int(fallen.sum()) < 24
    assert bool(result.success[fallen].all())
    assert torch.equal(result.adversarial[fallen], found[fallen])


HIDING: dict[str, Callable[[Tensor], Tensor]] = {
    "detached": lambda x: x.detach(),
    "quantized": lambda x: (x * 16).round() / 16,
    "misleading": lambda x: 2 * x.detach() - x,
}


@pytest.mark.parametrize("hide", HIDING.values(), ids=HIDING)
@pytest.mark.filterwarnings("ignore:the gradient of:weakspot._checks.ModelWarning")
def test_a_weak_model_that_hides_its_gradients_is_exposed(
    monkeypatch: pytest.MonkeyPatch, hide: Callable[[Tensor], Tensor]
) -> None:
    monkeypatch.setitem(ensemble.__globals__, "QUERIES", 300)
    eps = 0.05
    # A tenth of what the budget can move the score by, and four times what a random start moves it by.
    network, images = on_the_margin(64 * eps)
    model = Hiding(network, hide).eval()
    labels = torch.zeros(8, dtype=torch.long)
    with untouched(model, images), pytest.warns(ModelWarning, match="may hide its gradients: 8 of 8"):
        result = ensemble(model, images, labels, budget=Linf(eps))
    assert bool(result.success.all())
    assert float(result.perturbation.abs().max()) <= eps + 1e-6


@pytest.mark.parametrize(
    ("fallen", "images", "warned"),
    [(1, 1, False), (1, 10, False), (2, 12, False), (5, 100, False), (11, 100, True)],
)
def test_a_few_images_that_only_a_search_without_gradients_fools_accuse_no_model(
    fallen: int, images: int, warned: bool
) -> None:
    """On a network that hides nothing, squares alone fooled 1 of 10 digits, and 5 of 100."""
    problem: Any = MagicMock(classifier=MagicMock())
    problem.__len__.return_value = images
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        _warn_of_hidden_gradients(problem, fallen)
    assert len(found) == warned


@pytest.mark.parametrize("hide", HIDING.values(), ids=HIDING)
@pytest.mark.filterwarnings("ignore:the gradient of:weakspot._checks.ModelWarning")
def test_a_strong_model_that_hides_its_gradients_is_not_reported_as_fooled(
    hide: Callable[[Tensor], Tensor],
) -> None:
    network, images = on_the_margin(0)
    eps = 0.02
    _, images = on_the_margin((eps + 1 / 32 + 0.001) * float(network.weight.detach().abs().sum()))
    images = images.clamp(0, 1)
    with torch.no_grad():
        score = network(images)[:, 0]
    assert bool((score > eps * network.weight.detach().abs().sum()).all())
    model = Hiding(network, hide).eval()
    result = ensemble(model, images, torch.zeros(8, dtype=torch.long), budget=Linf(eps))
    assert not bool(result.success.any())


DUAL = {Linf: 1, L2: 2, L1: float("inf")}
NORMS: list[Linf | L2 | L1] = [Linf(0.02), L2(0.3), L1(5.0)]


@pytest.mark.parametrize("part", [False, True], ids=["everywhere", "region"])
@pytest.mark.parametrize("budget", NORMS, ids=str)
@pytest.mark.parametrize(("fraction", "falls"), [(1.001, False), (0.9, True)], ids=["safe", "weak"])
def test_a_linear_model_falls_where_the_budget_reaches_its_border_and_never_elsewhere(
    budget: Linf | L2 | L1, fraction: float, falls: bool, part: bool
) -> None:
    network, _ = on_the_margin(0)
    region = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    if part:
        region[..., 5:] = False
    reach = budget.eps * float(
        torch.linalg.vector_norm(network.weight.detach() * region[0], DUAL[type(budget)])
    )
    if isinstance(budget, L1):  # no channel can move further than the box, here 0.3 and more
        largest = (network.weight.detach() * region[0]).abs().flatten().sort(descending=True).values
        reach = (
            budget.eps * float(largest[:1])
            if not falls
            else 0.3 * float(largest[: int(budget.eps / 0.3)].sum())
        )
    model, images = on_the_margin(fraction * reach)
    assert 0.3 < float(images.min()) < float(images.max()) < 0.7 or not falls
    images = images.clamp(0, 1)
    with torch.no_grad():
        assert falls or bool((model(images)[:, 0] > reach).all())
    result = ensemble(model, images, torch.zeros(8, dtype=torch.long), budget=budget, region=region)
    assert result.success.tolist() == [falls] * 8
    assert torch.equal(result.targets, torch.full((8,), int(falls)))


@pytest.mark.parametrize("target", range(3))
@pytest.mark.parametrize("budget", [Linf(0.5), L2(6.0), L1(60.0)], ids=str)
def test_a_targeted_attack_reaches_its_target(target: int, budget: Budget) -> None:
    model, images = NETWORKS["linear"]()
    labels = predicted(model, images)
    labels = torch.where(labels == target, (target + 1) % 3, labels)
    targets = torch.full_like(labels, target)
    result = ensemble(model, images, labels, targets=targets, budget=budget)
    assert bool(result.success.all())
    assert torch.equal(predicted(model, result.adversarial), targets)
    assert torch.equal(result.targets, targets)


def test_leaving_the_label_short_of_the_target_is_no_targeted_success() -> None:
    model, images = NETWORKS["linear"]()
    scores = model(images)
    labels, targets = scores.argmin(1), scores.argsort(1)[:, 1]
    result = ensemble(model, images, labels, targets=targets, budget=Linf(0.0))
    assert result.success.tolist() == [False] * 3


@pytest.mark.parametrize(("network", "budget"), [*zip(NETWORKS, BUDGETS, strict=True)])
def test_misclassified_images_are_successes(network: str, budget: Budget) -> None:
    model, images = NETWORKS[network]()
    labels = model(images).argmin(1)
    result = ensemble(model, images, labels, budget=budget)
    assert result.success.tolist() == [True] * 3
    assert bool((budget.distance(result.perturbation, images) <= limit(budget) + 1e-6).all())


class Needle(nn.Module):
    """Misreads the very image that it is given, and none near it."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.image = nn.Parameter(image)

    def forward(self, images: Tensor) -> Tensor:
        distance = (images - self.image).abs().amax((1, 2, 3))
        return torch.stack([distance, 1e-3 - distance], 1)


def test_an_image_that_is_misclassified_already_is_a_success_whatever_lies_around_it() -> None:
    image = 0.5 + 0.1 * torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = Needle(image).eval()
    assert predicted(model, image).tolist() == [1]
    assert ensemble(model, image, torch.tensor([0])).success.tolist() == [True]


def test_an_empty_region_returns_the_clean_bits(any_model: Made) -> None:
    model, images = any_model
    empty = torch.zeros(1, 1, *images.shape[2:], dtype=torch.bool)
    result = ensemble(model, images, predicted(model, images), region=empty)
    assert torch.equal(bits(result.adversarial), bits(images))
    assert result.success.tolist() == [False] * 3


def test_where_nothing_can_succeed_every_pass_is_made_and_no_success_claimed() -> None:
    class Constant(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.new_tensor([1.0, 3.0, 2.0]).expand(len(images), 3)

    images, labels = torch.rand(5, 3, 8, 8), torch.ones(5, dtype=torch.long)
    with pytest.warns(ModelWarning, match=r"zero everywhere for 5 of 5") as caught:
        result = ensemble(Constant().eval(), images, labels)
    assert not any("hides" in str(warning.message) for warning in caught)
    assert not bool(result.success.any())
    assert torch.equal(result.targets, labels)


@pytest.mark.filterwarnings("ignore:the gradient of:weakspot._checks.ModelWarning")  # cross-entropy saturates
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e5])
def test_scaling_the_logits_hides_nothing(scale: float) -> None:
    network, images = balanced()
    labels = predicted(network, images)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.network(images)
            return scale * logits

    plain = ensemble(network, images, labels, budget=Linf(0.01))
    scaled = ensemble(Scaled().eval(), images, labels, budget=Linf(0.01))
    assert 0 < int(plain.success.sum()) < 24
    assert torch.equal(plain.success, scaled.success)


def test_the_same_seed_gives_the_same_result_and_another_another() -> None:
    model, images = NETWORKS["pooling"]()
    labels = predicted(model, images)
    first, again, other = (ensemble(model, images, labels, seed=seed).adversarial for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_progress_rises() -> None:
    network, images = on_the_margin(20)
    reported: list[float] = []
    ensemble(network, images.clamp(0, 1), torch.zeros(8, dtype=torch.long), progress=reported.append)
    assert reported == sorted(reported)
    assert 0 <= reported[0] <= reported[-1] <= 1


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
def test_an_honest_model_of_few_classes_is_not_accused_of_hiding_gradients(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(3 * 8 * 8, classes)
    with torch.no_grad():
        head.weight.copy_(0.1 * torch.randn(classes, 3 * 8 * 8, generator=generator))
    model = nn.Sequential(nn.Flatten(), head).eval()
    images = torch.rand(8, 3, 8, 8, generator=generator)
    labels = predicted(model, images)
    for eps in (1e-4, 0.01, 0.5):  # warnings are errors here
        result = ensemble(model, images, labels, budget=Linf(eps))
    assert bool(result.success.all())


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 37, 100, 1000])
def test_checkpoints_are_inside_the_steps_and_grow_closer(steps: int) -> None:
    judged = checkpoints(steps)
    assert judged == sorted(set(judged))
    assert all(0 < step <= steps for step in judged)
    if steps == 100:  # as in the paper: periods shrink by three until they are six
        assert judged[:6] == [22, 41, 57, 70, 80, 87]


@pytest.mark.parametrize("budget", [Linf(1e-3), L1(0.1)], ids=str)  # too small: every image stays to the end
def test_a_square_search_depends_on_no_neighbor(budget: Budget) -> None:
    network, images = doubled(NETWORKS["pooling"]())
    labels = predicted(network, images)

    def found(rows: list[int]) -> Tensor:
        with attack_context(network, images[rows], labels[rows], AttackOptions(budget)) as problem:
            return square_search(problem, queries=70, stream=1000)[0]

    together = found([0, 1, 2])
    assert bool((together != images).flatten(1).any(1).all())
    torch.testing.assert_close(torch.cat([found([2]), found([0, 1])])[[1, 2, 0]], together, rtol=0, atol=1e-8)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("queries", [1, 2, 65, 130])
def test_a_square_search_returns_its_best_and_queries_no_more_than_allowed(
    budget: Budget, queries: int
) -> None:
    network, images = NETWORKS["pooling"]()
    images, region = tagged(images)
    labels, model = predicted(network, images), Watched(network).eval()
    with attack_context(model, images, labels, AttackOptions(budget, region)) as problem:
        found, lowest = square_search(problem, queries=queries, stream=1000)
        assert torch.equal(problem.evaluate(found) < 0, lowest < 0)
        torch.testing.assert_close(problem.evaluate(found), lowest, rtol=0, atol=1e-5)
    assert times(model.seen[:-2], images) == problem.n_forward.sub(2).tolist()
    assert int(problem.n_forward.max()) - 2 <= queries
    assert bool((budget.distance(found - images, images) <= limit(budget) + 1e-6).all())
    assert torch.equal(bits(found[:, :, 0, 0]), bits(images[:, :, 0, 0]))
    assert not model.differentiated


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 1, 9), (3, 2, 2), (3, 5, 1)], ids=str)
def test_the_smallest_images_are_taken(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    model = LinearNetwork(torch.randn(shape, generator=generator)).eval()
    images = torch.rand(3, *shape, generator=generator)
    labels = predicted(model, images)
    for budget in (Linf(1e-3), L2(1e-3), L1(1e-3)):
        result = ensemble(model, images, labels, budget=budget)
        assert bool((budget.distance(result.perturbation, images) <= limit(budget) + 1e-6).all())


@pytest.mark.parametrize(
    "attack", [attacks.ensemble, attacks.pgd, attacks.fgsm, attacks.few_pixel, attacks.carlini_wagner]
)
def test_a_network_in_double_precision_is_attacked_all_the_same(attack: Any, pooling: Made) -> None:
    network, images = pooling
    model = copy.deepcopy(network).double()
    labels = model(images.double()).argmax(1)
    short = {attacks.few_pixel: {"population": 8, "generations": 2}, attacks.carlini_wagner: {"steps": 10}}
    result = attack(Classifier.wrap(model), images, labels, **short.get(attack, {}))
    assert torch.equal(result.success, model(result.adversarial.double()).argmax(1) != labels)
    assert result.adversarial.dtype == torch.float32


def test_the_starting_point_is_no_gain() -> None:
    """Algorithm 1 of Croce and Hein: w comparisons precede checkpoint w, none with the starting point itself."""
    model, images = on_the_margin(0.5)
    options = AttackOptions(Linf(1e-4))
    with attack_context(model, images, predicted(model, images), options) as problem:
        state = _State(torch.zeros_like(problem.clean))
        ones = torch.ones(len(images))
        for value in (3.0, 2.0, 2.5, 1.0):
            state.note(value * ones, torch.zeros_like(problem.clean))
    assert state.gains.flatten().tolist() == [2.0] * len(images)
