"""The real libraries, on the same network and images."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.attacks.test_gradient import predicted
from tests.networks import Made, untouched
from weakspot import L2, Budget, Linf
from weakspot.attacks import external, pgd
from weakspot.attacks.libraries import LIBRARIES, attacks_of, installed

pytestmark = pytest.mark.peers

CASES: list[tuple[str, Budget | None, dict[str, Any]]] = [
    ("foolbox:LinfPGD", Linf(0.1), {"steps": 10}),
    ("foolbox:L2CarliniWagnerAttack", None, {"steps": 20, "binary_search_steps": 2}),
    ("foolbox:L2PGD", L2(1.0), {"steps": 10}),
    ("torchattacks:PGD", Linf(0.1), {"steps": 10}),
    ("torchattacks:APGD", Linf(0.1), {"steps": 10}),
    ("torchattacks:OnePixel", None, {"steps": 2, "popsize": 20}),
    ("art:ProjectedGradientDescent", Linf(0.1), {"max_iter": 10}),
    ("art:FastGradientMethod", L2(1.0), {}),
    ("art:DeepFool", None, {"max_iter": 5}),
]


@pytest.mark.parametrize("confined", [False, True])
@pytest.mark.parametrize(("name", "budget", "options"), CASES, ids=[case[0] for case in CASES])
def test_their_attacks_keep_our_contract(
    pooling: Made, name: str, budget: Budget | None, options: dict[str, Any], confined: bool
) -> None:
    pytest.importorskip(name.partition(":")[0])
    model, images = pooling
    labels = predicted(model, images)
    region = torch.zeros(3, 1, 20, 20, dtype=torch.bool)
    region[:, :, 4:16, 2:18] = True
    seen = []
    handle = model.register_forward_hook(lambda module, given, logits: seen.append(len(given[0])))
    with untouched(model, images, labels):
        result = external(
            name, model, images, labels, budget=budget, region=region if confined else None, **options
        )
    handle.remove()
    assert int(result.n_forward.sum()) == sum(seen)
    assert torch.equal(result.success, predicted(model, result.adversarial) != labels)
    if budget is not None:
        assert bool(
            (budget.distance(result.perturbation, images) <= 1.0001 * getattr(budget, "eps", 0)).all()
        )
    if confined:
        assert not bool((result.perturbation != 0).masked_select(~region).any())


@pytest.mark.parametrize("name", ["foolbox:LinfPGD", "torchattacks:PGD", "art:ProjectedGradientDescent"])
def test_a_target_is_aimed_at(pooling: Made, name: str) -> None:
    pytest.importorskip(name.partition(":")[0])
    model, images = pooling
    labels = predicted(model, images)
    targets = (labels + 1) % 4
    result = external(name, model, images, labels, budget=Linf(0.4), targets=targets)
    ours = pgd(model, images, labels, budget=Linf(0.4), targets=targets)
    assert torch.equal(result.success, predicted(model, result.adversarial) == targets)
    assert bool((ours.success | ~result.success).all())  # no weaker than theirs


@pytest.mark.parametrize(
    ("name", "budget", "sentence"),
    [
        ("foolbox:LinfPGD", L2(1.0), "needs a budget in Linf, got 1 L2"),
        ("foolbox:LinfPGD", None, "needs a budget"),
        ("foolbox:LinfPDG", None, "did you mean 'LinfPGD'"),
        ("torchattacks:DeepFool", Linf(0.1), "takes no budget"),
        ("art:DeepFool", Linf(0.1), "takes no budget"),
    ],
)
def test_an_impossible_request_is_one_sentence(
    pooling: Made, name: str, budget: Budget | None, sentence: str
) -> None:
    pytest.importorskip(name.partition(":")[0])
    model, images = pooling
    with pytest.raises(ValueError, match=sentence):
        external(name, model, images, predicted(model, images), budget=budget)


@pytest.mark.parametrize("name", ["torchattacks:DeepFool", "art:DeepFool"])
def test_an_attack_without_targets_says_so(pooling: Made, name: str) -> None:
    pytest.importorskip(name.partition(":")[0])
    model, images = pooling
    labels = predicted(model, images)
    with pytest.raises(ValueError, match="cannot aim at targets"):
        external(name, model, images, labels, targets=(labels + 1) % 4)


def test_what_is_installed_is_listed() -> None:
    names = installed()
    for library, some in {"foolbox": "LinfPGD", "torchattacks": "PGD", "art": "DeepFool"}.items():
        assert (f"{library}:{some}" in names) == (attacks_of(library) is not None)
    assert {name.partition(":")[0] for name in names} <= set(LIBRARIES)
