"""Threads: two on one model get what each would get alone, and nothing of it stays in the model or the process."""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.networks import NETWORKS, untouched
from weakspot import (
    Classifier,
    LocalEdits,
    ModelWarning,
    _state,
    attacks,
    class_activation,
    explain,
)
from weakspot._checks import quiet
from weakspot._state import EvalMode, hooked, preserve_random_state, seeded, without_parameter_gradients
from weakspot.classifier import evaluating, predict
from weakspot.defenses.randomized import DrawnByImage, defender_model, expectation
from weakspot.defenses.unit_masking import mask_units
from weakspot.dissection.sensitivity import unit_sensitivity
from weakspot.fusion import fused
from weakspot.pairs import Pairs
from weakspot.zoo import build

Backlog = Callable[[], Any]


@pytest.fixture(autouse=True)
def _often() -> Iterator[None]:
    """Threads take turns a hundred times as often as usual."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(usual)


def together(*works: Backlog) -> list[Any]:
    """What these return, each in a thread of its own, all begun at once."""
    ready = threading.Barrier(len(works))

    def run(work: Backlog) -> Any:
        ready.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(run, work) for work in works]]


def small_resnet() -> tuple[nn.Module, Tensor]:
    """A ResNet-20 whose statistics are far from trivial, and six images."""
    model = build("resnet20", classes=4, size=(16, 16)).eval()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.uniform_(-0.3, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model, torch.rand(6, 3, 16, 16, generator=generator)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "batch-norm": small_resnet,
    "tokens": NETWORKS["tokens, not square"],
}


# ---------------------------------------------------------------- everything at once


def attacked(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return attacks.pgd(model, images, labels, steps=3).adversarial


def test_two_threads_that_attack_one_network_leave_its_accuracy_and_get_what_one_gets() -> None:
    model, images = small_resnet()
    labels = predict(Classifier.wrap(model), images).argmax(1)
    expected = attacked(model, images, labels)
    with untouched(model, images):
        for _ in range(20):
            for found in together(*[lambda: attacked(model, images, labels)] * 2):
                assert torch.equal(found, expected)
            assert torch.equal(predict(Classifier.wrap(model), images).argmax(1), labels)


@pytest.mark.data
@pytest.mark.slow
def test_two_threads_on_a_trained_network_leave_its_accuracy(data: Path) -> None:
    spec = importlib.util.spec_from_file_location("networks", data / "networks.py")
    assert spec is not None
    assert spec.loader is not None
    networks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(networks)
    images, labels = networks.cifar10("test", 200)
    model = Classifier.wrap(networks.network("cifar10_resnet20"))

    def accuracy() -> float:
        return float((predict(model, images).argmax(1) == labels).float().mean())

    before, expected = accuracy(), attacked(model, images[:16], labels[:16])
    assert before > 0.85
    for _ in range(20):
        for found in together(*[lambda: attacked(model, images[:16], labels[:16])] * 2):
            assert torch.equal(found, expected)
    assert accuracy() == before


def analyses(model: nn.Module, images: Tensor) -> dict[str, Backlog]:
    """Everything that watches, folds or edits a network, each from the same start."""
    labels = predict(Classifier.wrap(model), images).argmax(1)
    pairs = attacks.pgd(model, images[:2], labels[:2], steps=2)
    layer = "network.3" if isinstance(model, Classifier) else "norm"
    tops, lefts = torch.tensor([0, 3, 9]), torch.tensor([2, 5, 1])

    def units(pairs: Pairs) -> Tensor:
        return torch.from_numpy(unit_sensitivity(model, layer, pairs).to_numpy(np.float64))

    return {
        "pgd": lambda: attacked(model, images, labels),
        "units": lambda: units(pairs),
        "units, the other way around": lambda: units(
            Pairs.of(model, pairs.clean.flip(0), pairs.adversarial.flip(0))
        ),
        "activation": lambda: class_activation(model, images, labels),
        "edits": lambda: LocalEdits(model, images[0]).logits(tops, lefts, torch.ones(3, 3, 2, 2)),
        "masked": lambda: mask_units(model, layer, [0, 1])(images).detach(),
        "labels": lambda: model(images).detach(),
        "explanation": lambda: explained(model, pairs),
    }


def explained(model: nn.Module, pairs: Pairs) -> list[Tensor]:
    found = explain(model, pairs, seed=0)
    scores = found.scores.select_dtypes("number").to_numpy(dtype=np.float64)
    return [torch.from_numpy(scores), *found.maps.values()]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_analyses_at_once_on_one_network_find_what_each_finds_alone(name: str) -> None:
    model, images = MODELS[name]()
    works = analyses(model, images)
    expected = {work: run() for work, run in works.items()}
    with untouched(model, images):
        found = together(*works.values())
    for work, one in zip(works, found, strict=True):
        message = functools.partial("{}: {}".format, work)
        torch.testing.assert_close(one, expected[work], rtol=1e-4, atol=1e-5, equal_nan=True, msg=message)


# ---------------------------------------------------------------- fusion


def test_another_thread_sees_the_network_unfused_while_one_is_inside() -> None:
    model, images = small_resnet()
    assert isinstance(model, Classifier)
    inside, done = threading.Event(), threading.Event()
    expected = model(images).detach()

    def search() -> Tensor:
        with evaluating(model) as classifier, fused(classifier, images[:1]):
            inside.set()
            assert done.wait(60)
            logits: Tensor = classifier(images)
            return logits.detach()

    def look() -> tuple[Tensor, Tensor, bool]:
        assert inside.wait(60)
        try:
            same = all(torch.equal(one, state[name]) for name, one in model.state_dict().items())
            return model(images).detach(), copy.deepcopy(model)(images).detach(), same
        finally:
            done.set()

    state = copy.deepcopy(model.state_dict())
    found, (seen, copied, same) = together(search, look)
    assert torch.equal(seen, expected)
    assert torch.equal(copied, expected)
    assert same
    assert not torch.equal(found, expected)  # else nothing was folded
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_weights_that_two_convolutions_share_are_folded_for_neither() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 3, 3),
            nn.BatchNorm2d(3),
            nn.Conv2d(3, 3, 3),
            nn.BatchNorm2d(3),
            nn.Flatten(),
            nn.Linear(48, 2),
        ).eval()
        images = torch.rand(2, 3, 8, 8)
    first, second = network[0], network[2]
    assert isinstance(first, nn.Conv2d)
    assert isinstance(second, nn.Conv2d)
    second.weight = first.weight
    for norm, mean in ((network[1], 0.5), (network[3], -0.5)):
        nn.init.constant_(norm.running_mean, mean)  # type: ignore[arg-type]
    classifier = Classifier.wrap(network)
    expected = classifier(images)
    with fused(classifier, images[:1]):
        torch.testing.assert_close(classifier(images), expected)


# ---------------------------------------------------------------- modes


class Waiting(nn.Module):
    """Tells that it is inside and waits, then drops half of its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go_on, self.waits = threading.Event(), threading.Event(), True
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        if self.waits:
            self.waits = False
            self.entered.set()
            assert self.go_on.wait(60)
        logits: Tensor = self.dropout(images.flatten(1)[:, :64])
        return logits


@pytest.mark.parametrize("second", ["call", "evaluating"])
def test_a_network_stays_in_eval_mode_until_the_last_thread_has_left(second: str) -> None:
    network, images = Waiting().train(), torch.rand(2, 1, 8, 8) + 0.1

    def first() -> Any:
        return Classifier.wrap(network)(images)

    def other() -> Any:
        assert network.entered.wait(60)
        try:
            if second == "call":
                return Classifier.wrap(network)(images)
            with evaluating(network) as classifier:
                return classifier(images)
        finally:
            network.go_on.set()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for found in together(first, other):
            assert torch.equal(found, images.flatten(1))
    assert [str(one.message) for one in caught] == [
        "Waiting was in train mode; weakspot evaluates it in eval mode and then restores its mode"
    ]
    assert network.training
    assert network.dropout.training


def test_a_module_that_is_held_twice_is_let_go_by_the_second() -> None:
    network = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(3)).train()
    network[1].eval()
    outer, inner = EvalMode(network), EvalMode(network[0])
    with outer:
        with inner:
            pass
        assert [module.training for module in network.modules()] == [False, False, False]
    assert [module.training for module in network.modules()] == [True, True, False]


@pytest.mark.parametrize("restored", range(3))
def test_an_interrupted_exit_is_made_up_for(restored: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(3)).train()
    switch, switches = _state._set_training, itertools.count()

    def interrupted(module: nn.Module, mode: bool) -> None:
        if mode and next(switches) == restored:
            raise KeyboardInterrupt
        switch(module, mode)

    monkeypatch.setattr(_state, "_set_training", interrupted)
    try:
        with EvalMode(network):
            pass
    except KeyboardInterrupt:
        pass
    else:
        pytest.fail("was not interrupted")
    assert [module.training for module in network.modules()] == [True, True, True]
    assert not _state._evaluated


def test_a_held_module_that_its_user_switches_is_evaluated_all_the_same() -> None:
    network = nn.Sequential(nn.Dropout()).train()
    with EvalMode(network):
        network.train()
        with EvalMode(network):
            assert [module.training for module in network.modules()] == [False, False]
    assert [module.training for module in network.modules()] == [True, True]


# ---------------------------------------------------------------- hooks


def test_a_hook_sees_its_own_thread_alone_and_is_dead_in_copies_afterward() -> None:
    module, seen = nn.Linear(2, 2), []
    with hooked(module, lambda *_: seen.append(threading.get_ident())):
        copied = copy.deepcopy(module)
        module(torch.zeros(1, 2))
        together(lambda: module(torch.zeros(1, 2)))
        assert seen == [threading.get_ident()]
        copied(torch.zeros(1, 2))
        assert len(seen) == 2
    copied(torch.zeros(1, 2))
    module(torch.zeros(1, 2))
    assert len(seen) == 2
    assert not module._forward_hooks


def test_hooks_of_one_thread_do_not_keep_another_from_folding_or_windows() -> None:
    model, images = small_resnet()
    assert isinstance(model, Classifier)
    convolution = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    tops = torch.tensor([1, 4])
    expected = LocalEdits(model, images[0]).logits(tops, tops, torch.ones(2, 3, 2, 2))

    def edited() -> tuple[str, Tensor]:
        edits = LocalEdits(model, images[0])
        return edits.reason, edits.logits(tops, tops, torch.ones(2, 3, 2, 2))

    with hooked(convolution, lambda *_: None):
        assert "hooks" in LocalEdits(model, images[0]).reason
        ((reason, found),) = together(edited)
    assert reason == ""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the process


def test_random_generators_come_back_though_threads_overlap() -> None:
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002

    def first() -> None:
        with preserve_random_state():
            torch.default_generator.manual_seed(7)
            random.seed(7)
            np.random.seed(7)  # noqa: NPY002
            first_in.set()
            assert second_in.wait(60)
        first_out.set()

    def second() -> None:
        assert first_in.wait(60)
        with preserve_random_state():
            second_in.set()
            assert first_out.wait(60)
            torch.rand(3)

    together(first, second)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]  # noqa: NPY002


def test_the_generator_of_an_mps_device_is_seeded_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [torch.tensor([5])]
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: states[-1])
    monkeypatch.setattr(torch.mps, "set_rng_state", states.append)
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: states.append(torch.tensor([seed])))
    with seeded(9, torch.device("mps")):
        assert states[-1] == 9
    assert states[-1] == 5


def test_one_thread_that_is_quiet_leaves_anothers_warnings_and_the_filters_alone() -> None:
    quiet_in, other_in, quiet_out = threading.Event(), threading.Event(), threading.Event()

    def silent() -> None:
        with quiet():
            quiet_in.set()
            assert other_in.wait(60)
            warnings.warn("not heard", stacklevel=1)
        quiet_out.set()

    def other() -> None:
        assert quiet_in.wait(60)
        warnings.warn("heard", stacklevel=1)
        with quiet(ModelWarning):
            other_in.set()
            assert quiet_out.wait(60)
            warnings.warn("not heard either", ModelWarning, stacklevel=1)
            warnings.warn("heard too", stacklevel=1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        together(silent, other)
        assert list(warnings.filters) == before
    assert [str(one.message) for one in caught] == ["heard", "heard too"]


def test_weights_require_gradients_again_when_the_last_thread_has_left() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with without_parameter_gradients(model):
            first_in.set()
            assert second_in.wait(60)
        first_out.set()

    def second() -> tuple[bool, bool]:
        assert first_in.wait(60)
        with without_parameter_gradients(model):
            second_in.set()
            assert first_out.wait(60)
            return model.weight.requires_grad, model.bias.requires_grad

    assert together(first, second)[1] == (False, False)
    assert (model.weight.requires_grad, model.bias.requires_grad) == (True, False)


class Scaled(DrawnByImage):
    """Logits that tell the number of the draw, and a draw of the global generator beside it."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :2] * (1 + self.draw) + torch.rand(1)


def test_draws_that_one_thread_asks_for_are_not_anothers() -> None:
    model, images = Scaled().eval(), torch.rand(2, 1, 2, 2)
    attacker, defender = expectation(model, 5), defender_model(model)
    expected = attacker(images), defender(images)

    def often(asked: nn.Module) -> Sequence[Tensor]:
        return [asked(images) for _ in range(50)]

    for found, one in zip(together(lambda: often(attacker), lambda: often(defender)), expected, strict=True):
        assert all(torch.equal(logits, one) for logits in found)
    assert model.draw == 0
