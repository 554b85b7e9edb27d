"""Leads: gradients that bypass a defense, whether they predict its margin, and images as 8-bit files store them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.defenses.planted import BUDGET, Inline, planted, reversed_gradient
from tests.networks import NETWORKS, Wrapped, untouched
from weakspot import L1, L2, SSIM, Linf
from weakspot.attacks.eight_bit import LEAST, OVER, fit, on_8bit_images, rounded, whole_levels
from weakspot.budgets import Budget
from weakspot.classifier import Classifier, as_classifier
from weakspot.defenses.bpda import agreement, leads_on, straight_through_models

BUDGETS = [Linf(0.1), L2(0.8), L1(8.0), SSIM(0.02), SSIM(0.02, mode="local")]


def gradient_of(model: nn.Module, images: Tensor) -> Tensor:
    point = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(point)[:, 0].sum(), point)
    return gradient


def leads(defended: nn.Module, images: Tensor) -> list[Classifier]:
    with untouched(defended, images):
        return straight_through_models(as_classifier(defended), images)


def test_the_lead_goes_straight_through_preprocessing_without_a_gradient() -> None:
    network, images = NETWORKS["pooling"]()
    defended = Wrapped(network, lambda shown: (shown.detach() * 16).round() / 16).eval()
    (lead,) = leads(defended, images)
    with untouched(defended, images):
        torch.testing.assert_close(lead(images), defended(images))
    expected = gradient_of(network, (images * 16).round() / 16)
    result = gradient_of(lead, images)
    # The slope of each channel is fitted to rounded over given values: almost one.
    torch.testing.assert_close(result, expected, rtol=0.02, atol=1e-4)


def test_a_change_of_scale_has_its_own_slope() -> None:
    network, images = NETWORKS["pooling"]()

    def normalized(shown: Tensor) -> Tensor:
        return (shown - 0.4) / 0.25

    (lead,) = leads(Wrapped(network, lambda shown: normalized(shown).detach()).eval(), images)
    expected = gradient_of(Wrapped(network, normalized).eval(), images)
    torch.testing.assert_close(gradient_of(lead, images), expected, rtol=1e-4, atol=1e-6)


def test_images_are_resized_to_the_size_of_the_inner_network() -> None:
    network, images = NETWORKS["pooling"]()

    def resized(shown: Tensor) -> Tensor:
        return F.interpolate(shown, size=(26, 23), mode="bilinear", align_corners=False)

    (lead,) = leads(Wrapped(network, lambda shown: resized(shown).detach()).eval(), images)
    expected = gradient_of(Wrapped(network, resized).eval(), images)
    torch.testing.assert_close(gradient_of(lead, images), expected, rtol=1e-4, atol=1e-6)


class Averaged(nn.Module):
    """Calls its network on several changed copies of each image, in one batch or one after the other."""

    def __init__(self, network: nn.Module, how: str) -> None:
        super().__init__()
        self.network, self.how = network, how

    def forward(self, images: Tensor) -> Tensor:
        shown, changes = images.detach(), (0.9, 1.0, 1.05)
        if self.how == "calls":
            return torch.stack([self.network(images=shown * change) for change in changes]).mean(0)
        if self.how == "tiled":
            batch = torch.cat([shown * change for change in changes])
            return self.network(images=batch).unflatten(0, (3, len(images))).mean(0)  # type: ignore[no-any-return]
        scale = torch.tensor(changes).repeat(len(images)).view(-1, 1, 1, 1)
        batch = shown.repeat_interleave(3, 0) * scale
        return self.network(images=batch).unflatten(0, (len(images), 3)).mean(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["calls", "tiled", "interleaved"])
def test_several_copies_of_an_image_are_averaged(how: str) -> None:
    network, images = NETWORKS["pooling"]()
    defended = Averaged(network, how).eval()
    lead = leads(defended, images)[0]
    torch.testing.assert_close(lead(images), defended(images))
    expected = sum(change * gradient_of(network, images * change) for change in (0.9, 1.0, 1.05)) / 3
    torch.testing.assert_close(gradient_of(lead, images), expected, rtol=1e-3, atol=1e-5)


def test_the_last_of_several_calls_can_lead_alone() -> None:
    """A first pass that only prepares the second, as in neutralization, does not contribute to the logits."""
    network, images = NETWORKS["pooling"]()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, shown: Tensor) -> Tensor:
            self.network(1 - shown)
            logits: Tensor = self.network(shown.detach())
            return logits

    mean, last = leads(Twice().eval(), images)
    torch.testing.assert_close(gradient_of(last, images), gradient_of(network, images), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(gradient_of(mean, images), gradient_of(network, images), rtol=1e-2)


def test_a_network_that_is_not_a_submodule_is_found_and_nested_ones_from_the_outside_in() -> None:
    network, images = NETWORKS["normalized"]()
    hidden = Wrapped(nn.Identity(), after=lambda shown: network(shown.detach())).eval()
    outer, inner = leads(hidden, images)  # the classifier, and the network that it normalizes for
    expected = gradient_of(network, images)
    for lead in (outer, inner):
        torch.testing.assert_close(gradient_of(lead, images), expected, rtol=1e-3, atol=1e-5)


def test_without_an_inner_network_there_is_no_straight_lead() -> None:
    first, _, _, images, _ = planted()
    assert leads(first, images) == []
    assert leads(Inline(first).eval(), images) == []
    assert leads(NETWORKS["pooling"]()[0], NETWORKS["pooling"]()[1]) == []


def test_a_network_that_fails_leaves_no_hook() -> None:
    network, images = NETWORKS["pooling"]()
    calls = []

    def failing(logits: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("no")
        return logits

    defended = Wrapped(network, after=failing).eval()
    (lead,) = leads(defended, images)
    with pytest.raises(RuntimeError, match="no"), untouched(defended):
        lead(images)
    calls.clear()
    calls.append(1)
    with pytest.raises(RuntimeError, match="no"), untouched(defended):
        leads(defended, images)
    assert not nn.modules.module._global_forward_hooks


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_true_gradients_agree_and_others_do_not(budget: Budget) -> None:
    network, images = NETWORKS["pooling"]()
    images = images.repeat(4, 1, 1, 1) * torch.linspace(0.5, 1, 12).view(-1, 1, 1, 1)
    labels = network(images).argmax(1)
    own = as_classifier(network)

    def agreeing(lead: nn.Module) -> float:
        result = agreement(own, as_classifier(lead), images, labels, budget=budget, seed=0)
        return float(result.float().mean())

    with untouched(network, images, labels):
        assert agreeing(network) >= 0.9
    for before in (
        lambda shown: shown.detach(),
        reversed_gradient,
        lambda shown: shown + 3 * (shown - shown.detach()),
    ):
        assert agreeing(Wrapped(network, before).eval()) == 0


def test_agreement_belongs_to_the_image_and_does_not_see_other_draws() -> None:
    first, _, _, images, labels = planted()
    noisy = as_classifier(Wrapped(first, lambda shown: shown + 0.5 * torch.randn_like(shown)).eval())
    assert bool(agreement(noisy, noisy, images, labels, budget=BUDGET, seed=0).all())
    half = as_classifier(Wrapped(first, lambda shown: torch.where(shown < 0.5, shown, shown.detach())).eval())
    together = agreement(half, half, images, labels, budget=Linf(0.004), seed=0)
    alone = [
        agreement(half, half, images[i : i + 1], labels[i : i + 1], budget=Linf(0.004), seed=0)
        for i in range(8)
    ]
    assert torch.equal(together[:8], torch.cat(alone))


def test_a_slope_that_vanishes_near_the_decision_boundary_does_not_lead_on() -> None:
    first, _, _, images, labels = planted()

    def flat(logits: Tensor) -> Tensor:
        near = (logits[:, :1] - logits[:, 1:]).abs() < 4
        return torch.where(near, 2 * logits.sign().detach(), logits)

    network, plateau = as_classifier(first), as_classifier(Wrapped(first, after=flat).eval())
    # Halfway to the boundary, on the plateau.
    sign = (1 - 2 * labels).view(-1, 1, 1, 1)
    ends = images - 0.02 * sign * first.weight.detach().sign()
    for points, expected in ((images, True), (ends, False)):
        result = leads_on(plateau, plateau, points, labels, budget=BUDGET, seed=0)
        assert bool((result == expected).all())
        assert bool(leads_on(network, network, points, labels, budget=BUDGET, seed=0).all())


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@given(seed=st.integers(0, 2**31), reach=st.floats(0.01, 3))
@example(seed=139808701, reach=1.6875)  # SSIM, local: above its limit by what `is_inside` leaves to rounding
@settings(max_examples=15, deadline=None)
def test_a_fitted_image_is_on_the_grid_and_inside_the_budget(budget: Budget, seed: int, reach: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    clean = rounded(torch.rand(4, 3, 12, 10, generator=generator))
    cut = whole_levels(budget)
    wanted = reach * (torch.rand(4, 3, 12, 10, generator=generator) - 0.5)
    attacked = clean + cut.project(wanted, clean)
    fitted = fit(attacked, clean, cut)
    levels = fitted * 255
    assert float((levels - levels.round()).abs().max()) < 1e-4
    assert bool((cut.distance(fitted - clean, clean) <= limit(budget) * (1 + OVER) + LEAST).all())
    # An image that is on the grid and inside the budget does not change.
    assert torch.equal(fit(fitted, clean, cut), fitted)


def limit(budget: Any) -> float:
    return float(budget.eps)


@pytest.mark.parametrize(("eps", "levels"), [(1 / 255, 1), (4 / 255, 4), (0.3, 76), (0.05, 12), (1.0, 255)])
def test_whole_levels_of_an_l_infinity_budget(eps: float, levels: int) -> None:
    cut = whole_levels(Linf(eps))
    assert isinstance(cut, Linf)
    assert round(cut.eps * 255, 6) == levels
    clean = torch.full((1, 3, 4, 4), 0.4)
    clean = rounded(clean)
    reached = fit(clean + cut.eps, clean, cut) if eps <= 0.5 else None
    assert reached is None or round(float((reached - clean).max()) * 255, 3) == levels


def test_a_classifier_sees_rounded_images_and_its_gradient_passes() -> None:
    network, images = NETWORKS["pooling"]()
    seen = on_8bit_images(as_classifier(network))
    torch.testing.assert_close(seen(images), network(rounded(images)), rtol=0, atol=0)
    torch.testing.assert_close(gradient_of(seen, images), gradient_of(network, rounded(images)))
