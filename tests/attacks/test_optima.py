"""Linear models, whose optimum in every budget is known otherwise; planted weaknesses; best attempts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.networks import NETWORKS, LinearNetwork, Made, untouched
from weakspot.attacks import bim, fgsm, pgd
from weakspot.budgets import L1, L2, SSIM, Budget, Linf
from weakspot.logits import margin
from weakspot.pairs import AttackResult

BUDGETS: list[Budget] = [
    Linf(0.03),
    L2(0.5),
    L1(5.0),
    SSIM(0.01),
    SSIM(0.1, patch=4),
    SSIM(0.01, mode="local"),
    SSIM(0.1, patch=4, mode="local"),
]


def linear(*shape: int, contrast: float = 0.2, count: int = 4) -> tuple[LinearNetwork, Tensor, Tensor]:
    """A linear model of two classes, images around gray and the classes it says they are."""
    generator = torch.Generator().manual_seed(0)
    model = LinearNetwork(torch.randn(shape, generator=generator)).eval()
    images = 0.5 + contrast * (torch.rand(count, *shape, generator=generator) - 0.5)
    return model, images, predicted(model, images)


def predicted(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        classes: Tensor = model(images).argmax(1)
    return classes


def gained(model: nn.Module, result: AttackResult) -> Tensor:
    """(N,) how far each margin fell."""
    with torch.no_grad():
        before, after = (
            margin(model(images), result.labels) for images in (result.clean, result.adversarial)
        )
    return before - after


def scattered(images: Tensor, fraction: float = 0.4) -> Tensor:
    sites = torch.rand(len(images), 1, *images.shape[2:], generator=torch.Generator().manual_seed(3))
    return sites < fraction


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_more_steps_are_not_weaker_than_one_on_a_linear_model(budget: Budget) -> None:
    model, images, labels = linear(3, 16, 12)
    once = gained(model, fgsm(model, images, labels, budget=budget))
    for steps in (2, 10):
        often = gained(model, bim(model, images, labels, budget=budget, steps=steps))
        assert bool((often >= 0.99 * once).all()), often / once
    # A random start costs some of the twenty steps.
    drawn = gained(model, pgd(model, images, labels, budget=budget))
    assert bool((drawn >= 0.95 * once).all()), drawn / once


@pytest.mark.parametrize("contrast", [0.2, 1.0], ids=["box far", "box near"])
@pytest.mark.parametrize("eps", [0.4, 5.0, 40.0])
def test_l1_attacks_fill_the_heaviest_pixels_of_the_region(eps: float, contrast: float) -> None:
    model, images, labels = linear(3, 6, 8, contrast=contrast)
    region = scattered(images)
    results: list[AttackResult] = [
        attack(model, images, labels, budget=L1(eps), region=region) for attack in (fgsm, bim, pgd)
    ]
    for index in range(4):
        slopes = (model.weight.detach() * region[index]).flatten() * (1 if int(labels[index]) else -1)
        pixels, left, best = images[index].flatten(), eps, 0.0
        for place in slopes.abs().argsort(descending=True).tolist():
            slope, pixel = float(slopes[place]), float(pixels[place])
            amount = min(left, 1 - pixel if slope > 0 else pixel) if slope else 0.0
            best, left = best + abs(slope) * amount, left - amount
        for result, least in zip(results, (1 - 1e-4, 1 - 1e-4, 0.95), strict=True):
            reached = float((slopes * result.perturbation[index].flatten()).sum())
            assert least * best <= reached <= best * (1 + 1e-4)


def best_in_ssim(
    budget: SSIM, slopes: Tensor, image: Tensor, region: Tensor, start: Tensor, optimize: Any
) -> float:
    """The largest <slopes, perturbation> a general solver finds in budget, box and region."""
    sites = region.expand_as(image).flatten().nonzero()[:, 0]
    exact, weights = image.double()[None], slopes.double().flatten()[sites].numpy()

    def spent(free: Any) -> tuple[float, Any]:
        whole = torch.zeros(image.numel(), dtype=torch.float64)
        whole[sites] = torch.from_numpy(np.asarray(free))
        whole.requires_grad_()
        size = budget.distance(whole.view_as(exact), exact).sum() / budget.eps
        (gradient,) = torch.autograd.grad(size, whole)
        return float(size.detach()), gradient[sites].numpy()

    pixels = exact.flatten()[sites].tolist()
    found = []
    for fraction in (0.3, 0.9):
        ended = optimize.minimize(
            lambda free: -float(weights @ free),
            fraction * start.flatten()[sites].double().numpy(),
            jac=lambda free: -weights,
            bounds=[(-pixel, 1 - pixel) for pixel in pixels],
            constraints=[
                {"type": "ineq", "fun": lambda free: 1 - spent(free)[0], "jac": lambda free: -spent(free)[1]}
            ],
            method="SLSQP",
            options={"maxiter": 300},
        )
        if spent(ended.x)[0] <= 1 + 1e-4:
            found.append(-float(ended.fun))
    return max(found)


@pytest.mark.peers
@pytest.mark.parametrize("fraction", [1.0, 0.4], ids=["everywhere", "in a region"])
@pytest.mark.parametrize("contrast", [0.3, 1.0], ids=["smooth images", "rough images"])
@pytest.mark.parametrize("budget", [SSIM(0.005, level=1), SSIM(0.05, patch=4, level=1)], ids=str)
def test_pgd_reaches_what_a_general_solver_finds_in_the_ssim_budget(
    budget: SSIM, contrast: float, fraction: float
) -> None:
    optimize: Any = pytest.importorskip("scipy.optimize")
    model, images, labels = linear(1, 8, 8, contrast=contrast, count=1)
    region = scattered(images, fraction)
    result = pgd(model, images, labels, budget=budget, region=region)
    slopes = model.weight.detach() * (1 if int(labels[0]) else -1)
    best = best_in_ssim(budget, slopes, images[0], region[0], result.perturbation[0], optimize)
    reached = float((slopes * result.perturbation[0]).sum())
    assert 0.9 * best <= reached <= 1.001 * best


def test_the_ssim_budget_is_spent_where_it_is_not_seen() -> None:
    # A linear model weighs both halves alike; the left half is flat, the right one rough.
    generator = torch.Generator().manual_seed(0)
    model = LinearNetwork(torch.randn(3, 16, 32, generator=generator)).eval()
    images = torch.full((2, 3, 16, 32), 0.5)
    images[..., 16:] += 0.6 * (torch.rand(2, 3, 16, 16, generator=generator) - 0.5)
    labels = predicted(model, images)

    def textures(budget: Budget) -> Tensor:
        """How much rougher the right half is made than the left one."""
        moved = pgd(model, images, labels, budget=budget).perturbation
        blocks = moved.unflatten(3, (4, 8)).unflatten(2, (2, 8))
        spread: Tensor = blocks.var((3, 5)).mean((1, 2)).sqrt()
        ratio: Tensor = spread[:, 2:].mean(1) / spread[:, :2].mean(1)
        return ratio

    assert bool((textures(SSIM(0.01)) > 5).all())
    assert bool((textures(L2(1.0)) < 1.5).all())


class Cube:
    """Somebody's own budget, which has never heard of regions."""

    def project(self, perturbation: Tensor, images: Tensor) -> Tensor:
        return (images + perturbation.clamp(-0.05, 0.05)).clamp(0, 1) - images

    def steepest_step(self, gradient: Tensor, perturbation: Tensor, images: Tensor) -> Tensor:
        return 0.05 * gradient.sign()

    def distance(self, perturbation: Tensor, images: Tensor) -> Tensor:
        return perturbation.abs().flatten(1).amax(1)


@pytest.mark.parametrize("attack", [fgsm, bim, pgd])
def test_a_budget_of_ones_own_may_leave_the_region_to_the_attack(
    pooling: Made, attack: Callable[..., AttackResult]
) -> None:
    model, images = pooling
    labels, region = predicted(model, images), scattered(images)
    own = attack(model, images, labels, budget=Cube(), region=region)
    ours = attack(model, images, labels, budget=Linf(0.05), region=region)
    torch.testing.assert_close(own.adversarial, ours.adversarial, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stop_early", [False, True])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_where_nothing_can_succeed_the_best_attempt_is_returned(budget: Budget, stop_early: bool) -> None:
    model, images, _ = linear(3, 16, 12)

    class Sure(nn.Module):
        """The second class can never win, though the images do move its logit."""

        def __init__(self) -> None:
            super().__init__()
            self.inside = model

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.inside(images) + torch.tensor([1e3, -1e3])
            return logits

    sure, labels = Sure().eval(), torch.zeros(4, dtype=torch.long)
    with untouched(sure, images):
        result = pgd(sure, images, labels, budget=budget, steps=5, stop_early=stop_early)
    assert result.success_8bit is not None
    assert not bool((result.success | result.success_8bit).any())
    assert torch.equal(result.targets, labels)
    assert bool((gained(sure, result) > 0).all())
    assert result.n_forward.tolist() == [5 + 1 + 2] * 4


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_a_batch_that_is_misclassified_already_costs_one_step_and_comes_back_unchanged(
    budget: Budget, targeted: bool
) -> None:
    model, images = NETWORKS["normalized"]()
    labels = model(images).argmin(1)
    targets = predicted(model, images) if targeted else None
    result = bim(model, images, labels, targets=targets, budget=budget, stop_early=True)
    assert result.success.tolist() == [True] * 3
    assert torch.equal(result.adversarial, images)
    assert result.n_forward.tolist() == [1 + 1 + 2] * 3  # of its file too
    assert result.n_backward.tolist() == [1] * 3


@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("falls", [False, True])
def test_progress_ends_at_one_wherever_the_images_leave(pooling: Made, falls: bool, restarts: int) -> None:
    model, images = pooling
    labels = model(images).argmin(1) if falls else predicted(model, images)
    reported: list[float] = []
    pgd(
        model,
        images,
        labels,
        steps=4,
        restarts=restarts,
        budget=Linf(1e-6),
        stop_early=True,
        progress=reported.append,
    )
    assert reported == sorted(reported)
    assert reported[-1] == 1


@pytest.mark.parametrize("name", ["flat, gray, two classes, not square", "pooling"])
def test_8_bit_success_of_a_batch_is_that_of_its_files(tmp_path: Path, name: str) -> None:
    pictures = pytest.importorskip("PIL.Image")
    network, _ = NETWORKS[name]()
    _, example = NETWORKS[name]()
    images = torch.rand(40, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    images = (images * 255).round() / 255
    with torch.no_grad():
        bias = network.get_submodule("head").bias
        assert isinstance(bias, Tensor)
        bias -= network(images).mean(0)  # close to the borders of the classes
    labels = predicted(network, images)
    survived = []
    for eps in (0.4 / 255, 1 / 255, 3 / 255):
        result = pgd(network, images, labels, budget=Linf(eps), steps=5, stop_early=True)
        read = []
        for image in result.adversarial:
            levels = (image.permute(1, 2, 0).squeeze(2).numpy() * 255).round().astype(np.uint8)
            pictures.fromarray(levels).save(tmp_path / "image.png")
            stored = np.array(pictures.open(tmp_path / "image.png"), np.float32) / 255
            read.append(torch.from_numpy(stored).view(*image.shape[1:], -1).permute(2, 0, 1))
        assert result.success_8bit is not None
        assert torch.equal(result.success_8bit, predicted(network, torch.stack(read)) != labels)
        survived.append((int(result.success.sum()), int(result.success_8bit.sum())))
    assert survived[0][0] > 0 == survived[0][1]  # less than half a level is rounded away
    assert survived[2][1] > survived[1][1]
