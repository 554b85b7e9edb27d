"""Restoration: causal sets flip the decision, and a planted one is found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.networks import PoolingNetwork
from weakspot import Linf, Pairs, attacks, explain, occlusion, overlap, restoration
from weakspot.report.map_views import map_views, worth_drawing


def test_sets_flip_the_decision_and_every_member_is_needed() -> None:
    torch.manual_seed(0)
    model = PoolingNetwork().eval()
    images = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        model.head.bias.sub_(model(images).mean(0))  # close calls, that an attack can turn
    labels = model(images).argmax(1)
    pairs = attacks.pgd(model, images, labels, budget=Linf(0.3), steps=20)
    assert bool(pairs.success.all())
    result = restoration(model, pairs, cell=4)
    with torch.no_grad():
        alone = model(torch.where(result.sufficient, pairs.adversarial, images)).argmax(1)
        without = model(torch.where(result.necessary, images, pairs.adversarial)).argmax(1)
    assert bool((alone != labels).all())
    assert bool((without == labels).all())
    for number in range(3):
        cells = result.sufficient[number, 0, ::4, ::4].nonzero()
        for row, column in cells.tolist():
            fewer = result.sufficient[number : number + 1].clone()
            fewer[0, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = False
            with torch.no_grad():
                left = model(torch.where(fewer, pairs.adversarial[number], images[number])).argmax(1)
            assert int(left) == int(labels[number])


@pytest.mark.parametrize("seed", range(4))
def test_sets_equal_those_of_the_plain_search(seed: int) -> None:
    """Cell by cell, each in a forward pass of its own, pass after pass until a pass puts no cell back."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.Tanh(), nn.Conv2d(8, 8, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(72, 3)
    ).eval()
    images = torch.rand(4, 3, 16, 16)
    pairs = attacks.pgd(model, images, model(images).argmax(1), budget=Linf(0.2), steps=8)
    result = restoration(model, pairs, cell=2)
    for number, (image, other, label) in enumerate(
        zip(pairs.clean, pairs.adversarial, pairs.labels.tolist(), strict=True)
    ):
        sufficient = plain_set(model, image, other, label, correct=False)
        necessary = plain_set(model, other, image, label, correct=True)
        assert torch.equal(result.sufficient[number, 0, ::2, ::2].flatten(), sufficient)
        assert torch.equal(result.necessary[number, 0, ::2, ::2].flatten(), necessary)


@torch.no_grad()
def plain_set(model: nn.Module, image: Tensor, other: Tensor, label: int, *, correct: bool) -> Tensor:
    """(64,) the cells of side 2 of the other image that make the decision `correct`, or false, in `image`."""
    groups = (torch.arange(16) // 2)[:, None] * 8 + torch.arange(16) // 2

    def margin(chosen: Tensor) -> float:
        logits = model(torch.where(chosen[groups], other, image)[None])[0].double()
        return float(logits[label] - logits[torch.arange(3) != label].max())

    nothing = torch.zeros(64, dtype=torch.bool)
    if (margin(nothing) >= 0) == correct or (margin(~nothing) >= 0) != correct:
        return nothing
    alone = torch.tensor([margin(torch.arange(64) == cell) for cell in range(64)])
    chosen = nothing.clone()
    # As many of the strongest as the first of 33 evenly spaced counts that flips the decision.
    order = alone.argsort(descending=correct, stable=True)
    for count in torch.linspace(0, 64, 33).round().long().tolist():
        chosen[order[:count]] = True
        if (margin(chosen) >= 0) == correct:
            break
    weakest_first, before = [cell for cell in order.flip(0).tolist() if chosen[cell]], None
    while before != (before := int(chosen.sum())):
        for cell in weakest_first:
            if chosen[cell]:
                chosen[cell] = False
                chosen[cell] = (margin(chosen) >= 0) != correct
    return chosen


class Threshold(nn.Module):
    """Class 0 while the weighted sum of the image is above a level."""

    def __init__(self, weight: torch.Tensor, level: float) -> None:
        super().__init__()
        self.weight, self.level = nn.Parameter(weight), level

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        score = torch.einsum("nchw,chw->n", images, self.weight) - self.level
        return torch.stack([score, -score], 1)


def test_one_planted_cell_is_sufficient_and_necessary() -> None:
    weight = torch.full((3, 12, 12), 0.1)
    weight[:, 4:8, 8:] = 5
    clean = torch.full((1, 3, 12, 12), 0.5)
    model = Threshold(weight, float((clean * weight).sum()) - 50).eval()
    adversarial = clean - 0.05
    adversarial[:, :, 4:8, 8:] = 0
    result = restoration(model, Pairs.of(model, clean, adversarial), cell=4)
    planted = torch.zeros(1, 1, 12, 12, dtype=torch.bool)
    planted[:, :, 4:8, 8:] = True
    assert torch.equal(result.sufficient, planted)
    assert torch.equal(result.necessary, planted)
    assert result.scores["necessary_fraction"][0] == pytest.approx(1 / 9)
    assert result.scores["deletion_auc"][0] > 0.9
    assert result.scores["insertion_auc"][0] > 0.9


def test_a_confined_attack_does_not_count_as_concentrated() -> None:
    """Linear: every changed cell takes the same, so the curves are straight however few cells were changed."""
    model = Threshold(torch.ones(3, 12, 12), 3 * 144 * 0.5 - 2).eval()
    clean = torch.full((2, 3, 12, 12), 0.5)
    adversarial = clean.clone()
    adversarial[0] -= 4 / 432
    adversarial[1, :, :4, :8] -= 4 / 96
    result = restoration(model, Pairs.of(model, clean, adversarial), cell=4)
    scores = result.scores
    assert scores["deletion_auc"].tolist() == pytest.approx([0.5, 0.5], abs=1e-3)
    assert scores["insertion_auc"].tolist() == pytest.approx([0.5, 0.5], abs=1e-3)
    assert scores["necessary_fraction"].tolist() == pytest.approx([5 / 9, 1 / 2])
    assert not bool((result.sufficient[1] & (adversarial[1] == clean[1]).all(0)).any())


def test_curves_run_from_one_image_to_the_other() -> None:
    torch.manual_seed(1)
    model = PoolingNetwork().eval()
    images = torch.rand(2, 3, 10, 13)
    labels = model(images).argmax(1)
    pairs = attacks.pgd(model, images, labels, budget=Linf(0.2), steps=5)
    result = restoration(model, pairs, cell=4)
    with torch.no_grad():
        ends = [model(x) for x in (pairs.adversarial, images)]
    margins = [
        z.gather(1, labels[:, None])[:, 0] - z.scatter(1, labels[:, None], -torch.inf).amax(1) for z in ends
    ]
    assert result.fraction[0].tolist() == pytest.approx([number / 12 for number in range(13)])
    torch.testing.assert_close(result.deletion[:, 0], margins[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(result.deletion[:, -1], margins[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(result.insertion[:, 0], margins[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(result.insertion[:, -1], margins[0], atol=1e-4, rtol=1e-4)


def test_an_attack_that_fails_has_no_causal_set() -> None:
    model = PoolingNetwork().eval()
    images = torch.rand(1, 3, 8, 8)
    labels = model(images).argmax(1)
    result = restoration(model, Pairs(images, images, labels, (labels + 1) % 4), cell=4)
    assert not bool(result.necessary.any() | result.sufficient.any())
    assert result.scores.isna().all(axis=None)


@pytest.mark.parametrize("labeled", ["as classified", "as another class"])
def test_the_page_says_why_an_attack_has_no_sets(labeled: str) -> None:
    model = PoolingNetwork().eval()
    images = torch.rand(1, 3, 16, 16)
    logits = model(images)
    labels = logits.argmax(1) if labeled == "as classified" else logits.argmin(1)
    pairs = Pairs.of(model, images, images + 1e-6, labels)
    views = map_views(explain(model, pairs, analyses=["restoration"]), 0)
    assert worth_drawing(views)[1]["causal_cells"] == (
        "“What is enough, what is needed” is the same everywhere: no set, because the attack did not succeed "
        "or the image was misclassified already."
    )


COLORS = {"gray": 0.5, "black": 0.0}


def test_occlusion_equals_covering_cells_one_by_one() -> None:
    torch.manual_seed(2)
    model = PoolingNetwork().eval()
    images, classes = torch.rand(2, 3, 11, 14), torch.tensor([2, 0])
    for fill in ("mean", "gray", "black"):
        result = occlusion(model, images, classes, cell=4, fill=fill)
        with torch.no_grad():
            for top in range(0, 11, 4):
                for left in range(0, 14, 4):
                    covered = images.clone()
                    color = (
                        images.mean((2, 3), keepdim=True) if fill == "mean" else torch.tensor(COLORS[fill])
                    )
                    covered[:, :, top : top + 4, left : left + 4] = color
                    fall = (model(images) - model(covered)).gather(1, classes[:, None])[:, 0]
                    torch.testing.assert_close(result[:, 0, top, left], fall, atol=2e-5, rtol=1e-3)
                    same = result[:, 0, top : top + 4, left : left + 4].flatten(1)
                    assert bool((same == same[:, :1]).all())


def test_overlap_takes_occlusion_as_importance() -> None:
    torch.manual_seed(3)
    model = PoolingNetwork().eval()
    images = torch.rand(2, 3, 28, 28)
    pairs = attacks.pgd(model, images, model(images).argmax(1), steps=3)
    result = overlap(model, pairs, importance="occlusion")
    torch.testing.assert_close(result.importance, occlusion(model, images, pairs.labels, cell=2))


def test_invalid_arguments_are_errors() -> None:
    model, images = PoolingNetwork().eval(), torch.rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"fill must .* got 'graay'"):
        occlusion(model, images, torch.tensor([0]), fill="graay")
    with pytest.raises(ValueError, match=r"^cell .*1\.5"):
        occlusion(model, images, torch.tensor([0]), cell=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cell must be an integer of at least 1, got -1"):
        restoration(model, Pairs(images, images, torch.tensor([0]), torch.tensor([1])), cell=-1)
