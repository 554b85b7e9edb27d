"""Losses: definitions in plain Python, invariances, and that searches are driven by them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.networks import Made
from weakspot.attacks import LOSSES, fgsm, pgd
from weakspot.attacks.losses import find_loss
from weakspot.budgets import Linf
from weakspot.logits import margin

CLASSES = [2, 3, 4, 10]


def plain_margin(logits: list[float], label: int, target: int | None) -> float:
    wanted = label if target is None else target
    others = max(value for number, value in enumerate(logits) if number != wanted)
    return logits[label] - others if target is None else others - logits[target]


def plain_cross_entropy(logits: list[float], label: int, target: int | None) -> float:
    chosen = logits[label if target is None else target]
    log_probability = -math.log(sum(math.exp(value - chosen) for value in logits))
    return log_probability if target is None else -log_probability


def plain_dlr(logits: list[float], label: int, target: int | None) -> float:
    if target is None:
        lead = plain_margin(logits, label, None)
        return lead if len(logits) < 3 else lead / (max(logits) - sorted(logits)[-3])
    if len(logits) < 4:
        return logits[label] - logits[target]
    first, _, third, fourth, *_ = sorted(logits, reverse=True)
    return (logits[label] - logits[target]) / (first - (third + fourth) / 2)


PLAIN = {"margin": plain_margin, "cross_entropy": plain_cross_entropy, "dlr": plain_dlr}


def cases(classes: int, count: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of several scales, labels that win and that do not, targets that are never the label."""
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(count, classes, generator=generator, dtype=torch.float64)
    logits = logits * torch.tensor([0.1, 1.0, 5.0, 30.0]).repeat_interleave(count // 4)[:, None]
    labels = torch.randint(classes, (count,), generator=generator)
    further = torch.randint(1, classes, (count,), generator=generator)
    return logits, labels, (labels + further) % classes


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("targeted", [False, True])
def test_a_loss_equals_its_definition(name: str, classes: int, targeted: bool) -> None:
    logits, labels, targets = cases(classes)
    found = LOSSES[name](logits, labels, targets if targeted else None)
    expected = [
        PLAIN[name](row, label, target if targeted else None)
        for row, label, target in zip(logits.tolist(), labels.tolist(), targets.tolist(), strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("targeted", [False, True])
def test_gradients_are_those_of_finite_differences(name: str, classes: int, targeted: bool) -> None:
    logits, labels, targets = cases(classes)
    for rows in torch.arange(40).split(10)[:3]:  # the largest logits are left out: there nothing differs
        assert torch.autograd.gradcheck(
            lambda point, rows=rows: LOSSES[name](point, labels[rows], targets[rows] if targeted else None),
            (logits[rows].clone().requires_grad_(),),
        )


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("classes", CLASSES)
def test_an_untargeted_margin_and_dlr_are_negative_exactly_where_another_class_wins(
    name: str, classes: int
) -> None:
    logits, labels, targets = cases(classes)
    fooled = logits.argmax(1) != labels
    assert bool(fooled.any())
    assert not bool(fooled.all())
    values = LOSSES[name](logits, labels, None)
    if name == "cross_entropy":  # above one half nothing else can win
        assert not bool(fooled[values > -math.log(2)].any())
    else:
        assert torch.equal(values < 0, fooled)
    if name == "margin":
        assert torch.equal(LOSSES[name](logits, labels, targets) < 0, logits.argmax(1) == targets)


@pytest.mark.parametrize(
    ("classes", "targeted"), [(3, False), (4, False), (10, False), (4, True), (10, True)]
)
@pytest.mark.parametrize("factor", [1e-6, 0.1, 1e6])
def test_dlr_knows_neither_scale_nor_offset_of_logits(classes: int, targeted: bool, factor: float) -> None:
    logits, labels, targets = cases(classes)
    aims = targets if targeted else None
    expected = LOSSES["dlr"](logits, labels, aims)
    torch.testing.assert_close(LOSSES["dlr"](factor * logits, labels, aims), expected)
    torch.testing.assert_close(LOSSES["dlr"](logits + 7, labels, aims), expected)


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("targeted", [False, True])
def test_equal_and_enormous_logits_give_finite_values(name: str, classes: int, targeted: bool) -> None:
    labels, targets = torch.tensor([0, 1, 0]), torch.tensor([1, 0, 1])
    logits = torch.zeros(3, classes)
    logits[1], logits[2, 0] = 5.0, 1e6
    values = LOSSES[name](logits.requires_grad_(), labels, targets if targeted else None)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert bool(values.isfinite().all())
    assert bool(gradient.isfinite().all())


def test_an_objective_is_found_by_its_name_or_is_itself() -> None:
    for name, loss in LOSSES.items():
        assert find_loss(name) is loss
        assert find_loss(loss) is loss


@pytest.mark.parametrize(
    ("loss", "sentence"),
    [
        ("margn", r"loss must .* got 'margn' \(did you mean 'margin'\?"),
        ("loss", r"loss must be one of margin, cross_entropy, dlr, got 'loss' \(or a function"),
        ("", r"loss must be one of margin.* got ''"),
        (3, r"loss must be one of margin, .* got 3 \(or a function"),
        (None, r"loss must be .* got None"),
        (lambda logits, labels, targets: logits, r"loss must return a tensor of shape \(3,\).* got \(3, 4\)"),
        (lambda logits, labels, targets: logits[:, :1], r"loss must return .* got \(3, 1\)"),
        (lambda logits, labels, targets: logits.sum(), r"loss must return .* got \(\)"),
        (lambda logits, labels, targets: 1.0, r"loss must return .* got float"),
    ],
)
@pytest.mark.parametrize("attack", [pgd, fgsm])
def test_an_unknown_loss_is_refused(pooling: Made, attack: Any, loss: Any, sentence: str) -> None:
    model, pictures = pooling
    with pytest.raises(ValueError, match=sentence):
        attack(model, pictures, torch.tensor([0, 1, 2]), loss=loss)


def linear(classes: int = 3) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear model, its weights (K, C, H, W) and images far from black and white."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(48, classes, bias=False)
    layer.weight.data = torch.randn(classes, 48, generator=generator)
    images = 0.4 + 0.2 * torch.rand(4, 3, 4, 4, generator=generator)
    return nn.Sequential(nn.Flatten(), layer).eval(), layer.weight.detach().view(-1, 3, 4, 4), images


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_an_own_objective_decides_where_the_step_goes(chosen: int) -> None:
    model, weights, images = linear()
    labels = torch.tensor([0, 1, 2, 0])
    result = fgsm(model, images, labels, budget=Linf(0.1), loss=lambda logits, *_: logits[:, chosen])
    expected = images - 0.1 * weights[chosen].sign()
    torch.testing.assert_close(result.adversarial, expected, rtol=0, atol=1e-6)


def test_an_own_objective_is_given_logits_labels_and_targets() -> None:
    model, _, images = linear()
    labels, targets = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 2, 0, 2])
    given: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def watched(logits: Tensor, labels: Tensor, aims: Tensor | None) -> Tensor:
        given.append((logits.detach(), labels, aims))
        return logits[:, 0]

    fgsm(model, images, labels, targets=targets, loss=watched)
    fgsm(model, images, labels, loss=watched)
    for (logits, reported, aims), expected in zip(given, [targets, None], strict=True):
        torch.testing.assert_close(logits, model(images).detach())
        assert torch.equal(reported, labels)
        assert aims is expected is None or (
            aims is not None and expected is not None and torch.equal(aims, expected)
        )


def test_an_own_objective_drives_the_whole_search() -> None:
    model, _, images = linear()
    labels = model(images).argmax(1)
    budget = Linf(0.2)

    def upward(logits: Tensor, labels: Tensor, _: Tensor | None) -> Tensor:
        return -margin(logits, labels)

    down = pgd(model, images, labels, budget=budget, steps=10)
    own = pgd(model, images, labels, budget=budget, steps=10, loss=lambda z, y, _: 3 * margin(z, y))
    wrong = pgd(model, images, labels, budget=budget, steps=10, loss=upward)
    assert bool(down.success.all())
    torch.testing.assert_close(own.adversarial, down.adversarial, rtol=0, atol=1e-6)
    reached = [margin(model(each.adversarial), labels) for each in (down, wrong)]
    assert bool((reached[0] < reached[1] - 0.5).all())


@pytest.mark.parametrize("name", list(LOSSES))
def test_on_a_linear_model_of_two_classes_every_objective_reaches_the_optimum(name: str) -> None:
    model, weights, images = linear(classes=2)
    labels = model(images).argmax(1)
    result = pgd(model, images, labels, budget=Linf(0.05), steps=20, loss=name)
    away = weights[1 - labels] - weights[labels]
    torch.testing.assert_close(result.adversarial, images + 0.05 * away.sign(), rtol=0, atol=1e-6)
