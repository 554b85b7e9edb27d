"""Plug-ins are held to the contract of our attacks, whatever they do with their arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weakspot import AttackResult, Linf
from weakspot.attacks import Attack, AttackOptions


def linear() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(60, 3)).eval()
    images = torch.rand(4, 3, 4, 5)
    return model, images, model(images).argmax(1).detach()


def result(clean: Tensor, adversarial: Tensor, labels: Tensor) -> AttackResult:
    none = torch.zeros_like(labels)
    return AttackResult(clean, adversarial, labels, labels, none.bool(), none, none)


def test_what_a_plug_in_writes_into_its_arguments_is_no_way_around_the_budget() -> None:
    def in_place(
        model: Any, images: Tensor, labels: Tensor, *, budget: Any = None, region: Any = None
    ) -> AttackResult:
        images.add_(0.3).clamp_(0, 1)
        region.fill_(True)
        labels.fill_(0)
        return result(images, images, labels)

    model, images, labels = linear()
    before, own = images.clone(), labels.clone()
    region = torch.zeros(1, 1, 4, 5, dtype=torch.bool)
    attack, options = Attack.of("own", in_place), AttackOptions(Linf(0.01), region)
    with pytest.raises(ValueError, match="attack own must leave pixels outside the region as they are"):
        attack.run(model, images, labels, options, {})
    assert torch.equal(images, before)
    assert torch.equal(labels, own)
    assert not region.any()


@pytest.mark.parametrize("change", [2.0, -2.0])
@pytest.mark.parametrize("budget", [Linf(0.1), None])
def test_images_outside_the_range_are_refused(change: float, budget: Linf | None) -> None:
    def outside(model: Any, images: Tensor, labels: Tensor, *, budget: Any = None) -> AttackResult:
        return result(images, images + change, labels)

    model, images, labels = linear()
    with pytest.raises(ValueError, match=r"attack own must return images in \[0, 1\], got"):
        Attack.of("own", outside).run(model, images, labels, AttackOptions(budget), {})
