"""Warnings: each points at the line of the caller, however deep inside its cause was found."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weakspot
from tests.networks import PoolingNetwork
from weakspot import Classifier, LocalEdits, Pairs, attacks, class_activation, explain, regions
from weakspot._checks import ModelWarning, collected_warnings, quiet, warn
from weakspot.classifier import evaluating, predict


class Softened(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inside(images)
        return logits.softmax(1)


def soft() -> nn.Module:
    return Softened(PoolingNetwork()).eval()


def enter(model: nn.Module) -> None:
    with evaluating(model):
        pass


IMAGES, LABELS = torch.rand(2, 3, 20, 20), torch.tensor([0, 1])
PLACES = torch.tensor([0, 1])
# One line each, so that the line can be named.
CALLS: dict[str, Callable[[], Any]] = {
    "a classifier": lambda: Classifier.wrap(PoolingNetwork())(IMAGES),
    "an attack": lambda: attacks.pgd(PoolingNetwork(), IMAGES, LABELS, steps=1),
    "evaluating": lambda: class_activation(PoolingNetwork(), IMAGES, LABELS),
    "edits": lambda: LocalEdits(PoolingNetwork(), IMAGES[0]),
    "probabilities": lambda: attacks.pgd(soft(), IMAGES, LABELS, steps=1),
    "probabilities explained": lambda: explain(soft(), Pairs(IMAGES, 1 - IMAGES, LABELS, 1 - LABELS)),
    "probabilities, edits": lambda: LocalEdits(soft(), IMAGES[0]).logits(
        PLACES, PLACES, torch.rand(2, 3, 1, 1)
    ),
    "images beyond the range": lambda: attacks.fgsm(PoolingNetwork().eval(), 2 * IMAGES, LABELS),
    "a region": lambda: regions.cam(PoolingNetwork(), IMAGES, LABELS),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_warning_names_the_callers_line(call: str) -> None:
    function = CALLS[call]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    ours = [one for one in caught if one.category.__module__ == "weakspot._checks"]
    assert ours
    for one in ours:
        assert (one.filename, one.lineno) == (__file__, function.__code__.co_firstlineno)


def test_every_warning_goes_through_warn() -> None:
    source = Path(weakspot.__file__).parent
    own = Path(inspect.getfile(warn))
    for path in source.rglob("*.py"):
        if path != own:
            assert "warnings.warn" not in path.read_text("utf-8"), path


def test_quiet_is_for_its_category_and_for_the_time_inside() -> None:
    def three() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with quiet(ModelWarning):
                warn("a", ModelWarning)
                warn("b", UserWarning)
                with quiet():
                    warn("c", UserWarning)
            warn("d", ModelWarning)
        return [str(one.message) for one in caught]

    assert three() == ["b", "d"]


def test_each_model_is_warned_of_once() -> None:
    model = PoolingNetwork()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attacks.pgd(model, IMAGES, LABELS, steps=1)
        class_activation(model, IMAGES, LABELS)
        Classifier.wrap(model)(IMAGES)
        predict(Classifier.wrap(model), IMAGES)
        enter(model)
    assert len([one for one in caught if "train mode" in str(one.message)]) == 1


def test_warnings_can_be_collected_in_one_thread_alone() -> None:
    others: list[str] = []

    def other() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn("theirs", ModelWarning)
        others.extend(str(one.message) for one in caught)

    with collected_warnings() as mine:
        warn("mine", ModelWarning)
        with quiet(ModelWarning):
            warn("unheard", ModelWarning)
        with collected_warnings() as inner:
            warn("inner", ModelWarning)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert (mine, inner, others) == (["mine"], ["inner"], ["theirs"])
