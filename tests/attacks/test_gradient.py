"""FGSM and PGD: closed forms on linear models, laws on networks of every kind, broken models that trip warnings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.covering import sampled
from tests.networks import NETWORKS, LinearNetwork, Made, untouched
from weakspot._checks import ImageWarning, ModelWarning
from weakspot.attacks import bim, ensemble, fgsm, pgd
from weakspot.attacks import stored as as_file
from weakspot.attacks.context import AttackOptions, attack_context
from weakspot.attacks.losses import conservative_margin
from weakspot.budgets import L1, L2, SSIM, Budget, Linf
from weakspot.logits import margin
from weakspot.pairs import AttackResult

Attack = Callable[..., AttackResult]

BUDGETS: list[Budget] = [Linf(8 / 255), L2(0.8), L1(6), SSIM(0.01), SSIM(0.01, mode="local")]
REGIONS = ("everywhere", "scattered", "one for all", "block", "empty for one")


def short_pgd(*arguments: Any, **options: Any) -> AttackResult:
    return pgd(*arguments, **{"steps": 3, **options})


ATTACKS: dict[str, Attack] = {"fgsm": fgsm, "pgd": short_pgd}


def region_of(kind: str, images: Tensor) -> Tensor | None:
    count, _, height, width = images.shape
    drawn = torch.rand(count, 1, height, width, generator=torch.Generator().manual_seed(3)) < 0.3
    if kind == "everywhere":
        return None
    if kind == "one for all":
        return drawn[:1]
    if kind == "block":
        drawn = torch.zeros_like(drawn)
        drawn[..., height // 4 : height // 2, width // 3 :] = True
    if kind == "empty for one":
        drawn[1] = False
    return drawn


def test_a_change_is_applied_inside_the_region_and_the_range_of_images() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    images, region = torch.full((1, 1, 4, 4), 0.9), torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    region[..., :2] = True
    options = AttackOptions(Linf(0.5), region)
    with attack_context(model, images, torch.tensor([0]), options) as problem:
        applied = problem.apply(torch.full_like(images, 0.5))
    assert torch.equal(applied, torch.where(region, 1.0, images))


def bits(images: Tensor) -> Tensor:
    return images.contiguous().view(torch.int32)


def limit(budget: Budget) -> float:
    return float(getattr(budget, "eps"))  # noqa: B009 - Budget does not promise a limit's name


def predicted(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        classes: Tensor = model(images).argmax(1)
    return classes


def margins_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return margin(model(images), labels)


class Watched(nn.Module):
    """Passes images on to a network and keeps what it saw, its logits and the rows gradients were taken of."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.seen: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.differentiated: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.detach().clone())
        if images.requires_grad:
            rows = images.detach().clone()
            images.register_hook(lambda _: self.differentiated.append(rows))
        logits: Tensor = self.network(images)
        self.logits.append(logits.detach().clone())
        return logits


class Waves(nn.Module):
    """Logits that rise and fall many times within a budget, so that the last iterate is seldom the best."""

    def __init__(self) -> None:
        super().__init__()
        self.phases = nn.Parameter(torch.linspace(0, 6, 3 * 5 * 4).view(3, 5, 4))

    def forward(self, images: Tensor) -> Tensor:
        score = torch.sin(40 * images + self.phases).mean((1, 2, 3))
        return torch.stack([score, -score, score - 3], 1)


class Raising(nn.Module):
    """Fails on a given forward pass."""

    def __init__(self, network: nn.Module, allowed: int) -> None:
        super().__init__()
        self.network = network
        self.allowed = allowed

    def forward(self, images: Tensor) -> Tensor:
        if self.allowed == 0:
            raise RuntimeError("out of memory, say")
        self.allowed -= 1
        logits: Tensor = self.network(images)
        return logits


def steepest_within(direction: Tensor, image: Tensor, budget: Budget) -> Tensor:
    """The admissible perturbation of one image with the largest <direction, perturbation>, in float64."""
    direction, image, eps = direction.double(), image.double(), limit(budget)
    if isinstance(budget, Linf):
        return (eps * direction.sign()).clamp(-image, 1 - image)

    def clipped(scale: float) -> Tensor:
        return (scale * direction).clamp(-image, 1 - image)

    low, high = 0.0, 1e6
    if float(clipped(high).norm()) <= eps:
        return clipped(high)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float(clipped(middle).norm()) <= eps else (low, middle)
    return clipped(low)


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize(
    ("budget", "contrast", "least"),
    [
        (Linf(0.05), 0.8, 1 - 1e-5),
        (Linf(0.4), 1.0, 1 - 1e-5),
        # A step on the ball turns the random start toward the gradient; a few turn it onto it.
        (L2(0.05), 0.8, 1 - 1e-4),
        (L2(1.5), 1.0, 1 - 1e-3),
    ],
    ids=["Linf, box far", "Linf, box near", "L2, box far", "L2, box near"],
)
@pytest.mark.parametrize("shape", [(3, 6, 8), (1, 7, 5), (3, 9, 9)], ids=str)
def test_pgd_on_a_linear_model_reaches_the_closed_form_optimum_inside_the_region(
    shape: tuple[int, int, int], budget: Budget, contrast: float, least: float, steps: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    model = LinearNetwork(torch.randn(shape, generator=generator)).eval()
    images = 0.5 + contrast * (torch.rand(4, *shape, generator=generator) - 0.5)
    region = torch.rand(4, 1, *shape[1:], generator=generator) < 0.4
    labels = predicted(model, images)
    result = pgd(model, images, labels, budget=budget, region=region, steps=steps)
    for index in range(4):
        sign = 1 if labels[index] == 0 else -1
        direction = -sign * model.weight.detach() * region[index]
        best = steepest_within(direction, images[index], budget)
        fraction = float((direction * result.perturbation[index]).sum() / (direction * best).sum())
        assert (least if isinstance(budget, Linf) or steps >= 7 else 0.91) <= fraction <= 1 + 1e-5
        if isinstance(budget, Linf):
            torch.testing.assert_close(result.perturbation[index].double(), best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("budget", [Linf(0.05), L2(0.3)], ids=str)
def test_fgsm_on_a_linear_model_is_the_closed_form_optimum_where_the_box_is_far(budget: Budget) -> None:
    generator = torch.Generator().manual_seed(0)
    model = LinearNetwork(torch.randn(3, 6, 8, generator=generator)).eval()
    images = 0.4 + 0.2 * torch.rand(4, 3, 6, 8, generator=generator)
    region = torch.rand(4, 1, 6, 8, generator=generator) < 0.4
    labels = predicted(model, images)
    result = fgsm(model, images, labels, budget=budget, region=region)
    for index in range(4):
        sign = 1 if labels[index] == 0 else -1
        best = steepest_within(-sign * model.weight.detach() * region[index], images[index], budget)
        torch.testing.assert_close(result.perturbation[index].double(), best, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("budget", [Linf(0.05), L2(0.3)], ids=str)
def test_pgd_is_not_weaker_than_its_own_single_step_on_a_linear_model(budget: Budget) -> None:
    generator = torch.Generator().manual_seed(0)
    model = LinearNetwork(torch.randn(3, 6, 8, generator=generator)).eval()
    images = 0.4 + 0.2 * torch.rand(4, 3, 6, 8, generator=generator)
    labels = predicted(model, images)
    once, often = (attack(model, images, labels, budget=budget) for attack in (fgsm, pgd))
    before = margins_of(model, images, labels)
    gained_once, gained_often = (
        before - margins_of(model, result.adversarial, labels) for result in (once, often)
    )
    assert bool((gained_often >= gained_once * (1 - 1e-3)).all()), gained_often / gained_once


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_a_larger_budget_and_a_larger_region_never_lose_an_image_of_a_linear_model(attack: Attack) -> None:
    generator = torch.Generator().manual_seed(0)
    model = LinearNetwork(torch.randn(3, 6, 8, generator=generator)).eval()
    images = torch.rand(24, 3, 6, 8, generator=generator)
    labels, order = predicted(model, images), torch.rand(24, 1, 6, 8, generator=generator)
    nested = [
        (Linf(eps), order < fraction) for eps, fraction in [(0.01, 0.2), (0.03, 0.5), (0.1, 0.5), (0.1, 1.0)]
    ]
    nested.append((Linf(1.0), order < 1.0))
    before = margins_of(model, images, labels)
    fooled = torch.zeros(24, dtype=torch.bool)
    counts = []
    for budget, region in nested:
        result = attack(model, images, labels, budget=budget, region=region)
        after = margins_of(model, result.adversarial, labels)
        assert bool((after <= before + 1e-5).all())
        assert not bool((fooled & ~result.success).any())
        before, fooled = after, result.success
        counts.append(int(fooled.sum()))
    assert (
        0 < counts[0] < counts[-1] == 24
    )  # the chain crosses from few to all: without bounds, every image falls


@pytest.mark.parametrize("target", range(3))
def test_a_targeted_attack_reaches_its_target_on_a_linear_model(target: int) -> None:
    model, images = NETWORKS["linear"]()
    labels = predicted(model, images)
    labels = torch.where(labels == target, (target + 1) % 3, labels)
    targets = torch.full_like(labels, target)
    result = pgd(model, images, labels, targets=targets, budget=Linf(0.5), steps=10)
    assert bool(result.success.all())
    assert torch.equal(predicted(model, result.adversarial), targets)
    assert torch.equal(result.targets, targets)


def test_an_untargeted_success_short_of_the_target_is_no_targeted_success() -> None:
    model, images = NETWORKS["linear"]()
    scores = model(images)
    labels, targets = scores.argmin(1), scores.argsort(1)[:, 1]  # neither is what the model says
    result = fgsm(model, images, labels, targets=targets, budget=Linf(0.0))
    assert result.success.tolist() == [False] * 3
    assert torch.equal(result.targets, targets)


@sampled("network, budget, kind, attack", NETWORKS, BUDGETS, REGIONS, ATTACKS.values())
def test_results_are_in_range_in_budget_in_region_and_verified(
    network: str, budget: Budget, kind: str, attack: Attack
) -> None:
    model, images = NETWORKS[network]()
    labels, region = predicted(model, images), region_of(kind, images)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    with untouched(model, images, labels, *([] if region is None else [region])):
        result = attack(model, images, labels, budget=budget, region=region)
    adversarial = result.adversarial
    assert 0 <= float(adversarial.min()) <= float(adversarial.max()) <= 1
    assert bool((budget.distance(result.perturbation, images) <= limit(budget) + 1e-6).all())
    if region is not None:
        kept = ~region.expand(len(images), images.shape[1], -1, -1)
        assert torch.equal(bits(adversarial)[kept], bits(images)[kept])
    assert torch.equal(result.success, predicted(model, adversarial) != labels)
    assert torch.equal(result.targets, predicted(model, adversarial))
    assert torch.equal(result.clean, images)
    assert torch.equal(result.labels, labels)
    assert not adversarial.requires_grad
    moved = result.perturbation.flatten(1).any(1)
    assert moved.tolist() == [True, kind != "empty for one", True]


@sampled("network, budget, kind", NETWORKS, BUDGETS, ["everywhere", "scattered"])
def test_pgd_lowers_every_margin(network: str, budget: Budget, kind: str) -> None:
    model, images = NETWORKS[network]()
    labels = predicted(model, images)
    result = pgd(model, images, labels, budget=budget, region=region_of(kind, images), steps=5)
    after = margins_of(model, result.adversarial, labels)
    assert bool((after < margins_of(model, images, labels)).all())


@pytest.mark.parametrize("batch_size", [1, 2, None])
@pytest.mark.parametrize(
    ("attack", "options"), [(fgsm, {}), (pgd, {"steps": 4, "restarts": 3})], ids=["fgsm", "pgd"]
)
def test_counts_equal_the_passes_of_each_image(
    attack: Attack, options: dict[str, Any], batch_size: int | None
) -> None:
    network, images = NETWORKS["pooling"]()
    region = torch.ones(3, 1, 20, 20, dtype=torch.bool)
    region[..., 0, 0] = False
    images[:, 0, 0, 0] = (
        torch.tensor([26, 51, 77]) / 255
    )  # a name tag: no attack may change it, 8 bits keep it
    model = Watched(network).eval()
    result = attack(
        model, images, predicted(network, images), region=region, batch_size=batch_size, **options
    )

    def times(batches: list[Tensor]) -> list[int]:
        tags = torch.cat(batches)[:, 0, 0, 0]
        return [int((tags == tag).sum()) for tag in images[:, 0, 0, 0]]

    assert result.n_forward.tolist() == times(model.seen)
    assert result.n_backward.tolist() == times(model.differentiated)
    assert max(len(batch) for batch in model.seen) == (batch_size or 3)


@sampled("network, budget, attack", NETWORKS, BUDGETS, ATTACKS.values())
def test_an_images_result_depends_on_no_batch_size_no_order_and_no_neighbor(
    network: str, budget: Budget, attack: Attack
) -> None:
    model, images = NETWORKS[network]()
    labels, region = predicted(model, images), region_of("scattered", images)
    assert region is not None

    def adversarial(indices: list[int], batch_size: int | None = None) -> Tensor:
        options = {"budget": budget, "region": region[indices], "batch_size": batch_size}
        return attack(model, images[indices], labels[indices], **options).adversarial

    together = adversarial([0, 1, 2])
    # A network's own sums differ in their last bits between batch sizes.
    for other in (
        adversarial([0, 1, 2], 1),
        adversarial([0, 1, 2], 2),
        adversarial([2, 0, 1])[[1, 2, 0]],
        torch.cat([adversarial([index]) for index in range(3)]),
    ):
        torch.testing.assert_close(other, together, rtol=0, atol=1e-5)


def test_the_same_seed_gives_the_same_result_whatever_the_global_generator(pooling: Made) -> None:
    model, images = pooling
    labels = predicted(model, images)

    def adversarial(seed: int) -> Tensor:
        return pgd(model, images, labels, steps=1, seed=seed).adversarial

    first = adversarial(0)
    torch.rand(7)
    assert torch.equal(adversarial(0), first)
    for index in range(3):
        assert not torch.equal(adversarial(1)[index], first[index])


def test_equal_images_get_equal_starts_and_restarts_differ(pooling: Made) -> None:
    network, images = pooling
    model = Watched(network).eval()
    labels = predicted(network, images)[[0, 0]]
    pgd(model, images[[0, 0]], labels, steps=1, restarts=2)
    first, second = model.seen[0], model.seen[2]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first, second)
    assert not torch.equal(first, images[[0, 0]])


@pytest.mark.parametrize("budget", [Linf(0.1), L2(0.7)], ids=str)
def test_random_starts_are_drawn_in_the_region_and_not_cut_down_to_it(pooling: Made, budget: Budget) -> None:
    network, images = pooling
    images = 0.3 + 0.4 * images
    model, region = Watched(network).eval(), torch.zeros(3, 1, 20, 20, dtype=torch.bool)
    region[..., 4:8, 9:13] = True
    pgd(model, images, predicted(network, images), budget=budget, region=region, steps=1, restarts=2)
    sizes = budget.distance(model.seen[2] - images, images)
    assert bool((sizes > 0.4 * limit(budget)).all())


@pytest.mark.parametrize("budget", [Linf(0.15), L2(1.0)], ids=str)
@pytest.mark.parametrize("restarts", [1, 3])
def test_the_best_of_all_iterates_is_returned(budget: Budget, restarts: int) -> None:
    model = Watched(Waves()).eval()
    images = 0.3 + 0.4 * torch.rand(8, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    labels, steps = torch.zeros(8, dtype=torch.long), 5
    result = pgd(model, images, labels, budget=budget, steps=steps, restarts=restarts)
    *iterates, verified, stored = model.seen
    assert len(iterates) == restarts * (steps + 1)
    margins = torch.stack([margin(logits, labels) for logits in model.logits[:-2]])
    best = margins.argmin(0)
    for index in range(8):
        assert torch.equal(result.adversarial[index], iterates[int(best[index])][index])
    assert torch.equal(verified, result.adversarial)
    assert torch.equal(stored, as_file(result.adversarial, images, budget)[0])
    # The case is a hard one: neither the first nor the last iterate would do.
    assert bool((margins.amin(0) < margins[0]).any())
    assert bool((margins.amin(0) < margins[-1]).any())


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("budget", [Linf(0.1), L2(0.7)], ids=str)
def test_every_step_is_the_one_written_by_hand(pooling: Made, budget: Budget, targeted: bool) -> None:
    network, images = pooling
    labels, region = predicted(network, images), region_of("scattered", images)
    assert region is not None
    targets = (labels + 1) % 4 if targeted else None
    model, steps = Watched(network).eval(), 4
    pgd(model, images, labels, budget=budget, region=region, targets=targets, steps=steps)
    for step, (now, after) in enumerate(zip(model.seen[:steps], model.seen[1:], strict=False)):
        part = 2 * (1 - step / (steps + 1))
        point = now.clone().requires_grad_()
        logits = network(point)
        own = logits.gather(1, (labels if targets is None else targets)[:, None])[:, 0]
        others = logits.scatter(1, (labels if targets is None else targets)[:, None], -1e9).amax(1)
        (own - others).sum().backward()
        assert point.grad is not None
        downhill = point.grad * region * (1 if targeted else -1)
        eps = limit(budget)
        if isinstance(budget, Linf):
            moved = now - images + part * eps * downhill.sign()
            expected = (images + moved.clamp(-eps, eps)).clamp(0, 1)
        else:
            unit = downhill / downhill.flatten(1).norm(dim=1)[:, None, None, None]
            expected = images + budget.project(now - images + part * eps * unit, images)
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("budget", [Linf(0.1), L2(0.7)], ids=str)
def test_fgsm_is_one_step_of_the_whole_budget_written_by_hand(any_model: Made, budget: Budget) -> None:
    model, images = any_model
    labels, region = predicted(model, images), region_of("scattered", images)
    assert region is not None
    point = images.clone().requires_grad_()
    logits = model(point)
    competing = logits.scatter(1, labels[:, None], -1e9).argmax(1)
    lead = (logits[range(3), labels] - logits[range(3), competing]).sum()
    (gradient,) = torch.autograd.grad(lead, point)
    rows = (gradient * region).flatten(1)
    unit = rows.sign() if isinstance(budget, Linf) else torch.nn.functional.normalize(rows)
    # The step is inside the ball, so the nearest point of ball and box is the nearest of the box.
    expected = (images - limit(budget) * unit.view_as(images)).clamp(0, 1)
    found = fgsm(model, images, labels, budget=budget, region=region).adversarial
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("budget", [Linf(0.15), L2(1.0)], ids=str)
def test_restarts_never_worsen_a_margin_and_sometimes_better_it(budget: Budget) -> None:
    model = Waves().eval()
    images = 0.3 + 0.4 * torch.rand(8, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(8, dtype=torch.long)
    one, three = (
        margins_of(
            model, pgd(model, images, labels, budget=budget, steps=3, restarts=restarts).adversarial, labels
        )
        for restarts in (1, 3)
    )
    assert bool((three <= one).all())
    assert bool((three < one).any())


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_an_empty_region_returns_the_clean_bits(any_model: Made, attack: Attack) -> None:
    model, images = any_model
    labels = predicted(model, images)
    empty = torch.zeros(1, 1, *images.shape[2:], dtype=torch.bool)
    result = attack(model, images, labels, region=empty)
    assert torch.equal(bits(result.adversarial), bits(images))
    assert result.success.tolist() == [False] * 3


@sampled("network, budget, attack", NETWORKS, BUDGETS, ATTACKS.values())
def test_misclassified_images_stay_misclassified(network: str, budget: Budget, attack: Attack) -> None:
    model, images = NETWORKS[network]()
    labels = model(images).argmin(1)
    result = attack(model, images, labels, budget=budget)
    assert result.success.tolist() == [True] * 3
    assert bool((budget.distance(result.perturbation, images) <= limit(budget) + 1e-6).all())


@pytest.mark.parametrize("budget", [Linf(1e-4), L2(1e-3)], ids=str)
def test_where_no_image_falls_the_best_attempts_are_returned(budget: Budget) -> None:
    weight = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
    model = LinearNetwork(weight).eval()
    images = 0.5 + 0.2 * weight.sign().expand(4, -1, -1, -1)
    labels = predicted(model, images)
    result = pgd(model, images, labels, budget=budget)
    assert result.success.tolist() == [False] * 4
    assert torch.equal(result.targets, labels)
    gained = margins_of(model, images, labels) - margins_of(model, result.adversarial, labels)
    dual = 1 if isinstance(budget, Linf) else 2
    possible = 2 * limit(budget) * float(torch.linalg.vector_norm(weight, dual))
    assert bool((gained > 0.9 * possible).all())


def test_progress_rises_to_one(pooling: Made) -> None:
    model, images = pooling
    reported: list[float] = []
    pgd(model, images, predicted(model, images), steps=3, restarts=2, batch_size=2, progress=reported.append)
    assert reported == sorted(reported)
    assert 0 <= reported[0] < 0.2
    assert reported[-1] == 1


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("images", torch.rand(3, 20, 20)),
        ("images", torch.zeros(3, 3, 20, 20, dtype=torch.uint8)),
        ("images", torch.full((3, 3, 20, 20), float("nan"))),
        ("images", torch.rand(0, 3, 20, 20)),
        ("images", [[0.0]]),
        ("labels", torch.tensor([0, 1])),
        ("labels", torch.tensor([[0], [1], [2]])),
        ("labels", torch.tensor([0.0, 1.0, 2.0])),
        ("labels", torch.tensor([0, 1, 4])),
        ("labels", torch.tensor([0, -1, 2])),
        ("labels", [0, 1, 2]),
        ("targets", torch.tensor([1, 2])),
        ("targets", torch.tensor([1.0, 2.0, 3.0])),
        ("targets", torch.tensor([1, 2, 4])),
        ("targets", torch.tensor([1, 2, -3])),
        ("targets", torch.tensor([1, 1, 3])),  # the second is its own label
        ("region", torch.ones(3, 1, 20, 20)),
        ("region", torch.ones(3, 20, 20, dtype=torch.bool)),
        ("region", torch.ones(3, 3, 20, 20, dtype=torch.bool)),
        ("region", torch.ones(2, 1, 20, 20, dtype=torch.bool)),
        ("region", torch.ones(3, 1, 20, 19, dtype=torch.bool)),
        ("batch_size", 0),
        ("model", "resnet18"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(
    pooling: Made, attack: Attack, argument: str, value: Any
) -> None:
    model, images = pooling
    arguments = {"model": model, "images": images, "labels": torch.tensor([0, 1, 2]), argument: value}
    with untouched(model, images), pytest.raises(ValueError, match=rf"{argument}.*(accepted|must|ask for)"):
        attack(**arguments)


@pytest.mark.parametrize("argument", ["steps", "restarts"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_pgd_refuses_less_than_one_step_or_restart(pooling: Made, argument: str, value: float) -> None:
    model, images = pooling
    with pytest.raises(ValueError, match=f"{argument} (is|must) .*{value}"):
        pgd(model, images, torch.tensor([0, 1, 2]), **{argument: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize(
    "hide",
    [lambda x: x.detach(), lambda x: (x * 255).round() / 255, lambda x: 0 * x],
    ids=["detached", "rounded", "ignored"],
)
def test_a_model_with_no_gradient_trips_a_warning(
    pooling: Made, attack: Attack, hide: Callable[[Tensor], Tensor]
) -> None:
    network, images = pooling

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.network(hide(images))
            return logits

    model = Masked().eval()
    with (
        untouched(model, images),
        pytest.warns(ModelWarning, match=r"zero everywhere for 3 of 3"),
    ):
        attack(model, images, predicted(model, images))


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_a_model_that_returns_probabilities_trips_a_warning(pooling: Made, attack: Attack) -> None:
    network, images = pooling
    model = nn.Sequential(network, nn.Softmax(1)).eval()
    with pytest.warns(ModelWarning, match="as a softmax does"):
        attack(model, images, predicted(model, images))


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_a_model_in_train_mode_trips_a_warning_and_is_attacked_in_eval_mode(
    pooling: Made, attack: Attack
) -> None:
    model, images = pooling
    labels = predicted(model, images)
    expected = attack(model, images, labels).adversarial
    model.train()
    model.get_submodule("stem.1").eval()  # modes are put back one by one
    with untouched(model, images), pytest.warns(ModelWarning, match="train mode"):
        found = attack(model, images, labels).adversarial
    assert torch.equal(found, expected)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_rounding_below_zero_and_above_one_is_accepted_in_silence(pooling: Made, attack: Attack) -> None:
    model, images = pooling
    images[0, 0, 0, 0], images[1, 0, 0, 0] = -3e-8, 1 + 1.2e-7
    result = attack(model, images, predicted(model, images))
    assert torch.equal(result.clean, images.clamp(0, 1))
    assert 0 <= float(result.adversarial.min()) <= float(result.adversarial.max()) <= 1


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_normalized_images_trip_a_warning(pooling: Made, attack: Attack) -> None:
    model, images = pooling
    with pytest.warns(ImageWarning, match="images span"):
        attack(model, 3 * images - 1, torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("seed", [10**70, 0.5, "zero", None], ids=str)
def test_a_seed_that_is_no_64_bit_number_is_refused(pooling: Made, seed: Any) -> None:
    model, images = pooling
    with pytest.raises(ValueError, match=r"^seed must"):
        pgd(model, images, torch.tensor([0, 1, 2]), seed=seed)


def test_numbers_of_numpy_mean_the_same_as_those_of_python(pooling: Made) -> None:
    model, images = pooling
    labels = predicted(model, images)

    def attacked(whole: Callable[[int], Any], real: Callable[[float], Any]) -> Tensor:
        return pgd(
            model, images, labels, budget=Linf(real(0.125)), steps=whole(3), restarts=whole(2), momentum=real(0.5),
            seed=whole(5), batch_size=whole(2),
        ).adversarial  # fmt: skip

    assert torch.equal(attacked(np.int64, np.float32), attacked(int, float))


@pytest.mark.parametrize("seed", [-7, 2**63 - 1], ids=str)
def test_seeds_reach_over_64_bits(pooling: Made, seed: int) -> None:
    model, images = pooling
    labels = predicted(model, images)
    first, again, other = (pgd(model, images, labels, seed=s, steps=1) for s in (seed, seed, seed - 1))
    assert torch.equal(first.adversarial, again.adversarial)
    assert not torch.equal(first.adversarial, other.adversarial)


@sampled(
    "attack, without, network, made_inside",
    ATTACKS.values(),
    [torch.no_grad, torch.inference_mode],
    ["pooling", "normalized"],
    [False, True],
)
def test_grad_switches_outside_change_nothing(
    attack: Attack, without: Callable[[], Any], network: str, made_inside: bool
) -> None:
    model, images = NETWORKS[network]()
    labels = predicted(model, images)
    given = {"images": images, "labels": labels, "targets": (labels + 1) % 4}
    expected = attack(model, **given)
    with without():
        if made_inside:  # as in a user's evaluation loop
            given = {name: tensor.clone() for name, tensor in given.items()}
        result = attack(model, **given)
    assert torch.equal(result.adversarial, expected.adversarial)
    assert torch.equal(result.success, expected.success)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_frozen_models_are_attacked_alike(any_model: Made, attack: Attack) -> None:
    model, images = any_model
    labels = predicted(model, images)
    expected = attack(model, images, labels).adversarial
    model.requires_grad_(False)
    with untouched(model, images):
        found = attack(model, images, labels).adversarial
    # Vision transformers take another path where nothing needs a gradient; last bits may differ.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("allowed", [0, 1, 2])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore:.*train mode")
def test_a_model_that_fails_midway_is_left_as_it_was(pooling: Made, allowed: int, training: bool) -> None:
    network, images = pooling
    labels = predicted(network, images)
    model = Raising(network, allowed).train(training)
    images.requires_grad_()
    with untouched(model, images, labels), pytest.raises(RuntimeError, match="out of memory, say"):
        pgd(model, images, labels, steps=5)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_strided_images_and_other_precisions_are_taken(pooling: Made, attack: Attack) -> None:
    model, images = pooling
    labels = predicted(model, images)
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    expected = attack(model, images, labels).adversarial
    torch.testing.assert_close(attack(model, strided, labels).adversarial, expected, rtol=0, atol=1e-5)
    assert torch.equal(attack(model, images.double(), labels.int()).adversarial, expected)


def tagged(images: Tensor) -> tuple[Tensor, Tensor]:
    """The images with a name tag in one corner that 8 bits keep, and the region without that corner."""
    images = images.clone()
    images[:, 0, 0, 0] = torch.arange(1, len(images) + 1) / 255
    region = torch.ones(len(images), 1, *images.shape[2:], dtype=torch.bool)
    region[..., 0, 0] = False
    return images, region


def times(batches: list[Tensor], images: Tensor) -> list[int]:
    """How often each tagged image is in the batches."""
    tags = torch.cat(batches)[:, 0, 0, 0]
    return [int((tags == tag).sum()) for tag in images[:, 0, 0, 0]]


def balanced(count: int = 24) -> Made:
    """A network and images that lie close to the borders of its classes, so that a small budget fools some of them."""
    network, _ = NETWORKS["pooling"]()
    images = torch.rand(count, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        network.get_submodule("head").bias -= network(images).mean(0)
    return network, images


STOPPING: dict[str, tuple[Attack, dict[str, Any]]] = {
    "pgd": (pgd, {"steps": 6}),
    "pgd with restarts": (pgd, {"steps": 3, "restarts": 3}),
    "pgd with momentum": (pgd, {"steps": 6, "momentum": 0.7}),
    "bim": (bim, {"steps": 6}),
}


@sampled("budget, batch_size, name", [Linf(0.01), L2(0.2), L1(1.0), SSIM(0.00003)], [7, None], STOPPING)
def test_stopping_early_finds_the_same_successes_for_less_and_finished_images_leave(
    budget: Budget, batch_size: int | None, name: str
) -> None:
    attack, options = STOPPING[name]
    network, images = balanced()
    images, region = tagged(images)
    labels = predicted(network, images)
    given = {"budget": budget, "region": region, "batch_size": batch_size, **options}
    long = attack(network, images, labels, **given)
    model = Watched(network).eval()
    short = attack(model, images, labels, **given, stop_early=True)
    assert torch.equal(short.success, long.success)
    assert 0 < int(short.success.sum()) < 24
    assert bool((short.n_forward[short.fooled] <= 2 * long.n_forward[short.fooled]).all())  # of the files too
    assert int(short.n_forward.sum()) < int(long.n_forward.sum())
    assert bool((short.n_backward <= long.n_backward).all())
    assert short.n_forward.tolist() == times(model.seen, images)
    assert short.n_backward.tolist() == times(model.differentiated, images)
    assert torch.equal(short.n_forward[~long.success], long.n_forward[~long.success])
    # An image that fools is followed by its file; if that fools too, it was the last pass of the search.
    tags = images[:, 0, 0, 0]
    rows, logits = torch.cat(model.seen)[:, 0, 0, 0], torch.cat(model.logits)
    for index in short.fooled.nonzero()[:, 0].tolist():
        ours = logits[rows == tags[index]][:-2]
        lost = iter((conservative_margin(ours, labels[index].expand(len(ours)), None) < 0).tolist())
        outcomes = [next(lost) for fools in lost if fools]
        assert outcomes[-1]
        assert not any(outcomes[:-1])


def test_stopping_early_saves_passes_where_images_fall() -> None:
    network, images = NETWORKS["pooling"]()
    labels = network(images).argmin(1)
    result = pgd(network, images, labels, steps=9, restarts=4, stop_early=True)
    assert result.success.tolist() == [True] * 3
    assert result.n_forward.tolist() == [1 + 1 + 2] * 3  # the start, its file, and both verifications
    assert result.n_backward.tolist() == [1] * 3


@sampled(
    "steps, contrast, loss, momentum",
    [1, 3, 10],
    [0.8, 1.0],  # box far, box near
    ["margin", "cross_entropy", "dlr"],
    [0.0, 0.5, 1.0],
)
def test_the_iterative_method_on_a_linear_model_ends_in_the_corner_of_the_cube(
    steps: int, contrast: float, loss: str, momentum: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    model = LinearNetwork(0.3 * torch.randn(3, 6, 8, generator=generator)).eval()
    images = 0.5 + contrast * (torch.rand(4, 3, 6, 8, generator=generator) - 0.5)
    region = torch.rand(4, 1, 6, 8, generator=generator) < 0.4
    labels, eps = predicted(model, images), 0.05
    result = bim(
        model,
        images,
        labels,
        budget=Linf(eps),
        region=region,
        steps=steps,
        momentum=momentum,
        loss=loss,
    )
    downhill = torch.where(labels == 0, -1, 1)[:, None, None, None] * model.weight.detach().sign()
    expected = (images + eps * downhill * region).clamp(0, 1)
    torch.testing.assert_close(result.adversarial, expected, rtol=0, atol=1e-6)
    assert result.n_forward.tolist() == [steps + 3] * 4
    assert result.n_backward.tolist() == [steps] * 4


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("budget", [Linf(0.1), L2(0.7)], ids=str)
def test_every_iterative_step_is_the_one_written_by_hand(
    pooling: Made, budget: Budget, momentum: float, targeted: bool
) -> None:
    network, images = pooling
    labels, region = predicted(network, images), region_of("scattered", images)
    assert region is not None
    targets = (labels + 1) % 4 if targeted else None
    model, steps = Watched(network).eval(), 4
    bim(model, images, labels, budget=budget, region=region, targets=targets, steps=steps, momentum=momentum)
    assert torch.equal(model.seen[0], images)
    gathered = torch.zeros_like(images)
    for now, after in zip(model.seen[:steps], model.seen[1:], strict=False):
        point = now.clone().requires_grad_()
        loss = nn.functional.cross_entropy(
            network(point), labels if targets is None else targets, reduction="sum"
        )
        (gradient,) = torch.autograd.grad(loss, point)
        wanted = gradient * region * (-1 if targeted else 1)
        gathered = momentum * gathered + wanted / wanted.abs().mean((1, 2, 3), keepdim=True)
        eps = limit(budget)
        length = gathered.flatten(1).norm(dim=1)[:, None, None, None]
        unit = gathered.sign() if isinstance(budget, Linf) else gathered / length
        expected = images + budget.project(now - images + eps / steps * unit, images)
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("target", range(3))
@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_the_targeted_iterative_method_reaches_its_target_on_a_linear_model(
    target: int, momentum: float
) -> None:
    model, images = NETWORKS["linear"]()
    labels = predicted(model, images)
    labels = torch.where(labels == target, (target + 1) % 3, labels)
    targets = torch.full_like(labels, target)
    result = bim(model, images, labels, targets=targets, budget=Linf(0.5), momentum=momentum)
    assert bool(result.success.all())
    assert torch.equal(predicted(model, result.adversarial), targets)


def test_the_iterative_method_draws_nothing() -> None:
    model, images = NETWORKS["pooling"]()
    labels = predicted(model, images)
    first = bim(model, images, labels)
    torch.rand(3)
    assert torch.equal(bim(model, images, labels).adversarial, first.adversarial)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("attack", [pgd, bim])
def test_momentum_is_a_fraction(attack: Attack, momentum: float) -> None:
    model, images = NETWORKS["pooling"]()
    with untouched(model, images), pytest.raises(ValueError, match=r"^momentum must be between 0 and 1, got"):
        attack(model, images, torch.tensor([0, 1, 2]), momentum=momentum)


@pytest.mark.parametrize("attack", [fgsm, bim, pgd])
@pytest.mark.parametrize(("eps", "stored"), [(0.4 / 255, False), (1.6 / 255, True)], ids=["lost", "kept"])
def test_8_bit_success_is_that_of_png_files(tmp_path: Path, attack: Attack, eps: float, stored: bool) -> None:
    image_module = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 12, 10, generator=generator)
    images = torch.randint(40, 210, (6, 3, 12, 10), generator=generator) / 255

    class Shifted(LinearNetwork):
        """The border between its classes is a fifth of an 8-bit level away from the image in every channel."""

        def forward(self, images: Tensor) -> Tensor:
            score = super().forward(images - center)[:, 0]
            return torch.stack([score, -score], 1)

    for index in range(6):
        center = images[index] - 0.2 / 255 * weight.sign()
        model = Shifted(weight).eval()
        result = attack(model, images[index, None], torch.tensor([0]), budget=Linf(eps))
        levels = (result.adversarial[0] * 255).round().byte().permute(1, 2, 0).numpy()
        image_module.fromarray(levels).save(tmp_path / "adversarial.png")
        read = np.asarray(image_module.open(tmp_path / "adversarial.png"))
        back = torch.from_numpy(read.copy()).permute(2, 0, 1)[None] / 255
        assert result.success_8bit is not None
        assert result.success.tolist() == [True]
        assert result.success_8bit.tolist() == (predicted(model, back) != 0).tolist() == [stored]


def test_targeted_8_bit_success_is_reaching_the_target() -> None:
    model, images = NETWORKS["linear"]()
    scores = model(images)
    labels, targets = scores.argmin(1), scores.argsort(1)[:, 1]
    result = fgsm(model, images, labels, targets=targets, budget=Linf(0.0))
    assert result.success_8bit is not None
    assert result.success_8bit.tolist() == [False] * 3


@pytest.mark.parametrize("attack", [fgsm, bim, pgd])
@pytest.mark.parametrize("attached", [False, True], ids=["no graph", "zero graph"])
def test_a_constant_model_is_not_fooled_and_trips_a_warning(attack: Attack, attached: bool) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([1.0, 3.0, 2.0]))

        def forward(self, images: Tensor) -> Tensor:
            logits = self.logits.detach().expand(len(images), 3)
            return logits + 0 * images.sum((1, 2, 3))[:, None] if attached else logits

    model, images = Constant().eval(), torch.rand(5, 3, 8, 8)
    labels = torch.ones(5, dtype=torch.long)
    with (
        untouched(model, images),
        pytest.warns(ModelWarning, match=r"zero everywhere for 5 of 5"),
    ):
        result = attack(model, images, labels)
    assert result.success_8bit is not None
    assert not bool(result.success.any() | result.success_8bit.any())
    assert torch.equal(result.targets, labels)
    assert float(result.perturbation.abs().max()) <= 4 / 255 + 1e-6


def test_the_seed_of_every_image_is_in_the_table() -> None:
    model, images = NETWORKS["pooling"]()
    labels = predicted(model, images)
    assert pgd(model, images, labels, seed=17, steps=1).table["seed"].tolist() == [17] * 3
    assert fgsm(model, images, labels).table["seed"].tolist() == [0] * 3


@pytest.mark.parametrize("attack", [fgsm, bim, pgd, ensemble])
@pytest.mark.parametrize("budget", [0.1, "linf", None], ids=str)
def test_an_invalid_budget_is_refused_by_name(attack: Any, budget: Any) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).eval()
    with pytest.raises(ValueError, match=r"budget must be a budget such as Linf"):
        attack(model, torch.rand(1, 3, 4, 4), torch.tensor([0]), budget=budget)
