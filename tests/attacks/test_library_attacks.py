"""Attacks of other libraries: whatever a library does, the result obeys the contract and passes are counted."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.attacks.test_gradient import predicted, region_of
from tests.covering import sampled
from tests.networks import NETWORKS, Made, untouched
from weakspot import L1, L2, SSIM, Linf, ModelWarning
from weakspot.attacks import external, libraries

Search = Callable[..., Tensor]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[[Search], str]:
    """Makes a torchattacks of one attack, which runs the function (model, images, wanted, eps)."""

    def install(search: Search) -> str:
        class Attack:
            supported_mode = ("default", "targeted")

            def __init__(self, model: nn.Module, eps: float = 0.1, norm: str = "") -> None:
                self.model, self.eps, self.norm = model, eps, norm

            def set_mode_targeted_by_label(self, quiet: bool) -> None:
                pass

            def set_device(self, device: torch.device) -> None:
                pass

            def __call__(self, images: Tensor, wanted: Tensor) -> Tensor:
                return search(self.model, images, wanted, self.eps)

        monkeypatch.setattr(
            libraries, "attacks_of", lambda name: {"It": Attack} if name == "torchattacks" else None
        )
        return "torchattacks:It"

    return install


def noisy(model: nn.Module, images: Tensor, wanted: Tensor, eps: float) -> Tensor:
    """A descent that draws from every global generator and leaves the box and the budget."""
    point = (images + 3 * eps * torch.randn_like(images)).requires_grad_()
    for _ in range(2):
        logits = model(point)
        nn.functional.cross_entropy(logits, wanted, reduction="sum").backward()
        assert point.grad is not None
        step = eps * (1 + np.random.rand() + random.random())  # noqa: NPY002, S311
        point = (point.detach() + step * point.grad.sign()).requires_grad_()
    return point.detach()


@sampled(
    "network, batch_size, kind, budget",
    NETWORKS,
    [None, 1, 2],
    ["everywhere", "scattered"],
    [Linf(0.05), L2(0.3)],
)
def test_results_obey_range_budget_and_region_and_every_pass_is_counted(
    library: Callable[[Search], str], network: str, budget: Any, kind: str, batch_size: int | None
) -> None:
    model, images = NETWORKS[network]()
    labels, region = predicted(model, images), region_of(kind, images)
    seen = []
    handle = model.register_forward_hook(lambda module, given, logits: seen.append(len(given[0])))
    with untouched(model, images, labels):
        result = external(
            library(noisy), model, images, labels, budget=budget, region=region, batch_size=batch_size
        )
    handle.remove()
    assert bool(((result.adversarial >= 0) & (result.adversarial <= 1)).all())
    assert bool((budget.distance(result.perturbation, images) <= budget.eps * (1 + 1e-5) + 1e-7).all())
    if region is not None:
        outside = ~region.expand_as(images)
        assert torch.equal(result.adversarial[outside], images[outside])
    assert torch.equal(result.success, predicted(model, result.adversarial) != labels)
    assert int(result.n_forward.sum()) == sum(seen)
    assert result.n_forward.tolist() == [4, 4, 4]  # two steps, then as it is and as 8-bit files keep it
    assert result.n_backward.tolist() == [2, 2, 2]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_the_search_itself_is_confined_to_the_region(library: Callable[[Search], str], pooling: Made) -> None:
    model, images = pooling
    region = torch.zeros(3, 1, 20, 20, dtype=torch.bool)
    region[:, :, 5:9, 4:11] = True
    labels = predicted(model, images)
    seen: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach().clone()))
    external(library(noisy), model, images, labels, region=region)
    handle.remove()
    for batch in seen[:-2]:  # the last two verify
        assert len(batch) == 1
        distance = [
            float((batch - image).masked_select(~region[:1].expand_as(batch)).abs().max()) for image in images
        ]
        assert min(distance) == 0


def test_same_seed_same_result_whatever_the_global_generators_hold(
    library: Callable[[Search], str], pooling: Made
) -> None:
    model, images = pooling
    labels, name = predicted(model, images), library(noisy)

    def made(seed: int, state: int) -> Tensor:
        torch.manual_seed(state)
        np.random.seed(state)  # noqa: NPY002
        random.seed(state)
        before = torch.get_rng_state(), np.random.get_state()[1].sum(), random.getstate()  # type: ignore[index] # noqa: NPY002
        found = external(name, model, images, labels, seed=seed).adversarial
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1:] == (np.random.get_state()[1].sum(), random.getstate())  # type: ignore[index] # noqa: NPY002
        return found

    assert torch.equal(made(1, 10), made(1, 20))
    assert not torch.equal(made(1, 10), made(2, 10))


def test_the_generators_of_other_devices_are_not_seeded(
    library: Callable[[Search], str], pooling: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = pooling
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    external(library(noisy), model, images, predicted(model, images))
    assert seeds == []


def test_passes_of_some_images_only_are_counted_for_those(
    library: Callable[[Search], str], pooling: Made
) -> None:
    def uneven(model: nn.Module, images: Tensor, wanted: Tensor, eps: float) -> Tensor:
        for number in (2, 2, 0):
            model(images[number : number + 1] + 0.01)
        model(images.flip(0)[:2].repeat(2, 1, 1, 1))  # images 2, 1, 2, 1
        return images

    model, images = pooling
    result = external(library(uneven), model, images, predicted(model, images))
    assert (result.n_forward - 2).tolist() == [1, 2, 4]
    assert result.n_backward.tolist() == [0, 0, 0]
    assert torch.equal(result.adversarial, images)


def test_values_that_are_not_finite_stay_clean(library: Callable[[Search], str], pooling: Made) -> None:
    model, images = pooling
    name = library(lambda model, images, wanted, eps: torch.where(images > 0.5, torch.nan, 1 - images))
    result = external(name, model, images, predicted(model, images))
    torch.testing.assert_close(result.adversarial, torch.where(images > 0.5, images, 1 - images))


def explode(model: nn.Module, images: Tensor, wanted: Tensor, eps: float) -> Tensor:
    raise RuntimeError("out of fuel\nand more")


@pytest.mark.parametrize(
    ("search", "options", "sentence"),
    [
        (explode, {}, "attack torchattacks:It failed: RuntimeError: out of fuel"),
        (lambda m, x, y, e: x[:, :1], {}, r"returned shape \(1, 1, 20, 20\) for images of \(1, 3, 20, 20\)"),
        (
            noisy,
            {"budget": L1(2.0)},
            "needs a budget in Linf or L2, got 2 L1",
        ),
        (noisy, {"stpes": 3}, "failed: TypeError: .*stpes"),
        (
            noisy,
            {"budget": SSIM(0.1)},
            "budget must be Linf, L2 or L1 for torchattacks:It, got 0.1 SSIM",
        ),
    ],
)
def test_a_failure_is_one_sentence(
    library: Callable[[Search], str], pooling: Made, search: Search, options: dict[str, Any], sentence: str
) -> None:
    model, images = pooling
    with untouched(model, images), pytest.raises(ValueError, match=sentence) as caught:
        external(library(search), model, images, predicted(model, images), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "torchattacks:Itt",
            "the class of torchattacks must .* got 'Itt' .did you mean 'It'",
        ),
        ("foolbox:LinfPGD", "attack foolbox:LinfPGD needs foolbox .run: pip install foolbox"),
        ("art:X", "needs art .run: pip install adversarial-robustness-toolbox"),
        ("cleverhans:X", "must be LIBRARY:CLASS of foolbox, torchattacks, art"),
        ("torchattacks", "must be LIBRARY:CLASS"),
        ("", "must be LIBRARY:CLASS"),
    ],
)
def test_an_unknown_name_is_one_sentence(
    library: Callable[[Search], str], pooling: Made, name: str, sentence: str
) -> None:
    library(noisy)
    model, images = pooling
    with pytest.raises(ValueError, match=sentence):
        external(name, model, images, predicted(model, images))


def test_an_attack_sees_a_module_that_stays_in_eval_mode_and_an_empty_region_is_left_alone(
    library: Callable[[Search], str], pooling: Made
) -> None:
    def switching(model: nn.Module, images: Tensor, wanted: Tensor, eps: float) -> Tensor:
        model.train()
        assert not model.training
        assert not any(module.training for module in model.modules())
        return 1 - images

    model, images = pooling
    region = torch.ones(3, 1, 20, 20, dtype=torch.bool)
    region[1] = False
    result = external(library(switching), model, images, predicted(model, images), region=region)
    assert torch.equal(result.adversarial[1], images[1])
    torch.testing.assert_close(result.adversarial[[0, 2]], 1 - images[[0, 2]])


def test_a_failure_on_some_images_leaves_those_clean_with_a_warning(
    library: Callable[[Search], str], pooling: Made
) -> None:
    model, images = pooling

    def choosy(model: nn.Module, part: Tensor, wanted: Tensor, eps: float) -> Tensor:
        if bool((part == images[1]).flatten(1).all(1).any()):
            raise RuntimeError("no start found")
        return 1 - part

    with pytest.warns(ModelWarning, match="1 of 3 images stay clean: .*no start found"):
        result = external(library(choosy), model, images, predicted(model, images))
    assert torch.equal(result.adversarial[1], images[1])
    torch.testing.assert_close(result.adversarial[[0, 2]], 1 - images[[0, 2]])


def test_a_budget_of_nothing_changes_nothing(library: Callable[[Search], str], pooling: Made) -> None:
    model, images = pooling
    result = external(library(noisy), model, images, predicted(model, images), budget=Linf(0))
    assert torch.equal(result.adversarial, images)


def test_progress_reaches_one(library: Callable[[Search], str], pooling: Made) -> None:
    model, images = pooling
    shares: list[float] = []
    external(library(noisy), model, images, predicted(model, images), batch_size=1, progress=shares.append)
    assert shares == pytest.approx([1 / 3, 2 / 3, 1])
