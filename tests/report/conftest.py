"""One explanation of a tiny network, with names that want escaping."""

from __future__ import annotations

import pytest
import torch

from weakspot import Classifier, Explanation, Linf, explain
from weakspot.attacks import pgd

HOSTILE = ['<img src=x onerror="document.title=\'broken\'">', "</script><script>document.title='broken'</script>"]


def explained(module: torch.nn.Module, images: torch.Tensor) -> Explanation:
    model = Classifier.wrap(module, class_names=[HOSTILE[0], "b & b", "{target}", "d"])
    labels = model(images).argmax(1)
    pairs = pgd(model, images, labels, budget=Linf(0.2), steps=4)
    return explain(model, pairs, names=[HOSTILE[1], "second", "third"], made={"attack": HOSTILE[1], "seed": "0"})


@pytest.fixture
def explanation(pooling: tuple[torch.nn.Module, torch.Tensor]) -> Explanation:
    return explained(*pooling)
