"""The analysis of weak spots: what `explain` says of the smallest square, and when it says nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.vulnerability.test_square import Patch, gray
from weakspot import Linf, Pairs, attacks, explain
from weakspot.explanations.weakest_places import pair_budgets, square_finding


def pairs_of(model: Patch, images: Tensor, labels: Tensor, eps: float) -> Pairs:
    return attacks.pgd(model, images, labels, budget=Linf(eps), steps=3)


def test_each_state_of_an_image_has_its_own_scores() -> None:
    """Found, not found at the smaller budget, misclassified, and a pair without a change: one row of each."""
    model = Patch(4, 6, 5, 7.5 / 255, 128 / 255).eval()
    images = gray(4, (24, 20))
    labels = torch.tensor([0, 0, 1, 0])
    strong, weak = (pairs_of(model, images, labels, levels / 255).adversarial for levels in (8, 4))
    adversarial = torch.stack([strong[0], weak[1], images[2] + 4 / 255, images[3]])
    explanation = explain(model, Pairs(images, adversarial, labels, 1 - labels), analyses=["weak_spots"])
    scores = explanation.scores
    sentences = [square_finding(row) for _, row in scores.iterrows()]
    assert sentences[0] == (
        "A 5 x 5 square, 5.2% of the image, changed by at most 8/255, is enough to turn 'class 0' into 'class 1'."
    )
    assert sentences[1] is not None
    assert sentences[1].startswith("No square was found in which a change of at most 4/255")
    assert sentences[2] is not None
    assert sentences[2].startswith("No change is needed: the image is classified as 'class 0'")
    assert sentences[3] is None
    assert not any("robust" in str(sentence) for sentence in sentences)
    assert scores["smallest_square_class"].tolist() == ["class 1", "", "", ""]
    assert (255 * scores["smallest_square_budget"]).round(3).tolist() == [8, 4, 4, 0]
    assert scores["smallest_square_side"].tolist()[0] == 5
    assert all(math.isnan(side) for side in scores["smallest_square_side"][1:])
    assert (scores["smallest_square_top"][0], scores["smallest_square_left"][0]) == (4, 6)
    inside = explanation.maps["smallest_square"][:, 0]
    assert bool((inside[0, 4:9, 6:11] == 1).all())
    assert inside.flatten(1).sum(1).tolist() == [25, 0, 0, 0]
    assert float(explanation.maps["first_order"].max()) <= 1
    assert "smallest_square_side" in explanation.meanings


def test_the_page_draws_the_maps() -> None:
    model = Patch(4, 6, 5, 7.5 / 255, 128 / 255).eval()
    images, labels = gray(1, (24, 20)), torch.tensor([0])
    explanation = explain(model, pairs_of(model, images, labels, 8 / 255), analyses=["weak_spots"])
    page = explanation._repr_html_()
    assert "Smallest square found" in page


def test_budgets_are_the_largest_change_in_whole_levels_where_it_is_one() -> None:
    clean = torch.full((4, 1, 2, 2), 0.5)
    change = torch.tensor([8.0004 / 255, 0.3 / 255, 3.4 / 255, 0]).view(4, 1, 1, 1)
    pairs = Pairs(clean, clean + change, torch.zeros(4).long(), torch.ones(4).long())
    expected = torch.tensor([8, 1, 3.4, 0]).double() / 255
    torch.testing.assert_close(pair_budgets(pairs), expected, atol=1e-6, rtol=0)
    assert float(pair_budgets(pairs)[0]) == 8 / 255


def test_parts_of_a_batch_have_the_scores_of_the_whole() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 9 * 8, 3)).eval()
    images = torch.rand(3, 3, 9, 8)
    with torch.no_grad():
        labels = model(images).argmax(1)
    pairs = attacks.pgd(model, images, labels, budget=Linf(20 / 255), steps=3)
    whole = explain(model, pairs, analyses=["weak_spots"]).scores
    for number in range(3):
        part = explain(model, pairs[number], analyses=["weak_spots"]).scores
        names = [name for name in whole if str(name).startswith(("smallest_square", "weakest"))]
        assert len(names) == 7
        assert part[names].iloc[0].equals(whole[names].iloc[number])
