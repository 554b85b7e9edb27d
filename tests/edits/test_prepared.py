"""Recordings are remembered: used again if the network is the same, and never if it has changed."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from tests.networks import PoolingNetwork
from weakspot import Classifier, LocalEdits
from weakspot.edits import engine
from weakspot.edits.recording import record
from weakspot.edits.steps import Recording


class Scaled(nn.Module):
    """A network whose logits depend on an attribute that is not a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = PoolingNetwork(), 1.0

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(images) * self.scale
        return logits


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the classifiers that are recorded from now on."""
    names: list[str] = []

    def watched(classifier: Classifier, image: Tensor) -> Recording:
        names.append(classifier.name)
        return record(classifier, image)

    monkeypatch.setattr(engine, "record", watched)
    return names


def network() -> tuple[Scaled, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Scaled().eval(), torch.rand(3, 12, 14)


def agrees(model: nn.Module, image: Tensor) -> bool:
    patches = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(-1, 3, 2, 2)
    found = LocalEdits(model, image).logits(torch.tensor([0, 5]), torch.tensor([3, 12]), patches)
    edited = image.expand(2, -1, -1, -1).clone()
    edited[0, :, 0:2, 3:5], edited[1, :, 5:7, 12:14] = 0, 1
    with torch.no_grad():
        expected = model(edited)
    return bool(torch.allclose(found, expected, rtol=1e-4, atol=1e-5))


def test_a_recording_is_made_once(recorded: list[str]) -> None:
    model, image = network()
    assert agrees(model, image)
    assert agrees(model, 1 - image)
    assert len(recorded) == 1
    assert agrees(model, image[:, :10])
    assert len(recorded) == 2


@pytest.mark.parametrize("way", ["in place", "by data", "norm", "attribute", "other weights"])
def test_a_network_that_changed_is_recorded_anew(recorded: list[str], way: str) -> None:
    model, image = network()
    assert agrees(model, image)
    with torch.no_grad():
        if way == "in place":
            model.inner.head.weight.mul_(1.5)
        elif way == "by data":
            model.inner.branch.weight.data = model.inner.branch.weight.data.flip(0)
        elif way == "norm":
            model.inner.stem[1].running_mean.add_(0.1)  # type: ignore[operator]
        elif way == "attribute":
            model.scale = 3.0
        else:
            model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()})
    assert agrees(model, image)
    assert len(recorded) == 2


def test_another_normalization_of_the_same_network_is_another_recording() -> None:
    model, image = network()
    one = Classifier.wrap(model, mean=[0.5], std=[0.25])
    other = Classifier.wrap(model, mean=[0.1], std=[0.5])
    for classifier in (one, other, one, model):
        assert agrees(classifier, image)


def test_hooks_that_come_later_are_noticed_by_the_next_edits() -> None:
    model, image = network()
    assert agrees(model, image)
    handle = model.inner.branch.register_forward_hook(lambda _m, _i, output: output * 2)
    assert "hooks" in LocalEdits(model, image).reason
    assert agrees(model, image)
    handle.remove()
    assert not LocalEdits(model, image).reason
    assert agrees(model, image)


def test_a_recording_goes_with_its_network() -> None:
    model, image = network()
    assert agrees(model, image)
    before = len(engine._known)
    del model
    gc.collect()
    assert len(engine._known) == before - 1
