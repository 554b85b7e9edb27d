"""Observers see admissible attempts of every attack, change nothing, and can end it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.networks import NETWORKS
from weakspot.attacks import AttackOptions, ensemble, find_attack
from weakspot.attacks.observers import AttackEndedError, Observation, current_observer, observed
from weakspot.budgets import Linf
from weakspot.logits import margin

SETTINGS: dict[str, dict[str, str | int | float | bool | None]] = {
    "pgd": {"steps": 4}, "fgsm": {}, "bim": {"steps": 4}, "ensemble": {}, "fmn": {"steps": 8}, "minimal_pgd": {},
    "carlini_wagner": {"steps": 5}, "ead": {"steps": 5}, "strattack": {"steps": 10},
    "few_pixel": {"population": 8, "generations": 3}, "weak_spots": {},
}  # fmt: skip
BUDGETED = {"pgd", "fgsm", "bim", "ensemble", "weak_spots"}


def run(name: str, observer: Callable[[Observation | None], None] | None, region: Tensor) -> Tensor:
    model, images = NETWORKS["pooling"]()
    labels = model(images).argmax(1)
    attack = find_attack(name)
    budget = Linf(8 / 255) if name in BUDGETED else None
    options = AttackOptions(budget, region if "region" in attack.accepts else None, seed=3)
    if observer is None:
        return attack.run(model, images, labels, options, SETTINGS[name]).adversarial
    with observed(observer):
        return attack.run(model, images, labels, options, SETTINGS[name]).adversarial


def half(images: Tensor) -> Tensor:
    region = torch.zeros(1, 1, *images.shape[2:], dtype=torch.bool)
    region[..., : images.shape[3] // 2] = True
    return region


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEPS": 8, "QUERIES": 30}.items():
        monkeypatch.setitem(ensemble.__globals__, name, value)


@pytest.mark.parametrize("name", SETTINGS)
def test_an_observer_sees_admissible_attempts_and_changes_no_bit(name: str) -> None:
    model, images = NETWORKS["pooling"]()
    labels, region = model(images).argmax(1), half(images)
    seen: list[tuple[int, float, Tensor]] = []

    def observe(seen_now: Observation | None) -> None:
        assert seen_now is not None
        last = len(seen_now.rows) - 1
        seen.append((int(seen_now.rows[last]), float(seen_now.margins[last]), seen_now.picture(last).clone()))

    watched, alone = run(name, observe, region), run(name, None, region)
    assert torch.equal(watched, alone)
    assert seen
    for row, told, picture in seen:
        change = picture - images[row]
        if "region" in find_attack(name).accepts:
            assert torch.equal(picture[:, ~region[0, 0]], images[row][:, ~region[0, 0]])
        assert float(change.abs().max()) <= (8 / 255 + 1e-6 if name in BUDGETED else 1)
        with torch.no_grad():
            logits = model(picture[None])
        assert told == pytest.approx(float(margin(logits, labels[row : row + 1])), abs=1e-4)


@pytest.mark.parametrize("name", SETTINGS)
def test_an_observer_ends_the_attack_at_its_next_evaluation(name: str) -> None:
    images = NETWORKS["pooling"]()[1]
    calls: list[int] = []
    last = 1 if name == "fgsm" else 2  # it evaluates only once

    def end(_: Observation | None) -> None:
        calls.append(1)
        if len(calls) == last:
            raise AttackEndedError

    with pytest.raises(AttackEndedError):
        run(name, end, half(images))
    assert len(calls) == last
    assert current_observer() is None


@pytest.mark.peers
def test_attacks_of_other_libraries_can_be_ended() -> None:
    pytest.importorskip("foolbox")
    model, images = NETWORKS["pooling"]()
    calls: list[Observation | None] = []

    def end(seen: Observation | None) -> None:
        calls.append(seen)
        if len(calls) == 3:
            raise AttackEndedError

    options = AttackOptions(Linf(8 / 255))
    with pytest.raises(AttackEndedError), observed(end):
        find_attack("foolbox:LinfPGD").run(model, images, model(images).argmax(1), options, {"steps": 50})
    assert calls == [None] * 3
