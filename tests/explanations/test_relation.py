"""Relation: stated only where every setting agrees, from a second path that is unbiased and half as long."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import false_discovery_control
from torch import Tensor, nn
from torch.nn import functional as F

from tests.explanations.test_overlap import attacked, related
from tests.networks import NETWORKS, Made
from weakspot.attribution import margin_drop
from weakspot.attribution.integrated_gradients import sampled_drop
from weakspot.classifier import Classifier
from weakspot.explanations import overlap
from weakspot.explanations.agreement import agreed, second_path
from weakspot.explanations.analysis import competing_classes
from weakspot.pairs import Pairs
from weakspot.statistics import OtherImageTest


def a_test(p: list[float], direction: list[int]) -> OtherImageTest:
    filled = [torch.tensor(values, dtype=torch.float64) for values in (p, p, p, p, direction)]
    return OtherImageTest(*filled)


def test_a_relation_is_stated_if_all_tests_agree() -> None:
    """Images: agree, one p too large, directions differ, away, undefined, half defined, no direction."""
    nan = math.nan
    first = a_test([0.002, 0.002, 0.002, 0.01, nan, 0.002, 0.002], [1, 1, 1, -1, 0, 1, 1])
    other = a_test([0.004, 0.110, 0.002, 0.02, 0.01, nan, 0.002], [1, 1, -1, -1, 1, 0, 0])
    for tests in ([first, other], [first, other, other]):
        stated = agreed(tests)
        assert stated["relation"].tolist() == pytest.approx([1, 0, 0, -1, nan, 0, 0], nan_ok=True)
        p = [0.004, 0.11, 1, 0.02, nan, 1, 1]
        assert stated["relation_p"].tolist() == pytest.approx(p, nan_ok=True)


def test_q_is_computed_in_each_direction() -> None:
    p, direction = [0.01, 0.02, 0.03, 0.01, 0.9, 0.8], [1, 1, 1, -1, 1, -1]
    stated = agreed([a_test(p, direction)])
    up = false_discovery_control([0.005, 0.01, 0.015, 1, 0.45, 1])
    down = false_discovery_control([1, 1, 1, 0.005, 1, 0.4])
    assert stated["relation_q"].tolist() == pytest.approx([*up[:3], down[3], 0.9, down[5]])  # not below p
    assert stated["relation"].tolist() == [1, 1, 1, -1, 0, 0]
    many = agreed([a_test([0.05] + [0.9] * 39, [1] * 40)])
    assert float(many["relation_p"][0]) == 0.05
    assert float(many["relation_q"][0]) > 0.1
    assert not many["relation"].any()  # one image in forty has p = .05 by chance


def mean_path(model: nn.Module, pairs: Pairs, losing: Tensor, seeds: int) -> Tensor:
    drop = margin_drop(model, pairs.clean, pairs.adversarial, pairs.labels, losing)
    rows, classifier = torch.arange(len(pairs)), Classifier.wrap(model)
    maps = [second_path(classifier, pairs, losing, drop, rows, seed=seed) for seed in range(seeds)]
    assert not torch.equal(maps[0], maps[1])
    return torch.stack(maps).mean(0)


class Square(nn.Module):
    """Each logit is a sum of squares: gradients along the path are linear, so single points are off."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: Tensor) -> Tensor:
        return torch.einsum("nchw,kchw->nk", images.square(), self.weight)


def test_the_second_path_is_unbiased_and_random() -> None:
    generator = torch.Generator().manual_seed(1)
    clean, adversarial = torch.rand(2, 2, 3, 6, 7, generator=generator)
    pairs = Pairs(clean, adversarial, torch.tensor([0, 1]), torch.tensor([1, 0]))
    model = Square().eval()
    exact = margin_drop(model, clean, adversarial, pairs.labels, pairs.targets).sites
    one, many = (mean_path(model, pairs, pairs.targets, seeds) for seeds in (2, 400))
    assert 0 < float((many - exact).norm()) < 0.2 * float((one - exact).norm())


def test_the_second_path_has_half_the_points_of_the_first(
    pooling: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = pooling
    pairs = attacked(model, images)
    classifier = Classifier.wrap(model)
    losing = competing_classes(classifier, pairs)
    drop = margin_drop(model, images, pairs.adversarial, pairs.labels, losing)
    counted: list[Tensor] = []

    def counting(*given: Any) -> Tensor:
        counted.extend(given[-1])
        return sampled_drop(*given)

    monkeypatch.setattr("weakspot.explanations.agreement.sampled_drop", counting)
    second_path(classifier, pairs, losing, drop, torch.arange(3), seed=0)
    assert [len(places) for places in counted] == (drop.points // 2).tolist()
    for places in counted:
        count = len(places)
        assert (places * count).floor().tolist() == list(range(count))  # one in each part of the path


def test_paths_of_different_lengths_equal_single_ones(any_model: Made) -> None:
    model, images = any_model
    pairs = attacked(model, images)
    classifier = Classifier.wrap(model)
    losing = competing_classes(classifier, pairs)
    places = [torch.rand(count) for count in (3, 5, 3)]
    arguments = (images, pairs.adversarial, torch.stack([pairs.labels, losing], 1))
    result = sampled_drop(classifier, *arguments, places)
    change = pairs.adversarial - images
    for row in range(3):
        point = (images[row] + places[row].view(-1, 1, 1, 1) * change[row]).requires_grad_()
        logits = model(point)
        margin = (logits[:, pairs.labels[row]] - logits[:, losing[row]]).sum()
        (gradient,) = torch.autograd.grad(margin, point)
        expected = -(change[row] * gradient.mean(0)).sum(0, keepdim=True)
        torch.testing.assert_close(result[row], expected, rtol=1e-3, atol=1e-5)


def test_the_seed_changes_only_the_relation_and_rarely() -> None:
    """On a network without a bend the two paths are the same; the bent one must still state the same again."""
    model, images = related(40)
    bent = nn.Sequential(model, nn.Softplus(beta=4)).eval()
    labels, change = torch.zeros(40, dtype=torch.long), torch.tensor([0, 0, 0.1]).view(1, 3, 1, 1)
    pairs = Pairs(images, images + change, labels, 1 - labels)
    first, again = (overlap(bent, pairs, seed=seed).scores for seed in (0, 1))
    changed = [name for name in first if not first[name].equals(again[name])]
    assert set(changed) <= {"relation", "relation_p", "relation_q"}
    stated = np.flatnonzero(first["relation"] == 1)
    assert len(stated) >= 8
    assert (again["relation"].to_numpy()[stated] == 1).mean() >= 0.8


def test_a_batch_in_another_order_has_the_same_relations() -> None:
    model, images = related(30)
    labels, change = torch.zeros(30, dtype=torch.long), torch.tensor([0, 0, 0.1]).view(1, 3, 1, 1)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    scores = overlap(model, Pairs(images, images + change, labels, 1 - labels)).scores
    mixed = overlap(model, Pairs(images[order], images[order] + change, labels, 1 - labels)).scores
    columns = ["relation", "relation_p", "relation_q", "effect_in_roi_p"]
    np.testing.assert_allclose(mixed[columns], scores[columns].iloc[order.tolist()], atol=1e-6)


def test_a_network_without_gradients_has_no_relation() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 2, 3)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = F.relu(self.convolution(images.detach())).mean((2, 3)).round(decimals=1)
            return logits

    model = Flat().eval()
    images = torch.rand(20, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros(20, dtype=torch.long)
    scores = overlap(model, Pairs(images, 1 - images, zero, 1 - zero)).scores
    assert not (scores["relation"].abs() == 1).any()


@pytest.mark.parametrize("name", list(NETWORKS))
def test_relations_are_computed_for_every_kind_of_network(name: str) -> None:
    model, images = NETWORKS[name]()
    many = torch.rand(60, *images.shape[1:], generator=torch.Generator().manual_seed(0))
    scores = overlap(model, attacked(model, many)).scores  # NaN where no class activation is positive
    defined = scores[scores["relation"].notna()]
    assert len(defined) >= 20
    both = (defined["relation_p"] <= 0.1) & (defined["relation_q"] <= 0.1)
    assert ((defined["relation"] != 0) == both).all()
    assert (defined["relation_p"] >= defined["effect_in_roi_p"]).all()
    more = defined["effect_in_roi"] > defined["effect_in_roi_null"]
    assert (more[defined["relation"] == 1]).all()
    assert not (more[defined["relation"] == -1]).any()
